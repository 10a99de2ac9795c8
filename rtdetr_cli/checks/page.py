"""The report page of a dataset: its contents, the findings, and each finding drawn on its image."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.checks.doctor import Report
from rtdetr_cli.checks.duplicates import Member
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.records import Finding, Spot
from rtdetr_cli.files import write_text
from rtdetr_cli.images.decode import ImageError, open_image
from rtdetr_cli.images.draw import css_color
from rtdetr_cli.page import image_uri, render_page
from rtdetr_cli.text import counted, printable

MAX_FINDINGS = 3000
MAX_IMAGES = 500
"""With more, the page would not open on a phone; the page says what it leaves out."""

MAX_CLASSES = 200
MIN_FOLDED = 3
"""Findings of a minor code that are folded into one card."""

SAMPLES = 12
MAX_SAMPLE_BOXES = 300
SIDE_PX = 400
_HEATMAP_CELLS = 24
_PLOT_WH = (420.0, 160.0)

Images = dict[Member, dict[str, Any]]
"""(split, index) -> an image as the page shows it."""


def write_page(report: Report, path: Path) -> None:
    """Write the page of a report.

    Raises:
        RtdetrError: the file cannot be written.
    """
    page = render_page("validate.html", **page_context(report))
    write_text(path, page)


def page_context(report: Report) -> dict[str, Any]:
    """Return everything that the template shows."""
    chosen = _choose_findings(report)
    samples = _choose_samples(report)
    wanted = dict.fromkeys(samples)
    for finding in chosen:
        spot = finding.spot
        if spot.image >= 0 and len(wanted) < MAX_IMAGES:
            wanted[spot.member] = None
            if spot.other is not None:
                wanted[spot.other] = None
    images = _load_images(report, list(wanted))
    findings = [_finding(report, finding, images) for finding in chosen]
    on_page = Counter(f["code"] for f in findings)
    _fold_minor(report, findings)
    summary = report.summary()
    return {
        "title": f"{summary['name']}: dataset report",
        "dataset": summary,
        "counts": report.counts(),
        "imgsz": report.imgsz,
        "codes": [
            {**asdict(CODES[code]), "severity": same[0].severity, "count": len(same), "on_page": on_page[code]}
            for code, same in report.by_code().items()
        ],
        "classes": _classes(summary),
        "classes_left_out": max(0, summary["classes"] - MAX_CLASSES),
        "sizes": _size_histogram(report),
        "heatmap": _heatmap(report),
        "samples": [_sample(report, member, images[member]) for member in samples if member in images],
        "images": list(images.values()),
        "findings": findings,
        "findings_left_out": len(report.findings) - len(findings),
    }


# ---- what to show


def _choose_findings(report: Report) -> list[Finding]:
    """Return the findings to show: all of them, or as many of each code as fit."""
    by_code = report.by_code()
    chosen: dict[str, list[Finding]] = {}
    room = MAX_FINDINGS
    for done, code in enumerate(sorted(by_code, key=lambda code: len(by_code[code]))):
        chosen[code] = by_code[code][: room // (len(by_code) - done)]
        room -= len(chosen[code])
    return [finding for code in by_code for finding in chosen[code]]


def _fold_minor(report: Report, findings: list[dict[str, Any]]) -> None:
    """Hide repeated findings that cost nothing behind the first of their code, until the code is chosen."""
    for code, found in report.by_code().items():
        same = [finding for finding in findings if finding["code"] == code]
        if len(same) >= MIN_FOLDED and report.is_minor(code):
            same[0]["more"] = len(found) - 1
            for finding in same[1:]:
                finding["folded"] = True


def _choose_samples(report: Report) -> list[Member]:
    """Return images that show all classes, the rare ones first, and then some from the whole dataset."""
    raw = report.raw
    chosen: dict[Member, None] = {}
    for name in ("train", "val", "test"):
        split = raw.splits.get(name)
        if split is None or not len(split) or len(chosen) >= SAMPLES:
            continue
        counts = np.bincount(split.labels, minlength=len(raw.categories))
        for label in sorted(np.flatnonzero(counts).tolist(), key=lambda c: int(counts[c])):
            if len(chosen) >= SAMPLES - 4:
                break
            images = split.box_images[split.labels == label]
            chosen[name, int(images[len(images) // 2])] = None
        for image in np.linspace(0, len(split) - 1, SAMPLES).astype(int).tolist():
            if len(chosen) < SAMPLES and split.usable[image]:
                chosen.setdefault((name, image))
    return list(chosen)


# ---- images and findings


def _load_images(report: Report, members: list[Member]) -> Images:
    elsewhere = report.images_with("image-elsewhere")

    def load(member: Member) -> dict[str, Any] | None:
        name, index = member
        split = report.raw.splits[name]
        if not split.usable[index] or member in elsewhere:
            return None
        try:
            image = open_image(split.path(index), reduce_to=(SIDE_PX, SIDE_PX))
        except ImageError:
            return None
        width, height = split.sizes_wh[index].tolist()
        if not width or not height:
            width, height = image.size
        uri = image_uri(np.asarray(image), max_side=SIDE_PX, quality=72)
        return {"id": f"p-{name}-{index}", "uri": uri, "w": width, "h": height}

    with ThreadPoolExecutor() as pool:
        loaded = zip(members, pool.map(load, members), strict=True)
        return {member: image for member, image in loaded if image is not None}


def _finding(report: Report, finding: Finding, images: Images) -> dict[str, Any]:
    spot = finding.spot
    image = images.get(spot.member)
    other = images.get(spot.other) if spot.other is not None else None
    box = _drawable_box(spot, image) if image else None
    missing = ""
    if spot.image >= 0 and image is None:
        usable = report.raw.splits[spot.split].usable[spot.image]
        missing = f"not shown: the page is limited to {counted(MAX_IMAGES, 'image')}" if usable else "no image to show"
        if finding.code == "image-elsewhere":
            missing = "not shown: it is outside the dataset folder"
    ids = (("image", finding.image_id), ("annotation", finding.annotation_id))
    return {
        "code": finding.code,
        "severity": finding.severity,
        "message": finding.message,
        "file": finding.file,
        "line": finding.line,
        "ids": ", ".join(f"{kind} {value}" for kind, value in ids if value is not None),
        "view": _view(image, box) if image else None,
        "other": _view(other, None) if other else None,
        "box": box,
        "missing": missing,
        "folded": False,
        "more": 0,
    }


def _view(image: dict[str, Any], box: dict[str, float] | None) -> dict[str, Any]:
    """Return the visible area: the image, extended to a box outside it."""
    x1, y1, x2, y2 = 0.0, 0.0, float(image["w"]), float(image["h"])
    if box and (box["x"] < 0 or box["y"] < 0 or box["x"] + box["w"] > x2 or box["y"] + box["h"] > y2):
        margin = max(x2, y2) / 50  # so that the whole line is visible
        x1, y1 = min(x1, box["x"] - margin), min(y1, box["y"] - margin)
        x2, y2 = max(x2, box["x"] + box["w"] + margin), max(y2, box["y"] + box["h"] + margin)
    return {"id": image["id"], "x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}


def _drawable_box(spot: Spot, image: dict[str, Any]) -> dict[str, float] | None:
    """Return a finding's box with its corners in order, moved to within half an image of the image."""
    if spot.box is None or not np.isfinite(spot.box).all():
        return None
    width, height = image["w"], image["h"]
    x1, x2 = _drawable_range(spot.box[0], spot.box[2], width)
    y1, y2 = _drawable_range(spot.box[1], spot.box[3], height)
    return {
        "x": round(x1, 2),
        "y": round(y1, 2),
        # A box without extent would not be drawn at all.
        "w": round(max(x2 - x1, width / 400), 2),
        "h": round(max(y2 - y1, height / 400), 2),
        "cx": round((x1 + x2) / 2, 2),
        "cy": round((y1 + y2) / 2, 2),
        # A circle around a box that would be hard to see.
        "ring": round(width / 20, 2) if max(x2 - x1, y2 - y1) < width / 30 else 0,
    }


def _drawable_range(one: float, other: float, side: float) -> tuple[float, float]:
    """Return both ends in order, within half a side of the image; a range beyond that keeps its extent."""
    low, high = sorted((one, other))
    extent = min(high - low, side / 2)
    if low > 1.5 * side:
        return 1.5 * side - extent, 1.5 * side
    if high < -side / 2:
        return -side / 2, extent - side / 2
    return max(low, -side / 2), min(high, 1.5 * side)


def _sample(report: Report, member: Member, image: dict[str, Any]) -> dict[str, Any]:
    name, index = member
    split = report.raw.splits[name]
    rows = split.rows(index)
    labels = split.labels[rows].tolist()
    names = [c.name for c in report.raw.categories]
    boxes = [
        {
            "x": round(x1, 2),
            "y": round(y1, 2),
            "w": round(x2 - x1, 2),
            "h": round(y2 - y1, 2),
            "name": names[label],
            "color": css_color(label),
        }
        for (x1, y1, x2, y2), label in zip(split.boxes_xyxy_px[rows].tolist(), labels, strict=True)
    ]
    return {
        **image,
        "name": printable(split.file_names[index]),
        "split": name,
        "boxes": boxes[:MAX_SAMPLE_BOXES],
        "classes": [
            {"name": names[label], "count": count, "color": css_color(label)}
            for label, count in sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[:8]
        ],
    }


# ---- figures


def _classes(summary: dict[str, Any]) -> list[dict[str, Any]]:
    totals = [(sum(row["boxes"].values()), label, row) for label, row in enumerate(summary["per_class"])]
    totals.sort(key=lambda item: -item[0])
    most = max(totals[0][0], 1) if totals else 1
    return [
        {
            **row,
            "color": css_color(label),
            "bars": [(name, round(10 * count / most, 3)) for name, count in row["boxes"].items() if count],
        }
        for _, label, row in totals[:MAX_CLASSES]
    ]


def _normalized_boxes(report: Report) -> NDArray[np.float64]:
    """Return the boxes (N, 4) of all splits as fractions of their images, without crowds."""
    parts = [np.zeros((0, 4))]
    for split in report.raw.splits.values():
        sizes = split.sizes_wh[split.box_images].astype(np.float64)
        known = (sizes[:, 0] > 0) & ~split.crowd
        parts.append(split.boxes_xyxy_px[known] / np.tile(sizes[known], 2))
    return np.concatenate(parts)


def _size_histogram(report: Report) -> dict[str, Any]:
    """Return the histogram of box sizes at the network's input size, on a logarithmic axis."""
    boxes = _normalized_boxes(report)
    if not len(boxes):
        return {"bars": [], "ticks": [], "text": ""}
    height, width = report.imgsz
    sides = (boxes[:, 2:] - boxes[:, :2]) * np.asarray([width, height], np.float64)
    root = np.sqrt(np.prod(sides, axis=1))
    top = float(max(width, height))
    edges = np.geomspace(1, top, 41)
    counts, _ = np.histogram(np.clip(root, 1, top), edges)
    plot_width, plot_height = _PLOT_WH
    step = plot_width / len(counts)
    bars = [
        {
            "x": round(i * step + 0.5, 2),
            "y": round(plot_height - plot_height * count / counts.max(), 2),
            "w": round(step - 1, 2),
            "h": round(plot_height * count / counts.max(), 2),
            "color": "error" if edges[i + 1] <= 2 else "warning" if edges[i + 1] <= 8 else "accent",
            "title": f"{edges[i]:.0f} to {edges[i + 1]:.0f} px: {count:,}",
        }
        for i, count in enumerate(counts.tolist())
        if count
    ]
    ticks = [
        {"x": round(plot_width * float(np.log(value) / np.log(top)), 1), "text": str(value)}
        for value in (2**n for n in range(12))
        if value <= top
    ]
    smallest = sides.min(axis=1)
    text = (
        f"The median size is {np.median(root):.0f} px. {np.mean(smallest < 8):.1%} of the boxes have a side below "
        f"8 px, {np.mean(smallest < 2):.1%} below 2 px."
    )
    return {"bars": bars, "ticks": ticks, "text": text}


def _heatmap(report: Report) -> dict[str, Any]:
    """Return how often box centers fall into each cell of a grid over the image."""
    boxes = _normalized_boxes(report)
    centers = np.clip((boxes[:, :2] + boxes[:, 2:]) / 2 * _HEATMAP_CELLS, 0, _HEATMAP_CELLS - 1).astype(int)
    counts = np.zeros((_HEATMAP_CELLS, _HEATMAP_CELLS))
    np.add.at(counts, (centers[:, 1], centers[:, 0]), 1)
    opacity = np.sqrt(counts / (counts.max() or 1.0)).round(3)
    return {
        "side": _HEATMAP_CELLS,
        "cells": [{"x": int(x), "y": int(y), "opacity": float(opacity[y, x])} for y, x in np.argwhere(counts)],
    }

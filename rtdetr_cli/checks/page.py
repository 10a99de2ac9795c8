"""The page of an examined dataset: what it holds, what was found, and each finding on its image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.checks.doctor import Report
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.findings import Spot
from rtdetr_cli.datasets.raw import RawSplit
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.images.decode import ImageError, open_image
from rtdetr_cli.images.draw import class_color
from rtdetr_cli.page import image_uri, render_page
from rtdetr_cli.text import printable

MOST_FINDINGS = 3000
MOST_IMAGES = 500
"""Beyond these the page would not open on a phone; what is left out is said on the page."""

MOST_CLASSES = 200
SAMPLES = 12
MOST_SAMPLE_BOXES = 300
SIDE = 400
_HEAT = 24
_PLOT = (420.0, 160.0)


def write_page(report: Report, path: Path) -> None:
    """Write the page of a report.

    Raises:
        RtdetrError: the file cannot be written.
    """
    page = render_page("validate.html", **page_context(report))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RtdetrError(f"{path} cannot be written: {error.strerror or error}", code="output") from error


def page_context(report: Report) -> dict[str, Any]:
    """Return everything that the template shows."""
    chosen = _chosen_findings(report)
    samples = _chosen_samples(report)
    wanted = dict.fromkeys([(s, p) for s, p in samples])
    for i in chosen:
        spot = report.spots[i]
        if spot.image >= 0 and len(wanted) < MOST_IMAGES:
            wanted[spot.split, spot.image] = None
            if spot.other is not None:
                wanted[spot.other] = None
    images = _images(report, list(wanted))
    found = [_finding(report, i, images) for i in chosen]
    by_code = report.by_code()
    shown = {code: sum(f["code"] == code for f in found) for code in by_code}
    summary = report.summary()
    return {
        "title": f"{summary['name']}: dataset report",
        "dataset": summary,
        "counts": report.counts(),
        "imgsz": report.imgsz,
        "codes": [
            {
                "code": code,
                "severity": report.findings[positions[0]].severity,
                "title": CODES[code].title,
                "explanation": CODES[code].explanation,
                "hint": CODES[code].hint,
                "repair": CODES[code].repair,
                "count": len(positions),
                "shown": shown[code],
            }
            for code, positions in by_code.items()
        ],
        "classes": _classes(summary),
        "classes_left": max(0, summary["classes"] - MOST_CLASSES),
        "sizes": _sizes(report),
        "heat": _heat(report),
        "samples": [s for s in (_sample(report, split, p, images) for split, p in samples) if s],
        "images": list(images.values()),
        "findings": found,
        "findings_left": len(report.findings) - len(found),
    }


def css(label: int) -> str:
    """Return a class's colour."""
    red, green, blue = class_color(label)
    return f"#{red:02x}{green:02x}{blue:02x}"


# ---- which


def _chosen_findings(report: Report) -> list[int]:
    """Return the findings that are shown: all of them, or as many of each code as fit."""
    by_code = report.by_code()
    total = sum(len(p) for p in by_code.values())
    if total <= MOST_FINDINGS:
        return [i for positions in by_code.values() for i in positions]
    room, chosen = MOST_FINDINGS, []
    for left, (_, positions) in enumerate(sorted(by_code.items(), key=lambda item: len(item[1]))):
        share = min(len(positions), room // (len(by_code) - left))
        chosen.append(positions[:share])
        room -= share
    rank = {code: i for i, code in enumerate(by_code)}
    return sorted((i for part in chosen for i in part), key=lambda i: rank[report.findings[i].code])


def _chosen_samples(report: Report) -> list[tuple[str, int]]:
    """Return images that show the classes, the rare ones first, and then some from all over."""
    raw = report.raw
    chosen: dict[tuple[str, int], None] = {}
    for name in ("train", "val", "test"):
        split = raw.splits.get(name)
        if split is None or not len(split) or len(chosen) >= SAMPLES:
            continue
        counts = np.bincount(split.labels, minlength=len(raw.categories))
        for label in sorted(np.flatnonzero(counts).tolist(), key=lambda c: int(counts[c])):
            if len(chosen) >= SAMPLES - 4:
                break
            with_it = split.box_images[split.labels == label]
            chosen[name, int(with_it[len(with_it) // 2])] = None
        for position in np.linspace(0, len(split) - 1, SAMPLES).astype(int).tolist():
            if len(chosen) < SAMPLES and split.usable[position]:
                chosen.setdefault((name, position))
    return list(chosen)


# ---- images


def _images(report: Report, wanted: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    def read(member: tuple[str, int]) -> dict[str, Any] | None:
        name, index = member
        split = report.raw.splits[name]
        if not split.usable[index]:
            return None
        try:
            image = open_image(split.path(index), reduce_to=(SIDE, SIDE))
        except ImageError:
            return None
        width, height = split.sizes_wh[index].tolist()
        if not width or not height:
            width, height = image.size
        uri = image_uri(np.asarray(image), max_side=SIDE, quality=72)
        return {"id": f"p-{name}-{index}", "uri": uri, "w": width, "h": height}

    with ThreadPoolExecutor() as pool:
        found = dict(zip(wanted, pool.map(read, wanted), strict=True))
    return {member: image for member, image in found.items() if image is not None}


def _finding(report: Report, i: int, images: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    finding, spot = report.findings[i], report.spots[i]
    image = images.get((spot.split, spot.image))
    box = _drawn(spot, image) if image else None
    other = images.get(spot.other) if spot.other is not None else None
    ids = [
        f"{what} {value}"
        for what, value in (("image", finding.image_id), ("annotation", finding.annotation_id))
        if value is not None
    ]
    return {
        "code": finding.code,
        "severity": finding.severity,
        "message": finding.message,
        "file": finding.file,
        "line": finding.line,
        "ids": ", ".join(ids),
        "view": _view(image, box) if image else None,
        "other": _view(other, None) if other else None,
        "box": box,
        "no_view": "" if spot.image < 0 or image else _why_not(report, spot),
    }


def _why_not(report: Report, spot: Spot) -> str:
    if not report.raw.splits[spot.split].usable[spot.image]:
        return "no image to show"
    return f"not shown: the page holds {MOST_IMAGES} images"


def _view(image: dict[str, Any], box: dict[str, float] | None) -> dict[str, Any]:
    """Return what a frame shows: the image, and a box outside it where it is."""
    x1, y1, x2, y2 = 0.0, 0.0, float(image["w"]), float(image["h"])
    if box and (box["x"] < 0 or box["y"] < 0 or box["x"] + box["w"] > x2 or box["y"] + box["h"] > y2):
        rim = max(x2, y2) / 50  # so that the line itself is seen whole
        x1, y1 = min(x1, box["x"] - rim), min(y1, box["y"] - rim)
        x2, y2 = max(x2, box["x"] + box["w"] + rim), max(y2, box["y"] + box["h"] + rim)
    return {"id": image["id"], "x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}


def _drawn(spot: Spot, image: dict[str, Any]) -> dict[str, float] | None:
    """Return a finding's box as it can be drawn: corners in order, not further away than half an image."""
    if spot.box is None or not np.isfinite(spot.box).all():
        return None
    width, height = image["w"], image["h"]
    xs, ys = _reach(spot.box[0], spot.box[2], width), _reach(spot.box[1], spot.box[3], height)
    side = max(xs[1] - xs[0], ys[1] - ys[0])
    return {
        "x": round(xs[0], 2),
        "y": round(ys[0], 2),
        # A box without extent would not be drawn at all.
        "w": round(max(xs[1] - xs[0], width / 400), 2),
        "h": round(max(ys[1] - ys[0], height / 400), 2),
        "cx": round(sum(xs) / 2, 2),
        "cy": round(sum(ys) / 2, 2),
        "ring": round(width / 20, 2) if side < width / 30 else 0,
    }


def _reach(one: float, other: float, side: float) -> tuple[float, float]:
    """Return both ends in order, brought to within half a side of the image; what lies beyond keeps an extent."""
    low, high = sorted((one, other))
    extent = min(high - low, side / 2)
    if low > 1.5 * side:
        return 1.5 * side - extent, 1.5 * side
    if high < -side / 2:
        return -side / 2, extent - side / 2
    return max(low, -side / 2), min(high, 1.5 * side)


def _sample(
    report: Report, name: str, position: int, images: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, Any] | None:
    image = images.get((name, position))
    if image is None:
        return None
    split = report.raw.splits[name]
    low, high = np.searchsorted(split.box_images, [position, position + 1])
    labels = split.labels[low:high]
    names = [c.name for c in report.raw.categories]
    boxes = [
        {
            "x": round(x1, 2),
            "y": round(y1, 2),
            "w": round(x2 - x1, 2),
            "h": round(y2 - y1, 2),
            "name": names[label],
            "colour": css(label),
        }
        for (x1, y1, x2, y2), label in zip(
            split.boxes_xyxy_px[low:high][:MOST_SAMPLE_BOXES].tolist(), labels[:MOST_SAMPLE_BOXES].tolist(), strict=True
        )
    ]
    counts = np.bincount(labels) if len(labels) else np.zeros(0, int)
    return {
        **image,
        "name": printable(split.file_names[position]),
        "split": name,
        "boxes": boxes,
        "classes": [
            {"name": names[label], "count": int(counts[label]), "colour": css(label)}
            for label in np.argsort(-counts, kind="stable").tolist()[:8]
            if counts[label]
        ],
    }


# ---- figures


def _classes(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = summary["per_class"]
    most = max((sum(row["boxes"].values()) for row in rows), default=0) or 1
    ranked = sorted(enumerate(rows), key=lambda item: -sum(item[1]["boxes"].values()))[:MOST_CLASSES]
    return [
        {
            **row,
            "colour": css(label),
            "bars": [(name, round(10 * count / most, 3)) for name, count in row["boxes"].items() if count],
        }
        for label, row in ranked
    ]


def _shares(split: RawSplit) -> tuple[Any, Any]:
    sizes = split.sizes_wh[split.box_images].astype(np.float64)
    known = (sizes[:, 0] > 0) & ~split.crowd
    return split.boxes_xyxy_px[known] / np.tile(sizes[known], 2), known


def _sizes(report: Report) -> dict[str, Any]:
    """Return the histogram of box sizes at the network's scale, on a logarithmic axis."""
    shares = [_shares(split)[0] for split in report.raw.splits.values()]
    boxes = np.concatenate(shares) if shares else np.zeros((0, 4))
    if not len(boxes):
        return {"bars": [], "ticks": [], "said": ""}
    height, width = report.imgsz
    sides = (boxes[:, 2:] - boxes[:, :2]) * np.asarray([width, height], np.float64)
    root = np.sqrt(np.prod(sides, axis=1))
    top = float(max(width, height))
    edges = np.geomspace(1, top, 41)
    counts, _ = np.histogram(np.clip(root, 1, top), edges)
    wide, high = _PLOT
    step = wide / len(counts)
    bars = [
        {
            "x": round(i * step + 0.5, 2),
            "y": round(high - high * count / counts.max(), 2),
            "w": round(step - 1, 2),
            "h": round(high * count / counts.max(), 2),
            "tiny": 2 if edges[i + 1] <= 2 else 1 if edges[i + 1] <= 8 else 0,
            "title": f"{edges[i]:.0f} to {edges[i + 1]:.0f} px: {count:,}",
        }
        for i, count in enumerate(counts.tolist())
        if count
    ]
    ticks = [
        {"x": round(wide * float(np.log(value) / np.log(top)), 1), "text": str(value)}
        for value in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
        if value <= top
    ]
    smallest = sides.min(axis=1)
    said = (
        f"Half of the boxes are below {np.median(root):.0f} px; {np.mean(smallest < 8):.1%} have a side below 8 px, "
        f"{np.mean(smallest < 2):.1%} below 2 px."
    )
    return {"bars": bars, "ticks": ticks, "said": said}


def _heat(report: Report) -> dict[str, Any]:
    table = np.zeros((_HEAT, _HEAT))
    for split in report.raw.splits.values():
        boxes, _ = _shares(split)
        centres = np.clip((boxes[:, :2] + boxes[:, 2:]) / 2 * _HEAT, 0, _HEAT - 1).astype(int)
        np.add.at(table, (centres[:, 1], centres[:, 0]), 1)
    most = table.max() or 1.0
    return {
        "side": _HEAT,
        "cells": [
            {"x": int(x), "y": int(y), "share": round(float(np.sqrt(table[y, x] / most)), 3)}
            for y, x in zip(*np.nonzero(table), strict=True)
        ],
    }

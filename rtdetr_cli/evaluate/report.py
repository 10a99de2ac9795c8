"""The page of an evaluation: one file that opens anywhere, with every table, the curves, and the images themselves.

Boxes are drawn by the browser over the image and not into it: they stay sharp, can be filtered by kind of error
and class, and each image is in the file once although it is shown twice.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.evaluate.bootstrap import Interval
from rtdetr_cli.evaluate.coco import METRICS
from rtdetr_cli.evaluate.errors_analysis import (
    KINDS,
    MISSED,
    RIGHT,
    UNSEEN,
    ErrorAnalysis,
    Suspect,
)
from rtdetr_cli.evaluate.run import Evaluation
from rtdetr_cli.evaluate.thresholds import Calibration, score_curve
from rtdetr_cli.images.decode import ImageError, read_image
from rtdetr_cli.images.draw import colour
from rtdetr_cli.page import image_uri, render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_IMAGES = 60
MOST_SUSPECTS = 24
WORST = 24
EACH_KIND = 6
EACH_CLASS = 4
IMAGE_SIDE = 720  # pixels of an embedded image's longer side
CROP_SIDE = 260
MATRIX_CLASSES = 20
LETTER = 0.66  # width of a bold letter, in its height; ample, since the browser chooses the font
NAMED_CURVES = 10
LEGEND_LETTERS = 150  # that fit beside one another below the plots
ALL = "all classes"
GREY = "#888888"  # of axes and text in plots: readable on a light and on a dark page

MEANINGS = {
    "classification": "on a box, but of another class",
    "location": "on a box of its class, but not well enough (IoU 0.1 to 0.5)",
    "both": "near a box of another class, and not well",
    "duplicate": "on a box that a surer detection has taken",
    "background": "on nothing",
    "missed": "a box that nothing found",
}
SUSPECT_TITLES = {
    "no-box": "surely something, and no box",
    "other-class": "surely of another class",
    "never-found": "a box that nothing ever finds",
}


def write_page(
    path: Path,
    evaluation: Evaluation,
    analysis: ErrorAnalysis,
    *,
    model: str,
    interval: Interval | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the file; its folder is made.
        evaluation: the figures.
        analysis: the errors.
        model: what was judged, in words.
        interval: of AP.
        calibration: thresholds found in this run.
    """
    page = render_page(
        "eval.html", **page_context(evaluation, analysis, model=model, interval=interval, calibration=calibration)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def page_context(
    evaluation: Evaluation,
    analysis: ErrorAnalysis,
    *,
    model: str,
    interval: Interval | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Return everything that the template shows, as plain values."""
    dataset = evaluation.dataset
    images, unreadable = _images(analysis)
    suspects = _suspects(analysis)
    thresholds = calibration.thresholds if calibration else evaluation.thresholds
    at_thresholds = None
    if thresholds is not None:
        overall, classes = evaluation.at_thresholds(thresholds)
        at_thresholds = {
            "target": thresholds.target,
            "overall": thresholds.overall,
            "point": overall,
            "one": evaluation.at_one(thresholds.overall),
            "rows": list(zip(dataset.names, classes, strict=True)),
        }
    gains = analysis.gains
    most = max(gains.values(), default=0) if gains else 0
    return {
        "title": f"{dataset.name} {dataset.split}: evaluation",
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "model": model,
        "dataset": dataset,
        "images_count": len(dataset),
        "boxes_count": int(np.count_nonzero(~dataset.crowd)),
        "evaluator": evaluation.evaluator,
        "notes": [*evaluation.notes, *(calibration.notes if calibration else ())],
        "unreadable": evaluation.unreadable,
        "metric_names": METRICS,
        "metrics": evaluation.metrics,
        "interval": interval,
        "classes": [
            {**row, "colour": css_colour(label), "bar": round(100 * (row["AP"] or 0), 1)}
            for label, row in enumerate(evaluation.per_class)
        ],
        "sizes": evaluation.by_size,
        "best": evaluation.best,
        "at_thresholds": at_thresholds,
        "curves": curves_svg(evaluation) if len(evaluation.table) and evaluation.metrics["AP"] is not None else "",
        "named_curves": NAMED_CURVES,
        "unnamed_curves": max(0, sum(row["AP"] is not None for row in evaluation.per_class) - NAMED_CURVES),
        "origin": analysis.origin,
        "kinds": [
            {
                "kind": kind,
                "meaning": MEANINGS[kind],
                "count": analysis.counts[kind],
                "gain": None if gains is None else gains[kind],
                "bar": round(100 * gains[kind] / most, 1) if gains and most > 0 else 0,
            }
            for kind in KINDS
        ],
        "gains_known": gains is not None,
        "confusion": _confusion(analysis),
        "confused": _confused(analysis),
        "empty": analysis.empty,
        "suspects": suspects,
        "suspects_count": len(analysis.suspects),
        "suspects_note": analysis.suspects_note,
        "images": images,
        "images_lost": unreadable,
        "filter_kinds": [kind for kind in KINDS if any(kind in p["kinds"] for p in images)],
        "filter_classes": [
            {"label": label, "name": name, "colour": css_colour(label)}
            for label, name in enumerate(dataset.names)
            if any(label in p["classes"] for p in images)
        ],
    }


def css_colour(label: int) -> str:
    """Return the colour of a class for a style sheet: the one that it has on annotated images."""
    red, green, blue = colour(label)
    return f"#{red:02x}{green:02x}{blue:02x}"


# ----------------------------------------------------------------------------------------------------- curves


def curves_svg(evaluation: Evaluation) -> str:
    """Return precision over recall (IoU 0.5) and F1 over the score as one inline SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    dataset = evaluation.dataset
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rtdetr", "font.size": 9}):
        figure = Figure(figsize=(10, 4.3), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        left, right = figure.subplots(1, 2)
        present = [k for k, row in enumerate(evaluation.per_class) if row["AP"] is not None]
        # With many classes a legend of all is no legend: name the weakest, since they are what to look at.
        weakest = sorted(present, key=lambda k: evaluation.per_class[k]["AP"])[:NAMED_CURVES]
        named = present if len(present) <= NAMED_CURVES else weakest
        recall = np.linspace(0, 1, 101)
        precision = evaluation.coco.precision[0, :, :, 0, 2]
        for label in present:
            style: dict[str, Any] = (
                {"color": css_colour(label), "linewidth": 1.4, "label": _plain(dataset.names[label])}
                if label in named
                else {"color": GREY, "linewidth": 0.5, "alpha": 0.4}
            )
            left.plot(recall, np.maximum(precision[:, label], 0), **style)
            curve = score_curve(dataset, evaluation.table, evaluation.matches, label)
            right.plot(*_thinned(curve.scores, curve.f1), **style)
        left.plot(recall, np.maximum(precision[:, present], 0).mean(axis=1), color=GREY, linewidth=2.4, label=ALL)
        everything = score_curve(dataset, evaluation.table, evaluation.matches, None)
        right.plot(*_thinned(everything.scores, everything.f1), color=GREY, linewidth=2.4)
        best = evaluation.best.threshold
        if best is not None:
            right.axvline(best, color=GREY, linewidth=0.8, linestyle=":")
        _dress(left, "recall", "precision (IoU 0.5)")
        _dress(right, "score threshold", "F1")
        # Below both plots, which share their colours: inside, a weak model's curves would run through it.
        handles, labels = left.get_legend_handles_labels()
        widest = max(map(len, labels))
        columns = max(1, min(len(labels), 6, LEGEND_LETTERS // (widest + 8)))
        figure.legend(
            handles, labels, loc="outside lower center", frameon=False, fontsize=8, labelcolor=GREY, ncols=columns
        )
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _plain(name: str) -> str:
    """Return a class name as matplotlib will print it: a dollar sign would begin a formula, an underscore hides."""
    return name.replace("$", r"\$").removeprefix("_") or "(no name)"


def _thinned(scores: NDArray[np.float64], values: NDArray[np.float64], most: int = 400) -> tuple[Any, Any]:
    """Return at most `most` points of a curve, spread evenly over the scores: a page is no place for 100,000."""
    if len(scores) <= most:
        return scores, values
    wanted = np.linspace(scores[-1], scores[0], most)
    rows = np.unique(np.searchsorted(-scores, -wanted).clip(max=len(scores) - 1))
    return scores[rows], values[rows]


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.02))
    axes.set_facecolor("none")
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side in ("left", "bottom"))


# -------------------------------------------------------------------------------------------------- confusion


def _confusion(analysis: ErrorAnalysis) -> list[dict[str, Any]] | None:
    """Return the matrix's rows with a shade for each cell, or None: without hotcoco, or with too many classes."""
    matrix, names = analysis.confusion, analysis.evaluation.dataset.names
    if matrix is None or len(names) > MATRIX_CLASSES:
        return None
    rows = []
    for label, values in enumerate(matrix.tolist()):
        total = max(sum(values), 1)
        rows.append(
            {
                "name": names[label] if label < len(names) else "nothing",
                "cells": [
                    {"count": count, "share": round(count / total, 3), "right": column == label < len(names)}
                    for column, count in enumerate(values)
                ],
            }
        )
    return rows


def _confused(analysis: ErrorAnalysis, most: int = 12) -> list[tuple[str, str, int]]:
    """Return the commonest (annotated, found, count) among different classes."""
    if analysis.confusion is None:
        return []
    names = analysis.evaluation.dataset.names
    classes = analysis.confusion[:-1, :-1].copy()
    np.fill_diagonal(classes, 0)
    order = np.argsort(-classes, axis=None, kind="stable")[:most]
    found = [(int(i // len(names)), int(i % len(names))) for i in order.tolist()]
    return [(names[a], names[b], int(classes[a, b])) for a, b in found if classes[a, b]]


# --------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, slots=True)
class _Mark:
    """A box on an image of the page.

    Attributes:
        outcome: a kind of error, `right`, `near` or `crowd`.
        label: its class.
        errors: `kind:label` words by which the page's filters find it.
        text: beside the box.
        title: when pointed at.
        box: corners in pixels of the original.
    """

    outcome: str
    label: int
    errors: str
    text: str
    title: str
    box: NDArray[np.float64]

    def to_context(self) -> dict[str, Any]:
        """Return plain values."""
        x1, y1, x2, y2 = (float(v) for v in self.box)
        return {
            "outcome": self.outcome,
            "errors": self.errors,
            "text": self.text,
            "title": self.title,
            "x": round(x1, 1),
            "y": round(y1, 1),
            "w": round(max(x2 - x1, 0), 1),
            "h": round(max(y2 - y1, 0), 1),
        }


def place_texts(marks: Sequence[_Mark], size_wh: tuple[int, int], text_size: float) -> list[dict[str, Any]]:
    """Return the marks as plain values, each with a place for its text: where no other text lies.

    A text stands above its box, or below the upper edge, above the lower edge, or below the box, beginning where the
    box begins or ending where it ends. One for which no place is free, and that of a right box, is shown only when
    the box is pointed at: `label` is False.

    Args:
        marks: those drawn last, which are the surest, choose first.
        size_wh: of the image in pixels.
        text_size: height of a line in pixels.
    """
    width, height = size_wh
    taken = np.zeros((0, 4))
    shown: list[dict[str, Any]] = []
    for mark in reversed(marks):
        length = LETTER * text_size * len(mark.text)
        x1, y1, x2, y2 = (float(v) for v in mark.box)
        starts = [x1 + 2, min(x2, width) - 2 - length]
        lines = [y1 - 0.25 * text_size, y1 + text_size, y2 - 0.3 * text_size, y2 + text_size]
        places = np.array([(x, y - 0.95 * text_size, x + length, y + 0.25 * text_size) for y in lines for x in starts])
        inside = (places[:, 0] >= 0) & (places[:, 1] >= 0) & (places[:, 2] <= width) & (places[:, 3] <= height)
        free = inside & ~_overlaps(places, taken).any(axis=1)
        wanted = mark.outcome != "right"
        row = int(np.argmax(free)) if wanted and free.any() else int(np.argmax(inside)) if inside.any() else 0
        if wanted and free.any():
            taken = np.concatenate([taken, places[row : row + 1]])
        shown.append(
            {
                **mark.to_context(),
                "label": bool(wanted and free.any()),
                "text_x": round(float(places[row, 2 * (row % 2)]), 1),
                "text_y": round(float(np.clip(lines[row // 2], text_size, height)), 1),
                "anchor": "end" if row % 2 else "start",
            }
        )
    return shown[::-1]


def _overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (A, B) whether rectangles of corners lie on one another."""
    apart = (a[:, None, :2] >= b[None, :, 2:]) | (a[:, None, 2:] <= b[None, :, :2])
    together: NDArray[np.bool_] = ~np.any(apart, axis=2)
    return together


def choose_images(analysis: ErrorAnalysis) -> list[int]:
    """Return the images to show: the worst, then some for each kind of error and each class, then the rest."""
    table, dataset = analysis.evaluation.table, analysis.evaluation.dataset
    wrong = np.flatnonzero(analysis.kinds >= 0)
    wrong = wrong[np.argsort(-table.scores[wrong], kind="stable")]
    missed = np.flatnonzero(analysis.missed)
    images_of_boxes = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    chosen: dict[int, None] = {p.image: None for p in analysis.worst(WORST)}

    def some(images: NDArray[np.int64], most: int) -> None:
        for image in list(dict.fromkeys(images.tolist()))[:most]:
            chosen[image] = None

    for kind in range(len(KINDS)):
        some(table.image_index[wrong[analysis.kinds[wrong] == kind]], EACH_KIND)
    some(images_of_boxes[missed[~analysis.forgiven[missed]]], EACH_KIND)
    for label in range(len(dataset.categories)):
        some(table.image_index[wrong[table.labels[wrong] == label]], EACH_CLASS)
        some(images_of_boxes[missed[dataset.labels[missed] == label]], EACH_CLASS)
    for image in analysis.worst(MOST_IMAGES):
        chosen[image.image] = None
    return list(chosen)[:MOST_IMAGES]


def _images(analysis: ErrorAnalysis) -> tuple[list[dict[str, Any]], int]:
    """Return the images of the page with their boxes, and how many could not be read."""
    dataset = analysis.evaluation.dataset
    shown, lost = [], 0
    for index in choose_images(analysis):
        try:
            image = read_image(dataset.path(index))
        except ImageError:
            lost += 1
            continue
        truth, found = _truth_marks(analysis, index), _found_marks(analysis, index)
        figures = analysis.images[index]
        errors = [m for m in (*truth, *found) if m.outcome in KINDS]
        height, width = image.shape[:2]
        missed = {f"{m.outcome}:{m.label}" for m in truth if m.outcome in KINDS}
        text_size = round(max(9.0, (width * height) ** 0.5 / 30), 1)
        shown.append(
            {
                "id": index,
                "name": dataset.file_names[index],
                "uri": image_uri(image, max_side=IMAGE_SIDE),
                "width": width,
                "height": height,
                "text_size": text_size,
                "found": figures.found,
                "wrong": figures.wrong,
                "missed": figures.missed,
                "f1": figures.f1,
                "kinds": sorted({m.outcome for m in errors}),
                "classes": sorted({m.label for m in errors}),
                "pairs": " ".join(sorted({m.errors for m in found if m.outcome in KINDS} | missed)),
                "truth_marks": place_texts(truth, (width, height), text_size),
                "found_marks": place_texts(found, (width, height), text_size),
            }
        )
    return shown, lost


def _truth_marks(analysis: ErrorAnalysis, image: int) -> list[_Mark]:
    dataset, table = analysis.evaluation.dataset, analysis.evaluation.table
    start, stop = np.searchsorted(table.image_index, [image, image + 1])
    # The errors that are on a box: the filters show them and the box together.
    on_box: dict[int, list[str]] = {}
    for row in range(int(start), int(stop)):
        if analysis.kinds[row] >= 0:
            error = f"{KINDS[analysis.kinds[row]]}:{int(table.labels[row])}"
            on_box.setdefault(int(analysis.near_box[row]), []).append(error)
    marks = []
    for box in range(int(dataset.offsets[image]), int(dataset.offsets[image + 1])):
        label = int(dataset.labels[box])
        name = dataset.names[label]
        if dataset.crowd[box]:
            outcome, title = "crowd", f"{name}, a crowd: counts for nothing"
        elif analysis.missed[box] and not analysis.forgiven[box]:
            outcome, title = KINDS[MISSED], f"{name}: missed"
        elif analysis.missed[box]:
            outcome, title = "near", f"{name}: only found wrongly"
        else:
            outcome, title = "right", f"{name}: found"
        own = [f"{outcome}:{label}"] if outcome == KINDS[MISSED] else []
        errors = " ".join([*own, *on_box.get(box, [])])
        marks.append(_Mark(outcome, label, errors, name, title, dataset.boxes_xyxy_px[box]))
    return marks


def _found_marks(analysis: ErrorAnalysis, image: int) -> list[_Mark]:
    dataset, table = analysis.evaluation.dataset, analysis.evaluation.table
    start, stop = np.searchsorted(table.image_index, [image, image + 1])
    width, height = dataset.sizes_wh[image].tolist()
    marks = []
    # The surest are drawn last and lie on top.
    for row in range(int(stop) - 1, int(start) - 1, -1):
        kind = int(analysis.kinds[row])
        if kind == UNSEEN:
            continue
        label, score = int(table.labels[row]), float(table.scores[row])
        name = dataset.names[label]
        outcome = "right" if kind == RIGHT else KINDS[kind]
        title = f"{name} {score:.2f}: {outcome if kind == RIGHT else f'{outcome}, {MEANINGS[outcome]}'}"
        box = table.boxes_xyxy_px[row].clip(0, [width, height, width, height])
        marks.append(_Mark(outcome, label, f"{outcome}:{label}", f"{name} {score:.2f}", title, box))
    return marks


# --------------------------------------------------------------------------------------------------- suspects


def _suspects(analysis: ErrorAnalysis) -> list[dict[str, Any]]:
    """Return the suspected annotations to show, each with a piece of its image: some of every kind."""
    dataset = analysis.evaluation.dataset
    shown: list[dict[str, Any]] = []
    for suspect in _mixed(analysis.suspects):
        try:
            image = read_image(dataset.path(suspect.image))
        except ImageError:
            continue
        crop, (left, top) = _crop(image, suspect.box_xyxy_px)
        x1, y1, x2, y2 = suspect.box_xyxy_px
        names = dataset.names
        said = {
            "no-box": f"{names[suspect.label]}, score {suspect.score or 0:.2f}",
            "other-class": f"annotated {names[suspect.annotated or 0]}, found {names[suspect.label]} "
            f"{suspect.score or 0:.2f}",
            "never-found": names[suspect.label],
        }[suspect.kind]
        shown.append(
            {
                "kind": suspect.kind,
                "title": SUSPECT_TITLES[suspect.kind],
                "said": said,
                "name": dataset.file_names[suspect.image],
                "annotation_id": suspect.annotation_id,
                "uri": image_uri(crop, max_side=CROP_SIDE),
                "width": crop.shape[1],
                "height": crop.shape[0],
                "x": round(x1 - left, 1),
                "y": round(y1 - top, 1),
                "w": round(x2 - x1, 1),
                "h": round(y2 - y1, 1),
                "colour": css_colour(suspect.label),
            }
        )
        if len(shown) == MOST_SUSPECTS:
            break
    return shown


def _mixed(suspects: Sequence[Suspect]) -> list[Suspect]:
    """Return suspects of all kinds by turns, each kind's first ones first."""
    queues = [[s for s in suspects if s.kind == kind] for kind in SUSPECT_TITLES]
    longest = max((len(q) for q in queues), default=0)
    return [queue[place] for place in range(longest) for queue in queues if place < len(queue)]


def _crop(
    image: NDArray[np.uint8], box: tuple[float, float, float, float]
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Return the box with as much again around it, and where the piece begins."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = box
    room = max(0.6 * max(x2 - x1, y2 - y1), 16)
    left, top = int(np.clip(x1 - room, 0, width - 1)), int(np.clip(y1 - room, 0, height - 1))
    right, bottom = int(np.clip(x2 + room, left + 1, width)), int(np.clip(y2 + room, top + 1, height))
    return np.ascontiguousarray(image[top:bottom, left:right]), (left, top)

"""The HTML report of an evaluation: one file with every table, the curves, and the images themselves.

Boxes are drawn by the browser over the image, not into it: they stay sharp, can be filtered by kind of error and
class, and each image is in the file once although it is shown twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.boxes import intersection
from rtdetr_cli.evaluate.bootstrap import Interval
from rtdetr_cli.evaluate.coco import METRICS
from rtdetr_cli.evaluate.error_analysis import CORRECT, KINDS, MISSED_KIND, NOT_COUNTED, ErrorAnalysis
from rtdetr_cli.evaluate.matching import box_images
from rtdetr_cli.evaluate.run import Evaluation
from rtdetr_cli.evaluate.thresholds import ScoreCurve, score_curve
from rtdetr_cli.files import write_text
from rtdetr_cli.images.decode import ImageError, read_image
from rtdetr_cli.images.draw import css_color
from rtdetr_cli.page import figure_svg, image_uri, render_page
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import Thresholds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_IMAGES = 60
MAX_SUSPECTS = 24
WORST_IMAGES = 24
IMAGES_PER_KIND = 6
IMAGES_PER_CLASS = 4
IMAGE_SIDE = 720  # pixels of an embedded image's longer side
CROP_SIDE = 260
MATRIX_CLASSES = 20
MOST_CONFUSED = 12
LETTER_WIDTH = 0.66  # of a bold letter, relative to its height; ample, since the browser chooses the font
NAMED_CURVES = 10
LEGEND_LETTERS = 150  # that fit in one line below the plots
CURVE_POINTS = 400
GREY = "#888888"  # of axes and text in plots: readable on a light and on a dark page

SUSPECT_TITLES = {
    "no-box": "object without an annotation?",
    "other-class": "wrong class in the annotation?",
    "never-found": "annotation that is never detected",
}


def write_page(path: Path, analysis: ErrorAnalysis, **facts: Any) -> None:
    """Write the page; `facts` are keywords of `page_context`."""
    write_text(path, render_page("eval.html", **page_context(analysis, **facts)))


def page_context(
    analysis: ErrorAnalysis,
    *,
    model: str,
    interval: Interval | None = None,
    calibrated: Thresholds | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return everything that the template shows.

    `model` is a description, `calibrated` are thresholds found in this run, on which there are `notes`.
    """
    evaluation = analysis.evaluation
    dataset = evaluation.dataset
    images, images_unreadable = _images(analysis)
    thresholds = calibrated or evaluation.thresholds
    return {
        "counted": counted,
        "css_color": css_color,
        "title": f"Evaluation on {dataset.name} {dataset.split}",
        "created": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "model": model,
        "dataset": dataset,
        "evaluation": evaluation,
        "analysis": analysis,
        "notes": [*evaluation.notes, *notes],
        "metric_names": METRICS,
        "interval": interval,
        "thresholds": thresholds,
        "at_thresholds": evaluation.at_thresholds(thresholds) if thresholds else None,
        "curves": curves_svg(evaluation) if len(evaluation.table) and evaluation.metrics["AP"] is not None else "",
        "named_curves": NAMED_CURVES,
        "kinds": KINDS,
        "confusion": _confusion_rows(analysis),
        "confused": _most_confused(analysis),
        "suspects": _suspects(analysis),
        "images": images,
        "images_unreadable": images_unreadable,
        "filter_kinds": [kind for kind in KINDS if any(kind in image["kinds"] for image in images)],
        "filter_classes": sorted({label for image in images for label in image["classes"]}),
    }


# ----------------------------------------------------------------------------------------------------- curves


def curves_svg(evaluation: Evaluation) -> str:
    """Return precision over recall (IoU 0.5) and F1 over the score as one inline SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    dataset, per_class = evaluation.dataset, evaluation.per_class
    present = [label for label, row in enumerate(per_class) if row["AP"] is not None]
    named = sorted(present, key=lambda label: per_class[label]["AP"])[:NAMED_CURVES]  # a legend of all is too long
    recall, precision = np.linspace(0, 1, 101), np.maximum(evaluation.coco.precision[0, :, :, 0, 2], 0)
    with rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 4.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for label in present:
            style: dict[str, Any] = {"color": GREY, "linewidth": 0.5, "alpha": 0.4}
            if label in named:
                style = {"color": css_color(label), "linewidth": 1.4, "label": _plot_text(dataset.names[label])}
            left.plot(recall, precision[:, label], **style)
            _plot_f1(right, score_curve(evaluation.matches, label), **style)
        style = {"color": GREY, "linewidth": 2.4}
        left.plot(recall, precision[:, present].mean(axis=1), label="all classes", **style)
        _plot_f1(right, score_curve(evaluation.matches, None), **style)
        if evaluation.best.threshold is not None:
            right.axvline(evaluation.best.threshold, color=GREY, linewidth=0.8, linestyle=":")
        _style_axes(left, "recall", "precision (IoU 0.5)")
        _style_axes(right, "score threshold", "F1")
        # Below both plots, which share their colors: inside, curves of a weak model would run through the legend.
        handles, labels = left.get_legend_handles_labels()
        columns = max(1, min(len(labels), 6, LEGEND_LETTERS // (max(map(len, labels)) + 8)))
        figure.legend(
            handles, labels, loc="outside lower center", frameon=False, fontsize=8, labelcolor=GREY, ncols=columns
        )
        return figure_svg(figure, "rtdetr")


def _plot_text(name: str) -> str:
    """Escape a class name for matplotlib: a dollar sign starts a formula, a leading underscore hides a legend entry."""
    return name.replace("$", r"\$").removeprefix("_") or "(no name)"


def _plot_f1(axes: Axes, curve: ScoreCurve, **style: Any) -> None:
    """Plot F1 over the score with at most `CURVE_POINTS` points, spread evenly over the scores."""
    scores, f1 = curve.scores, curve.f1
    if len(scores) > CURVE_POINTS:
        wanted = np.linspace(scores[-1], scores[0], CURVE_POINTS)
        rows = np.unique(np.searchsorted(-scores, -wanted).clip(max=len(scores) - 1))
        scores, f1 = scores[rows], f1[rows]
    axes.plot(scores, f1, **style)


def _style_axes(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axes.tick_params(colors=GREY, labelcolor=GREY)
    axes.spines[:].set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------------------- confusion


def _confusion_rows(analysis: ErrorAnalysis) -> list[tuple[str, list[int]]] | None:
    """Return the name and counts of each row of the matrix, or None with too many classes."""
    names = [*analysis.evaluation.dataset.names, "nothing"]
    if len(names) > MATRIX_CLASSES + 1:
        return None
    return list(zip(names, analysis.confusion.tolist(), strict=True))


def _most_confused(analysis: ErrorAnalysis) -> list[tuple[str, str, int]]:
    """Return the commonest (annotated, detected, count) of different classes."""
    names = analysis.evaluation.dataset.names
    matrix = analysis.confusion[:-1, :-1].copy()
    np.fill_diagonal(matrix, 0)
    commonest = np.argsort(-matrix, axis=None, kind="stable")[:MOST_CONFUSED].tolist()
    pairs = [divmod(position, len(names)) for position in commonest]
    return [(names[a], names[b], int(matrix[a, b])) for a, b in pairs if matrix[a, b]]


# --------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, slots=True)
class Mark:
    """A box on an image of the page.

    The `outcome` is a kind of error, `correct`, `misdetected` or `crowd`; by `errors`, words `kind:label`, the page's
    filters find it. The `text` is written at the box, the `title` is shown when the box is pointed at.
    """

    outcome: str
    label: int
    errors: str
    text: str
    title: str
    box: NDArray[np.float64]


def place_texts(marks: Sequence[Mark], size_wh: tuple[int, int], text_size: float) -> list[dict[str, Any]]:
    """Return each mark with its rectangle and a position for its text that covers no other text.

    A text goes above its box, below the upper edge, above the lower edge, or below the box, and starts where the box
    starts or ends where it ends. Without a free position it is not `visible`, like that of a correct box: it appears
    only when the box is pointed at. Marks drawn last, which have the highest scores, choose first.
    """
    width, height = size_wh
    taken = np.zeros((0, 4))
    placed: list[dict[str, Any]] = []
    for mark in reversed(marks):
        x1, y1, x2, y2 = (float(v) for v in mark.box)
        length = LETTER_WIDTH * text_size * len(mark.text)
        lines = (y1 - 0.25 * text_size, y1 + text_size, y2 - 0.3 * text_size, y2 + text_size)
        starts = (x1 + 2, min(x2, width) - 2 - length)
        places = np.array([(x, y - 0.95 * text_size, x + length, y + 0.25 * text_size) for y in lines for x in starts])
        inside = (places[:, :2] >= 0).all(1) & (places[:, 2] <= width) & (places[:, 3] <= height)
        free = inside & ~(intersection(places[:, None], taken) > 0).any(axis=1)
        visible = mark.outcome != "correct" and bool(free.any())
        row = int(np.argmax(free if visible else inside))
        if visible:
            taken = np.concatenate([taken, places[row : row + 1]])
        at_end = row % 2 == 1
        placed.append(
            {
                "mark": mark,
                **_rectangle(x1, y1, x2, y2),
                "visible": visible,
                "text_x": round(float(places[row, 2 if at_end else 0]), 1),
                "text_y": round(float(np.clip(lines[row // 2], text_size, height)), 1),
                "anchor": "end" if at_end else "start",
            }
        )
    return placed[::-1]


def _rectangle(x1: float, y1: float, x2: float, y2: float) -> dict[str, float]:
    return {"x": round(x1, 1), "y": round(y1, 1), "w": round(max(x2 - x1, 0), 1), "h": round(max(y2 - y1, 0), 1)}


def choose_images(analysis: ErrorAnalysis) -> list[int]:
    """Return the images to show: the worst, then some for each kind of error and each class, then the rest."""
    table, dataset = analysis.evaluation.table, analysis.evaluation.dataset
    errors = np.flatnonzero(analysis.kinds >= 0)
    errors = errors[np.argsort(-table.scores[errors], kind="stable")]
    missed = np.flatnonzero(analysis.missed)
    error_image, missed_image = table.image_index[errors], box_images(dataset)[missed]

    chosen = [errors.image for errors in analysis.worst(WORST_IMAGES)]
    groups = [(error_image[analysis.kinds[errors] == kind], IMAGES_PER_KIND) for kind in range(len(KINDS))]
    groups.append((missed_image[~analysis.explained[missed]], IMAGES_PER_KIND))
    for label in range(len(dataset.categories)):
        groups.append((error_image[table.labels[errors] == label], IMAGES_PER_CLASS))
        groups.append((missed_image[dataset.labels[missed] == label], IMAGES_PER_CLASS))
    for images, limit in groups:
        chosen += list(dict.fromkeys(images.tolist()))[:limit]
    chosen += [errors.image for errors in analysis.worst(MAX_IMAGES)]
    return list(dict.fromkeys(chosen))[:MAX_IMAGES]


def _images(analysis: ErrorAnalysis) -> tuple[list[dict[str, Any]], int]:
    """Return the images of the page with their boxes, and how many could not be read."""
    dataset = analysis.evaluation.dataset
    shown, unreadable = [], 0
    for index in choose_images(analysis):
        try:
            image = read_image(dataset.path(index))
        except ImageError:
            unreadable += 1
            continue
        truth, detections = _truth_marks(analysis, index), _detection_marks(analysis, index)
        errors = [mark for mark in (*truth, *detections) if mark.outcome in KINDS]
        height, width = image.shape[:2]
        text_size = round(max(9.0, (width * height) ** 0.5 / 30), 1)
        shown.append(
            {
                "id": index,
                "name": dataset.file_names[index],
                "uri": image_uri(image, max_side=IMAGE_SIDE),
                "width": width,
                "height": height,
                "text_size": text_size,
                "counts": analysis.images[index],
                "kinds": sorted({mark.outcome for mark in errors}),
                "classes": sorted({mark.label for mark in errors}),
                "errors": " ".join(sorted({f"{mark.outcome}:{mark.label}" for mark in errors})),
                "truth_marks": place_texts(truth, (width, height), text_size),
                "detection_marks": place_texts(detections, (width, height), text_size),
            }
        )
    return shown, unreadable


def _truth_marks(analysis: ErrorAnalysis, image: int) -> list[Mark]:
    dataset, table = analysis.evaluation.dataset, analysis.evaluation.table
    # The filters show an error together with the box that it is on.
    errors_on: dict[int, list[str]] = {}
    for row in np.flatnonzero((table.image_index == image) & (analysis.kinds >= 0)).tolist():
        error = f"{list(KINDS)[analysis.kinds[row]]}:{int(table.labels[row])}"
        errors_on.setdefault(int(analysis.related_box[row]), []).append(error)
    marks = []
    for box in range(int(dataset.offsets[image]), int(dataset.offsets[image + 1])):
        label = int(dataset.labels[box])
        name = dataset.names[label]
        errors = errors_on.get(box, [])
        if dataset.crowd[box]:
            outcome, title = "crowd", f"{name}: a crowd, which is ignored"
        elif not analysis.missed[box]:
            outcome, title = "correct", f"{name}: detected"
        elif analysis.explained[box]:
            outcome, title = "misdetected", f"{name}: detected with the wrong class or a badly fitting box"
        else:
            outcome, title = MISSED_KIND, f"{name}: missed"
            errors = [f"{MISSED_KIND}:{label}", *errors]
        marks.append(Mark(outcome, label, " ".join(errors), name, title, dataset.boxes_xyxy_px[box]))
    return marks


def _detection_marks(analysis: ErrorAnalysis, image: int) -> list[Mark]:
    dataset, table = analysis.evaluation.dataset, analysis.evaluation.table
    width, height = dataset.sizes_wh[image].tolist()
    rows = np.flatnonzero((table.image_index == image) & (analysis.kinds != NOT_COUNTED))
    marks = []
    for row in rows[::-1].tolist():  # the highest score is drawn last, on top
        label = int(table.labels[row])
        text = f"{dataset.names[label]} {table.scores[row]:.2f}"
        if analysis.kinds[row] == CORRECT:
            outcome, title = "correct", f"{text}: correct"
        else:
            outcome = list(KINDS)[analysis.kinds[row]]
            title = f"{text}: {outcome} error ({KINDS[outcome]})"
        box = table.boxes_xyxy_px[row].clip(0, [width, height, width, height])
        marks.append(Mark(outcome, label, f"{outcome}:{label}", text, title, box))
    return marks


# --------------------------------------------------------------------------------------------------- suspects


def _suspects(analysis: ErrorAnalysis) -> list[dict[str, Any]]:
    """Return the annotations that may be wrong, each with a crop of its image, all kinds in turn."""
    dataset = analysis.evaluation.dataset
    by_kind = [[s for s in analysis.suspects if s.kind == kind] for kind in SUSPECT_TITLES]
    crops: list[dict[str, Any]] = []
    for suspect in (s for turn in zip_longest(*by_kind) for s in turn if s is not None):
        try:
            image = read_image(dataset.path(suspect.image))
        except ImageError:
            continue
        x1, y1, x2, y2 = suspect.box_xyxy
        room = max(0.6 * max(x2 - x1, y2 - y1), 16)
        height, width = image.shape[:2]
        left, top = int(np.clip(x1 - room, 0, width - 1)), int(np.clip(y1 - room, 0, height - 1))
        right, bottom = int(np.clip(x2 + room, left + 1, width)), int(np.clip(y2 + room, top + 1, height))
        texts = [] if suspect.annotated is None else [f"annotated {dataset.names[suspect.annotated]}"]
        if suspect.score is not None:
            texts.append(f"detected {dataset.names[suspect.label]} {suspect.score:.2f}")
        crops.append(
            {
                "title": SUSPECT_TITLES[suspect.kind],
                "text": ", ".join(texts),
                "name": dataset.file_names[suspect.image],
                "annotation_id": suspect.annotation_id,
                "uri": image_uri(np.ascontiguousarray(image[top:bottom, left:right]), max_side=CROP_SIDE),
                "width": right - left,
                "height": bottom - top,
                **_rectangle(x1 - left, y1 - top, x2 - left, y2 - top),
                "colour": css_color(suspect.label),
            }
        )
        if len(crops) == MAX_SUSPECTS:
            break
    return crops

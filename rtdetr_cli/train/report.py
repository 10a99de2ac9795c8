"""The page of a run: one file that says what was done and why, how it went, and what came of it."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.images.draw import class_color
from rtdetr_cli.page import image_uri, render_page
from rtdetr_cli.train import plots
from rtdetr_cli.train.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rtdetr_cli.evaluate.run import Evaluation

REPORT = "report.html"
MOST_IMAGE_SIDE = 1800
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


@dataclass(frozen=True, slots=True)
class RunStory:
    """Everything that the page of a run tells.

    Attributes:
        folder: of the run.
        config: settings with where they came from.
        plan: what was planned, with reasons.
        rows: of `metrics.csv`.
        best_epoch: from 1.
        evaluation: of the model that was kept; None where there was none.
        data: what was learned from: name, images, classes and the like, by name.
        start: where the weights came from, in words.
        machine: what it ran on and how fast, by name.
        warnings: what was said along the way.
        ended: `done` or `patience`.
        explanation: of an `--overfit` that fell short.
    """

    folder: Path
    config: RunConfig
    plan: Plan
    rows: Sequence[Mapping[str, float | None]]
    best_epoch: int
    evaluation: Evaluation | None
    data: Mapping[str, str]
    start: str
    machine: Mapping[str, str]
    warnings: Sequence[str] = field(default=())
    ended: str = "done"
    explanation: str = ""


def write_report(
    story: RunStory,
    *,
    labels: Figure | None = None,
    batch: NDArray[np.uint8] | None = None,
    predictions: NDArray[np.uint8] | None = None,
) -> Path:
    """Write `report.html` into the run's folder.

    Args:
        story: what it tells.
        labels: of `plots.labels_figure`.
        batch: of `plots.batch_image`.
        predictions: of `plots.predictions_image`.
    """
    page = render_page("run.html", **page_context(story, labels=labels, batch=batch, predictions=predictions))
    path = story.folder / REPORT
    partial = path.with_name(f".{REPORT}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def page_context(
    story: RunStory,
    *,
    labels: Figure | None = None,
    batch: NDArray[np.uint8] | None = None,
    predictions: NDArray[np.uint8] | None = None,
) -> dict[str, Any]:
    """Return everything that the template shows, as plain values."""
    config, evaluation = story.config, story.evaluation
    best = next((row for row in story.rows if row.get("epoch") == story.best_epoch), {})
    metrics = dict(evaluation.metrics) if evaluation is not None else {name: best.get(name) for name in SHOWN}
    classes = [] if evaluation is None else evaluation.per_class
    settings = [(key, _words(value), config.source(key)) for key, value in flatten(config.settings).items()]
    for table in ("model", "optim"):
        settings += [
            (f"{table}.{key}", _words(value), config.source(f"{table}.{key}"))
            for key, value in flatten(getattr(config.preset, table)).items()
        ]
    return {
        "title": f"{story.folder.name}: {story.data.get('name', 'run')}",
        "name": story.folder.name,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "preset": config.preset.name,
        "data": dict(story.data),
        "start": story.start,
        "best_epoch": story.best_epoch,
        "epochs_made": len(story.rows),
        "epochs_planned": story.plan.epochs,
        "ended": story.ended,
        "explanation": story.explanation,
        "warnings": list(story.warnings),
        "notes": list(evaluation.notes) if evaluation is not None else [],
        "metric_names": SHOWN,
        "metrics": metrics,
        "classes": [
            {**row, "colour": _css(label), "bar": round(8 * (row["AP"] or 0), 2)} for label, row in enumerate(classes)
        ],
        "threshold": evaluation.best.threshold if evaluation is not None else None,
        "curves": figure_svg(plots.curves_figure(story.rows, best_epoch=story.best_epoch), "curves"),
        "labels": figure_svg(labels, "labels") if labels is not None else "",
        "batch": _uri(batch),
        "predictions": _uri(predictions),
        "choices": story.plan.choices,
        "given": [row for row in settings if config.given(row[0])],
        "settings": settings,
        "machine": dict(story.machine),
        "best_file": story.folder / "best.safetensors",
        "source": config.settings.data,
    }


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG for a page: no ground, and ink in the page's own colour, so that it suits the dark too.

    Args:
        figure: drawn with `plots.INK`.
        name: tells its marks' names from those of other figures of the page.
    """
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(plots.INK, "currentColor")


def _uri(image: NDArray[np.uint8] | None) -> str:
    return "" if image is None else image_uri(image, max_side=MOST_IMAGE_SIDE, quality=80)


def _css(label: int) -> str:
    red, green, blue = class_color(label)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "–"

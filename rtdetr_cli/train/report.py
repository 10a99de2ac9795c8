"""The HTML report of a run: one file that says what was done and why, how training went, and the result."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.evaluate.coco import METRICS
from rtdetr_cli.files import atomic_write
from rtdetr_cli.images.draw import css_color
from rtdetr_cli.page import image_uri, render_page
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train import plots
from rtdetr_cli.train.explain import Choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rtdetr_cli.evaluate.run import Evaluation

MAX_IMAGE_SIDE_PX = 1800
CARDS = METRICS[:9]  # AP by overlap and size, and AR by number of detections


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Everything that the report of a run shows.

    Attributes:
        folder: of the run.
        config: settings with where they came from.
        epochs: that were planned.
        choices: the plan with its reasons.
        best_epoch: from 1.
        evaluation: of the best model; None where there was none.
        data: name, images, classes and the like of the dataset, by name.
        start: where the weights came from, in words.
        machine: what it ran on and how fast, by name.
        warnings: of the whole run.
        reason: why it ended: `done` or `patience`.
        explanation: of an `--overfit` that fell short.
    """

    folder: RunFolder
    config: RunConfig
    epochs: int
    choices: Sequence[Choice]
    best_epoch: int
    evaluation: Evaluation | None
    data: Mapping[str, str]
    start: str
    machine: Mapping[str, str]
    warnings: Sequence[str] = ()
    reason: str = "done"
    explanation: str = ""


def write_report(
    facts: RunFacts,
    *,
    labels: Figure | None = None,
    batch: NDArray[np.uint8] | None = None,
    predictions: NDArray[np.uint8] | None = None,
) -> Path:
    """Write the report into the run's folder.

    Args:
        facts: what it shows.
        labels: from `plots.labels_figure`.
        batch: from `plots.batch_image`.
        predictions: from `plots.predictions_image`.
    """
    context = page_context(facts)
    context["labels"] = figure_svg(labels, "labels") if labels is not None else ""
    context["batch"], context["predictions"] = _data_uri(batch), _data_uri(predictions)
    with atomic_write(facts.folder.report) as partial:
        partial.write_text(render_page("run.html", **context), encoding="utf-8")
    return facts.folder.report


def page_context(facts: RunFacts) -> dict[str, Any]:
    """Return everything that the template shows besides the images, as plain values."""
    config, evaluation, rows = facts.config, facts.evaluation, facts.folder.metrics()
    if evaluation is not None:
        metrics = dict(evaluation.metrics)
    else:
        metrics = next((row for row in rows if row.get("epoch") == facts.best_epoch), {})
    classes = evaluation.per_class if evaluation is not None else []
    values = {
        **flatten(config.settings),
        **flatten(config.preset.model, "model."),
        **flatten(config.preset.optim, "optim."),
    }
    settings = [(key, _shown(value), config.source(key)) for key, value in values.items()]
    name = facts.folder.path.name
    return {
        "title": f"{name}: {facts.data.get('name', 'run')}",
        "name": name,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "preset": config.preset.name,
        "data": dict(facts.data),
        "start": facts.start,
        "best_epoch": facts.best_epoch,
        "epochs_made": len(rows),
        "epochs_planned": facts.epochs,
        "reason": facts.reason,
        "explanation": facts.explanation,
        "warnings": [*facts.warnings, *(evaluation.notes if evaluation is not None else ())],
        "metrics": {name: metrics.get(name) for name in CARDS},
        "classes": [
            {**row, "color": css_color(label), "bar": round(8 * (row["AP"] or 0), 2)}
            for label, row in enumerate(classes)
        ],
        "threshold": evaluation.best.threshold if evaluation is not None else None,
        "curves": figure_svg(plots.curves_figure(rows, best_epoch=facts.best_epoch), "curves"),
        "choices": facts.choices,
        "given": [row for row in settings if config.given(row[0])],
        "settings": settings,
        "machine": dict(facts.machine),
        "best_file": facts.folder.best,
        "source": config.settings.data,
    }


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG without a background and in the page's text colour, so that it suits dark pages too.

    Args:
        figure: drawn with `plots.INK`.
        name: makes the ids of its elements differ from those of other figures on the page.
    """
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(plots.INK, "currentColor")


def _data_uri(image: NDArray[np.uint8] | None) -> str:
    return "" if image is None else image_uri(image, max_side=MAX_IMAGE_SIDE_PX, quality=80)


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value) or "–"

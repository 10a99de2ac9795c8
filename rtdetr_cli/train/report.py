"""The HTML report of a run: one file that says what was done and why, how training went, and the result."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.evaluate.coco import METRICS
from rtdetr_cli.files import write_text
from rtdetr_cli.images.draw import css_color
from rtdetr_cli.page import figure_svg, image_uri, render_page
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train import plots
from rtdetr_cli.train.explain import Choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rtdetr_cli.evaluate.run import Evaluation

FLAT = 1.02  # a val loss this close to its lowest value has not risen
CARDS = METRICS[:9]  # AP by overlap and size, and AR by number of detections


def write_report(
    folder: RunFolder,
    config: RunConfig,
    *,
    epochs: int,
    choices: Sequence[Choice],
    best_epoch: int,
    evaluation: Evaluation | None,
    data: Mapping[str, str],
    start: str,
    machine: Mapping[str, str],
    warnings: Sequence[str] = (),
    reason: str = "done",
    explanation: str = "",
    labels: Figure | None = None,
    batch: NDArray[np.uint8] | None = None,
    predictions: NDArray[np.uint8] | None = None,
) -> Path:
    """Write the report into the run's folder.

    `best_epoch` counts from 1; `evaluation` is that of the best model. `data` and `machine` are facts by name, `start`
    says where the weights came from, and `explanation` why an `--overfit` fell short. `reason`, why the run ended, is
    `done` or `patience`. `plots` draws `labels`, `batch` and `predictions`.
    """
    rows = folder.metrics()
    metrics = next((row for row in rows if row.get("epoch") == best_epoch), {})
    per_class: Sequence[Mapping[str, Any]] = ()
    if evaluation is not None:
        metrics, per_class, warnings = evaluation.metrics, evaluation.per_class, [*warnings, *evaluation.notes]
    settings = [(key, _format_setting(value), config.source(key)) for key, value in config.values().items()]
    page = render_page(
        "run.html",
        title=f"{folder.path.name}: {data.get('name', 'run')}",
        name=folder.path.name,
        created=time.strftime("%Y-%m-%d %H:%M"),
        config=config,
        data=data,
        start=start,
        best_epoch=best_epoch,
        epochs_trained=len(rows),
        epochs_planned=epochs,
        reason=reason,
        explanation=explanation,
        warnings=warnings,
        metrics={name: metrics.get(name) for name in CARDS},
        rescoring=evaluation.rescoring if evaluation is not None else "",
        classes=[{**row, "color": css_color(label)} for label, row in enumerate(per_class)],
        threshold=evaluation.best.threshold if evaluation is not None else None,
        val_loss=val_loss_note(rows),
        curves=figure_svg(plots.curves_figure(rows, best_epoch=best_epoch), "curves", ink=plots.INK),
        labels=figure_svg(labels, "labels", ink=plots.INK) if labels is not None else "",
        batch=_data_uri(batch),
        predictions=_data_uri(predictions),
        choices=choices,
        settings=settings,
        given=[row for row in settings if config.given(row[0])],
        machine=machine,
        best_file=folder.best,
    )
    write_text(folder.report, page)
    return folder.report


def val_loss_note(rows: Sequence[Mapping[str, float | None]]) -> str:
    """Return where the val loss in `metrics.csv` stopped improving; empty with fewer than three evaluated epochs."""
    columns = [[row.get(name) or math.nan for name in ("epoch", "train_loss", "val_loss")] for row in rows]
    known = [(int(epoch), train, val) for epoch, train, val in columns if math.isfinite(train + val)]
    if len(known) < 3:
        return ""
    best, last = min(known, key=lambda row: row[2]), known[-1]
    if last[2] <= FLAT * best[2]:
        losses = f"{last[2]:.2f}; training images {last[1]:.2f}"
        return f"Val loss did not rise until the end ({losses}): no sign of overfitting."
    text = f"Val loss stopped improving at epoch {best[0]} ({best[2]:.2f}, and {last[2]:.2f} at the end)"
    if last[1] >= best[1]:
        return f"{text}, and so did that of the training images ({best[1]:.2f} and {last[1]:.2f})."
    return (
        f"{text}, while that of the training images fell from {best[1]:.2f} to {last[1]:.2f}: the model overfits from "
        "there on."
    )


def _data_uri(image: NDArray[np.uint8] | None) -> str:
    return "" if image is None else image_uri(image, max_side=1800, quality=80)


def _format_setting(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        value = ", ".join(map(str, value))
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return "–" if value in (None, "") else str(value)

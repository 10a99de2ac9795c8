"""Write a run's log, plots, logger metrics and report. A failure in one of them never ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.images.decode import read_image
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.runs import PLOTS, RunFolder
from rtdetr_cli.train import plots
from rtdetr_cli.train.events import (
    CheckpointSaved,
    EpochDone,
    FirstBatch,
    MicroBatchReduced,
    RolledBack,
    StepDone,
    StepSkipped,
    TrainingDone,
    TrainingEvent,
)
from rtdetr_cli.train.loggers import Loggers
from rtdetr_cli.train.report import write_report
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.evaluator import explain_overfit
from rtdetr_cli.workflows.events import Notice
from rtdetr_cli.workflows.prepare import Prepared, versions

SLOW_LOADER_SHARE = 0.3  # of the time, spent waiting for images
MAX_WARNINGS = 20
# Curves are redrawn while the run goes on, but for no more than this share of its time.
DRAWING_SHARE = 0.02
FIRST_DRAWING_SECONDS = 20.0


class Recorder:
    """Records the events of the training loop in the main process of a run.

    Attributes:
        best: the evaluation of the best model so far, with its rescoring; None until this process has one.
        explanation: once training is done, why `--overfit` fell short; empty if it did not.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder) -> None:
        settings = prepared.config.settings
        self.explanation = ""
        self.warnings: list[str] = list(prepared.warnings)
        self._prepared, self._folder = prepared, folder
        # With --overfit the training set repeats a few images, which the val set has once.
        self._train_set = replace(prepared.val_set, split="train") if settings.overfit else prepared.train_set
        self.best: Evaluation | None = None
        self._slow_loader_reported = False
        self._seconds: list[float] = []
        self._loader_shares: list[float] = []
        self._memory = 0
        self._drawn_at = time.monotonic()
        self._drawing_seconds = 0.0
        given = {key: value for key, value in flatten(settings).items() if value is not None}
        self._loggers = Loggers(settings.log, folder.path, settings=given)
        self._notices = self._loggers.notices

    def record(self, event: TrainingEvent) -> list[Notice]:
        """Record one event; return notices for the user."""
        if line := log_line(event):
            problem = self._folder.log(line)
            self._notices += [problem] if problem else []
        self._loggers.write(event)
        match event:
            case FirstBatch():
                if not self._path(plots.LABELS).is_file():
                    self._draw(plots.LABELS, self._draw_labels)
                self._draw(plots.BATCH, lambda: self._draw_batch(event))
            case StepDone():
                self._memory = max(self._memory, event.memory_bytes)
            case EpochDone():
                self._record_epoch(event)
            case StepSkipped(scale_only=False) | MicroBatchReduced() | RolledBack():
                self._warn(line)
            case TrainingDone():
                self._finish(event)
        notices = [Notice(text) for text in self._notices]
        self._notices.clear()
        return notices

    def _record_epoch(self, event: EpochDone) -> None:
        self._seconds.append(event.seconds)
        self._loader_shares.append(event.loader_share)
        # The first epoch of a process waits for the loader to start.
        slow = event.loader_share > SLOW_LOADER_SHARE and len(self._seconds) > 1
        if slow and not self._slow_loader_reported:
            self._slow_loader_reported = True
            cached = self._prepared.config.settings.cache != "none"
            remedies = [] if cached else ["--cache ram"]
            remedies.append(f"more --workers than {self._prepared.workers}")
            if cached and self._prepared.plan.augmentation == "recipe":
                remedies.append("--aug light")
            text = f"training waits for images {event.loader_share:.0%} of the time; try {' or '.join(remedies)}"
            self._warn(text)
            self._notices.append(text)
        began = time.monotonic()
        if began - self._drawn_at > max(FIRST_DRAWING_SECONDS, self._drawing_seconds / DRAWING_SHARE):
            self._draw(plots.CURVES, lambda: self._draw_curves(event.best_epoch))
            self._drawn_at = time.monotonic()
            self._drawing_seconds = self._drawn_at - began

    def _finish(self, event: TrainingDone) -> None:
        if self._prepared.config.settings.overfit:
            self.explanation = explain_overfit(self._prepared, event.best_score)
        self._draw(plots.CURVES, lambda: self._draw_curves(event.best_epoch))
        self._draw("the report", lambda: self._write_report(event))
        images = [self._path(name) for name in (plots.LABELS, plots.BATCH, plots.CURVES, plots.PREDICTIONS)]
        self._loggers.finish(self.best.metrics if self.best is not None else {}, images)

    def _draw_labels(self) -> None:
        plots.save(plots.labels_figure(self._train_set, self._prepared.config.imgsz), self._path(plots.LABELS))

    def _draw_batch(self, event: FirstBatch) -> None:
        images, names = event.batch.images.numpy(), self._prepared.train_set.names
        boxes = [boxes.numpy() for boxes in event.batch.boxes_cxcywh]
        labels = [labels.numpy() for labels in event.batch.labels]
        plots.save(plots.batch_image(images, boxes, labels, names), self._path(plots.BATCH))

    def _draw_curves(self, best_epoch: int) -> None:
        figure = plots.curves_figure(self._folder.metrics(), best_epoch=best_epoch + 1)
        plots.save(figure, self._path(plots.CURVES))

    def _write_report(self, event: TrainingDone) -> None:
        prepared, batch = self._prepared, self._path(plots.BATCH)
        if self.best is None and self._folder.best.is_file():
            # The best epoch was trained by an earlier process, before the run was interrupted.
            model, header = load_model(self._folder.best)
            self.best = evaluate(TorchBackend(model, header, device=prepared.learner.device), prepared.val_set)
        predictions = None
        if self.best is not None:
            threshold = self.best.best.threshold
            predictions = plots.predictions_image(
                self.best.dataset, self.best.table, threshold=0.5 if threshold is None else threshold
            )
            plots.save(predictions, self._path(plots.PREDICTIONS))
        write_report(
            self._folder,
            prepared.config,
            epochs=prepared.plan.epochs,
            choices=prepared.choices,
            best_epoch=event.best_epoch + 1,
            evaluation=self.best,
            data={
                "name": prepared.splits.name,
                "training images": f"{len(self._train_set):,}",
                "val images": f"{len(prepared.val_set):,}",
                "classes": str(len(prepared.train_set.categories)),
            },
            start=prepared.start,
            machine=self._machine(),
            warnings=self.warnings,
            reason=event.reason,
            explanation=self.explanation,
            labels=plots.labels_figure(self._train_set, prepared.config.imgsz),
            batch=read_image(batch) if batch.is_file() else None,
            predictions=predictions,
        )

    def _machine(self) -> dict[str, str]:
        prepared, processes = self._prepared, self._prepared.processes
        facts = {
            "device": f"{prepared.learner.device}" + (f" x {processes.size}" if processes.distributed else ""),
            "precision": f"{prepared.precision.name} ({prepared.precision.reason})",
            "parameters": f"{sum(p.numel() for p in prepared.learner.model.parameters()):,}",
            "peak memory": f"{self._memory / 2**30:.1f} GiB",
            "loader processes": str(prepared.workers),
        }
        if self._seconds:
            facts["seconds per epoch"] = f"{float(np.median(self._seconds)):.1f}"
            facts["waiting for images"] = f"{float(np.median(self._loader_shares)):.0%} of the time"
        version_facts = versions(processes)
        return facts | {"processor": version_facts.pop("device")} | version_facts

    def _draw(self, name: str, draw: Callable[[], object]) -> None:
        """Draw, unless `plots=false`; a plot that fails is no reason to lose a run."""
        try:
            if self._prepared.config.settings.plots:
                draw()
        except Exception as error:
            self._notices.append(f"could not draw {name}: {type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def _path(self, name: str) -> Path:
        return self._folder.path / PLOTS / name


def log_line(event: TrainingEvent) -> str:
    """Return the line of `train.log` for an event; empty for events that are not logged."""
    match event:
        case EpochDone():
            metrics = event.metrics or {}
            scores = "".join(f"  {k} {v:.4f}" for k in ("AP", "AP50") if (v := metrics.get(k)) is not None)
            return (
                f"epoch {event.epoch + 1}/{event.epochs}  step {event.step}  lr {event.lr:.3g}  "
                f"loss {event.loss:.4f}{scores}  {event.seconds:.1f} s  waited {event.loader_share:.0%}  "
                f"{event.memory_bytes / 2**30:.2f} GiB"
            )
        case StepSkipped():
            return (
                f"step {event.step} skipped: {event.term} not finite, {event.in_a_row} in a row, "
                f"images {', '.join(event.files)}"
            )
        case MicroBatchReduced():
            return f"step {event.step}: out of memory, micro-batch {event.micro_batch_before} -> {event.micro_batch}"
        case RolledBack():
            return f"step {event.step}: rolled back to step {event.to_step}, learning rate x {event.rate_scale:.3g}"
        case CheckpointSaved(reason="stop"):
            return f"stopped at epoch {event.epoch + 1}, step {event.step}; checkpoint saved"
        case TrainingDone():
            return f"finished ({event.reason}), best AP {event.best_score:.4f} at epoch {event.best_epoch + 1}"
        case _:
            return ""

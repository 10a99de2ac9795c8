"""What a run leaves for people: plots, loggers' points and the report. A failure in any of it never ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.runs import PLOTS, RunFolder
from rtdetr_cli.train import plots
from rtdetr_cli.train.events import (
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
from rtdetr_cli.train.report import RunFacts, write_report
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.events import Notice

if TYPE_CHECKING:
    from rtdetr_cli.workflows.evaluator import Evaluator
    from rtdetr_cli.workflows.prepare import Prepared

SLOW_LOADER_SHARE = 0.3  # of the time, spent waiting for images
MAX_WARNINGS = 20
# Curves are redrawn while the run goes on, but for no more than this share of its time.
DRAWING_SHARE = 0.02
FIRST_DRAWING_SECONDS = 20.0


class Recorder:
    """Writes plots, loggers' points and the report in the main process of a run.

    Args:
        prepared: the run.
        folder: where everything goes.
        evaluator: gives the evaluation of the best model.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, evaluator: Evaluator) -> None:
        settings = prepared.config.settings
        self.prepared = prepared
        # With --overfit the training set repeats a few images, which the val set has once.
        self.train_set = replace(prepared.val_set, split="train") if settings.overfit else prepared.train_set
        self.folder = folder
        self.evaluator = evaluator
        self.best: Evaluation | None = None
        self.warnings: list[str] = list(prepared.warnings)
        self._plots = settings.plots
        self._slow_loader_reported = False
        self._seconds: list[float] = []
        self._loader_shares: list[float] = []
        self._memory = 0
        self._drawn_at = time.monotonic()
        self._drawing_seconds = 0.0
        shown = {key: value for key, value in flatten(settings).items() if value is not None}
        self._loggers = Loggers(settings.log, folder.path, settings=shown)

    def begin(self) -> Iterator[Notice]:
        """Draw the training annotations."""
        if self._plots and not self._path(plots.LABELS).is_file():
            yield from self._draw(plots.LABELS, self._draw_labels)
        yield from self._notices()

    def record(self, event: TrainingEvent) -> Iterator[Notice]:
        """Record one event of the training loop."""
        self._loggers.write(event)
        match event:
            case FirstBatch() if self._plots:
                yield from self._draw(plots.BATCH, lambda: self._draw_batch(event))
            case StepDone():
                self._memory = max(self._memory, event.memory_bytes)
            case EpochDone():
                yield from self._record_epoch(event)
            case StepSkipped() if not event.skipped.scale_only:
                self._warn(f"step {event.step + 1} was skipped: {event.skipped.term} was not finite")
            case MicroBatchReduced():
                self._warn(
                    f"out of memory at step {event.step + 1}: micro-batch {event.micro_batch_before} -> "
                    f"{event.micro_batch}"
                )
            case RolledBack():
                self._warn(
                    f"rolled back from step {event.step} to {event.to_step}, learning rate x {event.rate_scale:.3g}"
                )
            case _:
                pass
        yield from self._notices()

    def finish(self, event: TrainingDone, explanation: str) -> Iterator[Notice]:
        """Draw the last plots, write the report, and close the loggers."""
        images = [self._path(name) for name in (plots.LABELS, plots.BATCH, plots.CURVES, plots.PREDICTIONS)]
        if self._plots:
            yield from self._draw(plots.CURVES, lambda: self._draw_curves(event.best_epoch))
            yield from self._draw("the report", lambda: self._write_report(event, explanation))
        self._loggers.finish(self.best.metrics if self.best is not None else {}, images)
        yield from self._notices()

    # ---- parts --------------------------------------------------------------------------------------------------

    def _record_epoch(self, event: EpochDone) -> Iterator[Notice]:
        self._seconds.append(event.seconds)
        self._loader_shares.append(event.loader_share)
        if event.improved:
            self.best = event.evaluation
        # The first epoch of a process waits for the loader to start.
        slow = event.loader_share > SLOW_LOADER_SHARE and len(self._seconds) > 1
        if slow and not self._slow_loader_reported:
            self._slow_loader_reported = True
            text = slow_loader_warning(self.prepared, event.loader_share)
            self._warn(text)
            yield Notice(text)
        due = max(FIRST_DRAWING_SECONDS, self._drawing_seconds / DRAWING_SHARE)
        if self._plots and time.monotonic() - self._drawn_at > due:
            began = time.monotonic()
            yield from self._draw(plots.CURVES, lambda: self._draw_curves(event.best_epoch))
            self._drawn_at = time.monotonic()
            self._drawing_seconds = self._drawn_at - began

    def _draw_labels(self) -> None:
        plots.save(plots.labels_figure(self.train_set, self.prepared.config.imgsz), self._path(plots.LABELS))

    def _draw_batch(self, event: FirstBatch) -> None:
        batch = event.batch
        image = plots.batch_image(
            batch.images.numpy(),
            [boxes.numpy() for boxes in batch.boxes_cxcywh],
            [labels.numpy() for labels in batch.labels],
            self.prepared.train_set.names,
        )
        plots.save(image, self._path(plots.BATCH))

    def _draw_curves(self, best_epoch: int) -> None:
        figure = plots.curves_figure(self.folder.metrics(), best_epoch=best_epoch + 1)
        plots.save(figure, self._path(plots.CURVES))

    def _write_report(self, event: TrainingDone, explanation: str) -> None:
        prepared = self.prepared
        if self.best is None and self.folder.best.is_file():
            # The best epoch was trained by an earlier process, before the run was interrupted.
            model, header = load_model(self.folder.best)
            self.best = evaluate(TorchBackend(model, header, device=prepared.learner.device), prepared.val_set)
        predictions: NDArray[np.uint8] | None = None
        if self.best is not None:
            threshold = self.best.best.threshold
            predictions = plots.predictions_image(
                self.best.dataset, self.best.table, threshold=0.5 if threshold is None else threshold
            )
            plots.save(predictions, self._path(plots.PREDICTIONS))
        facts = RunFacts(
            folder=self.folder,
            config=prepared.config,
            epochs=prepared.plan.epochs,
            choices=prepared.choices,
            best_epoch=event.best_epoch + 1,
            evaluation=self.best,
            data={
                "name": prepared.splits.name,
                "training images": f"{len(self.train_set):,}",
                "val images": f"{len(prepared.val_set):,}",
                "classes": str(len(prepared.train_set.categories)),
            },
            start=prepared.start,
            machine=self._machine(),
            warnings=self.warnings,
            reason=event.reason,
            explanation=explanation,
        )
        write_report(
            facts,
            labels=plots.labels_figure(self.train_set, prepared.config.imgsz),
            batch=plots.read(self._path(plots.BATCH)),
            predictions=predictions,
        )

    def _machine(self) -> dict[str, str]:
        from rtdetr_cli.workflows.prepare import versions

        prepared, processes = self.prepared, self.prepared.processes
        facts = {
            "device": f"{prepared.learner.device}" + (f" x {processes.size}" if processes.distributed else ""),
            "precision": f"{prepared.precision} ({prepared.precision_reason})",
            "parameters": f"{sum(p.numel() for p in prepared.learner.model.parameters()):,}",
            "peak memory": f"{self._memory / 1e9:.1f} GB",
            "loader processes": str(prepared.workers),
        }
        if self._seconds:
            facts["seconds per epoch"] = f"{float(np.median(self._seconds)):.1f}"
            facts["waiting for images"] = f"{float(np.median(self._loader_shares)):.0%} of the time"
        version_facts = versions(processes)
        return facts | {"processor": version_facts.pop("device")} | version_facts

    def _draw(self, name: str, draw: Callable[[], object]) -> Iterator[Notice]:
        """Draw, and give a notice if that fails: a plot is no reason to lose a run."""
        try:
            draw()
        except Exception as error:
            yield Notice(f"could not draw {name}: {type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def _notices(self) -> Iterator[Notice]:
        while self._loggers.notices:
            yield Notice(self._loggers.notices.pop(0))

    def _path(self, name: str) -> Path:
        return self.folder.path / PLOTS / name


def slow_loader_warning(prepared: Prepared, share: float) -> str:
    """Say that the network waits for images, and what helps."""
    cached = prepared.config.settings.cache != "none"
    remedies = [] if cached else ["--cache ram"]
    remedies.append(f"more --workers than {prepared.workers}")
    if cached and prepared.plan.augmentation == "recipe":
        remedies.append("--aug light")
    return f"training waits for images {share:.0%} of the time; try {' or '.join(remedies)}"

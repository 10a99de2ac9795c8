"""What a run leaves for people: images, loggers' points and the page; none of it can end the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.runs import RunFolder
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
from rtdetr_cli.train.report import RunStory, write_report
from rtdetr_cli.weights.load import load_model

if TYPE_CHECKING:
    from rtdetr_cli.workflows.evaluator import Evaluator
    from rtdetr_cli.workflows.prepare import Prepared

LOADER_BOUND = 0.3  # of the time spent waiting for images
MOST_WARNINGS = 20
# Curves are drawn again while the run goes on, but never for more than this share of its time.
SHARE_OF_TIME = 0.02
FIRST_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should know and that changes nothing."""

    text: str


class Recorder:
    """Listens to the first process of a run.

    Args:
        prepared: the run.
        folder: where everything goes.
        evaluator: gives the evaluation of the model that was kept.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, evaluator: Evaluator) -> None:
        self.prepared = prepared
        # An --overfit trains on its few images many times over, and measures on them once.
        overfit = prepared.config.settings.overfit
        self.train_set = replace(prepared.val_set, split="train") if overfit else prepared.train_set
        self.folder = folder
        self.evaluator = evaluator
        self.best: Evaluation | None = None
        self.warnings: list[str] = list(prepared.warnings)
        self._plots = prepared.config.settings.plots
        self._told_loader_bound = False
        self._seconds: list[float] = []
        self._waited: list[float] = []
        self._memory = 0
        self._drawn_at = time.monotonic()
        self._drawing_took = 0.0
        self._loggers = Loggers(prepared.config.settings.log, folder.path, settings=_settings(prepared))

    def begin(self) -> Iterator[Notice]:
        """Draw what the run learns from."""
        if self._plots and not (self._path(plots.LABELS)).is_file():
            yield from self._drawing(
                plots.LABELS,
                lambda: plots.save(
                    plots.labels_figure(self.train_set, self.prepared.config.imgsz), self._path(plots.LABELS)
                ),
            )
        yield from self._notices()

    def take(self, report: TrainingEvent) -> Iterator[Notice]:
        """Record one report of the loop."""
        self._loggers.write(report)
        match report:
            case FirstBatch():
                if self._plots:
                    yield from self._drawing(plots.BATCH, lambda: self._draw_batch(report))
            case StepDone():
                self._memory = max(self._memory, report.memory_bytes)
            case EpochDone():
                yield from self._epoch(report)
            case StepSkipped() if not report.skipped.scale_only:
                self._warn(f"step {report.step + 1} was skipped: {report.skipped.term} was not finite")
            case MicroBatchReduced():
                self._warn(
                    f"out of memory at step {report.step + 1}: the micro-batch went from {report.micro_batch_before} "
                    f"to {report.micro_batch}"
                )
            case RolledBack():
                self._warn(
                    f"went back from step {report.step} to {report.to_step}, with {report.rate_scale:.3g} of the rate"
                )
            case _:
                pass
        yield from self._notices()

    def finish(self, report: TrainingDone, explanation: str) -> Iterator[Notice]:
        """Draw the last images, write the page, and close the loggers."""
        images = [self._path(name) for name in (plots.LABELS, plots.BATCH, plots.CURVES, plots.PREDICTIONS)]
        if self._plots:
            yield from self._drawing(plots.CURVES, lambda: self._draw_curves(report.best_epoch))
            yield from self._drawing("the report", lambda: self._write_page(report, explanation))
        self._loggers.finish(self.best.metrics if self.best is not None else {}, images)
        yield from self._notices()

    # ---- parts --------------------------------------------------------------------------------------------------

    def _epoch(self, report: EpochDone) -> Iterator[Notice]:
        self._seconds.append(report.seconds)
        self._waited.append(report.loader_share)
        if report.improved:
            self.best = self.evaluator.last
        # The first epoch of a process waits for the loader to start.
        if report.loader_share > LOADER_BOUND and len(self._seconds) > 1 and not self._told_loader_bound:
            self._told_loader_bound = True
            text = loader_bound(self.prepared, report.loader_share)
            self._warn(text)
            yield Notice(text)
        due = max(FIRST_SECONDS, self._drawing_took / SHARE_OF_TIME)
        if self._plots and time.monotonic() - self._drawn_at > due:
            began = time.monotonic()
            yield from self._drawing(plots.CURVES, lambda: self._draw_curves(report.best_epoch))
            self._drawn_at = time.monotonic()
            self._drawing_took = self._drawn_at - began

    def _draw_batch(self, report: FirstBatch) -> None:
        batch = report.batch
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

    def _write_page(self, report: TrainingDone, explanation: str) -> None:
        prepared = self.prepared
        if self.best is None and self.folder.best.is_file():
            # The best epoch was another process's, before the run was interrupted.
            model, header = load_model(self.folder.best)
            self.best = evaluate(TorchBackend(model, header, device=prepared.learner.device), prepared.val_set)
        predictions: NDArray[np.uint8] | None = None
        if self.best is not None:
            threshold = self.best.best.threshold
            predictions = plots.predictions_image(
                self.best.dataset, self.best.table, threshold=0.5 if threshold is None else threshold
            )
            plots.save(predictions, self._path(plots.PREDICTIONS))
        story = RunStory(
            folder=self.folder.path,
            config=prepared.config,
            plan=prepared.plan,
            rows=self.folder.metrics(),
            best_epoch=report.best_epoch + 1,
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
            ended=report.reason,
            explanation=explanation,
        )
        write_report(
            story,
            labels=plots.labels_figure(self.train_set, prepared.config.imgsz),
            batch=plots.read(self._path(plots.BATCH)),
            predictions=predictions,
        )

    def _machine(self) -> dict[str, str]:
        from rtdetr_cli.workflows.prepare import versions

        prepared = self.prepared
        facts = {
            "device": f"{prepared.learner.device}"
            + (f" x {prepared.processes.size}" if prepared.processes.distributed else ""),
            "precision": f"{prepared.precision} ({prepared.precision_reason})",
            "parameters": f"{sum(p.numel() for p in prepared.learner.model.parameters()):,}",
            "memory, peak": f"{self._memory / 1e9:.1f} GB",
            "loader processes": str(prepared.workers),
        }
        if self._seconds:
            facts["seconds an epoch"] = f"{float(np.median(self._seconds)):.1f}"
            facts["waited for images"] = f"{float(np.median(self._waited)):.0%} of the time"
        named = {"device": "processor"}
        return facts | {named.get(key, key): value for key, value in versions(prepared.processes).items()}

    def _drawing(self, what: str, draw: Callable[[], object]) -> Iterator[Notice]:
        """Draw, and say so when it does not work: an image is no reason to lose a run."""
        try:
            draw()
        except Exception as error:
            yield Notice(f"{what} could not be drawn: {type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        if len(self.warnings) < MOST_WARNINGS:
            self.warnings.append(text)

    def _notices(self) -> Iterator[Notice]:
        while self._loggers.notices:
            yield Notice(self._loggers.notices.pop(0))

    def _path(self, name: str) -> Path:
        return self.folder.path / plots.FOLDER / name


def loader_bound(prepared: Prepared, share: float) -> str:
    """Say that the network waits for images, and what helps here."""
    cached = prepared.config.settings.cache != "none"
    cores = prepared.workers
    remedies = [] if cached else ["--cache ram"]
    remedies.append(f"more --workers than {cores}")
    if prepared.plan.augmentation == "recipe" and cached:
        remedies.append("--aug light")
    return f"{share:.0%} of the time goes into waiting for images: {' or '.join(remedies)}"


def _settings(prepared: Prepared) -> dict[str, object]:
    return {key: value for key, value in flatten(prepared.config.settings).items() if value is not None}

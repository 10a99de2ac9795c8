"""The training loop: set up, then for each epoch run the steps, evaluate and save.

Batches depend on (seed, epoch, index) only, the denoising noise and the scale of a step on (seed, step) only. So the
position in the run, the tensors and the optimizer's moments are all that a checkpoint needs for a killed run to
continue bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rtdetr_cli.batches.loader import Batch, TrainLoader
from rtdetr_cli.config.settings import RunSettings
from rtdetr_cli.datasets.records import FlatStrings
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.evaluate.coco import METRICS
from rtdetr_cli.evaluate.run import Evaluation
from rtdetr_cli.runs import METRICS as METRICS_FILE
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train import memory
from rtdetr_cli.train.checkpoint import explain_write_failure, require_room, run_bytes
from rtdetr_cli.train.events import (
    SAMPLE_LOSSES,
    EpochDone,
    EvaluationStarted,
    FirstBatch,
    StepDone,
    StepSkipped,
    TrainingDone,
    TrainingEvent,
)
from rtdetr_cli.train.guard import NonFiniteGuard
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.train.processes import GlobalBatch
from rtdetr_cli.train.state import Checkpoints, Learner, Progress
from rtdetr_cli.train.step import accumulate_with_retry, draw_group, draw_size
from rtdetr_cli.train.stop import EvaluationStopped, Interrupted, StopFlag

Metrics = Mapping[str, float | None]


@dataclass(kw_only=True)
class Trainer:
    """Trains a learner to the end of a plan.

    Args:
        learner: what learns; changed in place.
        progress: where to begin; changed in place.
        loader: gives effective batches.
        plan: rates, moving average, augmentation and scales by step and epoch.
        folder: where `metrics.csv` and `last.ckpt` go.
        evaluate_model: measures a model on the val split without changing it, and its `SAMPLE_LOSSES`; the evaluation
            behind the metrics is None in all processes but the main one.
        write_best: writes the model to deploy, with its evaluation and epoch; called in the main process.
        stop: set by a signal; the current step is finished and saved.
        settings: of the run: its seed, patience, and how often checkpoints are saved within an epoch.
        identity: settings and dataset fingerprint that a resumed run must match.
        files: names of the training images, for messages.
        began: when the run began, for `Checkpoints`.
    """

    learner: Learner
    progress: Progress
    loader: TrainLoader
    plan: Plan
    folder: RunFolder
    evaluate_model: Callable[[nn.Module], tuple[Metrics, Evaluation | None]]
    write_best: Callable[[nn.Module, Evaluation, int], None]
    stop: StopFlag
    settings: RunSettings
    identity: Mapping[str, Any]
    files: Sequence[str] | FlatStrings
    began: float

    def __post_init__(self) -> None:
        learner, progress, folder = self.learner, self.progress, self.folder
        self._checkpoints = Checkpoints(learner, progress, folder, self.identity, self.began)
        self._guard = NonFiniteGuard(
            folder.path, scaled=learner.optimizer.scaled, skipped_in_a_row=progress.in_a_row, files=self.files
        )
        self._agreed_signal = 0
        self._epoch_started = time.monotonic()
        self._training_seconds = self._loader_seconds = 0.0

    def train(self) -> Iterator[TrainingEvent]:
        """Train from `progress` to the end of the plan, and yield what happens.

        Raises:
            Interrupted: `stop` was set; the checkpoint is written.
            RtdetrError: one image does not fit into memory, the disk is full, or training diverged.
        """
        progress, plan, is_main = self.progress, self.plan, self.learner.processes.is_main
        if is_main and not self.folder.checkpoint.exists():
            require_room(self.folder.path, run_bytes(self.learner.state_dict()))
            yield self._checkpoints.save("start")  # so that there always is a state to go back to
        while progress.epoch < plan.epochs and not progress.finished:
            epoch_complete = yield from self._run_steps()
            if not epoch_complete:
                continue  # training went back to a checkpoint, perhaps of an earlier epoch
            metrics, evaluation, improved = yield from self._evaluate()
            if improved and evaluation is not None:
                with explain_write_failure(self.folder.path, str(self.folder.best)):
                    self.write_best(self.learner.average.module, evaluation, progress.epoch)
            yield from self._end_epoch(metrics, evaluation, improved)
        yield TrainingDone(progress.finished or "done", progress.epoch, progress.best_score, progress.best_epoch)

    def _run_steps(self) -> Generator[TrainingEvent, None, bool]:
        """Run the remaining steps of the epoch; return False if training went back to a checkpoint."""
        learner, progress, plan, processes = self.learner, self.progress, self.plan, self.learner.processes
        self._epoch_started, self._loader_seconds = time.monotonic(), 0.0
        if learner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(learner.device)
        learner.train_mode()
        every_steps = self.settings.checkpoint_steps
        with closing(self.loader.epoch(progress.epoch, start=progress.batch)) as batches:
            while progress.batch < plan.steps_per_epoch:
                started = time.monotonic()
                batch = self._next_batch(batches)
                loader_seconds = time.monotonic() - started
                self._loader_seconds += loader_seconds
                save_due = time.monotonic() - self._checkpoints.saved_at > 60 * self.settings.checkpoint_minutes
                whole = processes.exchange_targets(batch, stop_signal=self.stop.signal, save_due=save_due)
                self._agreed_signal = whole.stop_signal
                if batch is None or whole.incomplete:
                    break
                if progress.step == 0:
                    yield FirstBatch(batch)
                yield from self._run_step(batch, whole, started=started, loader_seconds=loader_seconds)
                if self._guard.must_roll_back():
                    rolled_back = self._checkpoints.roll_back(self._guard.skipped_in_a_row)
                    self._guard.reset()
                    yield rolled_back
                    return False
                if self._stop_signal:
                    break
                if whole.save_due or (every_steps and progress.step % every_steps == 0):
                    yield from self._read_last_step()
                    yield self._checkpoints.save("time" if whole.save_due else "steps")
        yield from self._read_last_step()
        if self._stop_signal:
            yield self._checkpoints.save("stop")
            raise self._interrupted()
        self._training_seconds = time.monotonic() - self._epoch_started
        processes.check_in_sync(learner.optimizer.parameters)
        return True

    def _next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch; None if a signal has ended the loader."""
        try:
            return next(batches)
        except (RuntimeError, OSError, RtdetrError):
            # A machine that shuts down ends the loader's processes too. The batch they lose has not been used yet.
            if not self.stop:
                raise
            return None

    @property
    def _stop_signal(self) -> int:
        """The signal that all processes know of; a single process sees its own at once."""
        return self._agreed_signal if self.learner.processes.distributed else self.stop.signal

    def _interrupted(self) -> Interrupted:
        return Interrupted(self._stop_signal, step=self.progress.step, folder=self.folder.path)

    def _run_step(
        self, batch: Batch, whole: GlobalBatch, *, started: float, loader_seconds: float
    ) -> Iterator[TrainingEvent]:
        """Run one optimizer step; its own results are read after the next one has been queued."""
        learner, progress, plan, seed = self.learner, self.progress, self.plan, self.settings.seed
        optimizer = learner.optimizer
        rate = plan.rate(progress.step) * progress.rate_scale
        optimizer.set_rate(rate)
        group = draw_group(learner, whole, step=progress.step, seed=seed)
        rows, names, terms = yield from accumulate_with_retry(
            learner,
            progress,
            batch,
            size=draw_size(plan, epoch=progress.epoch, step=progress.step, seed=seed),
            group=group.rows(whole.local_rows) if group is not None else None,
            num_boxes=sum(len(labels) for labels in whole.labels),
        )
        yield from self._read_last_step()
        totals = learner.processes.all_reduce_gradients(optimizer.parameters, terms.sum(0))
        found_inf, gradient_norm = optimizer.step(totals.sum())
        learner.norms.restore_where(found_inf)
        learner.average.update(plan.ema_weight(progress.step + 1))
        optimizer.zero_grad()
        facts = {
            "epoch": progress.epoch,
            "index": progress.batch,
            "step": progress.step,
            "lr": plan.lr * rate,
            "seconds": time.monotonic() - started,
            "loader_seconds": loader_seconds,
            "memory_bytes": memory.peak_bytes(learner.device),
            "replaced": whole.replaced,
        }
        scalars = (found_inf, gradient_norm, optimizer.scale)
        self._guard.submit(batch, rows, names, terms=terms, totals=totals, scalars=scalars, facts=facts)
        progress.batch += 1
        progress.step += 1

    def _read_last_step(self) -> Iterator[StepDone | StepSkipped]:
        """Wait for the results of the step queued last, unless they have been read."""
        result = self._guard.collect()
        if result is None:
            return
        if isinstance(result, StepSkipped):
            parts = self.learner.processes.all_gather(result)  # each process knows its own images only
            result = replace(
                result,
                images=tuple(i for part in parts for i in part.images),
                files=tuple(name for part in parts for name in part.files),
                evidence=next((part.evidence for part in parts if part.evidence), None),
            )
        self.progress.record_step(result)
        self.progress.in_a_row = self._guard.skipped_in_a_row
        yield result

    def _evaluate(self) -> Generator[TrainingEvent, None, tuple[Metrics | None, Evaluation | None, bool]]:
        """Measure the moving average, if the plan says so; the last result is whether it is the best so far."""
        progress = self.progress
        if not self.plan.evaluates(progress.epoch):
            return None, None, False
        yield EvaluationStarted(progress.epoch, progress.step)
        try:
            metrics, evaluation = self.evaluate_model(self.learner.average.module)
        except EvaluationStopped:
            # All steps of the epoch are done and saved: a resumed run begins with the evaluation.
            yield self._checkpoints.save("stop")
            self._agreed_signal = max(self.learner.processes.all_gather(self.stop.signal))
            raise self._interrupted() from None
        score = metrics.get("AP")
        return metrics, evaluation, progress.record_score(-1.0 if score is None or math.isnan(score) else score)

    def _end_epoch(
        self, metrics: Metrics | None, evaluation: Evaluation | None, improved: bool
    ) -> Iterator[TrainingEvent]:
        """Log the epoch, save, and say whether training is over."""
        progress, plan, processes = self.progress, self.plan, self.learner.processes
        terms = progress.mean_terms()
        done = EpochDone(
            epoch=progress.epoch,
            epochs=plan.epochs,
            step=progress.step,
            lr=plan.lr * plan.rate(progress.step - 1) * progress.rate_scale,
            loss=sum(terms.values()) if terms else math.nan,
            terms=terms,
            metrics=metrics,
            improved=improved,
            best_score=progress.best_score,
            best_epoch=progress.best_epoch,
            seconds=time.monotonic() - self._epoch_started,
            loader_share=self._loader_seconds / self._training_seconds if self._training_seconds > 0 else 0.0,
            memory_bytes=memory.peak_bytes(self.learner.device),
            evaluation=evaluation,
        )
        if processes.is_main:
            row = {"epoch": done.epoch + 1, "step": done.step, "lr": done.lr, "loss": done.loss}
            scores = {name: (metrics or {}).get(name) for name in (*METRICS, *SAMPLE_LOSSES)}
            with explain_write_failure(self.folder.path, str(self.folder.path / METRICS_FILE)):
                self.folder.add_metrics({**row, **scores, **terms})
        yield done

        progress.start_next_epoch()
        if 0 < self.settings.patience <= progress.waited:
            progress.finished = "patience"
        elif progress.epoch == plan.epochs:
            progress.finished = "done"
        yield self._checkpoints.save("epoch")
        self._agreed_signal = max(processes.all_gather(self.stop.signal))
        if self._stop_signal and not progress.finished:
            raise self._interrupted()

"""The training loop: a straight line that yields a typed report of everything that happens.

Nothing random is left to chance or order. Batches depend on (seed, epoch, index); the denoising noise and the scale
of a step on (seed, step). So the progress in the run, the tensors and the moments of the optimizer are all that has to
be kept for a killed run to go on bit for bit.

The effective batch is one batch of the loader. It is cut into micro-batches here, after the denoising group has been
drawn and the boxes counted for the whole, so that the gradient is that of the whole however it is cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from rtdetr_cli.batches.loader import TrainLoader
from rtdetr_cli.datasets.records import FlatStrings
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.evaluate.coco import METRICS
from rtdetr_cli.train import memory
from rtdetr_cli.train.checkpoint import (
    explain_write_failure,
    load_rollback_checkpoint,
    require_room,
    run_bytes,
    save_checkpoint,
)
from rtdetr_cli.train.events import (
    CheckpointSaved,
    EpochDone,
    EvaluationStarted,
    FirstBatch,
    MicroBatchReduced,
    RolledBack,
    StepDone,
    StepSkipped,
    TrainingDone,
    TrainingEvent,
)
from rtdetr_cli.train.guard import MAX_ROLLBACKS, NonFinite, NonFiniteGuard, StepResult, diverged
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.runs import METRICS as METRICS_FILE
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train.state import Learner, Progress, restore, snapshot
from rtdetr_cli.train.step import accumulate_gradients, draw_group, draw_size
from rtdetr_cli.train.stop import EvaluationStopped, Interrupted, StopFlag

# ---- state ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """What the loop needs to know besides the plan.

    Attributes:
        seed: of the run.
        patience: evaluated epochs without a better score before the end; 0 for never.
        checkpoint_seconds: between saves within an epoch.
        checkpoint_steps: the same in steps; 0 for none.
        identity: what the checkpoint must match when it is resumed: settings and dataset fingerprint.
        files: names of the training images, by which a person is told of them.
    """

    seed: int
    patience: int = 0
    checkpoint_seconds: float = 300.0
    checkpoint_steps: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[str] | FlatStrings = ()


# ---- the loop ---------------------------------------------------------------------------------------------------


def train(
    learner: Learner,
    progress: Progress,
    *,
    loader: TrainLoader,
    plan: Plan,
    options: LoopOptions,
    folder: RunFolder,
    evaluate_model: Callable[[nn.Module], Mapping[str, float | None]],
    write_best: Callable[[nn.Module, Mapping[str, float | None], int], None],
    stop: StopFlag,
) -> Iterator[TrainingEvent]:
    """Train from `progress` to the end of the plan.

    Args:
        learner: what learns; changed in place.
        progress: where to begin; changed in place.
        loader: gives effective batches.
        plan: rates, moving average, augmentation and scales by step and epoch.
        options: seed, patience, saves.
        folder: where `metrics.csv` and `last.ckpt` go.
        evaluate_model: measures a model on the val split; must leave no trace in the model's tensors.
        write_best: writes the model that deploys, with its metrics and epoch.
        stop: set by a signal; the step in hand is finished and saved.

    Yields:
        Reports in the order of events.

    Raises:
        Interrupted: `stop` was set; the checkpoint is written.
        RtdetrError: one image does not fit into memory, the disk is full, or training diverged.
    """
    # ---- set up -------------------------------------------------------------------------------------------------
    processes = learner.processes
    # What every process knows of `stop`; a team learns of it with the next step's targets.
    agreed = StopFlag() if processes.distributed else stop
    guard = NonFiniteGuard(
        folder.path, scaled=learner.optimizer.scaled, in_a_row=progress.in_a_row, files=options.files
    )
    timing = _Timing()
    # Whether the newest checkpoint was written amid skipped steps, and is no state to go back to.
    saved_amid = progress.in_a_row > 0

    def learned() -> Iterator[TrainingEvent]:
        """Read the figures of the step that was queued last."""
        figures = guard.collect()
        if figures is not None:
            if figures.skipped is not None:
                figures = replace(figures, skipped=NonFinite.of_all(processes.all_gather(figures.skipped)))
            yield _account(progress, figures, timing)
            progress.in_a_row = guard.in_a_row

    def save(reason: str) -> CheckpointSaved:
        nonlocal saved_amid
        if processes.is_main:
            state = snapshot(learner, progress, options.identity, folder.metrics_offset())
            save_checkpoint(folder.path, state, keep_previous=saved_amid)
        saved_amid = progress.in_a_row > 0
        timing.saved_at = time.monotonic()
        return CheckpointSaved(folder.checkpoint, reason, progress.epoch, progress.step)

    if processes.is_main and not folder.checkpoint.exists():
        require_room(folder.path, run_bytes(learner.state_dict()))
        # Whatever happens from here on, there is a state to go back to.
        yield save("start")

    while progress.epoch < plan.epochs and not progress.finished:
        # ---- epoch ----------------------------------------------------------------------------------------------
        epoch = progress.epoch
        timing.begin_epoch(learner.device)
        learner.train_mode()
        batches = loader.epoch(epoch, strong=epoch < plan.strong_until, start=progress.batch)
        went_back = False

        while progress.batch < plan.steps_per_epoch:
            # ---- batch ------------------------------------------------------------------------------------------
            timing.begin_step()
            try:
                batch = next(batches)
            except (RuntimeError, OSError, RtdetrError):
                # A stopping machine ends the loader's processes as well; what they drop has not been used yet.
                if not stop:
                    raise
                batch = None
            timing.got_batch()
            whole = processes.exchange_targets(
                batch.boxes_cxcywh if batch is not None else (),
                batch.labels if batch is not None else (),
                images=plan.effective_batch // processes.size,
                stop=stop.signal,
                save_due=time.monotonic() - timing.saved_at > options.checkpoint_seconds,
                replaced=batch.replaced if batch is not None else (),
                broken=batch is None,
            )
            if processes.distributed:
                agreed.signal = whole.stop
            if batch is None or whole.broken:
                break
            if progress.step == 0:
                yield FirstBatch(batch)
            share = plan.rate(progress.step) * progress.rate_scale
            learner.optimizer.set_rate(share)
            size = draw_size(plan, epoch=epoch, step=progress.step, seed=options.seed)
            group = draw_group(learner, whole, step=progress.step, seed=options.seed)
            group = group.rows(whole.mine) if group is not None else None
            num_boxes = float(max(1, sum(len(labels) for labels in whole.labels)))

            # ---- step -------------------------------------------------------------------------------------------
            learner.norms.save()
            while True:
                rows = memory.micro_batches(len(batch.labels), progress.micro_batch)
                full = False
                try:
                    names, terms = accumulate_gradients(
                        learner, batch, rows=rows, size=size, group=group, num_boxes=num_boxes
                    )
                except Exception as error:
                    if not memory.is_out_of_memory(error):
                        raise
                    full = True
                # Outside the handler, whose traceback would hold on to the memory.
                if learner.norm_sync is not None:
                    # Norms that average over all processes want micro-batches of one number from all.
                    learner.norm_sync.finish(len(rows), learner.device)
                    full = processes.any(full)
                if not full:
                    break
                learner.optimizer.zero_grad()
                learner.norms.restore()
                memory.release(learner.device)
                before = max(r.stop - r.start for r in rows)
                progress.micro_batch = memory.halve(before, where=str(learner.device))
                yield MicroBatchReduced(progress.step, before, progress.micro_batch)
            yield from learned()
            totals = processes.all_reduce_gradients(learner.optimizer.parameters, terms.sum(0))
            found_inf, norm = learner.optimizer.step(totals.sum())
            scale = learner.optimizer.scale.clone() if learner.optimizer.scaled else learner.optimizer.scale
            learner.norms.restore_where(found_inf)
            learner.average.update(plan.ema_weight(progress.step + 1))
            learner.optimizer.zero_grad()

            # ---- log --------------------------------------------------------------------------------------------
            guard.submit(
                epoch=epoch,
                index=progress.batch,
                step=progress.step,
                names=names,
                terms=terms,
                totals=totals,
                found_inf=found_inf,
                norm=norm,
                scale=scale,
                batch=batch,
                rows=rows,
            )
            timing.end_step(progress.step, lr=plan.lr * share, device=learner.device, replaced=whole.replaced)
            progress.batch += 1
            progress.step += 1

            if guard.must_go_back():
                rate_scale, times, best = (
                    progress.rate_scale / 2,
                    progress.went_back + 1,
                    (progress.best_score, progress.best_epoch),
                )
                if times > MAX_ROLLBACKS:
                    raise diverged(guard.in_a_row, progress.rate_scale, folder.path)
                at = progress.step
                state = processes.broadcast_state(load_rollback_checkpoint(folder.path) if processes.is_main else None)
                restore(learner, progress, state, folder if processes.is_main else None)
                progress.rate_scale, progress.went_back, progress.in_a_row = rate_scale, times, 0
                progress.best_score, progress.best_epoch = max(best, (progress.best_score, progress.best_epoch))
                guard.forget()
                yield RolledBack(at, progress.step, rate_scale)
                went_back = True
                break

            # ---- save -------------------------------------------------------------------------------------------
            due = "steps" if options.checkpoint_steps and progress.step % options.checkpoint_steps == 0 else ""
            due = "time" if whole.save_due else due
            if agreed:
                break
            if due:
                yield from learned()
                yield save(due)

        close = getattr(batches, "close", None)
        if close is not None:
            close()
        if went_back:
            continue
        yield from learned()
        if agreed:
            yield save("stop")
            raise Interrupted(agreed.signal, step=progress.step, folder=folder.path)
        timing.end_training()
        processes.check_in_sync(learner.optimizer.parameters)

        # ---- evaluate -------------------------------------------------------------------------------------------
        metrics: Mapping[str, float | None] | None = None
        improved = False
        if plan.evaluates(epoch):
            yield EvaluationStarted(epoch, progress.step)
            try:
                metrics = evaluate_model(learner.average.module)
            except EvaluationStopped:
                # The epoch's steps are made and nothing is counted yet: a resumed run begins with the evaluation.
                yield save("stop")
                raise Interrupted(processes.max(stop.signal), step=progress.step, folder=folder.path) from None
            found = metrics.get("AP")
            score = -1.0 if found is None or math.isnan(found) else found
            better = score > progress.best_score
            # Where there is nothing to measure on, the newest model has at least learned longest.
            improved = better or score == progress.best_score == -1.0
            progress.waited = 0 if better else progress.waited + 1
            if improved:
                progress.best_score, progress.best_epoch = score, epoch
                if processes.is_main:
                    with explain_write_failure(folder.path, str(folder.best)):
                        write_best(learner.average.module, metrics, epoch)
        report = timing.epoch_report(plan, progress, metrics, improved, learner)
        if processes.is_main:
            with explain_write_failure(folder.path, str(folder.path / METRICS_FILE)):
                folder.add_metrics(_row(report))
        yield report

        # ---- save -----------------------------------------------------------------------------------------------
        progress.epoch, progress.batch = epoch + 1, 0
        progress.loss_sums, progress.loss_steps = {}, 0
        if options.patience and progress.waited >= options.patience:
            progress.finished = "patience"
        elif progress.epoch == plan.epochs:
            progress.finished = "done"
        yield save("epoch")
        agreed.signal = processes.max(stop.signal)
        if agreed and not progress.finished:
            raise Interrupted(agreed.signal, step=progress.step, folder=folder.path)

    yield TrainingDone(progress.finished or "done", progress.epoch, progress.best_score, progress.best_epoch)


# ---- accounts ---------------------------------------------------------------------------------------------------


class _Stopwatch(NamedTuple):
    seconds: float
    waited: float
    lr: float
    memory_bytes: int
    replaced: tuple[tuple[int, str], ...]


class _Timing:
    """Seconds and bytes of steps and epochs."""

    def __init__(self) -> None:
        now = time.monotonic()
        self.saved_at = self.epoch_at = self.step_at = self.batch_at = now
        self.steps: dict[int, _Stopwatch] = {}
        self.waited = self.trained = 0.0

    def begin_epoch(self, device: torch.device) -> None:
        self.epoch_at = time.monotonic()
        self.waited = self.trained = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def begin_step(self) -> None:
        self.step_at = time.monotonic()

    def got_batch(self) -> None:
        self.batch_at = time.monotonic()
        self.waited += self.batch_at - self.step_at

    def end_step(self, step: int, *, lr: float, device: torch.device, replaced: tuple[tuple[int, str], ...]) -> None:
        now = time.monotonic()
        self.steps[step] = _Stopwatch(
            now - self.step_at, self.batch_at - self.step_at, lr, memory.peak_bytes(device), replaced
        )

    def end_training(self) -> None:
        self.trained = time.monotonic() - self.epoch_at

    def epoch_report(
        self,
        plan: Plan,
        progress: Progress,
        metrics: Mapping[str, float | None] | None,
        improved: bool,
        learner: Learner,
    ) -> EpochDone:
        # Known by name even where no step was taken: `metrics.csv` has the same columns in every epoch.
        steps = progress.loss_steps or float("nan")
        terms = {name: total / steps for name, total in progress.loss_sums.items()}
        return EpochDone(
            epoch=progress.epoch,
            epochs=plan.epochs,
            step=progress.step,
            lr=plan.lr * plan.rate(progress.step - 1) * progress.rate_scale,
            loss=sum(terms.values()) if terms else float("nan"),
            terms=terms,
            metrics=metrics,
            improved=improved,
            best_score=progress.best_score,
            best_epoch=progress.best_epoch,
            seconds=time.monotonic() - self.epoch_at,
            loader_share=self.waited / self.trained if self.trained > 0 else 0.0,
            memory_bytes=memory.peak_bytes(learner.device),
        )


def _account(progress: Progress, figures: StepResult, timing: _Timing) -> StepDone | StepSkipped:
    watch = timing.steps.pop(figures.step)
    if figures.skipped is not None:
        progress.skipped += 1
        for name in figures.terms:
            progress.loss_sums.setdefault(name, 0.0)
        return StepSkipped(figures.epoch, figures.step, figures.skipped)
    for name, value in figures.terms.items():
        progress.loss_sums[name] = progress.loss_sums.get(name, 0.0) + value
    progress.loss_steps += 1
    return StepDone(
        epoch=figures.epoch,
        index=figures.index,
        step=figures.step,
        loss=figures.loss,
        terms=figures.terms,
        gradient_norm=figures.norm,
        lr=watch.lr,
        seconds=watch.seconds,
        loader_seconds=watch.waited,
        memory_bytes=watch.memory_bytes,
        replaced=watch.replaced,
    )


def _row(report: EpochDone) -> dict[str, float | int | None]:
    row: dict[str, float | int | None] = {
        "epoch": report.epoch + 1,
        "step": report.step,
        "lr": report.lr,
        "loss": report.loss,
    }
    row.update({name: (report.metrics or {}).get(name) for name in METRICS})
    row.update(report.terms)
    return row

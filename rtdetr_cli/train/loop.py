"""The training loop: a straight line that yields a typed report of everything that happens.

Nothing random is left to chance or order. Batches depend on (seed, epoch, index); the denoising noise and the scale
of a step on (seed, step). So the place in the run, the tensors and the moments of the optimizer are all that has to
be kept for a killed run to go on bit for bit.

The effective batch is one batch of the loader. It is cut into micro-batches here, after the denoising group has been
drawn and the boxes counted for the whole, so that the gradient is that of the whole however it is cut.
"""

from __future__ import annotations

import hashlib
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.batches.loader import Batch, TrainLoader
from rtdetr_cli.datasets.records import FlatStrings
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.model.denoising import DenoisingGroup, draw_denoising
from rtdetr_cli.train import memory
from rtdetr_cli.train.checkpoint import (
    kept_bytes,
    last_good_stays,
    load_good_checkpoint,
    require_room,
    save_checkpoint,
)
from rtdetr_cli.train.guard import GO_BACKS, Figures, Guard, Skipped, diverged
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.train.reports import (
    METRICS,
    SCORE,
    BatchReport,
    EpochReport,
    FinishedReport,
    MeasuringReport,
    MemoryReport,
    Report,
    SavedReport,
    SkippedReport,
    StepReport,
    WentBackReport,
)
from rtdetr_cli.train.run_folder import METRICS as METRICS_FILE
from rtdetr_cli.train.run_folder import RunFolder
from rtdetr_cli.train.state import Learner, Place, restore, snapshot
from rtdetr_cli.train.team import Whole


class Interrupted(RtdetrError):
    """A signal asked for an end; the checkpoint is written. The exit code is 128 + the signal."""

    default_code = "interrupted"

    def __init__(self, number: int, *, step: int, folder: Path) -> None:
        super().__init__(
            f"{'interrupted' if number == signal.SIGINT else 'terminated'} after step {step}; the checkpoint is saved",
            hint=f"rtdetr train --resume {folder}",
        )
        self.exit_code = 128 + number


class EvaluationStopped(Exception):
    """Raised by `evaluate_model` when a signal came while it ran."""


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


class StopFlag:
    """Set by a signal handler, read by the loop between steps.

    Attributes:
        number: of the signal; 0 for none.
        heeded: somebody reads it, so that a signal need not end the process by itself.
    """

    def __init__(self) -> None:
        self.number = 0
        self.heeded = False

    def __bool__(self) -> bool:
        return self.number != 0


# ---- the loop ---------------------------------------------------------------------------------------------------


def train(
    learner: Learner,
    place: Place,
    *,
    loader: TrainLoader,
    plan: Plan,
    options: LoopOptions,
    folder: RunFolder,
    evaluate_model: Callable[[nn.Module], Mapping[str, float | None]],
    write_best: Callable[[nn.Module, Mapping[str, float | None], int], None],
    stop: StopFlag,
) -> Iterator[Report]:
    """Train from `place` to the end of the plan.

    Args:
        learner: what learns; changed in place.
        place: where to begin; changed in place.
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
    team = learner.team
    # What every process knows of `stop`; a team learns of it with the next step's targets.
    agreed = StopFlag() if team.many else stop
    guard = Guard(folder.path, scaled=learner.stepper.scaled, in_a_row=place.in_a_row, files=options.files)
    timing = _Timing()
    # Whether the newest checkpoint was written amid skipped steps, and is no state to go back to.
    saved_amid = place.in_a_row > 0

    def learned() -> Iterator[Report]:
        """Read the figures of the step that was queued last."""
        figures = guard.collect()
        if figures is not None:
            if figures.skipped is not None:
                figures = replace(figures, skipped=Skipped.of_all(team.gather(figures.skipped)))
            yield _account(place, figures, timing)
            place.in_a_row = guard.in_a_row

    def save(reason: str) -> SavedReport:
        nonlocal saved_amid
        if team.leads:
            state = snapshot(learner, place, options.identity, folder.metrics_offset())
            save_checkpoint(folder.path, state, keep_previous=saved_amid)
        saved_amid = place.in_a_row > 0
        timing.saved_at = time.monotonic()
        return SavedReport(folder.checkpoint, reason, place.epoch, place.step)

    if team.leads and not folder.checkpoint.exists():
        require_room(folder.path, kept_bytes(learner.state_dict()))
        # Whatever happens from here on, there is a state to go back to.
        yield save("start")

    while place.epoch < plan.epochs and not place.finished:
        # ---- epoch ----------------------------------------------------------------------------------------------
        epoch = place.epoch
        timing.begin_epoch(learner.device)
        learner.train_mode()
        batches = loader.epoch(epoch, strong=epoch < plan.strong_until, start=place.batch)
        went_back = False

        while place.batch < plan.steps_per_epoch:
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
            whole = team.share(
                batch.boxes_cxcywh if batch is not None else (),
                batch.labels if batch is not None else (),
                images=plan.effective_batch // team.size,
                stop=stop.number,
                save_due=time.monotonic() - timing.saved_at > options.checkpoint_seconds,
                replaced=batch.replaced if batch is not None else (),
                broken=batch is None,
            )
            if team.many:
                agreed.number = whole.stop
            if batch is None or whole.broken:
                break
            if place.step == 0:
                yield BatchReport(batch)
            share = plan.rate(place.step) * place.rate_scale
            learner.stepper.set_rate(share)
            size = step_size(plan, epoch=epoch, step=place.step, seed=options.seed)
            group = step_denoising(learner, whole, step=place.step, seed=options.seed)
            group = group.rows(whole.mine) if group is not None else None
            num_boxes = float(max(1, sum(len(labels) for labels in whole.labels)))

            # ---- step -------------------------------------------------------------------------------------------
            learner.norms.keep()
            while True:
                rows = memory.micro_batches(len(batch.labels), place.micro_batch)
                full = False
                try:
                    names, terms = accumulate(learner, batch, rows=rows, size=size, group=group, num_boxes=num_boxes)
                except Exception as error:
                    if not memory.is_out_of_memory(error):
                        raise
                    full = True
                # Outside the handler, whose traceback would hold on to the memory.
                if learner.chorus is not None:
                    # Norms that average over all processes want micro-batches of one number from all.
                    learner.chorus.finish(len(rows), learner.device)
                    full = team.any(full)
                if not full:
                    break
                learner.stepper.zero_grad()
                learner.norms.restore()
                memory.release(learner.device)
                before = max(r.stop - r.start for r in rows)
                place.micro_batch = memory.smaller(before, where=str(learner.device))
                yield MemoryReport(place.step, before, place.micro_batch)
            yield from learned()
            totals = team.add_up_gradients(learner.stepper.parameters, terms.sum(0))
            found_inf, norm = learner.stepper.step(totals.sum())
            scale = learner.stepper.scale.clone() if learner.stepper.scaled else learner.stepper.scale
            learner.norms.restore_where(found_inf)
            learner.average.update(plan.ema_weight(place.step + 1))
            learner.stepper.zero_grad()

            # ---- log --------------------------------------------------------------------------------------------
            guard.submit(
                epoch=epoch,
                index=place.batch,
                step=place.step,
                names=names,
                terms=terms,
                totals=totals,
                found_inf=found_inf,
                norm=norm,
                scale=scale,
                batch=batch,
                rows=rows,
            )
            timing.end_step(place.step, lr=plan.lr * share, device=learner.device, replaced=whole.replaced)
            place.batch += 1
            place.step += 1

            if guard.must_go_back():
                rate_scale, times, best = (
                    place.rate_scale / 2,
                    place.went_back + 1,
                    (place.best_score, place.best_epoch),
                )
                if times > GO_BACKS:
                    raise diverged(guard.in_a_row, place.rate_scale, folder.path)
                at = place.step
                state = team.tell_state(load_good_checkpoint(folder.path) if team.leads else None)
                restore(learner, place, state, folder if team.leads else None)
                place.rate_scale, place.went_back, place.in_a_row = rate_scale, times, 0
                place.best_score, place.best_epoch = max(best, (place.best_score, place.best_epoch))
                guard.forget()
                yield WentBackReport(at, place.step, rate_scale)
                went_back = True
                break

            # ---- save -------------------------------------------------------------------------------------------
            due = "steps" if options.checkpoint_steps and place.step % options.checkpoint_steps == 0 else ""
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
            raise Interrupted(agreed.number, step=place.step, folder=folder.path)
        timing.end_training()
        team.refuse_drift(learner.stepper.parameters)

        # ---- evaluate -------------------------------------------------------------------------------------------
        metrics: Mapping[str, float | None] | None = None
        improved = False
        if plan.evaluates(epoch):
            yield MeasuringReport(epoch, place.step)
            try:
                metrics = evaluate_model(learner.average.module)
            except EvaluationStopped:
                # The epoch's steps are made and nothing is counted yet: a resumed run begins with the evaluation.
                yield save("stop")
                raise Interrupted(team.greatest(stop.number), step=place.step, folder=folder.path) from None
            found = metrics.get(SCORE)
            score = -1.0 if found is None or math.isnan(found) else found
            better = score > place.best_score
            # Where there is nothing to measure on, the newest model has at least learned longest.
            improved = better or score == place.best_score == -1.0
            place.waited = 0 if better else place.waited + 1
            if improved:
                place.best_score, place.best_epoch = score, epoch
                if team.leads:
                    with last_good_stays(folder.path, str(folder.best)):
                        write_best(learner.average.module, metrics, epoch)
        report = timing.epoch_report(plan, place, metrics, improved, learner)
        if team.leads:
            with last_good_stays(folder.path, str(folder.path / METRICS_FILE)):
                folder.add_metrics(_row(report))
        yield report

        # ---- save -----------------------------------------------------------------------------------------------
        place.epoch, place.batch = epoch + 1, 0
        place.loss_sums, place.loss_steps = {}, 0
        if options.patience and place.waited >= options.patience:
            place.finished = "patience"
        elif place.epoch == plan.epochs:
            place.finished = "done"
        yield save("epoch")
        agreed.number = team.greatest(stop.number)
        if agreed and not place.finished:
            raise Interrupted(agreed.number, step=place.step, folder=folder.path)

    yield FinishedReport(place.finished or "done", place.epoch, place.best_score, place.best_epoch)


# ---- one step ---------------------------------------------------------------------------------------------------


def accumulate(
    learner: Learner,
    batch: Batch,
    *,
    rows: Sequence[slice],
    size: tuple[int, int],
    group: DenoisingGroup | None,
    num_boxes: float,
) -> tuple[tuple[str, ...], Tensor]:
    """Add up the gradients of one effective batch, a micro-batch at a time.

    Args:
        learner: its model's gradients are added to.
        batch: the effective batch.
        rows: micro-batches.
        size: (height, width) to train at in pixels.
        group: denoising queries of the whole batch, on the CPU.
        num_boxes: normaliser of the whole batch.

    Returns:
        Names of the loss terms, and their values, (micro-batches, terms) float32 on the device, detached.
    """
    device = learner.device
    if learner.chorus is not None:
        learner.chorus.begin()
    images = batch.images.to(device, non_blocking=True)
    boxes, labels = targets_on(device, batch)
    group = group.to(device) if group is not None else None
    names: tuple[str, ...] = ()
    kept = []
    for part in rows:
        inputs = as_input(images[part], size)
        with torch.autocast(device.type, learner.autocast, enabled=learner.autocast is not None):
            outputs = learner.model(inputs, group.rows(part) if group is not None else None)
        terms = learner.criterion(outputs, boxes[part], labels[part], num_boxes=num_boxes)
        names = tuple(terms)
        stacked = torch.stack(list(terms.values()))
        torch.autograd.backward(stacked.sum() * learner.stepper.scale)
        kept.append(stacked.detach())
    return names, torch.stack(kept)


def as_input(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn uint8 images on the device into the network's input.

    Args:
        images: (B, 3, H, W) uint8.
        size: (height, width) to resize to, with antialiased bilinear filtering as everywhere else.

    Returns:
        (B, 3, *size) float32 from 0 to 1, channels last.
    """
    inputs = images.to(torch.float32, memory_format=torch.channels_last) / 255
    if inputs.shape[-2:] != torch.Size(size):
        inputs = functional.interpolate(inputs, size=size, mode="bilinear", antialias=True, align_corners=False)
        inputs = inputs.clamp_(0, 1).contiguous(memory_format=torch.channels_last)
    return inputs


def targets_on(device: torch.device, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Move boxes and labels to the device, in one transfer each."""
    if device.type == "cpu":
        return list(batch.boxes_cxcywh), list(batch.labels)
    counts = [len(labels) for labels in batch.labels]
    boxes = torch.cat(list(batch.boxes_cxcywh)).pin_memory().to(device, non_blocking=True)
    labels = torch.cat(list(batch.labels)).pin_memory().to(device, non_blocking=True)
    return list(torch.split(boxes, counts)), list(torch.split(labels, counts))


def step_size(plan: Plan, *, epoch: int, step: int, seed: int) -> tuple[int, int]:
    """Draw the (height, width) of a step from (seed, step)."""
    base = plan.scales[len(plan.scales) // 2]
    if epoch >= plan.multi_scale_until:
        return base
    return random.Random(f"scale {seed} {step}").choice(plan.scales)


def step_denoising(learner: Learner, batch: Batch | Whole, *, step: int, seed: int) -> DenoisingGroup | None:
    """Draw the denoising queries of an effective batch from (seed, step), on the CPU."""
    spec = learner.spec
    if not spec.denoising:
        return None
    digest = hashlib.sha256(f"denoising {seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return draw_denoising(
        batch.boxes_cxcywh,
        batch.labels,
        num_classes=learner.model.num_classes,
        queries=spec.queries,
        wanted=spec.denoising,
        label_noise=spec.label_noise,
        box_noise=spec.box_noise,
        generator=generator,
    )


def worst_batch(plan: Plan, *, most_boxes: int, num_classes: int, seed: int = 0) -> Batch:
    """Make a batch of noise with as many boxes in each image as the fullest one has.

    It is given at the largest scale, so that no resizing comes before the step.
    """
    height, width = plan.scales[-1] if plan.multi_scale_until else plan.scales[len(plan.scales) // 2]
    generator = torch.Generator().manual_seed(seed)
    count = plan.effective_batch
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    boxes = [torch.rand((most_boxes, 4), generator=generator) * 0.25 + 0.25 for _ in range(count)]
    labels = [torch.randint(0, num_classes, (most_boxes,), generator=generator) for _ in range(count)]
    return Batch(images, tuple(boxes), tuple(labels), tuple(range(count)), ())


def worst_step(learner: Learner, plan: Plan, *, most_boxes: int, micro_batch: int, parts: int | None = None) -> None:
    """Run forward and backward at the largest scale with the most boxes; nothing is left of it.

    Args:
        learner: left as it was.
        plan: for scales and batch.
        most_boxes: in one image of the dataset.
        micro_batch: images at once.
        parts: micro-batches to run; all of them if None.
    """
    batch = worst_batch(plan, most_boxes=most_boxes, num_classes=learner.model.num_classes)
    learner.train_mode()
    learner.norms.keep()
    size = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    group = step_denoising(learner, batch, step=0, seed=0)
    num_boxes = float(max(1, most_boxes * plan.effective_batch))
    rows = memory.micro_batches(plan.effective_batch, micro_batch)[:parts]
    try:
        accumulate(learner, batch, rows=rows, size=size, group=group, num_boxes=num_boxes)
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
    finally:
        learner.stepper.zero_grad()
        learner.norms.restore()
        memory.release(learner.device)


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
        self, plan: Plan, place: Place, metrics: Mapping[str, float | None] | None, improved: bool, learner: Learner
    ) -> EpochReport:
        # Known by name even where no step was taken: `metrics.csv` has the same columns in every epoch.
        steps = place.loss_steps or float("nan")
        terms = {name: total / steps for name, total in place.loss_sums.items()}
        return EpochReport(
            epoch=place.epoch,
            epochs=plan.epochs,
            step=place.step,
            lr=plan.lr * plan.rate(place.step - 1) * place.rate_scale,
            loss=sum(terms.values()) if terms else float("nan"),
            terms=terms,
            metrics=metrics,
            improved=improved,
            best_score=place.best_score,
            best_epoch=place.best_epoch,
            seconds=time.monotonic() - self.epoch_at,
            waited_share=self.waited / self.trained if self.trained > 0 else 0.0,
            memory_bytes=memory.peak_bytes(learner.device),
        )


def _account(place: Place, figures: Figures, timing: _Timing) -> StepReport | SkippedReport:
    watch = timing.steps.pop(figures.step)
    if figures.skipped is not None:
        place.skipped += 1
        for name in figures.terms:
            place.loss_sums.setdefault(name, 0.0)
        return SkippedReport(figures.epoch, figures.step, figures.skipped)
    for name, value in figures.terms.items():
        place.loss_sums[name] = place.loss_sums.get(name, 0.0) + value
    place.loss_steps += 1
    return StepReport(
        epoch=figures.epoch,
        index=figures.index,
        step=figures.step,
        loss=figures.loss,
        terms=figures.terms,
        norm=figures.norm,
        lr=watch.lr,
        seconds=watch.seconds,
        waited=watch.waited,
        memory_bytes=watch.memory_bytes,
        replaced=watch.replaced,
    )


def _row(report: EpochReport) -> dict[str, float | int | None]:
    row: dict[str, float | int | None] = {
        "epoch": report.epoch + 1,
        "step": report.step,
        "lr": report.lr,
        "loss": report.loss,
    }
    row.update({name: (report.metrics or {}).get(name) for name in METRICS})
    row.update(report.terms)
    return row

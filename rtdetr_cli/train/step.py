"""The forward and backward passes of one training step.

The effective batch is one batch of the loader, cut into micro-batches here. The denoising group is drawn and the boxes
are counted for the whole of it first, so that the gradient does not depend on how the batch is cut. A step that runs
out of memory is run again with smaller micro-batches.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.model.denoising import DenoisingGroup, draw_denoising
from rtdetr_cli.train import memory
from rtdetr_cli.train.events import MicroBatchReduced
from rtdetr_cli.train.losses import compute_losses
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.train.processes import GlobalBatch
from rtdetr_cli.train.state import Learner, Progress


def accumulate_gradients(
    learner: Learner,
    batch: Batch,
    *,
    rows: Sequence[slice],
    size: tuple[int, int],
    group: DenoisingGroup | None,
    num_boxes: float,
) -> tuple[tuple[str, ...], Tensor]:
    """Add up the gradients of one effective batch, one micro-batch at a time.

    Args:
        learner: its model's gradients are added to.
        batch: the effective batch.
        rows: micro-batches.
        size: (height, width) to train at in pixels.
        group: denoising queries of the whole batch, on the CPU.
        num_boxes: normalizer of the whole batch.

    Returns:
        The names of the T loss terms, and their values, (micro-batches, T) float32 on the device, detached.
    """
    device = learner.device
    if learner.norm_sync is not None:
        learner.norm_sync.begin_step()
    images = batch.images.to(device, non_blocking=True)
    boxes, labels = move_targets(device, batch)
    group = group.to(device) if group is not None else None
    names: tuple[str, ...] = ()
    values = []
    for part in rows:
        inputs = to_input(images[part], size)
        with torch.autocast(device.type, learner.autocast, enabled=learner.autocast is not None):
            outputs = learner.model(inputs, group.rows(part) if group is not None else None)
        terms = compute_losses(outputs, boxes[part], labels[part], num_boxes=num_boxes)
        names = tuple(terms)
        stacked = torch.stack(list(terms.values()))
        torch.autograd.backward(stacked.sum() * learner.optimizer.scale)
        values.append(stacked.detach())
    return names, torch.stack(values)


def accumulate_with_retry(
    learner: Learner,
    progress: Progress,
    batch: Batch,
    *,
    size: tuple[int, int],
    group: DenoisingGroup | None,
    num_boxes: float,
) -> Generator[MicroBatchReduced, None, tuple[Sequence[slice], tuple[str, ...], Tensor]]:
    """Call `accumulate_gradients` with smaller micro-batches for as long as memory runs out.

    `progress.micro_batch` is lowered, and stays lower.

    Yields:
        MicroBatchReduced: each time the same step is tried again.

    Returns:
        The micro-batches, and the names and values of the loss terms.

    Raises:
        RtdetrError: a single image does not fit.
    """
    learner.norms.save()
    while True:
        rows = memory.micro_batches(len(batch.labels), progress.micro_batch)
        out_of_memory = False
        try:
            names, terms = accumulate_gradients(learner, batch, rows=rows, size=size, group=group, num_boxes=num_boxes)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            out_of_memory = True
        # What follows stays outside the handler, because the traceback keeps the step's memory alive.
        if learner.norm_sync is not None:
            # Norms that average over all processes need the same number of micro-batches in each.
            learner.norm_sync.finish_step(len(rows))
            out_of_memory = any(learner.processes.all_gather(out_of_memory))
        if not out_of_memory:
            return rows, names, terms
        learner.optimizer.zero_grad()
        learner.norms.restore()
        torch.cuda.empty_cache()  # does nothing without CUDA
        before = rows[0].stop  # the first micro-batch is the largest
        progress.micro_batch = memory.halve(before, where=str(learner.device))
        yield MicroBatchReduced(progress.step, before, progress.micro_batch)


def to_input(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn uint8 images (B, 3, H, W) into the network's input, (B, 3, *size) float32 from 0 to 1, channels last.

    Images of another size are resized with antialiased bilinear filtering, as everywhere else.
    """
    inputs = images.to(torch.float32, memory_format=torch.channels_last) / 255
    if inputs.shape[-2:] != torch.Size(size):
        inputs = functional.interpolate(inputs, size=size, mode="bilinear", antialias=True, align_corners=False)
        inputs = inputs.clamp_(0, 1).contiguous(memory_format=torch.channels_last)
    return inputs


def move_targets(device: torch.device, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Move boxes and labels to the device, in one transfer each."""
    if device.type == "cpu":
        return list(batch.boxes_cxcywh), list(batch.labels)
    counts = [len(labels) for labels in batch.labels]
    boxes = torch.cat(list(batch.boxes_cxcywh)).pin_memory().to(device, non_blocking=True)
    labels = torch.cat(list(batch.labels)).pin_memory().to(device, non_blocking=True)
    return list(torch.split(boxes, counts)), list(torch.split(labels, counts))


def draw_size(plan: Plan, *, epoch: int, step: int, seed: int) -> tuple[int, int]:
    """Draw the (height, width) of a step from (seed, step)."""
    if epoch >= plan.multi_scale_until:
        return plan.scales[len(plan.scales) // 2]
    return random.Random(f"scale {seed} {step}").choice(plan.scales)


def draw_group(learner: Learner, batch: Batch | GlobalBatch, *, step: int, seed: int) -> DenoisingGroup | None:
    """Draw the denoising queries of an effective batch from (seed, step), on the CPU."""
    spec = learner.spec
    digest = hashlib.sha256(f"denoising {seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return draw_denoising(
        batch.boxes_cxcywh,
        batch.labels,
        num_classes=learner.model.num_classes,
        queries=spec.queries,
        num_positives=spec.denoising,
        label_noise=spec.label_noise,
        box_noise=spec.box_noise,
        generator=generator,
    )


def largest_batch(plan: Plan, *, most_boxes: int, num_classes: int) -> Batch:
    """Make a batch of noise at the largest scale, with `most_boxes` boxes in each image."""
    height, width = plan.scales[-1] if plan.multi_scale_until else plan.scales[len(plan.scales) // 2]
    generator = torch.Generator().manual_seed(0)
    count = plan.effective_batch
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    boxes = [torch.rand((most_boxes, 4), generator=generator) * 0.25 + 0.25 for _ in range(count)]
    labels = [torch.randint(0, num_classes, (most_boxes,), generator=generator) for _ in range(count)]
    return Batch(images, tuple(boxes), tuple(labels), tuple(range(count)), ())


def run_largest_step(
    learner: Learner, plan: Plan, *, most_boxes: int, micro_batch: int, parts: int | None = None
) -> None:
    """Run forward and backward at the largest scale with the most boxes, and undo what they changed.

    Args:
        learner: left as it was.
        plan: for scales and batch.
        most_boxes: in one image of the dataset.
        micro_batch: images at once.
        parts: micro-batches to run; all of them if None.
    """
    batch = largest_batch(plan, most_boxes=most_boxes, num_classes=learner.model.num_classes)
    learner.train_mode()
    learner.norms.save()
    size = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    group = draw_group(learner, batch, step=0, seed=0)
    rows = memory.micro_batches(plan.effective_batch, micro_batch)[:parts]
    try:
        num_boxes = most_boxes * plan.effective_batch
        accumulate_gradients(learner, batch, rows=rows, size=size, group=group, num_boxes=num_boxes)
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
    finally:
        learner.optimizer.zero_grad()
        learner.norms.restore()
        torch.cuda.empty_cache()  # does nothing without CUDA

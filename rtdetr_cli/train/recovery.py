"""Recovering from what goes wrong: out of memory, and weights that no longer give finite losses.

A step that runs out of memory is run again with smaller micro-batches; a run whose steps are skipped one after the
other goes back to a checkpoint and continues with half the learning rate.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.model.denoising import DenoisingGroup
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train import memory
from rtdetr_cli.train.checkpoint import load_rollback_checkpoint, save_checkpoint
from rtdetr_cli.train.events import CheckpointSaved, MicroBatchReduced, RolledBack
from rtdetr_cli.train.guard import EVIDENCE_FOLDER
from rtdetr_cli.train.state import Learner, Progress, restore, snapshot
from rtdetr_cli.train.step import accumulate_gradients

MAX_ROLLBACKS = 3


def accumulate_with_retry(
    learner: Learner,
    progress: Progress,
    batch: Batch,
    *,
    size: tuple[int, int],
    group: DenoisingGroup | None,
    num_boxes: float,
) -> Generator[MicroBatchReduced, None, tuple[Sequence[slice], tuple[str, ...], Tensor]]:
    """Add up the gradients of a step, with smaller micro-batches for as long as memory runs out.

    Args:
        learner: its model's gradients are added to.
        progress: `micro_batch` is lowered when memory runs out, and stays lower.
        batch: the effective batch.
        size: (height, width) to train at in pixels.
        group: denoising queries of the whole batch, on the CPU.
        num_boxes: normalizer of the whole batch.

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
            out_of_memory = learner.processes.any(out_of_memory)
        if not out_of_memory:
            return rows, names, terms
        learner.optimizer.zero_grad()
        learner.norms.restore()
        memory.release(learner.device)
        before = max(part.stop - part.start for part in rows)
        progress.micro_batch = memory.halve(before, where=str(learner.device))
        yield MicroBatchReduced(progress.step, before, progress.micro_batch)


class Checkpoints:
    """Saves the state of a run, and takes the run back to it.

    Args:
        learner: what learns.
        progress: where the run stands.
        folder: where `last.ckpt` goes; only the main process writes.
        identity: settings and dataset that a resumed run must match.
    """

    def __init__(self, learner: Learner, progress: Progress, folder: RunFolder, identity: Mapping[str, Any]) -> None:
        self.learner, self.progress, self.folder, self.identity = learner, progress, folder, identity
        self.saved_at = time.monotonic()
        # A checkpoint written after a skipped step is no state to go back to: the next save replaces it.
        self._saved_after_skipped_step = progress.in_a_row > 0

    def save(self, reason: str) -> CheckpointSaved:
        """Write `last.ckpt`, and keep the checkpoint before it.

        Raises:
            RtdetrError: the disk is full or the folder cannot be written.
        """
        if self.learner.processes.is_main:
            state = snapshot(self.learner, self.progress, self.identity, self.folder.metrics_offset())
            save_checkpoint(self.folder.path, state, keep_previous=self._saved_after_skipped_step)
        self._saved_after_skipped_step = self.progress.in_a_row > 0
        self.saved_at = time.monotonic()
        return CheckpointSaved(self.folder.checkpoint, reason, self.progress.epoch, self.progress.step)

    def roll_back(self, skipped_in_a_row: int) -> RolledBack:
        """Go back to the last checkpoint whose steps were finite, with half the learning rate.

        Raises:
            RtdetrError: the run has gone back too often: it diverges.
        """
        progress, processes = self.progress, self.learner.processes
        before = replace(progress)
        if before.went_back >= MAX_ROLLBACKS:
            raise RtdetrError(
                f"training diverged: {skipped_in_a_row} steps in a row were not finite, after {MAX_ROLLBACKS} returns "
                f"to a checkpoint and with the learning rate at {before.rate_scale:.3g} of the planned one",
                hint=f"use a lower --lr or --precision fp32; the batches are in {self.folder.path / EVIDENCE_FOLDER}",
                code="diverged",
            )
        state = load_rollback_checkpoint(self.folder.path) if processes.is_main else None
        restore(self.learner, progress, processes.broadcast_state(state), self.folder if processes.is_main else None)
        progress.rate_scale = before.rate_scale / 2
        progress.went_back = before.went_back + 1
        progress.in_a_row = 0
        progress.best_score, progress.best_epoch = max(
            (before.best_score, before.best_epoch), (progress.best_score, progress.best_epoch)
        )
        return RolledBack(before.step, progress.step, progress.rate_scale)

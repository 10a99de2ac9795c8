"""Skipping steps whose loss or gradient is not finite: decided on the device, reported one step later.

The host never waits to learn how a step went. The results of step n are copied to the host while step n + 1 runs, and
read once the matching of step n + 1 has waited for the device anyway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.datasets.records import FlatStrings
from rtdetr_cli.train.events import NonFinite, StepDone, StepSkipped

MAX_SKIPPED_IN_A_ROW = 5
EVIDENCE_FOLDER = "evidence"
MAX_EVIDENCE_FILES = 5


@dataclass(frozen=True, slots=True)
class QueuedStep:
    """A step that the device has been given, whose results the host does not know yet.

    Attributes:
        epoch, index, step: from 0; `index` is the batch's number in the epoch.
        batch: of this process, kept as evidence until the results are read.
        rows: the micro-batches.
        names: of the T loss terms.
        terms: (micro-batches, T) on the device, of this process.
        totals: (T,) on the device, of the whole effective batch.
        found_inf: () on the device, 1 where the step was skipped.
        gradient_norm: () on the device, before clipping.
        loss_scale: () on the device, during this step.
        lr: of the head.
        seconds, loader_seconds, memory_bytes, replaced: as in `StepDone`.
    """

    epoch: int
    index: int
    step: int
    batch: Batch
    rows: Sequence[slice]
    names: tuple[str, ...]
    terms: Tensor
    totals: Tensor
    found_inf: Tensor
    gradient_norm: Tensor
    loss_scale: Tensor
    lr: float
    seconds: float
    loader_seconds: float
    memory_bytes: int
    replaced: tuple[tuple[int, str], ...]


class NonFiniteGuard:
    """Reads the results of the last step and says which images and loss terms were not finite.

    Args:
        folder: the run's, for evidence.
        scaled: float16 with a loss scale.
        skipped_in_a_row: steps skipped so far, for a resumed run.
        files: names of the dataset's images.
    """

    def __init__(
        self, folder: Path, *, scaled: bool, skipped_in_a_row: int = 0, files: Sequence[str] | FlatStrings = ()
    ) -> None:
        self.folder = folder
        self.files = files
        self.scaled = scaled
        self.skipped_in_a_row = skipped_in_a_row
        self._pending: tuple[QueuedStep, Tensor, torch.cuda.Event | None] | None = None

    def submit(self, queued: QueuedStep) -> None:
        """Start copying the results of a step to the host; `collect` those of the step before it first."""
        scalars = torch.stack([queued.found_inf, queued.gradient_norm, queued.loss_scale])
        results = torch.cat([scalars, queued.totals, queued.terms.flatten()])
        copied = None
        if results.is_cuda:
            on_host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
            on_host.copy_(results, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            results = on_host
        self._pending = queued, results, copied

    def collect(self) -> StepDone | StepSkipped | None:
        """Return what became of the step last submitted; None if it has been collected."""
        if self._pending is None:
            return None
        queued, results, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        found_inf, gradient_norm, loss_scale, *values = results.tolist()
        totals = np.asarray(values[: len(queued.names)])
        terms = np.asarray(values[len(queued.names) :]).reshape(len(queued.rows), len(queued.names))
        total_by_name = {name: float(value) for name, value in zip(queued.names, totals, strict=True)}
        if not found_inf:
            self.skipped_in_a_row = 0
            return StepDone(
                epoch=queued.epoch,
                index=queued.index,
                step=queued.step,
                loss=float(totals.sum()),
                terms=total_by_name,
                gradient_norm=gradient_norm,
                lr=queued.lr,
                seconds=queued.seconds,
                loader_seconds=queued.loader_seconds,
                memory_bytes=queued.memory_bytes,
                replaced=queued.replaced,
            )
        # float16 gradients may overflow while the loss scale is being found. A loss that is not finite, or gradients
        # that overflow at a scale of 1, are a fault.
        scale_only = self.scaled and bool(np.isfinite(totals).all()) and loss_scale > 1
        if not scale_only:
            self.skipped_in_a_row += 1
        cause = self._find_cause(queued, terms, totals, scale_only)
        # Without images the fault lies with another process, and so does the evidence.
        if cause.images and not scale_only:
            cause = replace(cause, evidence=self._save_evidence(queued, terms, gradient_norm, loss_scale, cause))
        return StepSkipped(queued.epoch, queued.step, cause, total_by_name)

    def must_roll_back(self) -> bool:
        """Tell whether so many steps in a row were skipped that the weights themselves must be at fault."""
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def reset(self) -> None:
        """Forget the pending step and the count, after a roll-back."""
        self._pending = None
        self.skipped_in_a_row = 0

    def _find_cause(
        self, queued: QueuedStep, terms: NDArray[np.float64], totals: NDArray[np.float64], scale_only: bool
    ) -> NonFinite:
        bad_rows, bad_terms = np.nonzero(~np.isfinite(terms))
        if not len(bad_terms):
            bad_terms = np.flatnonzero(~np.isfinite(totals))
        indices = queued.batch.image_indices
        if len(bad_terms):
            term = queued.names[int(bad_terms.min())]
            images = tuple(i for row in sorted(set(bad_rows.tolist())) for i in indices[queued.rows[row]])
        else:
            term, images = "gradient", tuple(indices)
        return NonFinite(
            term=term,
            images=images,
            files=tuple(self.files[i] for i in images) if len(self.files) else (),
            evidence=None,
            in_a_row=self.skipped_in_a_row,
            scale_only=scale_only,
        )

    def _save_evidence(
        self,
        queued: QueuedStep,
        terms: NDArray[np.float64],
        gradient_norm: float,
        loss_scale: float,
        cause: NonFinite,
    ) -> Path | None:
        """Write the batch and all results of a skipped step; None after the first few, or if the disk is full."""
        folder = self.folder / EVIDENCE_FOLDER
        path = folder / f"step-{queued.step:06d}.npz"
        batch = queued.batch
        facts = {
            "epoch": queued.epoch,
            "step": queued.step,
            "term": cause.term,
            "pictures": list(cause.images),
            "files": list(cause.files),
            "gradient_norm": _json_number(gradient_norm),
            "loss_scale": loss_scale,
            "terms": [{n: _json_number(v) for n, v in zip(queued.names, row, strict=True)} for row in terms],
        }
        try:
            folder.mkdir(exist_ok=True)
            if len(list(folder.glob("*.npz"))) >= MAX_EVIDENCE_FILES:
                return None
            np.savez_compressed(
                path,
                facts=np.asarray(json.dumps(facts)),
                images=batch.images.numpy(),
                image_indices=np.asarray(batch.image_indices),
                boxes_cxcywh=torch.cat(list(batch.boxes_cxcywh)).numpy(),
                labels=torch.cat(list(batch.labels)).numpy(),
                boxes_in_image=np.asarray([len(b) for b in batch.labels]),
            )
        except OSError:
            return None  # a full disk must not turn a skipped step into a lost run
        return path


def _json_number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(value)

"""Skipping steps whose loss or gradient is not finite: decided on the device, reported one step later.

The host never waits to learn how a step went. The results of step n are copied to the host while step n + 1 runs, and
read once the matching of step n + 1 has waited for the device anyway.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.datasets.records import FlatStrings
from rtdetr_cli.train.events import StepDone, StepSkipped

MAX_SKIPPED_IN_A_ROW = 5
EVIDENCE_FOLDER = "evidence"
MAX_EVIDENCE_FILES = 5


@dataclass(frozen=True, slots=True)
class _PendingStep:
    """A step that the device has been given, whose results the host does not know yet."""

    facts: dict[str, Any]
    batch: Batch
    rows: Sequence[slice]
    names: Sequence[str]
    results: Tensor
    copied: torch.cuda.Event | None


class NonFiniteGuard:
    """Reads the results of the last step and says which images and loss terms were not finite.

    `folder` is the run's, for evidence; `scaled` means float16 with a loss scale; `files` are the names of the images.
    """

    def __init__(
        self, folder: Path, *, scaled: bool, skipped_in_a_row: int = 0, files: Sequence[str] | FlatStrings = ()
    ) -> None:
        self.folder, self.files, self.scaled = folder, files, scaled
        self.skipped_in_a_row = skipped_in_a_row
        self._pending: _PendingStep | None = None

    def submit(
        self,
        batch: Batch,
        rows: Sequence[slice],
        names: Sequence[str],
        *,
        terms: Tensor,
        totals: Tensor,
        scalars: Sequence[Tensor],
        facts: dict[str, Any],
    ) -> None:
        """Start copying the results of a step to the host; `collect` those of the step before it first.

        Args:
            batch: of this process.
            rows: its micro-batches.
            names: of the T loss terms.
            terms: (micro-batches, T) on the device, of this process.
            totals: (T,) on the device, of the whole effective batch.
            scalars: found_inf, gradient norm and loss scale, () on the device.
            facts: the other fields of `StepDone`.
        """
        results = torch.cat([torch.stack(list(scalars)), totals, terms.flatten()])
        copied = None
        if results.is_cuda:
            on_host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
            results = on_host.copy_(results, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending = _PendingStep(facts, batch, rows, names, results, copied)

    def collect(self) -> StepDone | StepSkipped | None:
        """Return what became of the step last submitted; None if it has been collected."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if pending.copied is not None:
            pending.copied.synchronize()
        found_inf, gradient_norm, loss_scale, *values = pending.results.tolist()
        names, batch = pending.names, pending.batch
        totals, by_part = values[: len(names)], np.reshape(values[len(names) :], (-1, len(names)))
        terms = dict(zip(names, totals, strict=True))
        if not found_inf:
            self.skipped_in_a_row = 0
            return StepDone(**pending.facts, loss=float(np.sum(totals)), terms=terms, gradient_norm=gradient_norm)
        bad_terms = [name for name, total in terms.items() if not np.isfinite(total)]
        # float16 gradients may overflow while the loss scale is being found. A loss that is not finite, or gradients
        # that overflow at a scale of 1, are a fault.
        scale_only = self.scaled and not bad_terms and loss_scale > 1
        if not scale_only:
            self.skipped_in_a_row += 1
        # If only the gradient is not finite, any image may be the reason. If none has a bad loss here, the fault lies
        # with another process, and so does the evidence.
        parts = [part for part, row in zip(pending.rows, by_part, strict=True) if not np.isfinite(row).all()]
        indices = tuple(batch.image_indices)
        images = tuple(i for part in parts for i in indices[part]) if bad_terms else indices
        skipped = StepSkipped(
            epoch=pending.facts["epoch"],
            step=pending.facts["step"],
            terms=terms,
            term=bad_terms[0] if bad_terms else "gradient",
            images=images,
            files=tuple(self.files[i] for i in images) if len(self.files) else (),
            evidence=None,
            in_a_row=self.skipped_in_a_row,
            scale_only=scale_only,
        )
        if not images or scale_only:
            return skipped
        losses = [dict(zip(names, row.tolist(), strict=True)) for row in by_part]
        return replace(skipped, evidence=self._save_evidence(skipped, batch, losses, gradient_norm, loss_scale))

    def must_roll_back(self) -> bool:
        """Return whether so many steps in a row were skipped that the weights themselves must be at fault."""
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def reset(self) -> None:
        """Forget the pending step and the count, after a roll-back."""
        self._pending = None
        self.skipped_in_a_row = 0

    def _save_evidence(
        self, skipped: StepSkipped, batch: Batch, losses: list[dict[str, float]], gradient_norm: float, scale: float
    ) -> Path | None:
        """Write the images and losses of a skipped step; None after the first few, or if the disk is full."""
        path = self.folder / EVIDENCE_FOLDER / f"step-{skipped.step:06d}.npz"
        facts = {
            "epoch": skipped.epoch,
            "step": skipped.step,
            "term": skipped.term,
            "pictures": skipped.images,
            "files": skipped.files,
            "gradient_norm": gradient_norm,
            "loss_scale": scale,
            "terms": losses,
        }
        try:
            path.parent.mkdir(exist_ok=True)
            if len(list(path.parent.glob("*.npz"))) >= MAX_EVIDENCE_FILES:
                return None
            np.savez_compressed(
                path, facts=json.dumps(facts), images=batch.images.numpy(), image_indices=batch.image_indices
            )
        except OSError:
            return None  # a full disk must not turn a skipped step into a lost run
        return path

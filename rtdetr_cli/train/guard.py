"""Steps whose loss or gradient is not finite: skipped on the device, told a step later, never silently.

The host does not wait to learn how a step went. The figures of step n are copied to it while step n + 1 runs, and
read once that step's matching has waited for the device anyway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.datasets.records import FlatStrings
from rtdetr_cli.errors import RtdetrError

MAX_SKIPPED_IN_A_ROW = 5
MAX_ROLLBACKS = 3
EVIDENCE = "evidence"
MOST_EVIDENCE = 5


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A step that was not taken.

    Attributes:
        term: the first loss term that is not finite, or `gradient`.
        images: dataset indices of the micro-batches where it is so.
        files: their names.
        evidence: the file with the batch and all figures, or None after the first few.
        in_a_row: how many it makes now.
        scale_only: float16's loss scale was too high; it has been halved and nothing is wrong.
    """

    term: str
    images: tuple[int, ...]
    evidence: Path | None
    in_a_row: int
    scale_only: bool = False
    files: tuple[str, ...] = ()

    @classmethod
    def of_all(cls, told: Sequence[NonFinite]) -> NonFinite:
        """Join what the processes of a run say of one step: each knows its own images only."""
        first = next((s for s in told if s.images), told[0])
        evidence = next((s.evidence for s in told if s.evidence is not None), None)
        return replace(
            first,
            images=tuple(i for s in told for i in s.images),
            files=tuple(name for s in told for name in s.files),
            evidence=evidence,
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the host learns of one step."""

    epoch: int
    index: int
    step: int
    loss: float
    terms: dict[str, float]
    norm: float
    skipped: NonFinite | None


@dataclass(slots=True)
class _Pending:
    epoch: int
    index: int
    step: int
    names: tuple[str, ...]
    values: Tensor
    event: torch.cuda.Event | None
    batch: Batch
    rows: Sequence[slice]


class NonFiniteGuard:
    """Carries the figures of the last step to the host and decides what non-finite ones mean.

    Args:
        folder: of the run, for evidence.
        scaled: float16 with a loss scale.
        in_a_row: skipped steps so far, when a run goes on.
        files: names of the dataset's images, to name those of a skipped step.
    """

    def __init__(
        self, folder: Path, *, scaled: bool, in_a_row: int = 0, files: Sequence[str] | FlatStrings = ()
    ) -> None:
        self.folder = folder
        self.files = files
        self.scaled = scaled
        self.in_a_row = in_a_row
        self._pending: _Pending | None = None

    def submit(
        self,
        *,
        epoch: int,
        index: int,
        step: int,
        names: tuple[str, ...],
        terms: Tensor,
        totals: Tensor,
        found_inf: Tensor,
        norm: Tensor,
        scale: Tensor,
        batch: Batch,
        rows: Sequence[slice],
    ) -> None:
        """Take the figures of a step that has just been queued; call `collect` for the one before first.

        Args:
            epoch: from 0.
            index: of the batch in the epoch.
            step: from the start of the run.
            names: of the loss terms.
            terms: (micro-batches, terms) on the device, of this process.
            totals: (terms,) on the device, of the whole effective batch.
            found_inf: () on the device, 1 where the step was skipped.
            norm: () on the device, of the gradient.
            scale: () on the device, of the loss.
            batch: the effective batch, kept for evidence until the figures are read.
            rows: the micro-batches.
        """
        values = torch.cat([torch.stack([found_inf, norm, scale]), totals, terms.flatten()])
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            values = host
        self._pending = _Pending(epoch, index, step, names, values, event, batch, rows)

    def collect(self) -> StepResult | None:
        """Return the figures of the step last submitted, or None when there is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.event is not None:
            pending.event.synchronize()
        found_inf, norm, scale, *flat = pending.values.tolist()
        totals = np.asarray(flat[: len(pending.names)])
        terms = np.asarray(flat[len(pending.names) :]).reshape(len(pending.rows), len(pending.names))
        skipped = None
        if found_inf:
            # A float16 gradient may overflow while the scale is being found; a loss or a scale of one may not.
            scale_only = self.scaled and bool(np.isfinite(totals).all()) and scale > 1
            if not scale_only:
                self.in_a_row += 1
            skipped = self._explain(pending, terms, totals, norm, scale, scale_only)
        else:
            self.in_a_row = 0
        return StepResult(
            epoch=pending.epoch,
            index=pending.index,
            step=pending.step,
            loss=float(totals.sum()),
            terms={name: float(value) for name, value in zip(pending.names, totals, strict=True)},
            norm=norm,
            skipped=skipped,
        )

    def must_go_back(self) -> bool:
        """Tell whether so many steps in a row were skipped that the weights themselves must be at fault."""
        return self.in_a_row >= MAX_SKIPPED_IN_A_ROW

    def forget(self) -> None:
        """Drop what is pending: the run goes back to an earlier state."""
        self._pending = None
        self.in_a_row = 0

    def _explain(
        self,
        pending: _Pending,
        terms: np.ndarray[tuple[int, int], np.dtype[np.float64]],
        totals: np.ndarray[tuple[int], np.dtype[np.float64]],
        norm: float,
        scale: float,
        scale_only: bool,
    ) -> NonFinite:
        bad_rows, bad_terms = np.nonzero(~np.isfinite(terms))
        indices = pending.batch.image_indices
        images = tuple(i for row in sorted(set(bad_rows.tolist())) for i in indices[pending.rows[row]])
        bad = bad_terms if len(bad_terms) else np.flatnonzero(~np.isfinite(totals))
        term = pending.names[int(bad.min())] if len(bad) else "gradient"
        if not len(bad):
            images = tuple(indices)
        files = tuple(self.files[i] for i in images) if len(self.files) else ()
        skipped = NonFinite(term, tuple(images), None, self.in_a_row, scale_only, files)
        # Without images the fault is another process's, and so is the evidence.
        if scale_only or not images:
            return skipped
        return replace(skipped, evidence=self._leave_evidence(pending, terms, norm, scale, skipped))

    def _leave_evidence(
        self,
        pending: _Pending,
        terms: np.ndarray[tuple[int, int], np.dtype[np.float64]],
        norm: float,
        scale: float,
        skipped: NonFinite,
    ) -> Path | None:
        folder = self.folder / EVIDENCE
        try:
            folder.mkdir(exist_ok=True)
            if len(list(folder.glob("*.npz"))) >= MOST_EVIDENCE:
                return None
            path = folder / f"step-{pending.step:06d}.npz"
            batch = pending.batch
            facts = {
                "epoch": pending.epoch,
                "step": pending.step,
                "term": skipped.term,
                "pictures": list(skipped.images),
                "files": list(skipped.files),
                "gradient_norm": _number(norm),
                "loss_scale": scale,
                "terms": [{n: _number(v) for n, v in zip(pending.names, row, strict=True)} for row in terms],
            }
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


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(value)


def diverged(steps: int, rate: float, folder: Path) -> RtdetrError:
    """Return the error that ends a run which going back did not mend."""
    return RtdetrError(
        f"training diverged: {steps} steps in a row were not finite, and going back {MAX_ROLLBACKS} times, "
        f"at last with {rate:.3g} of the rate, did not help",
        hint=f"a lower --lr, --precision fp32, or look at the batches in {folder / EVIDENCE}",
        code="diverged",
    )

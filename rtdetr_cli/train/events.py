"""What happens during training, as typed events: the command line renders them, loggers and the report write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.evaluate.run import Evaluation


@dataclass(frozen=True, slots=True)
class FirstBatch:
    """The first batch of this process, as the network gets it but for multi-scale resizing."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class StepDone:
    """The optimizer has made a step. Known one step later, since the host does not wait for the device.

    Attributes:
        epoch, index, step: from 0; `index` counts within the epoch, `step` from the start of the run.
        loss: sum of the weighted terms.
        terms: weighted loss terms by name.
        gradient_norm: global norm before clipping.
        lr: of the head.
        seconds: of the step, including the wait for the loader.
        loader_seconds: how long the step waited for its batch.
        memory_bytes: peak on the device, or the resident memory of this process on a CPU.
        replaced: (image, reason) of images that could not be read and were replaced.
    """

    epoch: int
    index: int
    step: int
    loss: float
    terms: Mapping[str, float]
    gradient_norm: float
    lr: float
    seconds: float
    loader_seconds: float
    memory_bytes: int
    replaced: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Why a step was skipped.

    Attributes:
        term: the first loss term that is not finite, or `gradient`.
        images: dataset indices of the micro-batches in which it is not finite.
        files: their names.
        evidence: the file with the batch and all results; None after the first few.
        in_a_row: steps skipped in a row, including this one.
        scale_only: float16's loss scale was too high and has been halved; nothing is wrong.
    """

    term: str
    images: tuple[int, ...]
    files: tuple[str, ...]
    evidence: Path | None
    in_a_row: int
    scale_only: bool

    @classmethod
    def merge(cls, causes: Sequence[NonFinite]) -> NonFinite:
        """Merge what the processes of a run say about one step; each knows its own images only."""
        return replace(
            next((c for c in causes if c.images), causes[0]),
            images=tuple(i for c in causes for i in c.images),
            files=tuple(name for c in causes for name in c.files),
            evidence=next((c.evidence for c in causes if c.evidence is not None), None),
        )


@dataclass(frozen=True, slots=True)
class StepSkipped:
    """A step was skipped because its loss or gradient was not finite. `terms` are the loss terms as they were."""

    epoch: int
    step: int
    skipped: NonFinite
    terms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MicroBatchReduced:
    """The device ran out of memory; the same step runs again with a smaller micro-batch."""

    step: int
    micro_batch_before: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Too many steps in a row were skipped: training continues from a checkpoint with a lower learning rate."""

    step: int
    to_step: int
    rate_scale: float


@dataclass(frozen=True, slots=True)
class EvaluationStarted:
    """The steps of an epoch are done and its evaluation begins."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch is complete, with or without an evaluation.

    Attributes:
        epoch: from 0.
        epochs: of the whole run.
        step: steps made so far.
        lr: of the head at its last step.
        loss: mean over its steps; NaN if all were skipped.
        terms: mean weighted loss terms.
        metrics: of the moving average; None if this epoch was not evaluated.
        improved: the score is the best so far, and the model was written.
        best_score, best_epoch: so far; the epoch from 0, or -1.
        seconds: of the epoch with its evaluation, in this process.
        loader_share: share of the training time spent waiting for the loader.
        memory_bytes: peak.
        evaluation: where `metrics` come from; None in all processes but the first, and without an evaluation.
    """

    epoch: int
    epochs: int
    step: int
    lr: float
    loss: float
    terms: Mapping[str, float]
    metrics: Mapping[str, float | None] | None
    improved: bool
    best_score: float
    best_epoch: int
    seconds: float
    loader_share: float
    memory_bytes: int
    evaluation: Evaluation | None = None


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint was written. `reason` is `start`, `time`, `steps`, `epoch` or `stop`."""

    path: Path
    reason: str
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """Training is complete. `reason` is `done` or `patience`."""

    reason: str
    epochs: int
    best_score: float
    best_epoch: int


TrainingEvent = (
    FirstBatch
    | StepDone
    | StepSkipped
    | MicroBatchReduced
    | RolledBack
    | EvaluationStarted
    | EpochDone
    | CheckpointSaved
    | TrainingDone
)

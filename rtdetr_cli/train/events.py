"""What happens during training, as typed events: the command line renders them, loggers and the report write them.

Epochs and steps count from 0. `lr` is that of the head; `memory_bytes` is the peak on a GPU, and the resident memory of
the process on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.evaluate.run import Evaluation

SAMPLE_LOSSES = ("train_loss", "val_loss")
"""The losses of an epoch's metrics: of some training and val images, the same in each epoch, without augmentation."""


@dataclass(frozen=True, slots=True)
class FirstBatch:
    """The first batch of this process, as the network gets it but for multi-scale resizing."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class StepDone:
    """The optimizer has made a step. Known one step later, since the host does not wait for the device."""

    epoch: int
    index: int  # of the batch within the epoch
    step: int
    loss: float
    terms: Mapping[str, float]  # weighted
    gradient_norm: float  # before clipping
    lr: float
    seconds: float  # with the wait for the loader
    loader_seconds: float
    memory_bytes: int
    replaced: tuple[tuple[int, str], ...] = ()  # (image, reason) of images that could not be read


@dataclass(frozen=True, slots=True)
class StepSkipped:
    """A step was skipped because its loss or gradient was not finite."""

    epoch: int
    step: int
    terms: Mapping[str, float]
    term: str  # the first loss term that is not finite, or `gradient`
    images: tuple[int, ...]  # of the micro-batches in which it is not finite
    files: tuple[str, ...]
    evidence: Path | None  # a file with the batch and its losses; None after the first few
    in_a_row: int
    scale_only: bool  # float16's loss scale was too high and has been halved; nothing is wrong


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
    """An epoch is complete, with or without an evaluation."""

    epoch: int
    epochs: int  # of the whole run
    step: int
    lr: float
    loss: float  # the mean over its steps; NaN if all were skipped
    terms: Mapping[str, float]
    metrics: Mapping[str, float | None] | None  # and `SAMPLE_LOSSES`, of the moving average; None if not evaluated
    improved: bool  # the score is the best so far, and the model was written
    best_score: float
    best_epoch: int  # -1 for none
    seconds: float  # with the evaluation
    loader_share: float  # of the training time
    memory_bytes: int
    evaluation: Evaluation | None = None  # behind `metrics`; only in the main process


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

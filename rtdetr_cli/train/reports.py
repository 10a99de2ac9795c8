"""Everything that the loop tells, as typed values: the command line renders them, loggers and pages write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.train.guard import Skipped

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SCORE = "AP"


@dataclass(frozen=True, slots=True)
class BatchReport:
    """The first batch of a run, of this process, as the network is going to get it but for multi-scale."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step that was taken; told a step later.

    Attributes:
        epoch, index, step: from 0; `index` counts within the epoch, `step` from the start of the run.
        loss: sum of the weighted terms.
        terms: weighted loss terms by name.
        norm: global gradient norm before clipping.
        lr: of the head.
        seconds: of the step, the wait for the loader included.
        waited: seconds of it that the loader took.
        memory_bytes: peak on the device, or of this process on a CPU.
        replaced: (image, reason) of images that could not be read and were replaced.
    """

    epoch: int
    index: int
    step: int
    loss: float
    terms: Mapping[str, float]
    norm: float
    lr: float
    seconds: float
    waited: float
    memory_bytes: int
    replaced: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SkippedReport:
    """One step that was not taken, since a loss or gradient was not finite."""

    epoch: int
    step: int
    skipped: Skipped


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """The device was full: the micro-batch was cut, and the same step run again."""

    step: int
    micro_batch_before: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class WentBackReport:
    """Too many steps in a row were skipped: the run goes on from an earlier state at a lower rate."""

    step: int
    to_step: int
    rate_scale: float


@dataclass(frozen=True, slots=True)
class MeasuringReport:
    """The steps of an epoch are made, and its evaluation begins."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch, evaluated or not.

    Attributes:
        epoch: from 0.
        epochs: of the whole run.
        step: steps made so far.
        lr: of the head at its last step.
        loss: mean over its steps; NaN if all were skipped.
        terms: mean weighted loss terms.
        metrics: of the moving average, or None where this epoch was not evaluated.
        improved: this is the best so far, and was written.
        best_score, best_epoch: so far; the epoch from 0, or -1.
        seconds: of the epoch with its evaluation, in this process.
        waited_share: share of the training time that the loader took.
        memory_bytes: peak.
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
    waited_share: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class SavedReport:
    """A checkpoint was written. `reason` is `start`, `time`, `steps`, `epoch` or `stop`."""

    path: Path
    reason: str
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class FinishedReport:
    """The run is over. `reason` is `done` or `patience`."""

    reason: str
    epochs: int
    best_score: float
    best_epoch: int


Report = (
    BatchReport
    | StepReport
    | SkippedReport
    | MemoryReport
    | WentBackReport
    | MeasuringReport
    | EpochReport
    | SavedReport
    | FinishedReport
)

"""The events of a run besides those of the training loop; the command line renders them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.datasets.records import Splits
from rtdetr_cli.train.events import TrainingEvent
from rtdetr_cli.train.explain import Choice
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.weights.header import Dedupe, Thresholds
from rtdetr_cli.weights.transfer import TransferTable


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Everything is ready and the first step comes next."""

    config: RunConfig
    plan: Plan
    choices: tuple[Choice, ...]  # the reasons for the plan
    splits: Splits
    train_images: int
    val_images: int
    folder: Path | None  # None for a dry run
    device: str
    precision: str
    precision_reason: str
    workers: int
    micro_batch: int
    parameters: int
    transfer: TransferTable | None  # what was taken from the pretrained weights
    start: str  # where the weights came from, in words
    warnings: tuple[str, ...]
    processes: int = 1
    resumed: tuple[int, int] | None = None  # (epoch, step) that a resumed run continues from
    restarted: bool = False  # a resumed run had no checkpoint yet and starts from the beginning


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run is complete."""

    folder: Path
    best: Path
    metrics: Mapping[str, float | None]  # of the best epoch; None for those that the dataset cannot give
    best_epoch: int  # from 0
    epochs: int  # trained in total
    reason: str  # `done` or `patience`
    seconds: float  # of the run, with what happened before it was resumed
    dedupe: Dedupe | None = None  # how the model rescores duplicates; None for a run of an earlier version
    thresholds: Thresholds | None = None  # that `predict` uses
    explanation: str = ""  # with `--overfit`, why AP stayed below 0.9
    page: Path | None = None  # the HTML report
    val_loss: str = ""  # where the val loss stopped improving, in a sentence
    already_finished: bool = False  # a resumed run had finished before, and nothing was done


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """What a run would cost, from one worst-case step, some real ones, one evaluation and one export."""

    micro_batch: int  # images per forward pass, halved until the worst-case step fitted
    step_seconds: float  # of a usual step, with the loader
    worst_seconds: float  # of a step at the largest scale with the most boxes
    evaluation_seconds: float
    export_seconds: float
    export_bytes: int
    total_seconds: float  # of the whole run, without the export
    memory_bytes: int  # peak of the worst-case step
    memory_total: int  # of the device
    disk_bytes: int  # that the run will keep
    disk_free: int


@dataclass(frozen=True, slots=True)
class Notice:
    """A message for the user; it changes nothing in the run."""

    text: str


Event = RunStarted | TrainingEvent | Notice | RunFinished | DryRunResult

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
from rtdetr_cli.weights.transfer import TransferTable


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Everything is ready and the first step comes next.

    Attributes:
        config: the resolved settings.
        plan, choices: the schedule, and the reasons for it.
        splits: the dataset.
        train_images, val_images: used for training and evaluation.
        folder: of the run; None for a dry run.
        device, precision, precision_reason, workers, micro_batch, parameters: what it runs on and with.
        transfer: what the pretrained weights gave, or None.
        start: where the weights came from, in words.
        resumed: (epoch, step) that a resumed run continues from, or None.
        warnings: what a person should know now.
        processes: that train together.
        restarted: a resumed run had no checkpoint yet and starts from the beginning.
    """

    config: RunConfig
    plan: Plan
    choices: tuple[Choice, ...]
    splits: Splits
    train_images: int
    val_images: int
    folder: Path | None
    device: str
    precision: str
    precision_reason: str
    workers: int
    micro_batch: int
    parameters: int
    transfer: TransferTable | None
    start: str
    warnings: tuple[str, ...]
    processes: int = 1
    resumed: tuple[int, int] | None = None
    restarted: bool = False


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run is complete, and this is what it left.

    Attributes:
        folder, best: on disk.
        metrics: of the best epoch; None for those that the dataset cannot give.
        best_epoch: from 0.
        epochs: trained in total.
        reason: `done` or `patience`.
        seconds: of this process.
        explanation: with `--overfit`, why AP stayed below 0.9; empty if it did not.
        page: the HTML report; None where none was written.
        already_finished: a resumed run had finished before, and nothing was done.
    """

    folder: Path
    best: Path
    metrics: Mapping[str, float | None]
    best_epoch: int
    epochs: int
    reason: str
    seconds: float
    explanation: str = ""
    page: Path | None = None
    already_finished: bool = False


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """What a run would cost, from one worst-case step, some real ones, one evaluation and one export.

    Attributes:
        micro_batch: images per forward pass, halved until the worst-case step fitted.
        step_seconds: of a usual step, with the loader; worst_seconds: of one at the largest scale with the most boxes.
        evaluation_seconds: of one evaluation.
        export_seconds: of one export to ONNX; export_bytes: of its file.
        total_seconds: of the whole run, without the export.
        memory_bytes: peak of the worst-case step; memory_total: of the device.
        disk_bytes: that the run will keep; disk_free: on the disk of its folder.
        metrics: of the evaluation before any training.
    """

    micro_batch: int
    step_seconds: float
    worst_seconds: float
    evaluation_seconds: float
    export_seconds: float
    export_bytes: int
    total_seconds: float
    memory_bytes: int
    memory_total: int
    disk_bytes: int
    disk_free: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should know and that changes nothing."""

    text: str


Event = RunStarted | TrainingEvent | Notice | RunFinished | DryRunResult

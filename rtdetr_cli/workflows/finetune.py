"""`rtdetr train` without its words: settings in, reports out, a run folder on disk.

Refusals come in the order of what they cost: clashing settings, a taken name, a missing file, a missing device, the
dataset, the weights. The folder is made when nothing can be refused any more.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from rtdetr_cli.config.run import RunConfig, resolve_run
from rtdetr_cli.datasets.records import Splits
from rtdetr_cli.errors import DataError, ModelError, RtdetrError, UsageError
from rtdetr_cli.infer.torch_backend import choose_device
from rtdetr_cli.runs import CONFIG, RunFolder, nearest_existing, refuse_existing
from rtdetr_cli.train.checkpoint import load_checkpoint, promote_previous
from rtdetr_cli.train.events import (
    CheckpointSaved,
    EpochDone,
    MicroBatchReduced,
    RolledBack,
    StepSkipped,
    TrainingDone,
    TrainingEvent,
)
from rtdetr_cli.train.loggers import require_loggers
from rtdetr_cli.train.loop import LoopOptions, train
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.train.processes import images_per_process, join_process_group, launched, parse_devices
from rtdetr_cli.train.report import REPORT
from rtdetr_cli.train.state import Progress, restore
from rtdetr_cli.train.stop import Interrupted, StopFlag, stop_on_signals
from rtdetr_cli.train.sync_norm import synchronize_norms
from rtdetr_cli.weights.header import read_header
from rtdetr_cli.weights.hub import ShowProgress
from rtdetr_cli.weights.load import save_model
from rtdetr_cli.weights.transfer import TransferTable
from rtdetr_cli.workflows.evaluator import Evaluator, explain_overfit
from rtdetr_cli.workflows.identity import Images, check_identity, identity, look_at_images, refuse_changes
from rtdetr_cli.workflows.prepare import Prepared, compile_parts, prepare, resolve_micro_batch, versions
from rtdetr_cli.workflows.recording import Notice, Recorder
from rtdetr_cli.workflows.rehearse import DryReport, rehearse

# ---- reports ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BeginReport:
    """Everything is ready and the first step comes next.

    Attributes:
        config: the resolved settings.
        plan: what will be done.
        splits: the dataset.
        train_images, val_images: used for training and evaluation.
        folder: of the run; None for a dry run.
        device, precision, workers, micro_batch, parameters: what it runs on and with.
        transfer: what the pretrained weights gave, or None.
        start: where the weights came from, in words.
        resumed: (epoch, step) a resumed run goes on from, or None.
        begun_again: a resumed run that had no checkpoint yet, and begins as it had begun.
        warnings: what a person should know now.
        processes: that make the steps together.
    """

    config: RunConfig
    plan: Plan
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
    resumed: tuple[int, int] | None
    warnings: tuple[str, ...]
    processes: int = 1
    begun_again: bool = False


@dataclass(frozen=True, slots=True)
class EndReport:
    """What a run left behind.

    Attributes:
        folder, best: on disk.
        metrics: of the best epoch.
        best_epoch: from 0.
        epochs: made in the whole.
        reason: `done` or `patience`.
        seconds: of this process.
        explanation: with `--overfit`, why AP stayed below 0.9; empty if it did not.
        page: `report.html`; None where none was written.
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


Event = BeginReport | TrainingEvent | Notice | EndReport | DryReport


def finetune(
    config: RunConfig,
    *,
    stop: StopFlag | None = None,
    argv: Sequence[str] = (),
    dry_run: bool = False,
    fetching: ShowProgress | None = None,
) -> Iterator[Event]:
    """Train a detector from beginning to end.

    Args:
        config: the resolved settings; `data` must be set.
        stop: set by a signal handler.
        argv: for the manifest.
        dry_run: only measure; leaves nothing behind.
        fetching: shows how far a download of weights has come.

    Yields:
        BeginReport, the loop's reports, EndReport; or BeginReport and DryReport.

    Raises:
        RtdetrError: of every kind; see `train.loop.train` as well.
    """
    began = time.monotonic()
    refuse_early(config)
    config = config.anchored()
    stop = stop if stop is not None else StopFlag()
    processes = join_process_group(config.settings.device)
    prepared = prepare(config, processes, fetching=fetching)
    with prepared.loader:
        progress = Progress(micro_batch=resolve_micro_batch(prepared))
        if dry_run:
            yield begin_report(prepared, progress, None, None)
            yield rehearse(prepared, progress.micro_batch)
        else:
            images = look_at_images(prepared)
            stop.polled = True
            folder = make_folder(prepared, progress, images, argv)
            yield begin_report(prepared, progress, folder, None)
            yield from run(prepared, progress, folder, stop, began, images)
    processes.close()


def config_of(path: Path) -> RunConfig:
    """Return the settings of a run that was begun.

    Raises:
        UsageError: it is no run.
    """
    return resolve_run({}, config_file=RunFolder.open(path).path / CONFIG)


def make_folder(prepared: Prepared, progress: Progress, images: Images, argv: Sequence[str]) -> RunFolder:
    """Make the run's folder with its settings and manifest; the first process does, and tells the others its name."""
    config, processes = prepared.config, prepared.processes
    folder = None
    if processes.is_main:
        stem = f"{Path(config.preset.name).stem}-{prepared.splits.name}"
        folder = RunFolder.create(Path(config.settings.out), name=config.settings.name, stem=stem)
        folder.write(CONFIG, config.to_toml())
        folder.write_digests(images.digests)
        folder.write_manifest(manifest(prepared, progress, images, argv))
    return RunFolder(Path(processes.broadcast(str(folder.path) if folder is not None else "")))


def resume(
    path: Path, *, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = (), stop: StopFlag | None = None
) -> Iterator[Event]:
    """Go on with a run that was interrupted, as if it had not been.

    Args:
        path: the run's folder.
        flags: what was given on the command line besides; must agree with the run.
        sets: the words of `--set`, likewise.
        stop: set by a signal handler.

    Raises:
        UsageError: it is no run, is finished, or a setting is another.
        DataError: the dataset has changed.
        ModelError: the checkpoint cannot be read, or the weights of a run that had none yet.
    """
    began = time.monotonic()
    config = config_of(path) if (path / CONFIG).is_file() else None
    # Another host may have neither the folder nor a say: the first process reads for all.
    processes = join_process_group(config.settings.device if config is not None else "auto")
    read: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    damaged = ""
    if processes.is_main:
        folder = RunFolder.open(path)
        assert config is not None
        refuse_changes(config, flags or {}, sets, path)
        require_loggers(config.settings.log)
        if folder.untrained:
            first = folder.manifest()
        else:
            read, damaged = load_checkpoint(path)
    folder = RunFolder(path)
    config, damaged, first = processes.broadcast((config, damaged, first))
    state: dict[str, Any] = processes.broadcast_state(read) if first is None else {"identity": first.get("identity")}
    del read
    if first is None and state["place"]["finished"]:
        done = state["place"]["epoch"]
        raise UsageError(
            f"the run {path} is finished ({done} of {config.settings.epochs} epochs): there is nothing to resume",
            hint=f"rtdetr train --weights {folder.best} --data {config.settings.data} trains further, as a new run",
            code="run-finished",
        )
    stop = stop if stop is not None else StopFlag()
    prepared = prepare(config, processes, pretrained=first is not None)
    with prepared.loader:
        if damaged:
            prepared.warnings.append(damaged)
        images = look_at_images(prepared)
        if state["identity"] is not None:
            check_identity(state["identity"], identity(prepared, images), path, images)
        if processes.is_main:
            prepared.warnings += other_machine(prepared, folder)
            if damaged:
                promote_previous(path)
        if first is None:
            progress = Progress(micro_batch=1)
            restore(prepared.learner, progress, state, folder if processes.is_main else None)
        else:
            progress = Progress(micro_batch=first.get("micro_batch") or resolve_micro_batch(prepared))
        del state
        if processes.is_main and (
            trouble := folder.log(f"resumed at epoch {progress.epoch + 1}, step {progress.step}")
        ):
            prepared.warnings.append(trouble)
        stop.polled = True
        if first is None:
            yield begin_report(prepared, progress, folder, (progress.epoch, progress.step))
        else:
            yield replace(begin_report(prepared, progress, folder, None), begun_again=True)
        yield from run(prepared, progress, folder, stop, began, images)
    processes.close()


def other_machine(prepared: Prepared, folder: RunFolder) -> list[str]:
    """Say what will make a resumed run differ from the one left alone: versions, hardware, arithmetic."""
    manifest = folder.manifest()
    then = {**manifest.get("versions", {}), "precision": manifest.get("precision", prepared.precision)}
    now = {**versions(prepared.processes), "precision": prepared.precision}
    return [
        f"{name} was {then[name]} and is {value} now: the run goes on, but not bit for bit as it would have"
        for name, value in now.items()
        if name not in ("python", "numpy") and then.get(name, value) != value
    ]


def run(
    prepared: Prepared, progress: Progress, folder: RunFolder, stop: StopFlag, began: float, images: Images
) -> Iterator[Event]:
    """Train from `progress` to the end, and say what is left behind."""
    config, learner = prepared.config, prepared.learner
    settings = config.settings
    evaluator = Evaluator(prepared, progress, stop)
    recorder = Recorder(prepared, folder, evaluator) if prepared.processes.is_main else None
    if recorder is not None:
        yield from recorder.begin()
    # Only now: trying out how much fits is each process's own affair.
    learner.norm_sync = synchronize_norms(learner.model, prepared.processes)

    def write_best(model: nn.Module, metrics: Mapping[str, float | None], epoch: int) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        header = replace(prepared.header, metrics=known, extra={**prepared.header.extra, "epoch": epoch + 1})
        save_model(folder.best, model.state_dict(), header)

    options = LoopOptions(
        seed=settings.seed,
        patience=settings.patience,
        checkpoint_seconds=settings.checkpoint_minutes * 60,
        checkpoint_steps=settings.checkpoint_steps,
        identity=identity(prepared, images),
        files=prepared.train_set.file_names,
    )
    if settings.compile:
        compile_parts(learner.model)
    best: dict[str, float | None] = {}
    for report in train(
        learner,
        progress,
        loader=prepared.loader,
        plan=prepared.plan,
        options=options,
        folder=folder,
        evaluate_model=evaluator,
        write_best=write_best,
        stop=stop,
    ):
        if isinstance(report, TrainingDone):
            if not best and prepared.processes.is_main and folder.best.is_file():
                best = dict(read_header(folder.best).metrics)
            if prepared.processes.is_main and (trouble := folder.log(log_line(report))):
                yield Notice(trouble)
            explanation = explain_overfit(prepared, report.best_score) if settings.overfit else ""
            yield report
            if recorder is not None:
                yield from recorder.finish(report, explanation)
            page = folder.path / REPORT
            yield EndReport(
                folder=folder.path,
                best=folder.best,
                metrics=best,
                best_epoch=report.best_epoch,
                epochs=report.epochs,
                reason=report.reason,
                seconds=time.monotonic() - began,
                explanation=explanation,
                page=page if page.is_file() else None,
            )
            return
        if prepared.processes.is_main and (line := log_line(report)) and (trouble := folder.log(line)):
            yield Notice(trouble)
        if getattr(report, "improved", False):
            best = dict(getattr(report, "metrics", None) or {})
        if recorder is not None:
            yield from recorder.take(report)
        yield report


def log_line(report: TrainingEvent) -> str:
    """Return what `train.log` says of a report; empty for a step that was taken and for a save."""
    match report:
        case EpochDone():
            found = "".join(
                f"  {k} {v:.4f}" for k in ("AP", "AP50") if (v := (report.metrics or {}).get(k)) is not None
            )
            return (
                f"epoch {report.epoch + 1}/{report.epochs}  step {report.step}  lr {report.lr:.3g}  "
                f"loss {report.loss:.4f}{found}  {report.seconds:.1f} s  waited {report.loader_share:.0%}  "
                f"{report.memory_bytes / 1e9:.2f} GB"
            )
        case StepSkipped():
            skipped = report.skipped
            return (
                f"step {report.step} skipped: {skipped.term} not finite, {skipped.in_a_row} in a row, "
                f"images {', '.join(skipped.files)}"
            )
        case MicroBatchReduced():
            return f"step {report.step}: out of memory, micro-batch {report.micro_batch_before} -> {report.micro_batch}"
        case RolledBack():
            return f"step {report.step}: went back to step {report.to_step}, rate x {report.rate_scale:.3g}"
        case CheckpointSaved(reason="stop"):
            return f"stopped at epoch {report.epoch + 1}, step {report.step}; saved"
        case TrainingDone():
            return f"finished ({report.reason}), best AP {report.best_score:.4f} at epoch {report.best_epoch + 1}"
        case _:
            return ""


# ---- refusing ---------------------------------------------------------------------------------------------------


def refuse_early(config: RunConfig) -> None:
    """Refuse what can be refused without reading a dataset or a model.

    Raises:
        UsageError, DataError, ModelError, EnvironmentProblem, RtdetrError: what is wrong.
    """
    settings, preset = config.settings, config.preset
    if settings.data is None:
        raise UsageError("no dataset is named", hint="rtdetr train --data DATA", code="data-missing")
    if settings.weights in ("coco", "imagenet"):
        published = preset.weights if settings.weights == "coco" else preset.imagenet
        if published is None:
            raise UsageError(
                f"--weights {settings.weights}: preset {preset.name} has no such published weights",
                hint="--weights none, or a model file",
                code="weights-unknown",
            )
    if isinstance(settings.batch, int) and settings.batch > settings.effective_batch and config.given("batch"):
        raise UsageError(
            f"--batch {settings.batch} is more than --effective-batch {settings.effective_batch}",
            hint=f"--batch is what lies on the device at once; --effective-batch {settings.batch} raises the other",
            code="batch-clash",
        )
    if int(os.environ.get("RANK", "0")) == 0 or not launched():
        require_loggers(settings.log)
        if settings.name:
            refuse_existing(Path(settings.out), settings.name)
    if not Path(settings.data).exists():
        raise DataError(f"the dataset {settings.data} does not exist", code="dataset-missing")
    if settings.weights not in ("coco", "imagenet", "none") and not Path(settings.weights).exists():
        raise ModelError(
            f"the weights {settings.weights} do not exist",
            hint="--weights coco, imagenet, none or a file",
            code="model-missing",
        )
    out = nearest_existing(Path(settings.out))
    if not out.is_dir() or not os.access(out, os.W_OK | os.X_OK):
        raise RtdetrError(
            f"the output folder {settings.out} cannot be written", hint="--out DIR names another", code="not-writable"
        )
    if not launched():
        # Those of a process that is one of many are looked at when it joins the others.
        devices = parse_devices(settings.device)
        for device in devices:
            choose_device(device)
        images_per_process(settings.effective_batch, len(devices))


# ---- telling ----------------------------------------------------------------------------------------------------


def begin_report(
    prepared: Prepared, progress: Progress, folder: RunFolder | None, resumed: tuple[int, int] | None
) -> BeginReport:
    """Gather what is said before the first step."""
    return BeginReport(
        config=prepared.config,
        plan=prepared.plan,
        splits=prepared.splits,
        train_images=len(prepared.train_set),
        val_images=len(prepared.val_set),
        folder=folder.path if folder else None,
        device=str(prepared.learner.device),
        precision=prepared.precision,
        precision_reason=prepared.precision_reason,
        workers=prepared.workers,
        micro_batch=progress.micro_batch,
        parameters=sum(p.numel() for p in prepared.learner.model.parameters()),
        transfer=prepared.transfer,
        start=prepared.start,
        resumed=resumed,
        warnings=tuple(prepared.warnings),
        processes=prepared.processes.size,
    )


def manifest(prepared: Prepared, progress: Progress, images: Images, argv: Sequence[str]) -> dict[str, Any]:
    """Return the run's record: what was asked, of what, with what; enough to begin it again."""
    return {
        "argv": list(argv or sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(prepared.processes),
        "dataset": {"source": str(prepared.splits.source), **prepared.header.dataset, "format": prepared.splits.format},
        "weights": prepared.start,
        "precision": prepared.precision,
        "micro_batch": progress.micro_batch,
        "identity": identity(prepared, images),
        "plan": {**asdict(prepared.plan)},
        "transfer": asdict(prepared.transfer) if prepared.transfer is not None else None,
    }


__all__ = ["BeginReport", "DryReport", "EndReport", "Interrupted", "Notice", "finetune", "resume", "stop_on_signals"]

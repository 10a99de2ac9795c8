"""`rtdetr train` without its words: settings in, reports out, a run folder on disk.

Refusals come in the order of what they cost: clashing settings, a taken name, a missing file, a missing device, the
dataset, the weights. The folder is made when nothing can be refused any more.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

import rtdetr_cli
from rtdetr_cli.config.presets import flatten
from rtdetr_cli.config.run import RunConfig, resolve_run
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.data.augment import load_augmentation
from rtdetr_cli.data.loader import TrainLoader
from rtdetr_cli.data.read import load_splits
from rtdetr_cli.data.records import Dataset, Splits
from rtdetr_cli.errors import DataError, ModelError, UsageError
from rtdetr_cli.evaluate.classes import ClassMap, map_classes
from rtdetr_cli.evaluate.run import Detected, Evaluation, conclude, detect
from rtdetr_cli.infer.torch_backend import TorchBackend, choose_device
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.header import ModelHeader
from rtdetr_cli.model.hub import fetch
from rtdetr_cli.model.transfer import TransferTable, load_backbone, transfer_weights
from rtdetr_cli.model.weights import load_model, save_model
from rtdetr_cli.train import memory
from rtdetr_cli.train.checkpoint import load_checkpoint
from rtdetr_cli.train.loggers import require_loggers
from rtdetr_cli.train.loop import (
    EpochReport,
    EvaluationStopped,
    FinishedReport,
    Interrupted,
    Learner,
    LoopOptions,
    MemoryReport,
    Place,
    Report,
    SavedReport,
    SkippedReport,
    StopFlag,
    WentBackReport,
    peak_bytes,
    restore,
    snapshot,
    train,
    worst_step,
)
from rtdetr_cli.train.losses import Criterion
from rtdetr_cli.train.optim import MovingAverage, NormStatistics, Stepper, parameter_groups
from rtdetr_cli.train.plan import Plan, make_plan
from rtdetr_cli.train.precision import choose_precision
from rtdetr_cli.train.report import REPORT
from rtdetr_cli.train.run_folder import CONFIG, RunFolder, refuse_existing
from rtdetr_cli.train.sync_norm import synchronise_norms
from rtdetr_cli.train.team import SOLO, Team, join, launched, parse_devices, share_of
from rtdetr_cli.workflows.recording import Notice, Recorder

# Settings that say where things lie and how the machine is used; a resumed run may not change them either, but they
# do not make it another run for the checkpoint.
PLACES = (
    "data",
    "images",
    "out",
    "name",
    "workers",
    "cache",
    "log",
    "device",
    "checkpoint_minutes",
    "checkpoint_steps",
    "plots",
)


# ---- reports ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BeginReport:
    """Everything is ready and the first step comes next.

    Attributes:
        config: the resolved settings.
        plan: what will be done.
        splits: the dataset.
        train_pictures, val_pictures: used for training and evaluation.
        folder: of the run; None for a dry run.
        device, precision, workers, micro_batch, parameters: what it runs on and with.
        transfer: what the pretrained weights gave, or None.
        start: where the weights came from, in words.
        resumed: (epoch, step) a resumed run goes on from, or None.
        warnings: what a person should know now.
        processes: that make the steps together.
    """

    config: RunConfig
    plan: Plan
    splits: Splits
    train_pictures: int
    val_pictures: int
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


@dataclass(frozen=True, slots=True)
class DryReport:
    """What a run would cost, from one worst-case step, some real ones and one evaluation.

    Attributes:
        step_seconds: of a usual step, with the loader; worst_seconds: of one at the largest scale with most boxes.
        evaluation_seconds: of one evaluation.
        total_seconds: of the whole run.
        memory_bytes: peak of the worst step; memory_total: of the device.
        disk_bytes: that the run will keep; disk_free: where it will lie.
        metrics: of the evaluation before any training.
    """

    step_seconds: float
    worst_seconds: float
    evaluation_seconds: float
    total_seconds: float
    memory_bytes: int
    memory_total: int
    disk_bytes: int
    disk_free: int
    metrics: Mapping[str, float | None]


Event = BeginReport | Report | Notice | EndReport | DryReport


# ---- what a run is made of --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Prepared:
    """A run that can begin: everything is loaded and on its device."""

    config: RunConfig
    splits: Splits
    train_set: Dataset
    val_set: Dataset
    plan: Plan
    learner: Learner
    team: Team
    loader: TrainLoader
    header: ModelHeader
    precision: str
    precision_reason: str
    workers: int
    start: str
    transfer: TransferTable | None
    warnings: list[str] = field(default_factory=list)

    @property
    def most_boxes(self) -> int:
        """Boxes of the fullest training picture."""
        return int(np.diff(self.train_set.offsets).max(initial=1))


def finetune(
    config: RunConfig, *, stop: StopFlag | None = None, argv: Sequence[str] = (), dry_run: bool = False
) -> Iterator[Event]:
    """Train a detector from beginning to end.

    Args:
        config: the resolved settings; `data` must be set.
        stop: set by a signal handler.
        argv: for the manifest.
        dry_run: only measure; leaves nothing behind.

    Yields:
        BeginReport, the loop's reports, EndReport; or BeginReport and DryReport.

    Raises:
        RtdetrError: of every kind; see `train.loop.train` as well.
    """
    began = time.monotonic()
    refuse_early(config)
    config = from_anywhere(config)
    team = join(config.settings.device)
    prepared = prepare(config, team)
    micro = resolve_micro_batch(prepared)
    place = Place(micro_batch=micro)
    if dry_run:
        with prepared.loader:
            yield begin_report(prepared, place, None, None)
            yield rehearse(prepared, micro)
        team.leave()
        return
    with prepared.loader:
        folder = make_folder(prepared, argv)
        yield begin_report(prepared, place, folder, None)
        yield from run(prepared, place, folder, stop if stop is not None else StopFlag(), began)
    team.leave()


def from_anywhere(config: RunConfig) -> RunConfig:
    """Make the paths of a run absolute, so that it can be resumed from another folder."""
    settings = config.settings
    paths = {k: os.path.abspath(v) for k in ("data", "images") if (v := getattr(settings, k)) is not None}
    for key in ("weights", "aug", "preset"):
        value = getattr(settings, key)
        if os.sep in value or Path(value).suffix in (".toml", ".json", ".yaml", ".yml", ".safetensors", ".pth"):
            paths[key] = os.path.abspath(value)
    return replace(config, settings=settings.model_copy(update=paths))


def config_of(path: Path) -> RunConfig:
    """Return the settings of a run that was begun.

    Raises:
        UsageError: it is no run.
    """
    return resolve_run({}, config_file=RunFolder.open(path).path / CONFIG)


def make_folder(prepared: Prepared, argv: Sequence[str]) -> RunFolder:
    """Make the run's folder with its settings and manifest; the first process does, and tells the others its name."""
    config, team = prepared.config, prepared.team
    folder = None
    if team.leads:
        stem = f"{Path(config.preset.name).stem}-{prepared.splits.name}"
        folder = RunFolder.create(Path(config.settings.out), name=config.settings.name, stem=stem)
        folder.write(CONFIG, config.to_toml())
        folder.write_manifest(manifest(prepared, argv))
    return RunFolder(Path(team.tell(str(folder.path) if folder is not None else "")))


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
        ModelError: the checkpoint cannot be read.
    """
    began = time.monotonic()
    config = config_of(path) if (path / CONFIG).is_file() else None
    # Another host may have neither the folder nor a say: the first process reads for all.
    team = join(config.settings.device if config is not None else "auto")
    read: dict[str, Any] | None = None
    damaged = ""
    if team.leads:
        folder = RunFolder.open(path)
        assert config is not None
        refuse_changes(config, flags or {}, sets, path)
        read, damaged = load_checkpoint(path)
    folder = RunFolder(path)
    config, damaged = team.tell((config, damaged))
    state = team.tell_state(read)
    del read
    if state["place"]["finished"]:
        done = state["place"]["epoch"]
        raise UsageError(
            f"the run {path} is finished ({done} of {config.settings.epochs} epochs): there is nothing to resume",
            hint=f"rtdetr train --weights {folder.best} --data ... trains further, as a new run",
            code="run-finished",
        )
    prepared = prepare(config, team, pretrained=False)
    if damaged:
        prepared.warnings.append(damaged)
    check_identity(state["identity"], identity(prepared), path)
    then = folder.manifest().get("versions", {}) if team.leads else {}
    for name, version in versions(team).items():
        if name not in ("python", "numpy") and then.get(name, version) != version:
            prepared.warnings.append(
                f"{name} was {then[name]} and is {version} now: the run goes on, but not bit for bit as it would have"
            )
    place = Place(micro_batch=1)
    restore(prepared.learner, place, state, folder if team.leads else None)
    del state
    if team.leads:
        folder.log(f"resumed at epoch {place.epoch + 1}, step {place.step}")
    with prepared.loader:
        yield begin_report(prepared, place, folder, (place.epoch, place.step))
        yield from run(prepared, place, folder, stop if stop is not None else StopFlag(), began)
    team.leave()


def run(prepared: Prepared, place: Place, folder: RunFolder, stop: StopFlag, began: float) -> Iterator[Event]:
    """Train from `place` to the end, and say what is left behind."""
    config, learner = prepared.config, prepared.learner
    settings = config.settings
    evaluator = Evaluator(prepared, place, stop)
    recorder = Recorder(prepared, folder, evaluator) if prepared.team.leads else None
    if recorder is not None:
        yield from recorder.begin()
    # Only now: trying out how much fits is each process's own affair.
    learner.chorus = synchronise_norms(learner.model, prepared.team)

    def write_best(model: nn.Module, metrics: Mapping[str, float | None], epoch: int) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        header = replace(prepared.header, metrics=known, extra={**prepared.header.extra, "epoch": epoch + 1})
        save_model(folder.best, model.state_dict(), header)

    options = LoopOptions(
        seed=settings.seed,
        patience=settings.patience,
        checkpoint_seconds=settings.checkpoint_minutes * 60,
        checkpoint_steps=settings.checkpoint_steps,
        identity=identity(prepared),
    )
    if settings.compile:
        # In place, and only the parts whose shapes stay: the decoder's change with every denoising group.
        learner.model.backbone.compile()
        learner.model.encoder.compile()
    best: dict[str, float | None] = {}
    for report in train(
        learner,
        place,
        loader=prepared.loader,
        plan=prepared.plan,
        options=options,
        folder=folder,
        evaluate_model=evaluator,
        write_best=write_best,
        stop=stop,
    ):
        if isinstance(report, FinishedReport):
            if not best and prepared.team.leads and folder.best.is_file():
                from rtdetr_cli.model.weights import read_header

                best = dict(read_header(folder.best).metrics)
            if prepared.team.leads:
                folder.log(log_line(report))
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
        if prepared.team.leads and (line := log_line(report)):
            folder.log(line)
        if getattr(report, "improved", False):
            best = dict(getattr(report, "metrics", None) or {})
        if recorder is not None:
            yield from recorder.take(report)
        yield report


def log_line(report: Report) -> str:
    """Return what `train.log` says of a report; empty for a step that was taken and for a save."""
    match report:
        case EpochReport():
            found = "".join(
                f"  {k} {v:.4f}" for k in ("AP", "AP50") if (v := (report.metrics or {}).get(k)) is not None
            )
            return (
                f"epoch {report.epoch + 1}/{report.epochs}  step {report.step}  lr {report.lr:.3g}  "
                f"loss {report.loss:.4f}{found}  {report.seconds:.1f} s  waited {report.waited_share:.0%}  "
                f"{report.memory_bytes / 1e9:.2f} GB"
            )
        case SkippedReport():
            skipped = report.skipped
            return (
                f"step {report.step} skipped: {skipped.term} not finite, {skipped.in_a_row} in a row, "
                f"pictures {', '.join(map(str, skipped.pictures))}"
            )
        case MemoryReport():
            return f"step {report.step}: out of memory, micro-batch {report.micro_batch_before} -> {report.micro_batch}"
        case WentBackReport():
            return f"step {report.step}: went back to step {report.to_step}, rate x {report.rate_scale:.3g}"
        case SavedReport(reason="stop"):
            return f"stopped at epoch {report.epoch + 1}, step {report.step}; saved"
        case FinishedReport():
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
    out = Path(settings.out).absolute()
    while not out.exists():
        out = out.parent
    if not out.is_dir() or not os.access(out, os.W_OK | os.X_OK):
        from rtdetr_cli.errors import RtdetrError

        raise RtdetrError(
            f"the output folder {settings.out} cannot be written", hint="--out DIR names another", code="not-writable"
        )
    if not launched():
        # Those of a process that is one of many are looked at when it joins the others.
        devices = parse_devices(settings.device)
        for device in devices:
            choose_device(device)
        share_of(settings.effective_batch, len(devices))


def refuse_changes(config: RunConfig, flags: Mapping[str, Any], sets: Sequence[str], path: Path) -> None:
    """Refuse a setting that differs from the resumed run's.

    Raises:
        UsageError: it names the setting and both values.
    """
    now = resolve_run(dict(flags), sets=sets)
    given = {*flags, *(w.partition("=")[0].strip() for w in sets)}
    before = {**flatten(config.settings), **_tables(config)}
    after = {**flatten(now.settings), **_tables(now)}
    for key in sorted(given):
        old, new = before.get(key), after.get(key)
        if key in ("data", "images", "out") and old is not None and new is not None:
            old, new = os.path.abspath(str(old)), os.path.abspath(str(new))
        if old != new:
            raise UsageError(
                f"--resume {path}: {key} is {_words(old)} in this run, not {_words(new)}",
                hint="a resumed run needs no other flag; a new run takes --weights from it",
                code="resume-changed",
            )


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with another dataset, other settings or another plan than the checkpoint's.

    Raises:
        DataError: the dataset.
        UsageError: a setting or a planned value.
    """
    if saved["dataset"] != now["dataset"]:
        differing = [k for k in now["dataset"] if saved["dataset"].get(k) != now["dataset"][k] and k != "fingerprint"]
        told = "; ".join(
            f"{k} {_words(saved['dataset'].get(k))} then, {_words(now['dataset'][k])} now" for k in differing
        )
        raise DataError(
            f"the dataset has changed since the run {path} began"
            + (f": {told}" if told else ": boxes, names or sizes"),
            hint="put it back as it was, or start a new run with --weights " + str(path / "best.safetensors"),
            code="resume-dataset",
        )
    for part in ("settings", "plan"):
        for key in sorted({*saved[part], *now[part]}):
            if saved[part].get(key) != now[part].get(key):
                raise UsageError(
                    f"--resume {path}: {key} was {_words(saved[part].get(key))} when the run began, "
                    f"and is {_words(now[part].get(key))} now",
                    hint=f"undo the change in {path / CONFIG}"
                    if part == "settings"
                    else "finish the run with the version of rtdetr-cli that began it",
                    code="resume-changed",
                )


def _tables(config: RunConfig) -> dict[str, Any]:
    model, optim = flatten(config.preset.model, "model."), flatten(config.preset.optim, "optim.")
    return {**model, **optim}


def _words(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return what a checkpoint belongs to: dataset, settings and plan as plain values."""
    config = prepared.config
    settings = {k: v for k, v in flatten(config.settings).items() if k not in PLACES}
    plan = {k: v for k, v in prepared.plan.to_dict().items() if k not in ("choices", "warnings")}
    splits = prepared.splits
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "dataset": {
                    "fingerprint": splits.fingerprint,
                    "training pictures": len(prepared.train_set),
                    "validation pictures": len(prepared.val_set),
                    "classes": list(splits.train.names) if splits.train else [],
                },
                "settings": {**settings, **_tables(config)},
                "plan": plan,
            }
        )
    )
    return plain


# ---- preparing --------------------------------------------------------------------------------------------------


def prepare(config: RunConfig, team: Team = SOLO, *, pretrained: bool = True) -> Prepared:
    """Load dataset and weights and put everything that learns on its device.

    Args:
        config: the resolved settings.
        team: the processes of the run.
        pretrained: False when the tensors come from a checkpoint anyway.
    """
    settings, preset = config.settings, config.preset
    warnings: list[str] = []
    device = choose_device(team.device if team.many else settings.device)
    chosen = choose_precision(settings.precision, device)
    batch_size = share_of(settings.effective_batch, team.size)
    augmentation = load_augmentation("none" if settings.overfit and not config.given("aug") else settings.aug)

    # ---- data
    assert settings.data is not None
    splits = load_splits(
        Path(settings.data),
        images=Path(settings.images) if settings.images else None,
        val_fraction=settings.val_fraction,
        seed=settings.seed,
    )
    train_set, val_set = training_sets(splits, config, warnings)
    alike = {k: v for k, v in versions(team).items() if k in ("torch", "rtdetr-cli")}
    refuse_differences(team, {"dataset": splits.fingerprint, "precision": chosen.name, **alike})

    # ---- plan
    spec = resolve_freezing(config, warnings)
    boxes = int(np.count_nonzero(~train_set.crowd))
    if not boxes:
        raise DataError(
            f"no picture to train on has a box ({len(train_set)} pictures in {settings.data})",
            hint=f"rtdetr validate {settings.data}",
            code="split-no-objects",
        )
    plan = make_plan(config, pictures=len(train_set))
    warnings += plan.warnings

    # ---- model
    torch.manual_seed(settings.seed)
    if device.type == "cuda":
        # TF32 halves the time of float32 products and is far finer than the noise of a batch.
        torch.set_float32_matmul_precision("high")
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    model = build_detector(
        spec, num_classes=len(train_set.categories), sampling=settings.sampling, rounding=settings.rounding
    )
    table, start = None, f"random weights, seed {settings.seed}"
    if pretrained and settings.weights != "none" and team.leads:
        table, start = load_start(model, config, train_set)
    freeze(model, settings.freeze)
    if settings.deterministic and device.type == "cuda" and settings.sampling == "bilinear":
        # The backward pass of grid_sample adds in no fixed order; that of a gather can.
        model.set_sampling("bilinear", operator="gather")
    model = model.to(device).to(memory_format=torch.channels_last)
    team.spread(list(model.state_dict().values()))
    learner = make_learner(model, config, spec, plan, device, chosen.dtype)
    learner.team = team

    workers = choose_workers(device) if settings.workers == "auto" else settings.workers
    loader = TrainLoader(
        train_set,
        imgsz=config.imgsz,
        batch_size=batch_size,
        seed=settings.seed,
        augmentation=augmentation,
        workers=workers,
        cache=settings.cache,
        rank=team.rank,
        world_size=team.size,
        pin_memory=device.type == "cuda",
    )
    header = ModelHeader(
        names=train_set.names,
        category_ids=train_set.category_ids,
        imgsz=config.imgsz,
        architecture=spec.model_dump(mode="json"),
        preset=preset.name,
        sampling=settings.sampling,
        rounding=settings.rounding,
        layers=spec.eval_layers,
        queries=spec.queries,
        dataset={
            "name": splits.name,
            "fingerprint": splits.fingerprint,
            "train": len(train_set),
            "val": len(val_set),
        },
        version=rtdetr_cli.__version__,
        extra={"weights": start},
    )
    return Prepared(
        config=config,
        splits=splits,
        train_set=train_set,
        val_set=val_set,
        plan=plan,
        learner=learner,
        team=team,
        loader=loader,
        header=header,
        precision=chosen.name,
        precision_reason=chosen.reason,
        workers=workers,
        start=start,
        transfer=table,
        warnings=warnings,
    )


def make_learner(
    model: RTDETR, config: RunConfig, spec: ModelSpec, plan: Plan, device: torch.device, autocast: torch.dtype | None
) -> Learner:
    """Put optimizer, moving average and losses around a model on its device."""
    groups = parameter_groups(model, config.preset.optim, lr=plan.lr, lr_backbone=plan.lr_backbone)
    if not groups:
        raise UsageError(f"--freeze {config.settings.freeze} leaves nothing to train", code="freeze")
    return Learner(
        model=model,
        average=MovingAverage(model),
        stepper=Stepper(groups, clip_norm=config.preset.optim.clip_norm, scaled=autocast == torch.float16),
        criterion=Criterion(num_classes=model.num_classes),
        spec=spec,
        device=device,
        autocast=autocast,
        norms=NormStatistics(model),
    )


def training_sets(splits: Splits, config: RunConfig, warnings: list[str]) -> tuple[Dataset, Dataset]:
    """Return what is trained on and what is measured on.

    Raises:
        DataError: there is no training split, or no picture in it.
    """
    settings = config.settings
    train_set, val_set = splits.train, splits.val
    if train_set is None or not len(train_set):
        raise DataError(
            f"{splits.source} has no training pictures", hint=f"rtdetr validate {splits.source}", code="dataset-empty"
        )
    if settings.overfit:
        wanted = min(settings.overfit, len(train_set))
        few = train_set.subset(range(wanted))
        # Repeated, so that an epoch is worth an evaluation.
        times = max(1, math.ceil(OVERFIT_STEPS * settings.effective_batch / wanted))
        return train_set.subset(list(range(wanted)) * times), replace(few, split="val")
    if val_set is None or not len(val_set):
        if splits.test is not None and len(splits.test):
            warnings.append("the dataset has no val split: the test split is used to choose the best epoch")
            return train_set, splits.test
        count = max(1, round(settings.val_fraction * len(train_set)))
        if len(train_set) < 2:
            warnings.append("the only picture is both trained and measured on")
            return train_set, replace(train_set, split="val")
        drawn = np.sort(np.random.default_rng(settings.seed).permutation(len(train_set))[:count])
        rest = np.setdiff1d(np.arange(len(train_set)), drawn)
        warnings.append(f"the dataset has no val split: {count} of {len(train_set)} pictures were drawn for it")
        return train_set.subset(rest), train_set.subset(drawn, split="val")
    return train_set, val_set


OVERFIT_STEPS = 20


def resolve_freezing(config: RunConfig, warnings: list[str]) -> ModelSpec:
    """Return the model's sizes with what `--freeze` and random weights change of them."""
    settings, spec = config.settings, config.preset.model
    if settings.freeze == "none":
        return spec.model_copy(update={"freeze_at": -1})
    if settings.freeze != "preset":
        return spec
    if settings.weights == "none" and (spec.freeze_at >= 0 or spec.freeze_norm):
        warnings.append(
            f"preset {config.preset.name} freezes part of the backbone; with random weights nothing is frozen"
        )
        return spec.model_copy(update={"freeze_at": -1, "freeze_norm": False})
    return spec


def freeze(model: RTDETR, what: str) -> None:
    """Freeze the stem, the backbone, or backbone and encoder; norms of frozen parts keep their statistics."""
    if what == "stem":
        model.backbone.freeze(0)
    elif what in ("backbone", "encoder"):
        model.backbone.freeze(4)
        model.backbone.requires_grad_(False)
        if what == "encoder":
            model.encoder.requires_grad_(False)


def load_start(model: RTDETR, config: RunConfig, train_set: Dataset) -> tuple[TransferTable, str]:
    """Fill a model from `--weights`.

    Returns:
        What came from where, and the start in words.
    """
    weights, preset = config.settings.weights, config.preset
    if weights == "imagenet":
        assert preset.imagenet is not None
        path = fetch(preset.imagenet)
        return load_backbone(model, path), f"ImageNet backbone {path.name}"
    if weights == "coco":
        assert preset.weights is not None
        path = fetch(preset.weights)
    else:
        path = Path(weights)
        if path.is_dir():
            path = path / "best.safetensors"
    source, header = load_model(path)
    table = transfer_weights(
        model, source.state_dict(), source_names=header.names, target_names=train_set.names, source=str(path)
    )
    return table, path.name


def choose_workers(device: torch.device) -> int:
    """Return how many processes load pictures: on a CPU they compete with the network for the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        return max(1, min(8, cores - 1))
    return 1 if cores <= 4 else min(4, cores // 4)


def resolve_micro_batch(prepared: Prepared) -> int:
    """Return how many pictures go onto the device at once."""
    settings, learner, team = prepared.config.settings, prepared.learner, prepared.team
    own = share_of(settings.effective_batch, team.size)
    plan = replace(prepared.plan, effective_batch=own)
    if isinstance(settings.batch, int):
        return min(settings.batch, own)
    most = prepared.most_boxes

    def attempt(micro: int) -> None:
        worst_step(learner, plan, most_boxes=most, micro_batch=micro, parts=1)

    one = memory.saved_bytes(lambda: worst_forward(prepared))
    free = memory.free_bytes(learner.device)
    found = memory.fitting_micro_batch(
        own,
        bytes_for_one=one,
        # Processes on CPUs share the host's memory.
        free=free if learner.device.type == "cuda" else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        attempt=attempt if learner.device.type == "cuda" else None,
        where=str(learner.device),
    )
    return team.least(found)


def worst_forward(prepared: Prepared) -> object:
    """Run one picture of the largest scale with the most boxes forward, and return what came out."""
    from rtdetr_cli.train.loop import as_input, step_denoising, worst_batch

    learner = prepared.learner
    one = replace(prepared.plan, effective_batch=1)
    batch = worst_batch(one, most_boxes=prepared.most_boxes, num_classes=learner.model.num_classes)
    group = step_denoising(learner, batch, step=0, seed=0)
    learner.train_mode()
    learner.norms.keep()
    size = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    inputs = as_input(batch.images.to(learner.device), size)
    with torch.autocast(learner.device.type, learner.autocast, enabled=learner.autocast is not None):
        outputs = learner.model(inputs, group.to(learner.device) if group is not None else None)
    learner.norms.restore()
    return outputs


# ---- evaluating -------------------------------------------------------------------------------------------------


class Evaluator:
    """Measures a model on the val split, in float32: the figures that `rtdetr eval` gives for the same weights.

    Each process looks at its share of the pictures; the first judges all that was found, once.
    """

    def __init__(self, prepared: Prepared, place: Place, stop: StopFlag) -> None:
        self.prepared = prepared
        self.batch = max(1, min(16, place.micro_batch))
        self.stop = stop
        self.last: Evaluation | None = None  # the first process's

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        """Return the twelve numbers.

        Raises:
            EvaluationStopped: a signal came, to whichever process.
        """
        assert isinstance(model, RTDETR)
        prepared, team = self.prepared, self.prepared.team
        began = time.monotonic()
        classes = map_classes(prepared.header.names, prepared.val_set)
        mine = np.arange(team.rank, len(prepared.val_set), team.size)
        backend = TorchBackend(model, prepared.header, device=prepared.learner.device)
        found = self._detect(backend, prepared.val_set.subset(mine), classes)
        if team.any(found is None):
            raise EvaluationStopped
        parts = team.collect((mine, found))
        metrics: dict[str, float | None] = {}
        if team.leads:
            took = time.monotonic() - began
            self.last = conclude(prepared.val_set, Detected.join(parts), classes, seconds=took)
            metrics = dict(self.last.metrics)
        told: dict[str, float | None] = team.tell(metrics)
        return told

    def _detect(self, backend: TorchBackend, share: Dataset, classes: ClassMap) -> Detected | None:
        """Return what is found in a share; None when a signal came."""
        while True:
            try:
                return detect(backend, share, batch=self.batch, progress=self._watch, label_map=classes.labels)
            except EvaluationStopped:
                return None
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
            memory.release(self.prepared.learner.device)
            self.batch = memory.smaller(self.batch, where=str(self.prepared.learner.device))

    def _watch(self, done: int) -> None:
        if self.stop:
            raise EvaluationStopped


def explain_overfit(prepared: Prepared, score: float) -> str:
    """Say why a model could not learn a few pictures by heart; empty if it could."""
    if score > 0.9:
        return ""
    boxes = prepared.val_set.boxes_xyxy_px
    reasons = []
    counts = np.diff(prepared.val_set.offsets)
    queries = prepared.config.preset.model.queries
    if len(counts) and counts.max() > queries:
        reasons.append(f"a picture has {counts.max()} boxes and the model {queries} queries")
    height, width = prepared.config.imgsz
    if len(boxes):
        pictures = np.repeat(np.arange(len(counts)), counts)
        scale = np.array([width, height]) / prepared.val_set.sizes_wh[pictures]
        sides = ((boxes[:, 2:] - boxes[:, :2]) * scale).min(1)
        small = float((sides < 8).mean())
        if small > 0.1:
            reasons.append(f"{small:.0%} of the boxes are under 8 pixels at {height}x{width}: a larger --imgsz")
        keys = np.concatenate([pictures[:, None], boxes.round(1)], 1)
        unique = len(np.unique(keys, axis=0))
        if unique < len(boxes):
            reasons.append(f"{len(boxes) - unique} boxes lie exactly on another one")
    steps = prepared.plan.total_steps
    if steps < 1000:
        reasons.append(
            f"{steps} steps are few to learn by heart: --epochs {math.ceil(1000 / prepared.plan.steps_per_epoch)}"
        )
    if prepared.config.settings.freeze in ("backbone", "encoder"):
        reasons.append(f"--freeze {prepared.config.settings.freeze} leaves little that can learn")
    return "; ".join(reasons) or "the rate may not suit these pictures: try --lr twice as high or half"


# ---- measuring without training ---------------------------------------------------------------------------------


def rehearse(prepared: Prepared, micro: int) -> DryReport:
    """Run a worst-case step, a few real ones and one evaluation, and work out what the run will cost."""
    learner, settings = prepared.learner, prepared.config.settings
    plan = replace(prepared.plan, effective_batch=share_of(settings.effective_batch, prepared.team.size))
    worst_step(learner, plan, most_boxes=prepared.most_boxes, micro_batch=micro, parts=1)  # warms kernels up
    if learner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(learner.device)
    begun = time.monotonic()
    worst_step(learner, plan, most_boxes=prepared.most_boxes, micro_batch=micro)
    worst = time.monotonic() - begun
    peak = peak_bytes(learner.device)
    step = _real_steps(prepared, micro)
    begun = time.monotonic()
    metrics = Evaluator(prepared, Place(micro_batch=micro), StopFlag())(learner.average.module)
    evaluation = time.monotonic() - begun
    evaluations = sum(plan.evaluates(e) for e in range(plan.epochs))
    state = snapshot(learner, Place(micro_batch=micro), {}, 0)
    checkpoint = _bytes(state)
    out = Path(settings.out).absolute()
    while not out.exists():
        out = out.parent
    total = (
        torch.cuda.get_device_properties(learner.device).total_memory
        if learner.device.type == "cuda"
        else memory.free_bytes(learner.device) + peak
    )
    return DryReport(
        step_seconds=step,
        worst_seconds=worst,
        evaluation_seconds=evaluation,
        total_seconds=step * plan.total_steps + evaluation * evaluations,
        memory_bytes=peak,
        memory_total=int(total),
        disk_bytes=3 * checkpoint + _bytes(dict(learner.average.module.state_dict())),
        disk_free=shutil.disk_usage(out).free,
        metrics=metrics,
    )


def _real_steps(prepared: Prepared, micro: int, count: int = 4) -> float:
    """Return the seconds of a step on real batches, the loader included; nothing is learned."""
    from rtdetr_cli.train.loop import accumulate, step_denoising

    learner, plan, settings = prepared.learner, prepared.plan, prepared.config.settings
    learner.train_mode()
    learner.norms.keep()
    batches = prepared.loader.epoch(0, strong=plan.strong_until > 0)
    times = []
    for step in range(min(count, plan.steps_per_epoch)):
        begun = time.monotonic()
        batch = next(batches)
        group = step_denoising(learner, batch, step=step, seed=settings.seed)
        rows = memory.micro_batches(len(batch.labels), micro)
        size = plan.scales[len(plan.scales) // 2]
        accumulate(learner, batch, rows=rows, size=size, group=group, num_boxes=1.0)
        learner.stepper.zero_grad()
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
        times.append(time.monotonic() - begun)
    learner.norms.restore()
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    # The first waits for the loader's processes to start.
    return min(times[1:] or times) if len(times) < 3 else sorted(times[1:])[len(times[1:]) // 2]


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    return sum(_bytes(v) for v in value) if isinstance(value, (list, tuple)) else 0


# ---- telling ----------------------------------------------------------------------------------------------------


def begin_report(
    prepared: Prepared, place: Place, folder: RunFolder | None, resumed: tuple[int, int] | None
) -> BeginReport:
    """Gather what is said before the first step."""
    return BeginReport(
        config=prepared.config,
        plan=prepared.plan,
        splits=prepared.splits,
        train_pictures=len(prepared.train_set),
        val_pictures=len(prepared.val_set),
        folder=folder.path if folder else None,
        device=str(prepared.learner.device),
        precision=prepared.precision,
        precision_reason=prepared.precision_reason,
        workers=prepared.workers,
        micro_batch=place.micro_batch,
        parameters=sum(p.numel() for p in prepared.learner.model.parameters()),
        transfer=prepared.transfer,
        start=prepared.start,
        resumed=resumed,
        warnings=tuple(prepared.warnings),
        processes=prepared.team.size,
    )


def refuse_differences(team: Team, own: Mapping[str, str]) -> None:
    """Refuse a run whose processes would not do the same.

    Raises:
        UsageError: it names what differs, and where.
    """
    told = team.gather(dict(own))
    for key, value in told[0].items():
        for rank, other in enumerate(told):
            if other[key] != value:
                short = "another one" if key == "dataset" else other[key]
                raise UsageError(
                    f"the processes of the run differ: {key} is {value[:12]} in process 0, {short} in process {rank}",
                    hint="the same dataset, GPUs and versions on every host"
                    + (", or --precision fp32" if key == "precision" else ""),
                    code="team-differs",
                )


def versions(team: Team = SOLO) -> dict[str, str]:
    """Return what the numbers of a run depend on."""
    return {
        "rtdetr-cli": rtdetr_cli.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "processes": str(team.size),
    }


def manifest(prepared: Prepared, argv: Sequence[str]) -> dict[str, Any]:
    """Return the run's record: what was asked, of what, with what."""
    return {
        "argv": list(argv or sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(prepared.team),
        "dataset": {"source": str(prepared.splits.source), **prepared.header.dataset, "format": prepared.splits.format},
        "weights": prepared.start,
        "precision": prepared.precision,
        "plan": {**asdict(prepared.plan)},
        "transfer": asdict(prepared.transfer) if prepared.transfer is not None else None,
    }


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Let SIGINT and SIGTERM ask for an end; a second one of either ends at once."""
    flag = StopFlag()
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        flag.number = number
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.getsignal(number)
            signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["BeginReport", "DryReport", "EndReport", "Interrupted", "Notice", "finetune", "resume", "stop_on_signals"]

"""Training from settings to a finished run folder, as a stream of events; the command line renders them.

The cheapest checks come first: clashing settings, a taken name, a missing file, a missing device, the dataset, the
weights. The run folder is created after the last check.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from rtdetr_cli.config.image_size import STRIDE
from rtdetr_cli.config.presets import flatten, load_preset, preset_names
from rtdetr_cli.config.run import NAMED, RunConfig, resolve_run
from rtdetr_cli.config.settings import PUBLISHED_WEIGHTS
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.evaluate.coco import METRICS
from rtdetr_cli.evaluate.post_processing import fit_post_processing
from rtdetr_cli.evaluate.run import Evaluation
from rtdetr_cli.infer.torch_backend import choose_device
from rtdetr_cli.runs import CONFIG, RunFolder, nearest_existing, refuse_existing, timestamp
from rtdetr_cli.train.checkpoint import load_checkpoint, promote_previous
from rtdetr_cli.train.events import TrainingDone
from rtdetr_cli.train.explain import plan_warnings
from rtdetr_cli.train.loggers import require_loggers
from rtdetr_cli.train.loop import Trainer
from rtdetr_cli.train.processes import images_per_process, join_process_group, launched, parse_devices
from rtdetr_cli.train.report import val_loss_note
from rtdetr_cli.train.state import Progress, restore
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.train.sync_norm import synchronize_norms
from rtdetr_cli.weights.download import ShowProgress
from rtdetr_cli.weights.header import read_header
from rtdetr_cli.weights.load import save_model
from rtdetr_cli.workflows.dry_run import measure_run
from rtdetr_cli.workflows.evaluator import Evaluator
from rtdetr_cli.workflows.events import Event, RunFinished, RunStarted
from rtdetr_cli.workflows.identity import Identity, check_identity, identify, refuse_changes
from rtdetr_cli.workflows.launching import require_dataset
from rtdetr_cli.workflows.prepare import Prepared, compiled, prepare, resolve_micro_batch, versions
from rtdetr_cli.workflows.recording import Recorder


def finetune(
    config: RunConfig,
    *,
    stop: StopFlag | None = None,
    argv: Sequence[str] = (),
    dry_run: bool = False,
    fetching: ShowProgress | None = None,
) -> Iterator[Event]:
    """Train a detector from start to finish; a dry run only measures, and leaves nothing behind.

    Args:
        config: the resolved settings; `data` must be set.
        stop: set by a signal handler.
        argv: for the manifest.
        dry_run: yield DryRunResult after RunStarted, in place of the loop's events and RunFinished.
        fetching: shows the progress of a download of weights.

    Raises:
        RtdetrError: the run cannot start, or training fails.
    """
    began = time.monotonic()
    refuse_early(config)
    config = config.anchored()
    stop = stop if stop is not None else StopFlag()
    processes = join_process_group(config.settings.device)
    prepared = prepare(config, processes, fetching=fetching)
    with prepared.loader, ExitStack() as lock:
        progress = Progress(micro_batch=resolve_micro_batch(prepared))
        if dry_run:
            yield _run_started(prepared, progress, None)
            yield measure_run(prepared, progress.micro_batch)
        else:
            identity = identify(prepared)
            stop.polled = True
            folder = _make_folder(prepared, progress, identity, argv, lock)
            yield _run_started(prepared, progress, folder)
            yield from _train(prepared, progress, folder, stop, began, identity)
    processes.close()


def resume(
    path: Path, *, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = (), stop: StopFlag | None = None
) -> Iterator[Event]:
    """Resume an interrupted run, as if it had never stopped; only RunFinished where nothing is left to do.

    `flags` and `sets` are what else was given on the command line, and must agree with the run.

    Raises:
        UsageError: the folder is not a run, another process is training it, or a setting has changed.
        DataError: the dataset has changed.
        ModelError: the checkpoint cannot be read, or the weights of a run that had no checkpoint yet.
    """
    began = time.monotonic()
    config = run_config(path) if (path / CONFIG).is_file() else None
    # Another host may not have the folder: the main process reads it for all.
    processes = join_process_group(config.settings.device if config is not None else "auto")
    folder = RunFolder(path)
    finished, warning = "", ""
    untrained: dict[str, Any] | None = None  # the manifest of a run without a checkpoint
    checkpoint: dict[str, Any] | None = None
    with ExitStack() as lock:
        if processes.is_main:
            RunFolder.open(path)
            assert config is not None
            refuse_changes(config, flags or {}, sets, path)
            finished = folder.finished
            if not finished:
                lock.enter_context(folder.lock())
                require_loggers(config.settings.log)
                if folder.untrained:
                    untrained = folder.manifest()
                else:
                    checkpoint, warning = load_checkpoint(path)
        config, finished, warning, untrained = processes.broadcast((config, finished, warning, untrained))
        if finished:
            if processes.is_main:
                yield _run_finished(folder, finished, began, already_finished=True)
            processes.close()
            return
        state: dict[str, Any] = untrained if untrained is not None else processes.broadcast_state(checkpoint)
        del checkpoint
        stop = stop if stop is not None else StopFlag()
        prepared = prepare(config, processes, pretrained=untrained is not None, run=folder)
        with prepared.loader:
            identity = identify(prepared)
            if state.get("identity") is not None:
                check_identity(state["identity"], identity, path)
            prepared.warnings += [warning] if warning else []
            if processes.is_main:
                prepared.warnings += _changed_versions(prepared, folder)
                if warning:
                    promote_previous(path)
            if untrained is not None:
                progress = Progress(micro_batch=untrained.get("micro_batch") or resolve_micro_batch(prepared))
            else:
                progress = Progress()
                began -= restore(prepared.learner, progress, state, folder if processes.is_main else None)
            del state
            if processes.is_main:
                problem = folder.log(f"resumed at epoch {progress.epoch + 1}, step {progress.step}")
                prepared.warnings += [problem] if problem else []
            at = None if untrained is not None else (progress.epoch, progress.step)
            stop.polled = True
            yield replace(_run_started(prepared, progress, folder), resumed=at, restarted=untrained is not None)
            yield from _train(prepared, progress, folder, stop, began, identity)
    processes.close()


def run_config(path: Path) -> RunConfig:
    """Return the settings of a run that was started.

    Raises:
        UsageError: the folder is not a run, or is an interrupted run of version 0.1.
        ModelError: its `config.toml` is damaged.
    """
    folder = RunFolder.open(path)
    folder.refuse_old()
    try:
        config = resolve_run({}, config_file=folder.config)
    except UsageError as error:
        raise ModelError(error.message, hint=folder.usable(), code="run-damaged") from error
    if config.settings.data is None:
        raise folder.damaged(CONFIG, "it names no dataset")
    return config


def _train(
    prepared: Prepared, progress: Progress, folder: RunFolder, stop: StopFlag, began: float, identity: Identity
) -> Iterator[Event]:
    """Train from `progress` to the end, and report what the run left."""
    settings, is_main = prepared.config.settings, prepared.processes.is_main
    evaluator = Evaluator(prepared, progress, stop)
    recorder = Recorder(prepared, folder) if is_main else None
    # Only now, since each process has to measure alone how much fits into its memory. The model is changed in place.
    norm_sync = synchronize_norms(prepared.learner.model, prepared.processes)
    learner = replace(prepared.learner, norm_sync=norm_sync)

    def write_best(model: nn.Module, evaluation: Evaluation, epoch: int) -> None:
        assert recorder is not None
        header, recorder.best = fit_post_processing(prepared.header, evaluation)
        save_model(folder.best, model.state_dict(), replace(header, extra={**header.extra, "epoch": epoch + 1}))

    trainer = Trainer(
        learner=learner,
        progress=progress,
        loader=prepared.loader,
        plan=prepared.plan,
        folder=folder,
        evaluate_model=evaluator,
        write_best=write_best,
        stop=stop,
        settings=settings,
        identity=identity.facts,
        files=prepared.train_set.file_names,
        began=began,
    )
    with compiled(learner.model, settings.compile):
        for event in trainer.train():
            if recorder is not None:
                yield from recorder.record(event)
            yield event
            if isinstance(event, TrainingDone) and recorder is not None:
                folder.mark_finished(event.reason)
                yield _run_finished(folder, event.reason, began, explanation=recorder.explanation)


# ---- refusals ---------------------------------------------------------------------------------------------------


def refuse_early(config: RunConfig) -> None:
    """Refuse what can be refused without reading a dataset or a model.

    Raises:
        RtdetrError: a setting, file, package or device cannot be used.
    """
    settings, preset = config.settings, config.preset
    if settings.data is None:
        raise UsageError("no dataset given", hint="rtdetr train --data DATA", code="data-missing")
    texts = [value for value in flatten(config.anchored().settings).values() if isinstance(value, str)]
    if names := [text for text in texts if text.encode("utf-8", "replace").decode() != text]:
        raise UsageError(
            f"the settings of a run are written as UTF-8, which this is not: {', '.join(names)}",
            hint="rename the folder or file",
            code="not-utf8",
        )
    if max(config.imgsz) == STRIDE:  # its coarsest feature map is a single value, which batch norm cannot learn from
        raise UsageError(f"--imgsz {STRIDE} is too small for training", hint=f"--imgsz {2 * STRIDE}", code="size")
    field = PUBLISHED_WEIGHTS.get(settings.weights)
    if field is not None and getattr(preset, field) is None:
        having = ", ".join(name for name in preset_names() if getattr(load_preset(name), field))
        raise UsageError(
            f"--weights {settings.weights}: preset {preset.name} has no such published weights",
            hint=f"--weights none, or a model file, or one of the presets that have them: {having}",
            code="weights-unknown",
        )
    if isinstance(settings.batch, int) and settings.batch > settings.effective_batch and config.given("batch"):
        raise UsageError(
            f"--batch {settings.batch} is larger than --effective-batch {settings.effective_batch}",
            hint="--batch is the number of images per forward pass; to take more images per optimizer step, "
            f"use --effective-batch {settings.batch}",
            code="batch-clash",
        )
    if not launched() or os.environ.get("RANK", "0") == "0":
        require_loggers(settings.log)
        if settings.name:
            refuse_existing(Path(settings.out), settings.name)
    require_dataset(settings.data)
    if settings.weights not in NAMED["weights"] and not Path(settings.weights).exists():
        raise ModelError(
            f"the weights {settings.weights} do not exist",
            hint=f"--weights {', '.join(NAMED['weights'])} or a file",
            code="model-missing",
        )
    out = nearest_existing(Path(settings.out))
    if not out.is_dir() or not os.access(out, os.W_OK | os.X_OK):
        raise RtdetrError(
            f"cannot write to the output folder {settings.out}",
            hint="choose another folder with --out DIR",
            code="not-writable",
        )
    if not launched():  # a launched process checks its own device when it joins the others
        devices = parse_devices(settings.device)
        for device in devices:
            choose_device(device)
        images_per_process(settings.effective_batch, len(devices))


# ---- parts ------------------------------------------------------------------------------------------------------


def _make_folder(
    prepared: Prepared, progress: Progress, identity: Identity, argv: Sequence[str], lock: ExitStack
) -> RunFolder:
    """Make the run's folder with its settings and manifest, and lock it; all processes get its path."""
    settings, processes, splits = prepared.config.settings, prepared.processes, prepared.splits
    if not processes.is_main:
        return RunFolder(Path(processes.broadcast("")))
    stem = f"{Path(prepared.config.preset.name).stem}-{splits.name}"
    folder = RunFolder.create(Path(settings.out), name=settings.name, stem=stem)
    lock.enter_context(folder.lock())
    folder.write(CONFIG, prepared.config.to_toml())
    folder.write_digests(identity.digests)
    if splits.split_made and splits.val is not None:
        folder.write_val_images(splits.val.file_names)
    folder.write_manifest(
        {
            "argv": list(argv or sys.argv),
            "started": timestamp(),
            "finished": None,
            "versions": versions(processes),
            "dataset": {"source": str(splits.source), **prepared.header.dataset, "format": splits.format},
            "weights": prepared.start,
            "precision": prepared.precision.name,
            "micro_batch": progress.micro_batch,
            "identity": identity.facts,
            "plan": {
                **asdict(prepared.plan),
                "choices": [asdict(choice) for choice in prepared.choices],
                "warnings": list(plan_warnings(prepared.config, prepared.plan, images=len(prepared.train_set))),
            },
            "transfer": asdict(prepared.transfer) if prepared.transfer is not None else None,
        }
    )
    processes.broadcast(str(folder.path))
    return folder


def _changed_versions(prepared: Prepared, folder: RunFolder) -> list[str]:
    """Warn of what will make a resumed run differ from one that never stopped: versions, hardware, precision."""
    manifest = folder.manifest()
    before = {**manifest.get("versions", {}), "precision": manifest.get("precision", prepared.precision.name)}
    now = {**versions(prepared.processes), "precision": prepared.precision.name}
    return [
        f"{name} was {before[name]} and is {value} now: the resumed run will not be identical bit for bit"
        for name, value in now.items()
        if name not in ("python", "numpy") and before.get(name, value) != value
    ]


def _run_started(prepared: Prepared, progress: Progress, folder: RunFolder | None) -> RunStarted:
    return RunStarted(
        config=prepared.config,
        plan=prepared.plan,
        choices=prepared.choices,
        splits=prepared.splits,
        train_images=len(prepared.train_set),
        val_images=len(prepared.val_set),
        folder=folder.path if folder else None,
        device=str(prepared.learner.device),
        precision=prepared.precision.name,
        precision_reason=prepared.precision.reason,
        workers=prepared.workers,
        micro_batch=progress.micro_batch,
        parameters=sum(p.numel() for p in prepared.learner.model.parameters()),
        transfer=prepared.transfer,
        start=prepared.start,
        warnings=tuple(prepared.warnings),
        processes=prepared.processes.size,
    )


def _run_finished(folder: RunFolder, reason: str, began: float, **more: Any) -> RunFinished:
    header = read_header(folder.best)
    return RunFinished(
        folder=folder.path,
        best=folder.best,
        metrics={name: header.metrics.get(name) for name in METRICS},
        best_epoch=int(header.extra.get("epoch", 0)) - 1,
        epochs=len(folder.metrics()),
        reason=reason,
        dedupe=header.dedupe,
        thresholds=header.thresholds,
        seconds=time.monotonic() - began,
        page=folder.report if folder.report.is_file() else None,
        val_loss=val_loss_note(folder.metrics()),
        **more,
    )

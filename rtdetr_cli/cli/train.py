"""`rtdetr train`: finetune a detector. The words of it; the work is `workflows/finetune.py`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rtdetr_cli.config.run import RunConfig
    from rtdetr_cli.workflows.finetune import BeginReport, DryReport, EndReport, Event

FLAGS_OF_THE_COMMAND = ("resume", "dry_run", "set_values", "config_file", "as_json")
SET_HELP = (
    "Any setting: schedule=official, optim.clip_norm=1. `rtdetr presets show NAME` lists model.* and optim.*, "
    "a run's config.toml lists all."
)


def train(
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="COCO JSON, Roboflow folder, YOLO data.yaml or VOC folder; required."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if they are not beside the JSON.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="tiny, r18, r34, r50m, r50, r101. [r18]")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", "-w", help="Start: coco, imagenet, none, or a model file. [coco]")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", "-e", help="Passes over the images. [50]")] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", "-b", help="Images on the device at once, or auto. [auto]")
    ] = None,
    effective_batch: Annotated[int | None, typer.Option(help="Images in a step of the optimizer. [16]")] = None,
    imgsz: Annotated[str | None, typer.Option(help="Input size: 640, or height first 480x640. [the preset's]")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. [the preset's, scaled to the effective batch]")
    ] = None,
    lr_backbone: Annotated[float | None, typer.Option(help="The backbone's. [the preset's share of --lr]")] = None,
    aug: Annotated[
        str | None,
        typer.Option(
            help="auto (light in short runs, else recipe), recipe, light, none, or an Albumentations file. [auto]"
        ),
    ] = None,
    freeze: Annotated[
        str | None, typer.Option(help="What stays as it is: preset, none, stem, backbone, encoder. [preset]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16. [auto]")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile", help="Compile backbone and encoder.")] = None,
    workers: Annotated[str | None, typer.Option(help="Processes that load images, or auto. [auto]")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Keep decoded images: none, ram or disk (--set cache_gb=4). [none]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, 0, or several: 0,1. [auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [0]")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="CUDA: gather sampling, deterministic kernels.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better AP; 0: never. [0]")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run; needs no other flag.")
    ] = None,
    overfit: Annotated[int | None, typer.Option(metavar="N", help="Learn the first N images by heart.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, try the worst step, say time, memory and disk.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. [runs]")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; an existing one is refused.")] = None,
    log: Annotated[str | None, typer.Option(help="Besides the CSV: tensorboard,wandb,mlflow.")] = None,
    set_values: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="TOML of settings, such as a run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON document on one line.")] = False,
) -> None:
    """Finetune a detector on your own images."""
    given = {
        "data": data and str(data),
        "images": images and str(images),
        "preset": preset,
        "weights": weights,
        "epochs": epochs,
        "batch": _number_or_word(batch),
        "effective_batch": effective_batch,
        "imgsz": imgsz,
        "lr": lr,
        "lr_backbone": lr_backbone,
        "aug": aug,
        "freeze": freeze,
        "precision": precision,
        "compile": compile_,
        "workers": _number_or_word(workers),
        "cache": cache,
        "device": device,
        "seed": seed,
        "deterministic": deterministic,
        "patience": patience,
        "overfit": overfit,
        "out": out and str(out),
        "name": name,
        "log": tuple(w for w in log.split(",") if w) if log is not None else None,
    }
    flags: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if imgsz is not None:
        from rtdetr_cli.cli.select import parse_size

        flags["imgsz"] = parse_size(imgsz)
    sets = set_values or []
    if resume is not None and (dry_run or config_file is not None):
        from rtdetr_cli.errors import UsageError

        raise UsageError(f"--resume goes with neither {'--dry-run' if dry_run else '--config'} nor new settings")
    if resume is None:
        _refuse_missing(flags, sets, config_file)

    from rtdetr_cli.config.run import resolve_run

    config = resolve_run(flags, sets=sets, config_file=config_file) if resume is None else None
    if config is not None:
        _refuse_early(config.settings.data)

    if config is not None:
        config = _as_the_weights_say(config, flags, sets, config_file)

    from rtdetr_cli.workflows import finetune as workflow

    _start_processes(given, sets, config_file, resume, dry_run, as_json, config)
    with workflow.stop_on_signals() as stop:
        if resume is not None:
            events = workflow.resume(resume, flags=flags, sets=sets, stop=stop)
        else:
            assert config is not None
            import sys

            from rtdetr_cli.cli import terminal

            events = workflow.finetune(config, stop=stop, argv=sys.argv, dry_run=dry_run, fetching=terminal.transfer)
        if _leads():
            render(events, as_json=as_json)
        else:
            deque(events, maxlen=0)  # another process of the run speaks for all


def _as_the_weights_say(
    config: RunConfig, flags: dict[str, Any], sets: list[str], config_file: Path | None
) -> RunConfig:
    """Take preset, input size and sizes of the model from the file of weights, where nobody has named a preset."""
    from rtdetr_cli.config.run import resolve_run

    weights = config.settings.weights
    if config.source("preset") != "default" or weights in ("coco", "imagenet", "none"):
        return config

    from rtdetr_cli.workflows.start import settings_of

    found = settings_of(weights)
    if found is None:
        return config
    path, values = found
    config = resolve_run(flags, sets=sets, config_file=config_file, inherited=(str(path), values))
    taken = [f"{key} {_shown(value)}" for key, value in values.items() if config.source(key) == str(path)]

    from rtdetr_cli.train import launch

    if taken and _leads() and not launch.supervised():  # whoever starts several processes has said it
        from rtdetr_cli.cli import terminal

        terminal.say(f"from {path}: {_some(taken, 5)}")
    return config


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _start_processes(
    given: dict[str, Any],
    sets: list[str],
    config_file: Path | None,
    resume: Path | None,
    dry_run: bool,
    as_json: bool,
    config: RunConfig | None,
) -> None:
    """Start a process for each device and wait, where several are named; return where this one is to train.

    Raises:
        typer.Exit: the run is over.
    """
    from rtdetr_cli.train import launch
    from rtdetr_cli.train.processes import launched, parse_devices
    from rtdetr_cli.workflows import finetune as workflow

    if launched():
        if launch.supervised():
            launch.end_with_starter()
        return
    if config is None:
        assert resume is not None
        config = workflow.config_of(resume)
    devices = parse_devices(config.settings.device)
    if len(devices) == 1:
        return
    if resume is None:
        workflow.refuse_early(config)
    argv = ["train", *(word for key, value in given.items() for word in _flag(key, value))]
    argv += [word for value in sets for word in ("--set", value)]
    argv += [word for key, value in {"config": config_file, "resume": resume}.items() for word in _flag(key, value)]
    argv += ["--dry-run"] * dry_run + ["--json"] * as_json
    raise typer.Exit(launch.supervise(argv, devices))


def _leads() -> bool:
    from rtdetr_cli.train.processes import launched

    return not launched() or int(os.environ["RANK"]) == 0


def _flag(key: str, value: Any) -> list[str]:
    """Return a setting as it is written on the command line."""
    if value is None or value is False:
        return []
    name = f"--{key.replace('_', '-')}"
    return [name] if value is True else [name, ",".join(value) if isinstance(value, tuple) else str(value)]


def _number_or_word(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def _refuse_missing(flags: dict[str, Any], sets: list[str], config_file: Path | None) -> None:
    """Refuse a call without a dataset, before anything is imported."""
    if "data" not in flags and config_file is None and not any(w.startswith("data=") for w in sets):
        from rtdetr_cli.errors import UsageError

        raise UsageError(
            "no dataset is named: --data is required",
            hint="rtdetr train --preset r18 --data my.json",
            code="data-missing",
        )


def _refuse_early(data: str | None) -> None:
    """Refuse a dataset that is not there, before torch is imported."""
    if data is not None and not Path(data).exists():
        from rtdetr_cli.errors import DataError

        raise DataError(f"the dataset {data} does not exist", hint="check the path", code="dataset-missing")


# ---- words ------------------------------------------------------------------------------------------------------


def render(events: Iterator[Event], *, as_json: bool = False, result_on_stdout: bool = True) -> dict[str, Any]:
    """Say what happens, on stderr, and the result on stdout; return the result as plain values.

    Args:
        events: of `workflows.finetune`.
        as_json: the result is one JSON line, else a table.
        result_on_stdout: False where the run is a part of something larger that has a result of its own.
    """
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.train.events import (
        EpochDone,
        EvaluationStarted,
        MicroBatchReduced,
        RolledBack,
        StepDone,
        StepSkipped,
    )
    from rtdetr_cli.workflows import finetune as workflow

    begun: workflow.BeginReport | None = None
    bar = _StepBar()
    result: dict[str, Any] = {}
    try:
        for event in events:
            match event:
                case EvaluationStarted():
                    bar.measure(event)
                case workflow.BeginReport():
                    begun = event
                    _say_beginning(event)
                    bar.begin(event)
                case StepDone():
                    bar.step(event)
                    for image, reason in event.replaced:
                        bar.say(f"warning: image {image} was replaced: {reason}")
                case EpochDone():
                    assert begun is not None
                    bar.say(epoch_line(event, bar.seconds_left(event)))
                case StepSkipped():
                    bar.say(skipped_line(event))
                case MicroBatchReduced():
                    bar.say(
                        f"warning: out of memory at step {event.step + 1}: micro-batch {event.micro_batch_before} -> "
                        f"{event.micro_batch}, same effective batch; the step is run again"
                    )
                case RolledBack():
                    bar.say(
                        f"warning: went back from step {event.step} to step {event.to_step}, "
                        f"with {event.rate_scale:.3g} of the learning rate"
                    )
                case workflow.Notice():
                    bar.say(f"warning: {event.text}")
                case workflow.DryReport():
                    bar.end()
                    assert begun is not None
                    result = dry_document(event, begun)
                    if not as_json:
                        _show_dry(event, begun)
                case workflow.EndReport():
                    bar.end()
                    result = end_document(event)
                    if result_on_stdout and not as_json:
                        _show_end(event)
                    if event.explanation:
                        terminal.warn(f"the images were not learned by heart: {event.explanation}")
                case _:
                    pass
    finally:
        bar.end()
        # Not left to the collector: whatever has happened, the loader's processes end here.
        close = getattr(events, "close", None)
        if close is not None:
            close()
    if as_json and result_on_stdout:
        terminal.emit_json(result)
    return result


def _say_beginning(report: BeginReport) -> None:
    from importlib.metadata import version

    from rtdetr_cli.cli import terminal
    from rtdetr_cli.version import __version__

    preset, splits = report.config.preset, report.splits
    # A resumed run has had its full look at the images; what reading the labels finds is a part of that.
    warned = 0 if report.resumed else sum(f.severity == "warning" for f in splits.findings)
    device = report.device if report.processes == 1 else f"{report.device.partition(':')[0]} x {report.processes}"
    parts = [
        f"rtdetr {__version__}",
        f"torch {'.'.join(version('torch').split('.')[:2])} {device} {report.precision}",
        f" preset {preset.name} ({report.parameters / 1e6:.1f}M)",
        f" data {splits.name}: {_images(report)}, "
        f"{len(splits.categories)} class{'es' if len(splits.categories) != 1 else ''}"
        + (f", {warned} warning{'s' if warned > 1 else ''} (rtdetr validate)" if warned else ""),
    ]
    _lay("  ".join(parts))
    if splits.split_made and report.resumed is None and not report.config.settings.overfit:
        whole, settings = report.train_images + report.val_images, report.config.settings
        drawn = f"{report.val_images} of {whole} images were drawn for it (seed {settings.seed})"
        _lay(f"split  no val split in the dataset: {drawn}")
    table = report.transfer
    if table is None:
        _lay(f"start  {report.start}" if report.resumed is None else "start  the run's own checkpoint")
    else:
        _lay(f"start  {report.start}: {table.tensors_loaded} of {table.tensors_total} tensors")
        if table.by_class:
            kept = [
                f"{r.name}" if r.name == r.source_name else f"{r.name} <- {r.source_name}"
                for r in table.classes
                if r.source_name
            ]
            fresh = [r.name for r in table.classes if r.source_name is None]
            if kept:
                _lay(f"  carried over by name  {_some(kept)}", indent=24)
            if fresh:
                _lay(f"  made anew             {_some(fresh)}", indent=24)
            _lay(f"  in  {_some(list(table.by_class), 3)}")
    _lay(report.plan.line(report.micro_batch, report.processes))
    for choice in report.plan.choices:
        _lay(f"  {choice.name:<20} {choice.value:<34} {choice.reason}", indent=23)
    given = report.config.given("batch") and report.config.settings.batch != "auto"
    at_once = report.config.source("batch") if given else "what fits"
    terminal.say(f"  {'micro-batch':<20} {report.micro_batch:<34} {at_once}")
    terminal.say(f"  {'precision':<20} {report.precision:<34} {report.precision_reason}")
    if report.folder is not None:
        terminal.say(f"run  {report.folder}")
    if report.begun_again:
        terminal.say("resumed at step 0: the run was killed before its first checkpoint, and begins with its settings")
    elif report.resumed is not None:
        terminal.say(f"resumed at epoch {report.resumed[0] + 1}, step {report.resumed[1]}")
    for warning in report.warnings:
        terminal.warn(_laid(warning, indent=9, first=9))


def _images(report: BeginReport) -> str:
    """Return how many images are trained and measured on; with `--overfit` they are the same ones, repeated."""
    few = report.val_images
    if report.config.settings.overfit:
        times = report.train_images // few
        often = "once" if times == 1 else f"{times} times"
        return f"{few} image{'s' if few > 1 else ''}, {often} an epoch, measured on the same"
    return f"{report.train_images}/{few} images"


def _lay(text: str, *, indent: int = 6) -> None:
    from rtdetr_cli.cli import terminal

    terminal.say(_laid(text, indent=indent))


def _laid(text: str, *, indent: int, first: int = 0) -> str:
    """Fold a line between words where a terminal would fold it within one; leave it whole in a pipe.

    Args:
        text: a line.
        indent: of what follows the first fold.
        first: columns that are taken before it.
    """
    import shutil
    import textwrap

    from rtdetr_cli.cli import terminal

    if not terminal.is_terminal():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    folded = textwrap.fill(
        " " * first + text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return folded[first:]


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def epoch_line(report: Any, seconds_left: float) -> str:
    """Return one epoch on one line."""
    from rtdetr_cli.cli import terminal

    parts = [f"epoch {report.epoch + 1}/{report.epochs}", f"loss {report.loss:.2f}"]
    if report.metrics is not None:
        best = f" (best {report.best_score:.3f} @{report.best_epoch + 1})" if report.best_epoch >= 0 else ""
        parts.append(f"AP {terminal.show(report.metrics.get('AP'))}{best}")
        parts.append(f"AP50 {terminal.show(report.metrics.get('AP50'))}")
    parts += [f"{report.memory_bytes / 1e9:.1f} GB", terminal.duration(report.seconds)]
    if report.epoch + 1 < report.epochs:
        parts.append(f"{terminal.duration(seconds_left)} left")
    return "  ".join(parts)


def skipped_line(report: Any) -> str:
    """Return what is said of a step that was not taken."""
    skipped = report.skipped
    if skipped.scale_only:
        return f"step {report.step + 1} skipped: the float16 loss scale was too high and has been halved"
    files = f" ({_some(list(skipped.files), 4)})" if skipped.files else ""
    left = f"; evidence in {skipped.evidence}" if skipped.evidence else ""
    return (
        f"warning: step {report.step + 1} skipped: {skipped.term} is not finite{files}, "
        f"{skipped.in_a_row} in a row{left}"
    )


def end_document(report: EndReport) -> dict[str, Any]:
    """Return the result of a run as plain values."""
    return {
        "run": str(report.folder),
        "best": str(report.best),
        "metrics": dict(report.metrics),
        "best_epoch": report.best_epoch + 1,
        "epochs": report.epochs,
        "stopped": report.reason,
        "seconds": round(report.seconds, 1),
        "explanation": report.explanation or None,
    }


def dry_document(report: DryReport, begun: BeginReport) -> dict[str, Any]:
    """Return the rehearsal as plain values."""
    return {
        "plan": [{"name": c.name, "value": c.value, "reason": c.reason} for c in begun.plan.choices],
        "micro_batch": report.micro_batch,
        "seconds": {
            "step": report.step_seconds,
            "worst_step": report.worst_seconds,
            "evaluation": report.evaluation_seconds,
            "export": report.export_seconds,
            "total": report.total_seconds,
        },
        "memory_bytes": report.memory_bytes,
        "memory_total": report.memory_total,
        "disk_bytes": report.disk_bytes,
        "disk_free": report.disk_free,
        "export_bytes": report.export_bytes,
        "warnings": [*begun.warnings, *dry_warnings(report)],
    }


def dry_warnings(report: DryReport) -> list[str]:
    """Say what the run would be refused for, or end with."""
    from rtdetr_cli.train.checkpoint import has_room

    warnings = []
    if not has_room(report.disk_bytes, report.disk_free):
        warnings.append(
            f"the run keeps {report.disk_bytes / 1e9:.2f} GB and {report.disk_free / 1e9:.2f} GB are free: free some "
            "space, or --out DIR names another disk"
        )
    if report.memory_bytes > 0.95 * report.memory_total:
        warnings.append(
            f"the worst step takes {report.memory_bytes / 1e9:.1f} of {report.memory_total / 1e9:.1f} GB: a smaller "
            "--batch leaves room"
        )
    return warnings


def _show_dry(report: DryReport, begun: BeginReport) -> None:
    from rtdetr_cli.cli import terminal

    evaluations = sum(begun.plan.evaluates(e) for e in range(begun.plan.epochs))
    terminal.table(
        ("what", "value", "of"),
        [
            ("step", f"{report.step_seconds:.2f} s", f"{begun.plan.total_steps} steps"),
            ("worst step", f"{report.worst_seconds:.2f} s", "largest scale, most boxes"),
            ("evaluation", f"{report.evaluation_seconds:.1f} s", f"{evaluations} of {begun.val_images} images"),
            ("export", f"{report.export_seconds:.1f} s", f"ONNX, {report.export_bytes / 1e6:.1f} MB"),
            ("whole run", terminal.duration(report.total_seconds), f"{begun.plan.epochs} epochs"),
            ("at once", report.micro_batch, f"of {begun.plan.effective_batch} images in a step"),
            ("memory", f"{report.memory_bytes / 1e9:.1f} GB", f"{report.memory_total / 1e9:.1f} GB"),
            ("disk", f"{report.disk_bytes / 1e9:.2f} GB", f"{report.disk_free / 1e9:.1f} GB free"),
        ],
        title="dry run: nothing was trained or written",
    )
    for warning in dry_warnings(report):
        terminal.warn(warning)


def _show_end(report: EndReport) -> None:
    from rtdetr_cli.cli import terminal

    metrics = report.metrics
    terminal.table(
        ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "best epoch", "time"),
        [
            (
                *(metrics.get(k) for k in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")),
                f"{report.best_epoch + 1} of {report.epochs}",
                terminal.duration(report.seconds),
            )
        ],
    )
    terminal.out(f"best  {report.best}")
    if report.page is not None:
        terminal.say(f"page  {report.page}")
    if report.reason == "patience":
        terminal.say("stopped early: no better AP within --patience")


class _StepBar:
    """A bar of steps on a terminal; nothing in a pipe, where an epoch is one line."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._done: list[float] = []

    def begin(self, report: BeginReport) -> None:
        from rtdetr_cli.cli import terminal

        self._epochs = report.plan.epochs
        if not terminal.is_terminal() or report.folder is None:
            return
        import sys

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=Console(file=sys.stderr, highlight=False),
            transient=True,
        )
        done = report.resumed[1] if report.resumed else 0
        self._task = self._bar.add_task("step", total=report.plan.total_steps, completed=done, facts="")
        self._bar.start()

    def step(self, report: Any) -> None:
        if self._bar is not None:
            facts = (
                f"loss {report.loss:.2f}  lr {report.lr:.2g}  {1 / report.seconds:.1f} steps/s  "
                f"{report.memory_bytes / 1e9:.1f} GB"
            )
            self._bar.update(
                self._task,
                completed=report.step + 1,
                facts=facts,
                description=f"epoch {report.epoch + 1}/{self._epochs}",
            )

    def measure(self, report: Any) -> None:
        """Say that the steps stand still since the epoch is being evaluated."""
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, facts="evaluating")

    def say(self, line: str) -> None:
        from rtdetr_cli.cli import terminal

        if self._bar is None:
            terminal.say(line)
        else:
            from rich.text import Text

            self._bar.console.print(Text(line), soft_wrap=True)

    def seconds_left(self, report: Any) -> float:
        """Estimate from the last epochs of this process; the first one is slow and soon forgotten."""
        self._done.append(report.seconds)
        recent: list[float] = self._done[-5:] if len(self._done) < 3 else self._done[1:][-5:]
        remaining: int = report.epochs - report.epoch - 1
        return sum(recent) / len(recent) * remaining

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

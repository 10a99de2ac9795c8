"""Render the events of a training run: progress on stderr, the result on stdout."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.unexpected import remember_run
from rtdetr_cli.infer.duplicates import describe_dedupe
from rtdetr_cli.infer.selection import describe_thresholds
from rtdetr_cli.text import abbreviate, counted, printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from rtdetr_cli.train.events import EpochDone, StepDone, StepSkipped
    from rtdetr_cli.train.plan import Plan
    from rtdetr_cli.workflows.events import DryRunResult, Event, RunFinished, RunStarted

FIRST_LINE_STEPS, FIRST_LINE_SECONDS = 10, 30.0  # whichever is over first
LINE_SECONDS = 60.0
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def render(events: Iterator[Event], *, as_json: bool = False, result_on_stdout: bool = True) -> None:
    """Show a run as it happens, and print its result as a table or as one JSON line.

    `result_on_stdout` is False where the run is part of a larger command that prints a result of its own.
    """
    from rtdetr_cli.train import events as training
    from rtdetr_cli.workflows import events as workflow

    started: workflow.RunStarted | None = None
    bar = _TrainingBar()
    result: dict[str, Any] = {}
    try:
        for event in events:
            match event:
                case workflow.RunStarted():
                    started = event
                    remember_run(event.folder)
                    _show_start(event)
                    bar.start(event)
                case training.EvaluationStarted():
                    bar.update(completed=event.step, facts="evaluating")
                case training.StepDone():
                    bar.show_step(event)
                    for image, reason in event.replaced:
                        bar.say(f"warning: image {image} was replaced: {reason}")
                case training.EpochDone():
                    bar.say(epoch_line(event, bar.seconds_left(event)))
                case training.StepSkipped():
                    bar.say(_skipped_line(event))
                case training.MicroBatchReduced():
                    bar.say(
                        f"warning: out of memory at step {event.step + 1}: repeating it with micro-batch "
                        f"{event.micro_batch} instead of {event.micro_batch_before} (same effective batch)"
                    )
                case training.RolledBack():
                    bar.say(
                        f"warning: rolled back from step {event.step} to step {event.to_step}, "
                        f"with {event.rate_scale:.3g} of the learning rate"
                    )
                case workflow.Notice():
                    bar.say(f"warning: {event.text}")
                case workflow.DryRunResult():
                    bar.stop()
                    assert started is not None
                    result = _dry_run_document(event, started)
                    if not as_json:
                        _show_dry_run(event, started)
                case workflow.RunFinished():
                    bar.stop()
                    if event.already_finished:
                        terminal.say(f"{event.folder} has already finished: there is nothing left to do")
                    result = {
                        "run": str(event.folder),
                        "best": str(event.best),
                        "metrics": dict(event.metrics),
                        "best_epoch": event.best_epoch + 1,
                        "epochs": event.epochs,
                        "stopped": event.reason,
                        "dedupe": None if event.dedupe is None else asdict(event.dedupe),
                        "thresholds": None if event.thresholds is None else asdict(event.thresholds),
                        "seconds": round(event.seconds, 1),
                        "explanation": event.explanation or None,
                        "already_finished": event.already_finished,
                    }
                    if result_on_stdout and not as_json:
                        _show_result(event)
                        _show_next(event, started)
                    if event.explanation:
                        terminal.warn(f"the images were not overfitted: {event.explanation}")
    finally:
        bar.stop()
        # Closing the generator ends the processes of the loader now; an error may keep its frames alive for long.
        if isinstance(events, Generator):
            events.close()
    if as_json and result_on_stdout:
        terminal.emit_json(result)


def _say(text: str, indent: int = 6) -> None:
    terminal.say(terminal.fold(text, indent=indent))


def _show_start(event: RunStarted) -> None:
    from importlib.metadata import version

    from rtdetr_cli import __version__
    from rtdetr_cli.train.explain import plan_line

    settings = event.config.settings
    device = event.device if event.processes == 1 else f"{event.device.partition(':')[0]} x {event.processes}"
    torch_version = ".".join(version("torch").split(".")[:2])
    _say(f"rtdetr {__version__}  torch {torch_version}  {device} {event.precision}")
    _show_model(event)
    _show_data(event)
    _say(plan_line(event.plan, event.micro_batch, event.processes))
    given = event.config.given("batch") and settings.batch != "auto"
    choices = [(choice.name, choice.value, choice.reason) for choice in event.choices]
    choices.append(("micro-batch", str(event.micro_batch), event.config.source("batch") if given else "fits in memory"))
    choices.append(("precision", event.precision, event.precision_reason))
    for name, value, reason in choices:
        _say(f"  {name:<20} {value:<34} {reason}", indent=23)
    if event.folder is not None:
        terminal.say(f"run  {event.folder}")
    if event.restarted:
        terminal.say("resumed at step 0: the run was killed before its first checkpoint, so it starts again")
    elif event.resumed is not None:
        terminal.say(f"resumed at epoch {event.resumed[0] + 1}, step {event.resumed[1]}")
    for warning in event.warnings:
        terminal.warn(terminal.fold(warning, indent=9, first=9))


def _show_data(event: RunStarted) -> None:
    from rtdetr_cli.checks.val_split import FEW_VAL_IMAGES

    splits, settings = event.splits, event.config.settings
    if settings.overfit:  # the same images, repeated, for training and validation
        times = event.train_images // event.val_images
        repeats = "once" if times == 1 else f"{times} times"
        images = f"{counted(event.val_images, 'image')}, {repeats} per epoch, for training and validation"
    else:
        images = f"{event.train_images:,} train / {event.val_images:,} val images"
    text = f"data  {splits.name}: {images}, {counted(len(splits.categories), 'class')}"
    # The dataset of a resumed run was checked in full when the run started; reading its labels again adds nothing.
    warnings = 0 if event.resumed else sum(f.severity == "warning" for f in splits.findings)
    _say(text + (f", {counted(warnings, 'warning')} (rtdetr validate)" if warnings else ""))
    if splits.split_made and event.resumed is None and not settings.overfit:
        held_out = f"{event.val_images:,} of {counted(event.train_images + event.val_images, 'train image')}"
        few = ", too few for reliable metrics" if event.val_images < FEW_VAL_IMAGES else ""
        _say(f"split  the dataset has no val split: {held_out} are held out, the same in every run{few}")


def _show_model(event: RunStarted) -> None:
    table = event.transfer
    start = event.start if event.resumed is None else "its own checkpoint"
    tensors = f": {table.tensors_loaded} of {table.tensors_total} tensors" if table is not None else ""
    _say(f"model  {event.config.preset.name}, {event.parameters / 1e6:.1f}M parameters, from {start}{tensors}")
    if table is None or not table.by_class:
        return
    transferred = [
        row.name if row.name == row.source_name else f"{row.name} <- {row.source_name}"
        for row in table.classes
        if row.source_name
    ]
    new = [row.name for row in table.classes if row.source_name is None]
    for title, names in (("transferred by class name", transferred), ("reinitialized", new)):
        if names:
            _say(f"  {title:<25}  {abbreviate(names)}", indent=29)
    _say(f"  in  {abbreviate(table.by_class, 3)}")


def epoch_line(event: EpochDone, seconds_left: float) -> str:
    """Return one epoch on one line."""
    parts = [f"epoch {event.epoch + 1}/{event.epochs}", f"loss {event.loss:.2f}"]
    if event.metrics is not None:
        best = f" (best {event.best_score:.3f} at {event.best_epoch + 1})" if event.best_epoch >= 0 else ""
        parts.append(f"AP {terminal.show(event.metrics.get('AP'))}{best}")
        parts.append(f"AP50 {terminal.show(event.metrics.get('AP50'))}")
    parts += [f"{event.memory_bytes / 2**30:.1f} GiB", terminal.duration(event.seconds)]
    if event.epoch + 1 < event.epochs:
        parts.append(f"{terminal.duration(seconds_left)} left")
    return "  ".join(parts)


def _skipped_line(event: StepSkipped) -> str:
    if event.scale_only:
        return f"step {event.step + 1} skipped: the float16 loss scale was too high and has been halved"
    files = f" ({abbreviate(event.files, 4)})" if event.files else ""
    evidence = f"; its batch was saved to {event.evidence}" if event.evidence else ""
    return (
        f"warning: step {event.step + 1} skipped: {event.term} is not finite{files}, "
        f"{event.in_a_row} in a row{evidence}"
    )


class _TrainingBar:
    """A bar of steps on a terminal; elsewhere a line soon after the start and one each minute without another line."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._plan: Plan | None = None
        self._epoch_seconds: list[float] = []
        self._step_seconds: list[float] = []
        self._line_due = 0.0  # in the clock's seconds, after a few steps

    def start(self, event: RunStarted) -> None:
        self._plan = event.plan
        self._line_due = time.monotonic() + FIRST_LINE_SECONDS
        if not terminal.is_terminal() or event.folder is None:
            return
        self._bar = terminal.make_bar()
        done = event.resumed[1] if event.resumed else 0
        self._task = self._bar.add_task("step", total=event.plan.total_steps, completed=done, facts="")
        self._bar.start()

    def show_step(self, event: StepDone) -> None:
        assert self._plan is not None
        self._step_seconds.append(event.seconds)
        epoch = f"epoch {event.epoch + 1}/{self._plan.epochs}"
        memory = event.memory_bytes / 2**30
        if self._bar is not None:
            facts = f"loss {event.loss:.2f}  lr {event.lr:.2g}  {1 / event.seconds:.1f} steps/s  {memory:.1f} GiB"
            self.update(completed=event.step + 1, facts=facts, description=epoch)
            return
        steps = len(self._step_seconds)
        if steps == FIRST_LINE_STEPS or (steps > 2 and time.monotonic() > self._line_due):
            recent = self._step_seconds[1:][-50:]  # the first step is slower than the others
            mean = sum(recent) / len(recent)
            left = terminal.duration(mean * (self._plan.total_steps - event.step - 1))
            self.say(
                f"step {event.step + 1}/{self._plan.total_steps}  {epoch}  loss {event.loss:.2f}  "
                f"{self._plan.effective_batch / mean:.3g} images/s  {memory:.1f} GiB  {left} left without evaluation"
            )

    def update(self, **fields: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, **fields)

    def say(self, line: str) -> None:
        """Write a line above the bar."""
        self._line_due = time.monotonic() + LINE_SECONDS
        if self._bar is None:
            terminal.say(line)
        else:
            from rich.text import Text

            self._bar.console.print(Text(printable_lines(line)), soft_wrap=True)

    def seconds_left(self, event: EpochDone) -> float:
        """Estimate from the last epochs of this process, without the first, which is slower than the others."""
        self._epoch_seconds.append(event.seconds)
        seconds = self._epoch_seconds
        recent = seconds if len(seconds) < 3 else seconds[1:][-5:]
        return sum(recent) / len(recent) * (event.epochs - event.epoch - 1)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _show_result(event: RunFinished) -> None:
    best_epoch = f"{event.best_epoch + 1} of {event.epochs}"
    metrics = [event.metrics.get(name) for name in METRICS]
    terminal.table((*METRICS, "best epoch", "time"), [(*metrics, best_epoch, terminal.duration(event.seconds))])
    if event.dedupe is not None:
        terminal.out(f"duplicates  {describe_dedupe(event.dedupe)}")
    if event.thresholds is not None:
        terminal.out(f"threshold  {describe_thresholds(event.thresholds)}")
    terminal.out(f"best  {event.best}")
    if event.page is not None:
        terminal.say(f"report  {event.page}")
    if event.val_loss:
        terminal.say(f"loss  {event.val_loss}")
    if event.reason == "patience":
        terminal.say("stopped early: no better AP within --patience")


def _show_next(event: RunFinished, started: RunStarted | None) -> None:
    """Print the commands that use the model; a run that had already finished has no image to suggest."""
    terminal.next_step("rtdetr", "eval", event.folder)
    if started is not None and started.splits.val is not None:
        terminal.next_step("rtdetr", "predict", started.splits.val.path(0), "--weights", event.folder)
    terminal.next_step("rtdetr", "export", event.folder)


def dry_run_warnings(result: DryRunResult) -> list[str]:
    """Return what would stop the run: too little disk space, or too little memory."""
    from rtdetr_cli.train.checkpoint import has_room

    warnings = []
    if not has_room(result.disk_bytes, result.disk_free):
        warnings.append(
            f"the run needs {result.disk_bytes / 2**30:.2f} GiB of disk space, but only "
            f"{result.disk_free / 2**30:.2f} GiB is free: free some space, or choose another disk with --out DIR"
        )
    if result.memory_bytes > 0.95 * result.memory_total:
        warnings.append(
            f"the largest step needs {result.memory_bytes / 2**30:.1f} of {result.memory_total / 2**30:.1f} GiB: "
            "leave room with a smaller --batch"
        )
    return warnings


def _dry_run_document(result: DryRunResult, started: RunStarted) -> dict[str, Any]:
    names = ("micro_batch", "memory_bytes", "memory_total", "disk_bytes", "disk_free", "export_bytes")
    return {
        "plan": [asdict(choice) for choice in started.choices],
        "seconds": {
            "step": result.step_seconds,
            "worst_step": result.worst_seconds,
            "evaluation": result.evaluation_seconds,
            "export": result.export_seconds,
            "total": result.total_seconds,
        },
        **{name: getattr(result, name) for name in names},
        "warnings": [*started.warnings, *dry_run_warnings(result)],
    }


def _show_dry_run(result: DryRunResult, started: RunStarted) -> None:
    from rtdetr_cli.workflows.launching import command_line

    plan = started.plan
    evaluations = sum(plan.evaluates(epoch) for epoch in range(plan.epochs))
    images = counted(started.val_images, "image")
    terminal.out("dry run: nothing was trained or written; times are estimated from a few measured steps")
    terminal.table(
        ("quantity", "value", "details"),
        [
            ("step", f"{result.step_seconds:.2f} s", counted(plan.total_steps, "step")),
            ("largest step", f"{result.worst_seconds:.2f} s", "largest scale, most boxes"),
            ("evaluation", f"{result.evaluation_seconds:.1f} s", f"{evaluations} x {images}"),
            ("export", f"{result.export_seconds:.1f} s", f"ONNX, {result.export_bytes / 1e6:.1f} MB"),
            ("whole run", f"about {terminal.duration(result.total_seconds)}", counted(plan.epochs, "epoch")),
            ("micro-batch", result.micro_batch, f"effective batch {plan.effective_batch}"),
            ("memory", f"{result.memory_bytes / 2**30:.1f} GiB", f"{result.memory_total / 2**30:.1f} GiB in all"),
            ("disk", f"{result.disk_bytes / 2**30:.2f} GiB", f"{result.disk_free / 2**30:.1f} GiB free"),
        ],
    )
    for warning in dry_run_warnings(result):
        terminal.warn(warning)
    terminal.next_step("rtdetr", *(word for word in command_line()[1:] if word != "--dry-run"))

"""`rtdetr train`: read the command line, start the run, and render its events."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag, OfflineFlag
from rtdetr_cli.cli.setting_flags import TRAIN_FLAGS, SetFlag, with_setting_flags
from rtdetr_cli.errors import UsageError
from rtdetr_cli.runs import RunFolder

if TYPE_CHECKING:
    from rtdetr_cli.config.run import RunConfig


@with_setting_flags(TRAIN_FLAGS)
def train(
    flags: dict[str, Any],
    dataset: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", help="Dataset; the same as --data.", show_default=False)
    ] = None,
    *,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Resume an interrupted run; needs no other flag.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan, test the largest step, and estimate time, memory and disk space."
        ),
    ] = False,
    offline: OfflineFlag = False,
    set_values: SetFlag = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file of settings, such as the config.toml of a run.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Finetune a detector on your own images. DATA is required, except with --resume."""
    from rtdetr_cli.cli.training_output import render
    from rtdetr_cli.workflows import launching

    terminal.forbid_downloads(offline)
    sets = set_values or []
    if resume is not None and (dry_run or config_file is not None):
        flag = "--dry-run" if dry_run else "--config"
        raise UsageError(f"--resume cannot be combined with {flag}", hint=f"rtdetr train --resume {resume}")
    if dataset is not None:
        if (named := flags.get("data")) is not None and Path(named).resolve() != dataset.resolve():
            raise UsageError(f"two datasets given: {dataset} and --data {named}", hint=f"rtdetr train {dataset}")
        flags["data"] = str(dataset)
    config, note = None, ""
    if resume is None:
        config, note = launching.resolve_training(flags, sets=sets, config_file=config_file)
    elif os.environ.get("RANK", "0") == "0":  # before torch is loaded
        RunFolder.open(resume)

    from rtdetr_cli.train.processes import launched
    from rtdetr_cli.train.stop import stop_on_signals
    from rtdetr_cli.workflows import finetune as workflow

    first_process = not launched() or os.environ["RANK"] == "0"
    if note and first_process:
        terminal.say(note)
    _start_processes(config, resume, flags, sets, ["--dry-run"] * dry_run + ["--json"] * as_json)

    with stop_on_signals() as stop:
        if resume is not None:
            events = workflow.resume(resume, flags=flags, sets=sets, stop=stop)
        else:
            assert config is not None
            events = workflow.finetune(
                config, stop=stop, argv=launching.command_line(), dry_run=dry_run, fetching=terminal.transfer
            )
        if first_process:
            render(events, as_json=as_json)
        else:
            deque(events, maxlen=0)  # the first process renders the run for all of them


def _start_processes(
    config: RunConfig | None, resume: Path | None, flags: dict[str, Any], sets: list[str], words: list[str]
) -> None:
    """Start one process for each device and wait for them, if there are several; return in a process that trains.

    Raises:
        typer.Exit: the processes have ended.
    """
    from rtdetr_cli.train import launch
    from rtdetr_cli.train.processes import launched, parse_devices
    from rtdetr_cli.workflows import finetune as workflow
    from rtdetr_cli.workflows.identity import refuse_changes
    from rtdetr_cli.workflows.launching import run_processes

    if launched():
        if launch.supervised():
            launch.stop_with_parent()
        return
    if config is None:
        assert resume is not None
        config = workflow.run_config(resume)
    devices = parse_devices(config.settings.device)
    if len(devices) == 1:
        return
    if resume is None:
        workflow.refuse_early(config)
    else:
        refuse_changes(config, flags, sets, resume)
    raise typer.Exit(run_processes(config, devices, resume=resume, words=words))

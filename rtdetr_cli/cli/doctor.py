"""`rtdetr doctor`: is this machine fit, and what to do where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    data: Annotated[Path, typer.Option("--out", help="Folder whose disk will hold the runs.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on one line.")] = False,
) -> None:
    """Say whether this machine is fit: versions, devices, providers, disk, shared memory, name clash."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.errors import EnvironmentProblem
    from rtdetr_cli.workflows.doctor import inspect_machine

    checks = inspect_machine(data)
    failed = [c for c in checks if c.state == "fail"]
    if as_json:
        terminal.emit_json(
            {
                "fit": not failed,
                "checks": [{"name": c.name, "state": c.state, "found": c.found, "advice": c.advice} for c in checks],
            }
        )
        if failed:
            raise typer.Exit(EnvironmentProblem.exit_code)
        return
    terminal.table(("check", "state", "found"), [(c.name, c.state, c.found) for c in checks])
    for check in checks:
        if check.advice:
            terminal.out(f"{check.state}  {check.name}: {check.advice}")
    if failed:
        raise EnvironmentProblem(f"this machine is not fit: {', '.join(c.name for c in failed)}", code="doctor-failed")
    terminal.out("this machine is fit")

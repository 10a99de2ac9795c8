"""`rtdetr doctor`: check that this machine has what a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag
from rtdetr_cli.errors import EnvironmentProblem


def doctor(
    out: Annotated[Path, typer.Option(help="Folder on the disk that will hold the runs.")] = Path("."),
    as_json: JsonFlag = False,
) -> None:
    """Check this machine: package versions, devices, ONNX Runtime providers, memory, disk space and name clashes."""
    from rtdetr_cli.workflows.doctor import inspect_machine

    checks = inspect_machine(out)
    missing = [c.missing for c in checks if c.missing]
    if as_json:
        rows = [{"name": c.name, "state": c.state, "found": c.result, "advice": c.advice} for c in checks]
        terminal.emit_json({"fit": not missing, "checks": rows})
        if missing:
            raise typer.Exit(EnvironmentProblem.exit_code)
        return
    terminal.table(("check", "state", "result"), [(c.name, c.state, c.result) for c in checks])
    for check in checks:
        if check.advice:
            terminal.out(f"{check.state}  {check.name}: {check.advice}")
    if missing:
        raise EnvironmentProblem(f"this machine is missing: {', '.join(missing)}", code="doctor-failed")
    terminal.out("this machine has everything that rtdetr needs")

"""`rtdetr weights`: the published weights, their cache and their checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.terminal import JsonFlag
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.text import suggest

app = terminal.command_group(
    "Manage the published weights, which train --weights coco and predict download once; without a command, list them."
)

Name = Annotated[str, typer.Argument(help="A preset such as r18, or the name of a published file.")]


@app.callback()
def root(context: typer.Context) -> None:
    """List the published weights if no command is given."""
    if context.invoked_subcommand is None:
        list_files()


def _file_name(name: str) -> str:
    """Return the file name of a preset's COCO weights, or the name itself."""
    from rtdetr_cli.config.presets import load_preset, preset_names

    if name not in preset_names():
        from rtdetr_cli.weights.hub import PUBLISHED

        if name not in PUBLISHED:
            raise ModelError(
                f"there is no published file {name}{suggest(name, [*preset_names(), *PUBLISHED])}",
                hint=f"a preset ({', '.join(preset_names())}), or a file from: rtdetr weights list",
                code="weights-unknown",
            )
        return name
    weights = load_preset(name).weights
    if weights is None:
        raise UsageError(f"preset {name} has no published weights", hint="rtdetr weights list")
    return weights


@app.command("list")
def list_files(as_json: JsonFlag = False) -> None:
    """List the published files, and which of them are in the cache."""
    from rtdetr_cli.weights import hub

    folder = hub.weights_folder()
    rows = []
    for entry in hub.PUBLISHED.values():
        here, sha256 = (folder / entry.file).is_file(), hub.expected_sha256(entry.file)
        rows.append({"file": entry.file, "what": entry.description, "here": here, "sha256": sha256})
    if as_json:
        terminal.emit_json({"folder": str(folder), "files": rows})
        return
    terminal.table(
        ("file", "content", "cached", "sha256"),
        [(r["file"], r["what"], "yes" if r["here"] else "-", str(r["sha256"])[:12] or "-") for r in rows],
    )
    terminal.out(f"cache: {folder}")


@app.command()
def fetch(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Download the file even if it is cached, and accept a changed file.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Download a file into the cache and check its hash."""
    from rtdetr_cli.weights import hub

    file = _file_name(name)
    recorded = hub.expected_sha256(file)
    path = hub.fetch(file, force=force, progress=terminal.transfer)
    _print_path(path, as_json, recorded=recorded)


@app.command()
def verify(as_json: JsonFlag = False) -> None:
    """Check the hash of every cached file."""
    from rtdetr_cli.weights import hub

    rows, errors = [], []
    for file in hub.PUBLISHED:
        path = hub.weights_folder() / file
        if not path.is_file():
            continue
        try:
            rows.append({"file": file, "ok": True, "sha256": hub.verify(file, path)})
        except ModelError as error:
            rows.append({"file": file, "ok": False, "sha256": hub.file_sha256(path)})
            errors.append(error)
    if as_json and not errors:
        terminal.emit_json({"files": rows})
    elif not as_json and rows:
        terminal.table(("file", "ok", "sha256"), [(r["file"], "yes" if r["ok"] else "NO", r["sha256"]) for r in rows])
    elif not as_json:
        terminal.say(f"there is no published file in {hub.weights_folder()}")
    if errors:
        raise errors[0]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A published file that was downloaded by other means.")],
    force: Annotated[bool, typer.Option("--force", help="Accept a file that differs from the recorded one.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the hash of a downloaded file and copy it into the cache."""
    from rtdetr_cli.weights import hub

    recorded = hub.expected_sha256(file.name)
    _print_path(hub.import_file(file, force=force), as_json, recorded=recorded)


@app.command()
def path(name: Name, as_json: JsonFlag = False) -> None:
    """Print the path of a cached file (exit code 4: not cached)."""
    from rtdetr_cli.weights import hub

    cached = hub.weights_folder() / hub.find_published(_file_name(name)).file
    if not cached.is_file():
        raise ModelError(f"{cached} does not exist", hint=f"rtdetr weights fetch {name}", code="weights-missing")
    _print_path(cached, as_json)


def _print_path(path: Path, as_json: bool, *, recorded: str = "") -> None:
    """Print the path of a file in the cache, and warn if its hash is not the one that was recorded before."""
    from rtdetr_cli.weights import hub

    if recorded and recorded != (now := hub.expected_sha256(path.name)):
        terminal.warn(f"the file has changed: its recorded sha256 was {recorded[:12]}..., now it is {now[:12]}...")
    if as_json:
        terminal.emit_json({"path": str(path)})
    else:
        terminal.out(str(path))

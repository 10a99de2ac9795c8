"""`rtdetr weights`: the published weights, their cache and their checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag, OfflineFlag
from rtdetr_cli.errors import ModelError

app = terminal.command_group(
    "Manage the published weights, which train --weights coco and predict download once; without a command, list them."
)

Name = Annotated[str, typer.Argument(help="Name from the list, such as r18 or r50-objects365-coco, or a file name.")]


@app.callback()
def root(context: typer.Context) -> None:
    """List the published weights if no command is given."""
    if context.invoked_subcommand is None:
        list_files()


@app.command("list")
def list_files(as_json: JsonFlag = False) -> None:
    """List the published weights, and which of them are in the cache."""
    from rtdetr_cli.weights import hub
    from rtdetr_cli.weights.catalogue import catalogue

    rows: list[dict[str, Any]] = []
    for entry in catalogue().values():
        path = hub.cached_path(entry.name)
        here = path.is_file()
        rows.append({
            "name": entry.name, "file": entry.file, "what": entry.description, "preset": entry.preset,
            "data": entry.data, "ap": entry.ap, "version": entry.version, "sampling": entry.sampling,
            "license": entry.license, "bytes": path.stat().st_size if here else entry.bytes or None, "here": here,
            "hash": hub.hash_kind(entry.name) or None, "sha256": hub.expected_sha256(entry.name),
        })  # fmt: skip
    folder = hub.weights_folder()
    if as_json:
        terminal.emit_json({"folder": str(folder), "files": rows})
        return
    terminal.table(
        ("name", "preset", "trained on", "AP", "MB", "hash", "cached"),
        [
            (r["name"], r["preset"], r["data"], f"{r['ap']:.3f}" if r["ap"] else "-",
             f"{r['bytes'] / 1e6:.0f}" if r["bytes"] else "-", r["hash"] or "-", "yes" if r["here"] else "-")
            for r in rows
        ],
    )  # fmt: skip
    licenses = ", ".join(sorted({str(r["license"]) for r in rows}))
    terminal.out(
        f"license: {licenses}. AP: published, on COCO val2017 (objects365: on its own val split).\n"
        "hash: pinned = publicly known; recorded = that of the first copy on this machine.\n"
        f"cache: {folder}"
    )


@app.command()
def fetch(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Download the file even if it is cached, and accept a changed file.")
    ] = False,
    offline: OfflineFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Download a file into the cache and check it."""
    from rtdetr_cli.weights import hub

    terminal.forbid_downloads(offline)
    recorded = hub.expected_sha256(name)
    path = hub.fetch(name, force=force, progress=terminal.transfer, notify=terminal.say)
    _print_path(path, as_json, recorded=recorded)


@app.command()
def verify(as_json: JsonFlag = False) -> None:
    """Check the hash and architecture of every cached file."""
    from rtdetr_cli.weights import hub
    from rtdetr_cli.weights.catalogue import catalogue

    rows, errors = [], []
    for entry in catalogue().values():
        path = hub.cached_path(entry.name)
        if not path.is_file():
            continue
        row = {"name": entry.name, "file": entry.file}
        try:
            rows.append({**row, "ok": True, "sha256": hub.verify(entry.name, notify=terminal.say)})
        except ModelError as error:
            rows.append({**row, "ok": False, "sha256": hub.file_sha256(path)})
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
    file: Annotated[Path, typer.Argument(help="A published file that was downloaded by other means, of any name.")],
    name: Annotated[
        str, typer.Option("--as", metavar="NAME", help="Which weights it holds, where its tensors fit several.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Accept a file that differs from the recorded one.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check a downloaded file and copy it into the cache."""
    from rtdetr_cli.weights import hub

    before = hub.recorded_hashes()
    path = hub.import_file(file, name=name, force=force, notify=terminal.say)
    _print_path(path, as_json, recorded=before.get(path.name, ""))


@app.command()
def path(name: Name, as_json: JsonFlag = False) -> None:
    """Print the path of a cached file (exit code 4: not cached)."""
    from rtdetr_cli.weights import hub

    cached = hub.cached_path(name)
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

"""`rtdetr weights`: the published files, their cache and their hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtdetr_cli.cli import terminal

app = typer.Typer(
    help="Published weights: list, fetch, verify, import, path.",
    rich_markup_mode=None,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on one line.")]
Name = Annotated[str, typer.Argument(help="A preset (r18), or a published file's name.")]


@app.callback()
def root(context: typer.Context) -> None:
    """Look after the published weights; `list` when nothing else is asked."""
    if context.invoked_subcommand is None:
        list_files()


def file_named(name: str) -> str:
    """Return the file that a word means: a preset's COCO weights, or the word itself."""
    from rtdetr_cli.config.presets import load_preset, preset_names

    if name in preset_names():
        weights = load_preset(name).weights
        if weights is None:
            from rtdetr_cli.errors import UsageError

            raise UsageError(f"preset {name} has no published weights", hint="rtdetr weights list")
        return weights
    return name


@app.command("list")
def list_files(as_json: Json = False) -> None:
    """List the published files and which of them are here."""
    from rtdetr_cli.weights import hub

    folder = hub.weights_folder()
    rows = [
        {
            "file": entry.file,
            "what": entry.what,
            "here": (folder / entry.file).is_file(),
            "sha256": hub.expected_sha256(entry.file),
        }
        for entry in hub.PUBLISHED.values()
    ]
    if as_json:
        terminal.emit_json({"folder": str(folder), "files": rows})
        return
    terminal.table(
        ("file", "what", "here", "sha256"),
        [(r["file"], r["what"], "yes" if r["here"] else "-", str(r["sha256"])[:12] or "-") for r in rows],
    )
    terminal.out(f"kept in {folder}")


@app.command()
def fetch(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch it again although it is here; replaces a recorded hash.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a file once, hash-checked."""
    from rtdetr_cli.weights import hub

    file = file_named(name)
    before = hub.expected_sha256(file)
    path = hub.fetch(file, force=force, progress=terminal.transfer)
    _say_change(before, hub.expected_sha256(file))
    _say_path(path, as_json)


@app.command()
def verify(as_json: Json = False) -> None:
    """Check every file that is here against its hash."""
    from rtdetr_cli.errors import ModelError
    from rtdetr_cli.weights import hub

    rows, wrong = [], []
    for file in hub.PUBLISHED:
        path = hub.weights_folder() / file
        if not path.is_file():
            continue
        try:
            rows.append({"file": file, "ok": True, "sha256": hub.verify(file, path)})
        except ModelError as error:
            rows.append({"file": file, "ok": False, "sha256": hub.file_sha256(path)})
            wrong.append(error)
    if as_json and not wrong:
        terminal.emit_json({"files": rows})
    elif not as_json:
        terminal.table(("file", "ok", "sha256"), [(r["file"], "yes" if r["ok"] else "NO", r["sha256"]) for r in rows])
        if not rows:
            terminal.say(f"no published file lies in {hub.weights_folder()}")
    if wrong:
        raise wrong[0]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file fetched by other means.")],
    force: Annotated[bool, typer.Option("--force", help="Let it replace a recorded hash.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a file into the cache, hash-checked."""
    from rtdetr_cli.weights import hub

    before = hub.expected_sha256(file.name)
    path = hub.import_file(file, force=force)
    _say_change(before, hub.expected_sha256(file.name))
    _say_path(path, as_json)


@app.command()
def path(name: Name, as_json: Json = False) -> None:
    """Print where a file is or would be kept."""
    from rtdetr_cli.weights import hub

    _say_path(hub.weights_folder() / hub.published(file_named(name)).file, as_json)


def _say_change(before: str, after: str) -> None:
    if before and before != after:
        terminal.warn(f"another file than before: the recorded sha256 was {before[:12]}..., it is {after[:12]}... now")


def _say_path(found: Path, as_json: bool) -> None:
    if as_json:
        terminal.emit_json({"path": str(found)})
    else:
        terminal.out(str(found))

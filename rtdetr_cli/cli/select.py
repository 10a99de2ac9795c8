"""Resolve the model, run and image size that a command line names, and check the files it will write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_cli.cli import terminal
from rtdetr_cli.config.image_size import parse_image_size
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.runs import BEST, RunFolder, find_runs
from rtdetr_cli.weights.header import MODEL_SUFFIXES, TRANSFORMERS_TENSORS

if TYPE_CHECKING:
    from rtdetr_cli.infer.backend import Backend

CHECKPOINT_SUFFIX = ".ckpt"


def resolve_model(model: Path | None, *, runs: Path = Path("runs")) -> Path:
    """Return the model file of a path; for None the best one of the newest finished run, reported on stderr.

    Where no run has finished it is that of the newest run. Raises ModelError where there is no such file or run.
    """
    if model is not None:
        return model_file(model)
    candidates = find_runs(runs)
    if not candidates:
        raise ModelError(
            f"no model given, and {runs}/ has no run with a model",
            hint="rtdetr train --preset r18 --data DATA, or pass a model file",
            code="run-missing",
        )
    newest = candidates[-1]
    finished = next((run for run in reversed(candidates) if not run.caveat()), None)
    run, description = finished or newest, "the newest run"
    if finished is None:
        description += f", {newest.caveat()}"
    elif finished is not newest:
        description = f"the newest finished run; {newest.path} is newer, but {newest.caveat()}"
    terminal.say(f"model {run.best} ({description})")
    return run.best


def model_file(model: Path) -> Path:
    """Return the model file of a path: itself, the best model of a run folder, or that of a folder of transformers.

    Raises:
        ModelError: there is none, or it is not a known format.
    """
    if model.is_dir():
        for file in (RunFolder(model).best, model / TRANSFORMERS_TENSORS):
            if file.is_file():
                return file
        raise _no_model_in(model)
    if not model.exists():
        from rtdetr_cli.infer.backend import neighbours

        hint = neighbours(model) or f"pass a model file ({', '.join(MODEL_SUFFIXES)}) or the folder of a run"
        raise ModelError(f"the model {model} does not exist", hint=hint, code="model-missing")
    suffix = model.suffix.lower()
    if suffix == CHECKPOINT_SUFFIX and RunFolder(model.parent).best.is_file():
        raise ModelError(
            f"{model} is a training checkpoint, which can be resumed but not used as a model",
            hint=f"pass the run folder: {model.parent}",
            code="model-foreign",
        )
    if suffix not in MODEL_SUFFIXES:
        from rtdetr_cli.images.decode import IMAGE_SUFFIXES

        use = "images are for rtdetr predict; " if suffix in IMAGE_SUFFIXES else ""
        if suffix in (".json", ".yaml", ".yml"):
            use = "datasets are for --data or rtdetr validate; "
        hint = f"{use}models end in {', '.join(MODEL_SUFFIXES)}"
        raise ModelError(f"{model} is not a model file", hint=hint, code="model-foreign")
    return model


def open_model(
    model: Path, runtime: str, *, images: int, device: str, threads: int | None = None, **changes: Any
) -> Backend:
    """Open a model to predict `images` with, or its export where `--backend auto` may use it.

    `changes` are the options of `open_backend` that change the model.
    """
    from rtdetr_cli.infer.backend import open_backend
    from rtdetr_cli.infer.exported import choose_file

    changed = any(value is not None for value in changes.values())
    opened, why = choose_file(runtime, model, images=images, device=device, changed=changed)
    if why:
        terminal.say(why)
    return open_backend(opened, device=device, threads=threads, **changes)


def model_name(model: Path) -> Path:
    """Return the shortest path that names a model file on a command line: its run folder, or itself."""
    return model.parent if model.name == BEST else model


def _no_model_in(folder: Path) -> ModelError:
    """Return the error for a folder without a model, with a hint that fits what is in it."""
    hint = "pass a model file, or the folder of a run such as runs/NAME"
    run, runs = RunFolder(folder), find_runs(folder)
    models = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in MODEL_SUFFIXES and p.is_file())
    if runs:
        message, hint = f"{folder} is a folder of runs ({len(runs)}), not a run", f"the newest is {runs[-1].path}"
    elif run.config.is_file():
        message = f"the run {folder} has no {BEST}: no epoch has been evaluated yet"
        hint = f"rtdetr train --resume {folder}" if run.started else hint
    elif models:
        message, hint = f"the folder {folder} is not a run", f"pass the model file: {', '.join(models[:5])}"
    elif not any(folder.iterdir()):
        message = f"the folder {folder} is empty"
    else:
        message = f"the folder {folder} is not a run and has no model"
    return ModelError(message, hint=hint, code="model-missing")


def output_file(path: Path, flag: str) -> None:
    """Refuse an output file, as given for a flag such as `--html`, that cannot be written: before the work, not after.

    Raises:
        UsageError: a folder of that name exists.
        RtdetrError: the file cannot be created.
    """
    if path.is_dir():
        suggested = path / ("report.html" if flag == "--html" else "results.json")
        raise UsageError(f"{flag} {path} is a folder, not a file", hint=f"{flag} {suggested}", code="output")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is not writable" if folder.is_dir() else "is a file, not a folder"
        raise RtdetrError(
            f"{path} cannot be written: {folder} {reason}",
            hint=f"choose another file: {flag} FILE",
            code="not-writable",
        )


def parse_size(text: str) -> tuple[int, int]:
    """Read `--imgsz`: `640` or `480x640`, height first, in pixels; raises UsageError for any other text."""
    try:
        return parse_image_size(text)
    except ValueError as error:
        hint = "--imgsz 640, or height first: --imgsz 480x640"
        raise UsageError(f"--imgsz {text}: {error}", hint=hint, code="size") from None

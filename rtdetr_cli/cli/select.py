"""Resolve the model, run and image size that a command line names, and check the files it will write."""

from __future__ import annotations

import os
from pathlib import Path

from rtdetr_cli.config.image_size import parse_image_size
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.runs import BEST, RunFolder, find_runs
from rtdetr_cli.weights.header import MODEL_SUFFIXES

CHECKPOINT_SUFFIX = ".ckpt"
__all__ = ["BEST", "CHECKPOINT_SUFFIX", "model_file", "newest_run", "output_file", "parse_size", "resolve_model"]


def newest_run(runs: Path = Path("runs")) -> tuple[Path, str]:
    """Return the newest finished run folder and a description of it; the newest of all where none has finished.

    Raises:
        ModelError: there is none.
    """
    candidates = find_runs(runs)
    if not candidates:
        raise ModelError(
            f"no model is named, and {runs}/ has no run with a model",
            hint="rtdetr train --preset r18 --data DATA, or name a model file",
            code="run-missing",
        )
    newest = candidates[-1]
    caveat = newest.caveat()
    if not caveat:
        return newest.path, "the newest run"
    for run in reversed(candidates[:-1]):
        if not run.caveat():
            return run.path, f"the newest finished run; {newest.path} is newer, but {caveat}"
    return newest.path, f"the newest run, {caveat}"


def resolve_model(model: Path | None, *, runs: Path = Path("runs")) -> Path:
    """Return the model file of a path, or the best model of the newest finished run when None (reported on stderr).

    Raises:
        ModelError: there is no such file or run.
    """
    if model is None:
        from rtdetr_cli.cli import terminal

        run, description = newest_run(runs)
        terminal.say(f"model {run / BEST} ({description})")
        return run / BEST
    return model_file(model)


def model_file(model: Path) -> Path:
    """Return the model file of a path: itself, or the best model of a run folder.

    Raises:
        ModelError: there is none, or it is not a known format.
    """
    if model.is_dir():
        best = model / BEST
        if best.is_file():
            return best
        raise _no_model_in(model)
    if not model.exists():
        raise ModelError(f"the model {model} does not exist", hint=_neighbours(model), code="model-missing")
    suffix = model.suffix.lower()
    if suffix == CHECKPOINT_SUFFIX and (model.parent / BEST).is_file():
        raise ModelError(
            f"{model} is a training checkpoint, which can be resumed but not used as a model",
            hint=f"name the run: {model.parent}",
            code="model-foreign",
        )
    if suffix not in MODEL_SUFFIXES:
        hint = f"{_purpose(suffix)}models end in {', '.join(MODEL_SUFFIXES)}"
        raise ModelError(f"{model} is not a model file", hint=hint, code="model-foreign")
    return model


def _no_model_in(folder: Path) -> ModelError:
    """Return the error for a folder without a model, with a hint that fits what is in it."""
    hint = "name a model file, or the folder of a run such as runs/NAME"
    run, runs = RunFolder(folder), find_runs(folder)
    models = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in MODEL_SUFFIXES and p.is_file())
    if runs:
        message, hint = f"{folder} is a folder of runs ({len(runs)}), not a run", f"the newest is {runs[-1].path}"
    elif run.config.is_file():
        message = f"the run {folder} has no {BEST}: no epoch has been evaluated yet"
        hint = f"rtdetr train --resume {folder}" if run.started else hint
    elif models:
        message, hint = f"the folder {folder} is not a run", f"name the model file: {', '.join(models[:5])}"
    elif not any(folder.iterdir()):
        message = f"the folder {folder} is empty"
    else:
        message = f"the folder {folder} is not a run and has no model"
    return ModelError(message, hint=hint, code="model-missing")


def _neighbours(path: Path) -> str:
    """Return a hint about the files in the folder of a missing one."""
    from rtdetr_cli.infer.backend import neighbours

    return neighbours(path) or f"name a model file ({', '.join(MODEL_SUFFIXES)}) or the folder of a run"


def _purpose(suffix: str) -> str:
    """Return what a file that is not a model is used for; empty for an unknown suffix."""
    from rtdetr_cli.images.decode import IMAGE_SUFFIXES

    if suffix in IMAGE_SUFFIXES:
        return "images are for rtdetr predict; "
    return "datasets are for --data or rtdetr validate; " if suffix in (".json", ".yaml", ".yml") else ""


def output_file(path: Path, flag: str) -> None:
    """Refuse an output file that cannot be written, before the work rather than after it.

    Args:
        path: as given on the command line.
        flag: its flag, such as `--html`.

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
    """Read `--imgsz`: `640` or `480x640`, height first, in pixels.

    Raises:
        UsageError: it is not a size, or a side is not a multiple of 32 from 32 to 4096.
    """
    try:
        return parse_image_size(text)
    except ValueError as error:
        hint = "--imgsz 640, or height first: --imgsz 480x640"
        raise UsageError(f"--imgsz {text}: {error}", hint=hint, code="size") from None

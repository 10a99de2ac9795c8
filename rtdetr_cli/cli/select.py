"""Which run, model and size the words of a command line mean."""

from __future__ import annotations

import os
from pathlib import Path

from rtdetr_cli.cli.runs import BEST, caveat, runs_with_models
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.weights.header import MODEL_SUFFIXES

CHECKPOINT_SUFFIX = ".ckpt"
__all__ = ["BEST", "model_file", "newest_run", "output_file", "parse_size", "resolve_model"]


def newest_run(runs: Path = Path("runs")) -> tuple[Path, str]:
    """Return the newest finished run folder, and what it is in words; where none has finished, the newest.

    Raises:
        ModelError: there is none.
    """
    found = runs_with_models(runs)
    if not found:
        raise ModelError(
            f"no finished run lies under {runs}/ and no model was named",
            hint="rtdetr train --preset r18 --data DATA, or name a model file",
            code="run-missing",
        )
    newest = found[-1]
    against = caveat(newest)
    if not against:
        return newest, "the newest run"
    for run in reversed(found[:-1]):
        if not caveat(run):
            return run, f"the newest finished run; {newest} is newer, but {against}"
    return newest, f"the newest run, {against}"


def resolve_model(model: Path | None, *, runs: Path = Path("runs")) -> Path:
    """Return the model file that is meant: a file, a run folder's best, or the newest finished run's when None.

    What was taken in place of a missing name is said on stderr.

    Raises:
        ModelError: there is no such file or run.
    """
    if model is None:
        from rtdetr_cli.cli import terminal

        run, what = newest_run(runs)
        terminal.say(f"model {run / BEST} ({what})")
        return run / BEST
    return model_file(model)


def model_file(model: Path) -> Path:
    """Return the model file that a path means: itself, or the best of a run folder.

    Raises:
        ModelError: there is none, or it is no format we know.
    """
    if model.is_dir():
        best = model / BEST
        if best.is_file():
            return best
        raise _no_model_in(model)
    if not model.exists():
        raise ModelError(f"the model {model} does not exist", hint=_beside(model), code="model-missing")
    suffix = model.suffix.lower()
    if suffix == CHECKPOINT_SUFFIX and (model.parent / BEST).is_file():
        raise ModelError(
            f"{model} is a checkpoint to resume from, not a model to use",
            hint=f"name the run: {model.parent}",
            code="model-foreign",
        )
    if suffix not in MODEL_SUFFIXES:
        kinds = f"models end in {', '.join(MODEL_SUFFIXES)}"
        raise ModelError(
            f"{model} is not a model file",
            hint=_purpose(suffix) + kinds,
            code="model-foreign",
        )
    return model


def _no_model_in(folder: Path) -> ModelError:
    """Say what a folder without a model is."""
    name = "name a model file, or the folder of a run such as runs/NAME"
    runs = runs_with_models(folder)
    models = _models_in(folder)
    if runs:
        said, hint = f"{folder} is a folder of runs ({len(runs)}), not a run", f"{runs[-1]} is the newest"
    elif (folder / "config.toml").is_file():
        said = f"the folder {folder} holds no {BEST}: no epoch of that run has been evaluated"
        begun = any((folder / file).is_file() for file in ("last.ckpt", "manifest.json"))
        hint = f"rtdetr train --resume {folder}" if begun else name
    elif models:
        said, hint = f"the folder {folder} is not a run", f"name the file: {', '.join(map(str, models[:5]))}"
    elif not any(folder.iterdir()):
        said, hint = f"the folder {folder} holds no model: it is empty", name
    else:
        said, hint = f"the folder {folder} is not a run and holds no model", name
    return ModelError(said, hint=hint, code="model-missing")


def _models_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in MODEL_SUFFIXES and p.is_file())


def _beside(path: Path) -> str:
    """Return a hint about what lies where a missing file was looked for."""
    from rtdetr_cli.infer.backend import neighbours

    return neighbours(path) or f"name a model file ({', '.join(MODEL_SUFFIXES)}) or the folder of a run"


def _purpose(suffix: str) -> str:
    """Say what a file is for that is no model; empty where nobody knows."""
    from rtdetr_cli.images.decode import IMAGE_SUFFIXES

    if suffix in IMAGE_SUFFIXES:
        return "rtdetr predict takes images; "
    return "a dataset goes to --data or rtdetr validate; " if suffix in (".json", ".yaml", ".yml") else ""


def output_file(path: Path, flag: str) -> None:
    """Refuse a file to write that cannot be written, before the work and not after it.

    Args:
        path: as it was given.
        flag: that gave it, such as `--html`.

    Raises:
        UsageError: a folder of that name exists.
        RtdetrError: it cannot be made where it is to lie.
    """
    if path.is_dir():
        suggested = path / ("report.html" if flag == "--html" else "results.json")
        raise UsageError(f"{flag} {path} is a folder, not a file", hint=f"{flag} {suggested}", code="output")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "may not be written into" if folder.is_dir() else "is a file, not a folder"
        raise RtdetrError(
            f"{path} cannot be written: {folder} {why}", hint=f"name another file: {flag} FILE", code="not-writable"
        )


def parse_size(text: str) -> tuple[int, int]:
    """Read `640` or `480x640` (height first) in pixels.

    Raises:
        UsageError: it is no size, or not a multiple of 32.
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.strip().isdecimal() for p in parts):
        raise UsageError(
            f"--imgsz {text} is not a size", hint="--imgsz 640, or height first: --imgsz 480x640", code="size"
        )
    height, width = (int(parts[0]), int(parts[-1]))
    for side in (height, width):
        if side % 32 or side < 32:
            below, above = max(32, side // 32 * 32), (side // 32 + 1) * 32
            raise UsageError(
                f"--imgsz {text}: {side} is not a multiple of 32", hint=f"--imgsz {below} or {above}", code="size"
            )
        if side > 4096:
            raise UsageError(
                f"--imgsz {text}: {side} is more than 4096 pixels", hint="--imgsz 640, at most 4096", code="size"
            )
    return height, width

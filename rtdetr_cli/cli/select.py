"""Which run, model and size the words of a command line mean."""

from __future__ import annotations

from pathlib import Path

from rtdetr_cli.errors import ModelError, UsageError

BEST = "best.safetensors"
MODEL_SUFFIXES = (".safetensors", ".pth", ".pt", ".onnx", ".xml", ".engine")


def finished_runs(runs: Path) -> list[Path]:
    """Return the run folders below `runs` that hold a model to deploy, newest last."""
    if not runs.is_dir():
        return []
    found = [p.parent for p in runs.glob(f"*/{BEST}")]
    return sorted(found, key=lambda run: ((run / BEST).stat().st_mtime_ns, run.name))


def newest_run(runs: Path = Path("runs")) -> Path:
    """Return the newest run folder.

    Raises:
        ModelError: there is none.
    """
    found = finished_runs(runs)
    if not found:
        raise ModelError(
            f"no finished run lies under {runs}/ and no model was named",
            hint="rtdetr train --preset r18 --data DATA, or name a model file",
            code="run-missing",
        )
    return found[-1]


def resolve_model(model: Path | None, *, runs: Path = Path("runs")) -> Path:
    """Return the model file that is meant: a file, a run folder's best, or the newest run's when None.

    What was taken in place of a missing name is said on stderr.

    Raises:
        ModelError: there is no such file or run.
    """
    if model is None:
        from rtdetr_cli.cli import terminal

        taken = newest_run(runs) / BEST
        terminal.say(f"model {taken} (the newest run)")
        return taken
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
        raise ModelError(
            f"the folder {model} holds no {BEST}: no epoch of that run has finished",
            hint=f"rtdetr train --resume {model}",
            code="model-missing",
        )
    if not model.exists():
        raise ModelError(f"the model {model} does not exist", code="model-missing")
    if model.suffix.lower() not in MODEL_SUFFIXES:
        raise ModelError(
            f"{model} is not a kind of model file that is known ({', '.join(MODEL_SUFFIXES)})", code="model-foreign"
        )
    return model


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
            raise UsageError(f"--imgsz {text}: {side} is more than 4096 pixels", code="size")
    return height, width

"""What the folder of a run says about itself: when it began, whether it has finished, and what speaks against it.

Read from the files that training leaves, without torch: this decides which model is meant where none is named.
"""

from __future__ import annotations

import json
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Any

BEST = "best.safetensors"
FINISHED = "  finished ("  # in the line that ends the log of a run


def runs_with_models(runs: Path) -> list[Path]:
    """Return the run folders below `runs` that hold a model to deploy, newest last."""
    if not runs.is_dir():
        return []
    return sorted((p.parent for p in runs.glob(f"*/{BEST}")), key=lambda run: (*_age(run), run.name))


def _age(run: Path) -> tuple[float, int]:
    """Return when a run began, in seconds, and when its model was written.

    The model's own time is no answer by itself: calibrated thresholds make a new file of an old model.
    """
    written = (run / BEST).stat().st_mtime_ns
    try:
        return datetime.fromisoformat(str(_json(run / "manifest.json").get("started"))).timestamp(), written
    except ValueError:
        return written / 1e9, written


def caveat(run: Path) -> str:
    """Say why a run's model should not be taken without a word: unfinished, or judged too bad; else nothing."""
    if (run / "train.log").is_file() and FINISHED not in _text(run / "train.log"):
        return f"unfinished{_reached(run)}"
    result = _json(run / "discrete.json")
    if result.get("passed", True):
        return ""
    drop, most = result.get("drop"), result.get("max_drop")
    if isinstance(drop, (int, float)) and isinstance(most, (int, float)) and drop > most:
        return f"its discrete sampling lost {drop:.3f} AP, more than --max-drop {most:g}"
    return "an export of finetune-discrete did not pass its gate"


def _reached(run: Path) -> str:
    done = len(_text(run / "metrics.csv").splitlines()) - 1  # the first line is the heading
    if done < 1:
        return ""
    try:
        epochs = tomllib.loads(_text(run / "config.toml")).get("epochs")
    except tomllib.TOMLDecodeError:
        epochs = None
    return f", epoch {done}" + (f" of {epochs}" if isinstance(epochs, int) else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

"""Get a training run ready to start: its settings, and the processes of several devices."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdetr_cli.config.run import NAMED, RunConfig, resolve_run
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.files import missing_path_hint
from rtdetr_cli.text import abbreviate

COMMAND_LINE = "RTDETR_COMMAND_LINE"


def resolve_training(
    flags: Mapping[str, Any], *, sets: Sequence[str] = (), config_file: Path | None = None
) -> tuple[RunConfig, str]:
    """Resolve the settings of `rtdetr train`.

    Preset, input size and model sizes come from the file of `--weights` unless a preset was given.

    Returns:
        The settings, and a note that says which of them come from the weights, if any do.

    Raises:
        UsageError: invalid settings, or no dataset.
        DataError: the dataset does not exist. Checked here, since whatever comes next has to import torch.
        ModelError: the weights cannot be read.
    """
    config = resolve_run(flags, sets=sets, config_file=config_file)
    data, weights = config.settings.data, config.settings.weights
    if data is None:
        hint = "rtdetr train my-dataset/ --preset r18"
        raise UsageError("no dataset given", hint=hint, code="data-missing")
    require_dataset(data)
    if config.source("preset") != "default" or weights in NAMED["weights"]:
        return config, ""

    from rtdetr_cli.workflows.starting_weights import settings_from_weights

    inherited = settings_from_weights(weights)
    if inherited is None:
        return config, ""
    path, values = inherited
    config = resolve_run(flags, sets=sets, config_file=config_file, inherited=(str(path), values))
    texts = [
        f"{key} {'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in values.items()
        if config.source(key) == str(path)
    ]
    return config, f"from {path}: {abbreviate(texts, 5)}" if texts else ""


def require_dataset(data: str | Path) -> None:
    """Raise DataError if the dataset does not exist."""
    if not Path(data).exists():
        hint = missing_path_hint(Path(data))
        raise DataError(f"the dataset {data} does not exist", hint=hint, code="dataset-missing")


def run_processes(config: RunConfig, devices: Sequence[str], *, resume: Path | None, words: Sequence[str] = ()) -> int:
    """Train in one process for each device, wait for them, and return their exit code.

    Every process reads the settings from a file, or resumes the run `resume`; `words` are added to its command line.
    """
    from rtdetr_cli.train import launch

    with tempfile.TemporaryDirectory(prefix="rtdetr-") as folder:
        file = Path(folder) / "config.toml"
        file.write_text(config.to_toml(), encoding="utf-8")
        start = ["--resume", str(resume)] if resume is not None else ["--config", str(file)]
        os.environ[COMMAND_LINE] = json.dumps(sys.argv)
        try:
            return launch.supervise(["train", *start, *words], devices)
        finally:
            del os.environ[COMMAND_LINE]


def command_line() -> list[str]:
    """Return the command line as the user typed it, also in a process that `run_processes` started."""
    words = os.environ.get(COMMAND_LINE)
    return list(json.loads(words)) if words else sys.argv

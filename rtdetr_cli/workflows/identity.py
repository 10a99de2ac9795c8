"""What makes two runs the same: dataset, settings, plan and versions; a resumed run must agree with its beginning."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.config.run import RunConfig, resolve_run
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.train.run_folder import CONFIG
from rtdetr_cli.workflows.prepare import Prepared

# Settings that say where things lie and how the machine is used; a resumed run may not change them either, but they
# do not make it another run for the checkpoint.
PLACES = (
    "data",
    "images",
    "out",
    "name",
    "workers",
    "cache",
    "cache_gb",
    "log",
    "device",
    "checkpoint_minutes",
    "checkpoint_steps",
    "plots",
)


AUG_CONTENT = "the content of the --aug file"


def refuse_changes(config: RunConfig, flags: Mapping[str, Any], sets: Sequence[str], path: Path) -> None:
    """Refuse a setting that differs from the resumed run's.

    Raises:
        UsageError: it names the setting and both values.
    """
    now = resolve_run(dict(flags), sets=sets)
    given = {*flags, *(w.partition("=")[0].strip() for w in sets)}
    before = {**flatten(config.settings), **_tables(config)}
    after = {**flatten(now.settings), **_tables(now)}
    for key in sorted(given):
        old, new = before.get(key), after.get(key)
        if key in ("data", "images", "out") and old is not None and new is not None:
            old, new = os.path.abspath(str(old)), os.path.abspath(str(new))
        if old != new:
            raise UsageError(
                f"--resume {path}: {key} is {_words(old)} in this run, not {_words(new)}",
                hint="a resumed run needs no other flag; a new run takes --weights from it",
                code="resume-changed",
            )


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with another dataset, other settings or another plan than the checkpoint's.

    Raises:
        DataError: the dataset.
        UsageError: a setting or a planned value.
    """
    if saved["dataset"] != now["dataset"]:
        differing = [k for k in now["dataset"] if saved["dataset"].get(k) != now["dataset"][k] and k != "fingerprint"]
        told = "; ".join(
            f"{k} {_words(saved['dataset'].get(k))} then, {_words(now['dataset'][k])} now" for k in differing
        )
        raise DataError(
            f"the dataset has changed since the run {path} began"
            + (f": {told}" if told else ": boxes, names or sizes"),
            hint="put it back as it was, or start a new run with --weights " + str(path / "best.safetensors"),
            code="resume-dataset",
        )
    for part in ("settings", "plan"):
        for key in sorted({*saved[part], *now[part]}):
            if saved[part].get(key) != now[part].get(key):
                raise UsageError(
                    f"--resume {path}: {key} was {_words(saved[part].get(key))} when the run began, "
                    f"and is {_words(now[part].get(key))} now",
                    hint=_remedy(part, key, path),
                    code="resume-changed",
                )


def _remedy(part: str, key: str, path: Path) -> str:
    if key == AUG_CONTENT:
        return "put the file back as it was"
    if part == "settings":
        return f"undo the change in {path / CONFIG}"
    return "finish the run with the version of rtdetr-cli that began it"


def _tables(config: RunConfig) -> dict[str, Any]:
    model, optim = flatten(config.preset.model, "model."), flatten(config.preset.optim, "optim.")
    return {**model, **optim}


def _words(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return what a checkpoint belongs to: dataset, settings and plan as plain values."""
    config = prepared.config
    settings = {k: v for k, v in flatten(config.settings).items() if k not in PLACES}
    if prepared.augmentation.custom:
        settings[AUG_CONTENT] = hashlib.sha256(prepared.augmentation.custom.encode()).hexdigest()[:12]
    plan = {k: v for k, v in prepared.plan.to_dict().items() if k not in ("choices", "warnings")}
    splits = prepared.splits
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "dataset": {
                    "fingerprint": splits.fingerprint,
                    "training pictures": len(prepared.train_set),
                    "validation pictures": len(prepared.val_set),
                    "classes": list(splits.train.names) if splits.train else [],
                },
                "settings": {**settings, **_tables(config)},
                "plan": plan,
            }
        )
    )
    return plain

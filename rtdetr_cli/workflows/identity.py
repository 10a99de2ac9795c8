"""What a checkpoint belongs to: dataset, settings and plan. A resumed run must agree with its start in all three."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli import documents as doc
from rtdetr_cli.config.run import NAMED, RunConfig, absolute, parse_set, resolve_run
from rtdetr_cli.datasets.fingerprint import image_digests
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.runs import CHECKPOINT, RunFolder
from rtdetr_cli.text import counted
from rtdetr_cli.workflows.prepare import Prepared

# Settings that say where files are and how the machine is used. A resumed run may not change them either, but they
# are no part of what a checkpoint belongs to.
UNRELATED = (
    *("data", "images", "out", "name", "workers", "cache", "cache_gb", "log", "device"),
    *("checkpoint_minutes", "checkpoint_steps", "plots"),
)
AUG_CONTENT = "the content of the --aug file"
IMAGES = "pictures"  # in checkpoints


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run's checkpoints belong to.

    Attributes:
        facts: plain values, stored in each checkpoint.
        files: the image files that the run trains or evaluates on, each once; empty in all but the main process.
        digests: of these files, (N,) uint64.
    """

    facts: dict[str, Any]
    files: list[str]
    digests: NDArray[np.uint64]


def identify(prepared: Prepared) -> Identity:
    """Return what a run's checkpoints belong to; the main process reads all image files."""
    config, splits, sets = prepared.config, prepared.splits, (prepared.train_set, prepared.val_set)
    files: list[str] = []
    if prepared.processes.is_main:
        # Each file once: with --overfit the training images are repeated.
        files = list(dict.fromkeys(os.path.join(s.root, name) for s in sets for name in s.file_names))
    digests = image_digests(files)
    overall = prepared.processes.broadcast(hashlib.sha256(digests.astype("<u8").tobytes()).hexdigest())
    settings = {key: value for key, value in _values(config).items() if key not in UNRELATED}
    if prepared.augmentation.custom:
        settings[AUG_CONTENT] = hashlib.sha256(prepared.augmentation.custom.encode()).hexdigest()[:12]
    facts = {
        "dataset": {
            "fingerprint": splits.fingerprint,
            IMAGES: overall,
            "training images": len(prepared.train_set),
            "validation images": len(prepared.val_set),
            "classes": list(splits.train.names) if splits.train else [],
        },
        "settings": settings,
        "plan": asdict(prepared.plan),
    }
    return Identity(json.loads(json.dumps(facts)), files, digests)


def check_identity(saved: Mapping[str, Any], now: Identity, path: Path) -> None:
    """Refuse to resume with another dataset, other settings or another plan than those in a run's checkpoint.

    Raises:
        UsageError: a setting or the plan differs.
        DataError: the dataset differs.
    """
    folder = RunFolder(path)
    try:
        saved = doc.table(doc.table(doc.plain))(saved)
        before, after = saved["dataset"], now.facts["dataset"]
        changed = [key for key in after if before[key] != after[key]]
        saved["settings"], saved["plan"]
    except (ValueError, KeyError) as error:
        reason = f"what it says about dataset and settings is incomplete ({error})"
        raise folder.damaged(CHECKPOINT, reason) from None
    if changed:
        counts = [key for key in changed if key not in ("fingerprint", IMAGES)]
        digests = folder.digests()
        if counts:
            text = "; ".join(f"{key} {_format(before[key])} then, {_format(after[key])} now" for key in counts)
        elif "fingerprint" in changed:
            text = "boxes, areas, names, ids or sizes"
        elif digests is None or len(digests) != len(now.digests):
            text = "some image files are different"
        else:
            different = np.flatnonzero(digests != now.digests)
            text = f"{counted(len(different), 'image file')}, such as {now.files[different[0]]}"
        raise DataError(
            f"the dataset has changed since {path} started: {text}",
            hint=f"restore it, or start a new run with --weights {folder.best}",
            code="resume-dataset",
        )
    remedies = {
        "settings": f"undo the change in {folder.config}",
        "plan": "finish the run with the version of rtdetr-cli that started it",
    }
    for part, remedy in remedies.items():
        before, after = saved[part], now.facts[part]
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                raise UsageError(
                    f"--resume {path}: {key} was {_format(before.get(key))} when the run started "
                    f"and is {_format(after.get(key))} now",
                    hint="restore the file" if key == AUG_CONTENT else remedy,
                    code="resume-changed",
                )


def refuse_changes(config: RunConfig, flags: Mapping[str, Any], sets: Sequence[str], path: Path) -> None:
    """Refuse a setting that differs from the resumed run's; another spelling of the same value is accepted.

    Raises:
        UsageError: it names the setting and both values.
    """
    words = parse_set(sets)
    if not flags and not words:
        return
    folder = RunFolder(path)
    flags = dict(flags)
    if "preset" in flags:
        flags["preset"] = absolute("preset", str(flags["preset"]))
    # On top of the run's own settings: its preset file may be gone, and a value need not fit another preset.
    now = resolve_run(flags, sets=sets, config_file=folder.config)
    before, after = _values(config.anchored()), _values(now.anchored())
    before |= {"out": os.path.abspath(path.parent), "name": config.settings.name or path.resolve().name}
    after["out"] = os.path.abspath(now.settings.out)
    plan = folder.manifest().get("plan", {})
    for key, unset, name in (("lr", None, "lr"), ("lr_backbone", None, "lr_backbone"), ("aug", "auto", "augmentation")):
        if before[key] == unset and after[key] != unset:
            before[key] = plan.get(name)
    for key in sorted({*flags, *words}):
        old, new = before.get(key), after.get(key)
        if old != new and not (key in (*NAMED, "out") and _is_same_file(old, new)):
            raise UsageError(
                f"--resume {path}: {key} is {_format(old)} in this run, not {_format(new)}",
                hint="a resumed run needs no other flag; a new run can start from it with --weights",
                code="resume-changed",
            )


def _values(config: RunConfig) -> dict[str, Any]:
    return config.values() | {"imgsz": config.imgsz}


def _is_same_file(one: object, other: object) -> bool:
    return one is not None and other is not None and os.path.realpath(str(one)) == os.path.realpath(str(other))


def _format(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)

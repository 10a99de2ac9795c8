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

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.config.run import NAMED, RunConfig, absolute, parse_set, resolve_run
from rtdetr_cli.datasets.fingerprint import image_digests
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.workflows.prepare import Prepared

# Settings that say where files are and how the machine is used. A resumed run may not change them either, but they
# are no part of what a checkpoint belongs to.
UNRELATED = (
    *("data", "images", "out", "name", "workers", "cache", "cache_gb", "log", "device"),
    *("checkpoint_minutes", "checkpoint_steps", "plots"),
)
AUG_CONTENT = "the content of the --aug file"
IMAGES = "pictures"  # in checkpoints


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
    before, after = _values(config), _values(now)
    before |= {"out": os.path.abspath(path.parent), "name": config.settings.name or path.resolve().name}
    after["out"] = os.path.abspath(now.settings.out)
    plan = folder.manifest().get("plan", {})
    for key, unset, name in (("lr", None, "lr"), ("lr_backbone", None, "lr_backbone"), ("aug", "auto", "augmentation")):
        if before[key] == unset and after[key] != unset:
            before[key] = plan.get(name)
    for key in sorted({*flags, *words}):
        old, new = before.get(key), after.get(key)
        if old != new and not (key in (*NAMED, "out") and _same_file(old, new)):
            raise UsageError(
                f"--resume {path}: {key} is {_shown(old)} in this run, not {_shown(new)}",
                hint="a resumed run needs no other flag; a new run can start from it with --weights",
                code="resume-changed",
            )


def _values(config: RunConfig) -> dict[str, Any]:
    return {**flatten(config.anchored().settings), **_preset_values(config), "imgsz": config.imgsz}


def _same_file(one: object, other: object) -> bool:
    return one is not None and other is not None and os.path.realpath(str(one)) == os.path.realpath(str(other))


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path, digests: ImageDigests) -> None:
    """Refuse to resume with another dataset, other settings or another plan than the run's.

    Args:
        saved: `identity` when the run started.
        now: `identity` today.
        path: the run's folder.
        digests: of today's images, which can name what has changed.

    Raises:
        UsageError: a setting or the plan differs.
        DataError: the dataset differs.
    """
    changed = [key for key in now["dataset"] if saved["dataset"][key] != now["dataset"][key]]
    if changed:
        raise DataError(
            f"the dataset has changed since {path} started: "
            + _dataset_changes(saved["dataset"], now["dataset"], changed, RunFolder(path).digests(), digests),
            hint=f"restore it, or start a new run with --weights {RunFolder(path).best}",
            code="resume-dataset",
        )
    for part in ("settings", "plan"):
        for key in sorted({*saved[part], *now[part]}):
            if saved[part].get(key) != now[part].get(key):
                raise UsageError(
                    f"--resume {path}: {key} was {_shown(saved[part].get(key))} when the run started "
                    f"and is {_shown(now[part].get(key))} now",
                    hint=_remedy(part, key, path),
                    code="resume-changed",
                )


def _dataset_changes(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    changed: Sequence[str],
    before: NDArray[np.uint64] | None,
    digests: ImageDigests,
) -> str:
    counts = [key for key in changed if key not in ("fingerprint", IMAGES)]
    if counts:
        return "; ".join(f"{key} {_shown(saved[key])} then, {_shown(now[key])} now" for key in counts)
    if "fingerprint" in changed:
        return "boxes, areas, names, ids or sizes"
    if before is None or len(before) != len(digests.values):
        return "some image files are different"
    different = np.flatnonzero(before != digests.values)
    first = digests.name(int(different[0]))
    if len(different) == 1:
        return f"the image file {first} is different"
    return f"{len(different)} image files are different, the first is {first}"


def _remedy(part: str, key: str, path: Path) -> str:
    if key == AUG_CONTENT:
        return "restore the file"
    if part == "settings":
        return f"undo the change in {RunFolder(path).config}"
    return "finish the run with the version of rtdetr-cli that started it"


def _preset_values(config: RunConfig) -> dict[str, Any]:
    return {**flatten(config.preset.model, "model."), **flatten(config.preset.optim, "optim.")}


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


@dataclass(frozen=True, slots=True)
class ImageDigests:
    """Digests of the image files that a run trains or evaluates on, each file once.

    Attributes:
        positions: for each file, the dataset (0 training, 1 validation) and the index in it; empty in all but the
            main process, which reads the files for all.
        values: (N,) uint64.
        overall: one digest of all values.
    """

    prepared: Prepared
    positions: tuple[tuple[int, int], ...]
    values: NDArray[np.uint64]
    overall: str

    def name(self, index: int) -> str:
        """Return the name of a file as the dataset has it."""
        dataset, position = self.positions[index]
        return (self.prepared.train_set, self.prepared.val_set)[dataset].file_names[position]


def digest_images(prepared: Prepared) -> ImageDigests:
    """Compute the digests by which a replaced image file is noticed."""
    positions: dict[str, tuple[int, int]] = {}
    values = np.zeros(0, np.uint64)
    if prepared.processes.is_main:
        for number, dataset in enumerate((prepared.train_set, prepared.val_set)):
            for index, name in enumerate(dataset.file_names):
                positions.setdefault(os.path.join(dataset.root, name), (number, index))
        values = image_digests(list(positions))
    overall = prepared.processes.broadcast(hashlib.sha256(values.astype("<u8").tobytes()).hexdigest())
    return ImageDigests(prepared, tuple(positions.values()), values, overall)


def identity(prepared: Prepared, digests: ImageDigests) -> dict[str, Any]:
    """Return what a checkpoint belongs to, as plain values."""
    config, splits = prepared.config, prepared.splits
    settings = {k: v for k, v in flatten(config.settings).items() if k not in UNRELATED}
    settings["imgsz"] = config.imgsz
    if prepared.augmentation.custom:
        settings[AUG_CONTENT] = hashlib.sha256(prepared.augmentation.custom.encode()).hexdigest()[:12]
    facts = {
        "dataset": {
            "fingerprint": splits.fingerprint,
            IMAGES: digests.overall,
            "training images": len(prepared.train_set),
            "validation images": len(prepared.val_set),
            "classes": list(splits.train.names) if splits.train else [],
        },
        "settings": {**settings, **_preset_values(config)},
        "plan": asdict(prepared.plan),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain

"""What makes two runs the same: dataset, settings, plan and versions; a resumed run must agree with its beginning."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.config.run import NAMED, RunConfig, absolute, parse_set, resolve_run
from rtdetr_cli.datasets.fingerprint import image_digests
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.runs import CONFIG, RunFolder
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
IMAGES = "pictures"


def refuse_changes(config: RunConfig, flags: Mapping[str, Any], sets: Sequence[str], path: Path) -> None:
    """Refuse a setting that differs from the resumed run's; what says the same in other words does not.

    Raises:
        UsageError: it names the setting and both values.
    """
    words = parse_set(sets)
    if not flags and not words:
        return
    own = {**flags, "preset": absolute("preset", str(flags["preset"]))} if "preset" in flags else dict(flags)
    # On top of the run's own settings: a preset of one's own may be gone, and a value need not fit another preset.
    now = resolve_run(own, sets=sets, config_file=path / CONFIG)
    before, after = _values(config), _values(now)
    before |= {"out": os.path.abspath(path.parent), "name": config.settings.name or path.resolve().name}
    after["out"] = os.path.abspath(now.settings.out)
    planned = RunFolder(path).manifest().get("plan", {})
    for key, unset, name in (("lr", None, "lr"), ("lr_backbone", None, "lr_backbone"), ("aug", "auto", "augmentation")):
        if before[key] == unset and after[key] != unset:
            before[key] = planned.get(name)
    for key in sorted({*flags, *words}):
        old, new = before.get(key), after.get(key)
        if old != new and not (key in (*NAMED, "out") and _same_place(old, new)):
            raise UsageError(
                f"--resume {path}: {key} is {_words(old)} in this run, not {_words(new)}",
                hint="a resumed run needs no other flag; a new run takes --weights from it",
                code="resume-changed",
            )


def _values(config: RunConfig) -> dict[str, Any]:
    return {**flatten(config.anchored().settings), **_tables(config), "imgsz": config.imgsz}


def _same_place(one: object, other: object) -> bool:
    return one is not None and other is not None and os.path.realpath(str(one)) == os.path.realpath(str(other))


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path, images: Images) -> None:
    """Refuse to go on with another dataset, other settings or another plan than the run's.

    Args:
        saved: what the run began with.
        now: what `identity` gives of it today.
        path: the run's folder.
        images: those of today, which can name what has changed.

    Raises:
        DataError: the dataset.
        UsageError: a setting or a planned value.
    """
    differing = [key for key, value in saved["dataset"].items() if now["dataset"].get(key) != value]
    if differing:
        raise DataError(
            f"the dataset has changed since the run {path} began: "
            + _changes(saved["dataset"], now["dataset"], differing, RunFolder(path).digests(), images),
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


def _changes(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    differing: Sequence[str],
    digests: NDArray[np.uint64] | None,
    images: Images,
) -> str:
    told = [k for k in differing if k not in ("fingerprint", IMAGES)]
    if told:
        return "; ".join(f"{k} {_words(saved[k])} then, {_words(now[k])} now" for k in told)
    if "fingerprint" in differing:
        return "boxes, areas, names, ids or sizes"
    if digests is None or len(digests) != len(images.digests):
        return "images are not the files that they were"
    places = np.flatnonzero(digests != images.digests)
    if len(places) == 1:
        return f"the image {images.name(int(places[0]))} is another file"
    return f"{len(places)} images are other files, the first {images.name(int(places[0]))}"


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


@dataclass(frozen=True, slots=True)
class Images:
    """What lay on disk when it was looked at: the images that a run trains or measures on, each once.

    Attributes:
        places: of each, the split (0 trained on, 1 measured on) and the index in it; none in another process than the
            first, which looks for all.
        digests: (N,) uint64, a number for each image.
        digest: one for all of them.
    """

    prepared: Prepared
    places: tuple[tuple[int, int], ...]
    digests: NDArray[np.uint64]
    digest: str

    def name(self, index: int) -> str:
        """Return the name of one of them, as the dataset has it."""
        which, place = self.places[index]
        return (self.prepared.train_set, self.prepared.val_set)[which].file_names[place]


def look_at_images(prepared: Prepared) -> Images:
    """Give each image of a run a number by which another file in its place is noticed."""
    found: dict[str, tuple[int, int]] = {}
    digests = np.zeros(0, np.uint64)
    if prepared.processes.is_main:
        for which, dataset in enumerate((prepared.train_set, prepared.val_set)):
            for index, name in enumerate(dataset.file_names):
                found.setdefault(os.path.join(dataset.root, name), (which, index))
        digests = image_digests(list(found))
    digest = prepared.processes.broadcast(hashlib.sha256(digests.astype("<u8").tobytes()).hexdigest())
    return Images(prepared, tuple(found.values()), digests, digest)


def identity(prepared: Prepared, images: Images) -> dict[str, Any]:
    """Return what a checkpoint belongs to: dataset, settings and plan as plain values."""
    config = prepared.config
    settings = {k: v for k, v in flatten(config.settings).items() if k not in PLACES}
    settings["imgsz"] = config.imgsz
    if prepared.augmentation.custom:
        settings[AUG_CONTENT] = hashlib.sha256(prepared.augmentation.custom.encode()).hexdigest()[:12]
    plan = {k: v for k, v in prepared.plan.to_dict().items() if k not in ("choices", "warnings")}
    splits = prepared.splits
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "dataset": {
                    "fingerprint": splits.fingerprint,
                    IMAGES: images.digest,
                    "training images": len(prepared.train_set),
                    "validation images": len(prepared.val_set),
                    "classes": list(splits.train.names) if splits.train else [],
                },
                "settings": {**settings, **_tables(config)},
                "plan": plan,
            }
        )
    )
    return plain

"""Which split of which dataset a model is judged on: the one named, or the one it was trained with."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.records import Dataset, Splits
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.weights.header import ModelHeader


@dataclass(frozen=True, slots=True)
class OwnData:
    """The dataset that a run was trained with, as its settings name it."""

    source: Path
    images: Path | None
    val_fraction: float
    seed: int


def own_data(model: Path, header: ModelHeader | None = None) -> OwnData | None:
    """Return the dataset of the run that a model file lies in (also in its `export/`), or that its header names.

    A relative path is looked for from here, and from the folders above the run.
    """
    for folder in (model.parent, model.parent.parent):
        settings = _settings(folder)
        if settings.get("data"):
            images = settings.get("images")
            return OwnData(
                _found(Path(settings["data"]), folder),
                _found(Path(images), folder) if images else None,
                float(settings.get("val_fraction", 0.2)),
                int(settings.get("seed", 0)),
            )
    named = (header.dataset if header else {}).get("source")
    return OwnData(Path(str(named)), None, 0.2, 0) if named else None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _found(path: Path, run: Path) -> Path:
    """Return a path of a run's settings: as it is, or seen from where the run was started, usually above `runs/`."""
    if path.is_absolute() or path.exists():
        return path
    return next((parent / path for parent in run.resolve().parents if (parent / path).exists()), path)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A split to judge on, and what a reader should know about how it came to be."""

    dataset: Dataset
    splits: Splits
    notes: tuple[str, ...]


def choose_split(
    source: Path | None,
    *,
    split: str = "val",
    images: Path | None = None,
    model: Path | None = None,
    header: ModelHeader | None = None,
    find_images: bool = True,
) -> Chosen:
    """Load the split that a model is to be judged on.

    A dataset without a val split is judged whole, except the one that the model was trained with: there the part
    that training held out is drawn again.

    Args:
        source: the dataset, or None for the model's own.
        split: `train`, `val` or `test`.
        images: folder of the images.
        model: path of the model file.
        header: the model's.
        find_images: False when detections come from a file, and the images need not be there.

    Raises:
        UsageError: no dataset is named and the model does not know its own.
        DataError: the dataset cannot be read, or has no such split, or it is empty.
    """
    own = own_data(model, header) if model is not None else None
    notes: list[str] = []
    if source is None:
        if own is None:
            raise UsageError(
                "no dataset is named, and the model does not say what it was trained on",
                hint="--data DATA names a dataset",
                code="data-missing",
            )
        if not own.source.exists():
            raise DataError(
                f"the dataset that the model was trained with, {own.source}, is not there any more",
                hint="--data DATA names another",
                code="dataset-missing",
            )
        source, images = own.source, images or own.images
        notes.append(f"data {source} (the model's own)")
    same_draw = own is not None and own.source.exists() and own.source.resolve() == source.resolve()
    fraction, seed = (own.val_fraction, own.seed) if own is not None and same_draw else (0.2, 0)
    splits = load_splits(source, images=images, val_fraction=fraction, seed=seed, find_images=find_images)
    trained_on = str((header.dataset if header else {}).get("fingerprint", ""))
    if splits.split_made:
        if same_draw or (trained_on and trained_on == splits.fingerprint):
            notes.append(f"{splits.name} has no val split: the part that training held out is taken")
        else:
            splits = load_splits(source, images=images, split_single=False, find_images=find_images)
    elif same_draw and trained_on and trained_on != splits.fingerprint:
        notes.append(f"{splits.name} has changed since the model was trained")
    found: dict[str, Dataset | None] = {"train": splits.train, "val": splits.val, "test": splits.test}
    if split not in found:
        raise UsageError(f"there is no split {split!r}", hint="--split train, val or test", code="split")
    dataset = found[split]
    there = [f"{name} ({len(part)} images)" for name, part in found.items() if part is not None]
    if dataset is None or not len(dataset):
        state = "has no" if dataset is None else "has an empty"
        raise DataError(
            f"{splits.name} {state} {split} split; it has {', '.join(there) or 'nothing'}",
            hint="--split names another; or rtdetr validate DATA --resplit 0.8,0.2 --to DIR",
            code="empty-split",
        )
    return Chosen(dataset, splits, tuple(notes))

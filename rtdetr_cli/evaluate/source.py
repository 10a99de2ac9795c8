"""Choose the dataset split to evaluate a model on: the one that was named, or the one that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtdetr_cli import documents as doc
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.checks.val_split import VAL_FRACTION
from rtdetr_cli.config.presets import read_toml
from rtdetr_cli.datasets.records import Dataset, Splits
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.runs import CONFIG, RunFolder
from rtdetr_cli.weights.header import ModelHeader

_SETTINGS: dict[str, doc.Reader[Any]] = {
    "data": doc.string,
    "images": doc.string,
    "val_fraction": doc.number,
    "seed": doc.integer(0, (1 << 63) - 1),
}


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The dataset that a run was trained with, from its settings.

    Attributes:
        source: the dataset.
        images: folder of the images, if it was named.
        val_fraction: fraction of train that was held out if the dataset had no val split.
        val_images: names of the images that were held out; None for none.
        legacy_seed: by which a run of version 0.1 drew them; None for other runs.
    """

    source: Path
    images: Path | None = None
    val_fraction: float = VAL_FRACTION
    val_images: Sequence[str] | None = None
    legacy_seed: int | None = None

    def is_of(self, source: Path) -> bool:
        """Return whether `source` is this dataset."""
        return self.source.exists() and self.source.resolve() == source.resolve()

    def load(self, *, find_images: bool = True) -> Splits:
        """Load the dataset with the val split that the run used."""
        return load_splits(
            self.source,
            images=self.images,
            val_fraction=self.val_fraction,
            val_images=self.val_images,
            legacy_seed=self.legacy_seed,
            find_images=find_images,
        )


def training_data(model: Path, header: ModelHeader | None = None) -> TrainingData | None:
    """Return the dataset of the run that holds a model file (also in its `export/`), or that the header names.

    A relative path is resolved from here, or from the folders above the run.
    """
    for folder in (model.parent, model.parent.parent):
        try:
            settings = doc.read_fields(read_toml(folder / CONFIG), _SETTINGS)
        except (UsageError, ValueError):
            continue
        if settings.get("data"):
            images, run = settings.get("images"), RunFolder(folder)
            return TrainingData(
                _resolve(Path(settings["data"]), folder),
                _resolve(Path(images), folder) if images else None,
                settings.get("val_fraction", VAL_FRACTION),
                run.val_images(),
                settings.get("seed", 0) if run.is_old else None,
            )
    source = (header.dataset if header else {}).get("source")
    return TrainingData(Path(str(source))) if source else None


def _resolve(path: Path, run: Path) -> Path:
    """Return a path of a run's settings as it is, or from the folder that the run was started in."""
    if path.is_absolute() or path.exists():
        return path
    return next((parent / path for parent in run.resolve().parents if (parent / path).exists()), path)


@dataclass(frozen=True, slots=True, eq=False)
class SelectedSplit:
    """A split to evaluate on, the path of its dataset, and notes on how it was chosen."""

    dataset: Dataset
    source: Path
    notes: tuple[str, ...]


def choose_split(
    source: Path | None,
    *,
    split: str = "val",
    images: Path | None = None,
    model: Path | None = None,
    header: ModelHeader | None = None,
    find_images: bool = True,
) -> SelectedSplit:
    """Load the split to evaluate a model on.

    Of the dataset that the model was trained with, the val split of the training is used. Of another dataset that is
    not split, all images are; if it has train and test but no val, the part of train that training would hold out.

    `source` is the dataset, None for the one that the model was trained with. With `find_images=False` the images need
    not exist: the detections come from a file.

    Raises:
        UsageError: no dataset is named and the model does not name one either.
        DataError: the dataset cannot be read, or the split is missing or empty.
    """
    trained = training_data(model, header) if model is not None else None
    notes: list[str] = []
    if source is None:
        if trained is None:
            raise UsageError(
                "no dataset given, and the model does not record what it was trained on",
                hint="pass a dataset with --data DATA",
                code="data-missing",
            )
        if not trained.source.exists():
            raise DataError(
                f"the dataset that the model was trained with, {trained.source}, no longer exists",
                hint="pass another dataset with --data DATA",
                code="dataset-missing",
            )
        source, images = trained.source, images or trained.images
        notes.append(f"data {source} (the dataset that the model was trained with)")
    same_source = trained is not None and trained.is_of(source)
    if trained is not None and same_source:
        data = replace(trained, source=source, images=images)
    else:
        # A model of version 0.1 without its run folder was most likely trained with the default seed.
        old = header is not None and header.version.startswith("0.1.")
        data = TrainingData(source, images, legacy_seed=0 if old else None)
    splits = data.load(find_images=find_images)
    fingerprint = str((header.dataset if header else {}).get("fingerprint", ""))
    unchanged = bool(fingerprint) and fingerprint == splits.fingerprint
    if splits.split_made and (same_source or unchanged):
        notes.append(f"{splits.name} has no val split: val is the part that was held out in training")
    elif splits.split_made and splits.test is not None:
        notes.append(f"{splits.name} has no val split: val is the part of train that training would hold out")
    elif splits.split_made:
        splits = load_splits(source, images=images, split_single=False, find_images=find_images)
    if same_source and fingerprint and not unchanged:
        notes.append(f"{splits.name} has changed since the model was trained")
    return SelectedSplit(_pick(splits, split), splits.source, tuple(notes))


def _pick(splits: Splits, split: str) -> Dataset:
    by_name = {"train": splits.train, "val": splits.val, "test": splits.test}
    if split not in by_name:
        raise UsageError(f"there is no split {split!r}", hint="--split train, val or test", code="split")
    dataset = by_name[split]
    if dataset is None or not len(dataset):
        state = "no" if dataset is None else "an empty"
        existing = [f"{name} ({len(part)} images)" for name, part in by_name.items() if part is not None]
        raise DataError(
            f"{splits.name} has {state} {split} split; it has {', '.join(existing) or 'nothing'}",
            hint="choose another with --split, or create one: "
            f"rtdetr validate {splits.source} --resplit 0.8,0.2 --to DIR",
            code="empty-split",
        )
    return dataset

"""Map a model's classes to a dataset's by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.text import abbreviate, counted

_NAMELESS = re.compile(r"(class[ _-]?)?\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class ClassMap:
    """The dataset's label for each of a model's classes, and the differences in words.

    `labels` is (model classes,) with -1 for a class that the dataset does not have, or None when they are the same.
    """

    labels: NDArray[np.int64] | None
    notes: tuple[str, ...] = ()


def map_classes(names: Sequence[str], dataset: Dataset) -> ClassMap:
    """Map a model's classes to a dataset's by name, ignoring case and spaces.

    A model without class names (a foreign graph) keeps its labels in the dataset's order.

    Raises:
        DataError: no class has the same name, or the number of nameless classes differs.
    """
    dataset_names = dataset.names
    if tuple(names) == dataset_names:
        return ClassMap(None)
    by_position = "the model has no class names: its labels are read in the dataset's order"
    if not names:
        return ClassMap(np.arange(len(dataset_names), dtype=np.int64), (by_position,))
    if all(_NAMELESS.fullmatch(name.strip()) for name in names) and len(names) == len(dataset_names):
        return ClassMap(None, (by_position,))
    # Of two classes with the same name, the first counts.
    label_of = {_normalized(name): label for label, name in reversed(list(enumerate(dataset_names)))}
    labels = np.array([label_of.get(_normalized(name), -1) for name in names], np.int64)
    only_model = [name for name, label in zip(names, labels, strict=True) if label < 0]
    only_data = [name for label, name in enumerate(dataset_names) if label not in labels]
    if len(only_model) == len(names):
        raise DataError(
            f"the model and the dataset {dataset.name} have no class in common: the model has {abbreviate(names)}; "
            f"the dataset has {abbreviate(dataset_names)}",
            hint="use the dataset that the model was trained for, or rename the categories of one of them",
            code="classes-differ",
        )
    notes = []
    if only_model:
        count = counted(len(only_model), "class")
        notes.append(f"ignored {count} of the model that the dataset does not have: {abbreviate(only_model)}")
    if only_data:
        count = counted(len(only_data), "class")
        notes.append(f"the model does not know {count} of the dataset: {abbreviate(only_data)}")
    if not notes and not np.array_equal(labels, np.arange(len(dataset_names))):
        notes.append("the model and the dataset order their classes differently: mapped by name")
    return ClassMap(labels, tuple(notes))


def _normalized(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()

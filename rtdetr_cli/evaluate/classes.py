"""Bring a model's classes and a dataset's together, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError

_NAMELESS = re.compile(r"(class[ _-]?)?\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class ClassMap:
    """Which of the dataset's labels each of a model's classes stands for.

    Attributes:
        labels: (model classes,) the dataset's label, -1 for none; None when they are the same.
        notes: what differs, in words; empty when nothing does.
        unknown_to_model: labels of the dataset that the model cannot find.
    """

    labels: NDArray[np.int64] | None
    notes: tuple[str, ...] = ()
    unknown_to_model: tuple[int, ...] = ()


def map_classes(names: Sequence[str], dataset: Dataset) -> ClassMap:
    """Map a model's classes to a dataset's by name, letters' case and spaces aside.

    A model without names (a foreign graph) is taken by position.

    Raises:
        DataError: no class has the same name, or the number of nameless classes differs.
    """
    own = dataset.names
    if tuple(names) == own:
        return ClassMap(None)
    if not names:
        in_order = np.arange(len(own), dtype=np.int64)
        return ClassMap(in_order, ("the model carries no class names: its labels are taken in the dataset's order",))
    if all(_NAMELESS.fullmatch(name.strip()) for name in names) and len(names) == len(own):
        return ClassMap(None, ("the model's classes have no names: they are taken in the dataset's order",))
    positions: dict[str, int] = {}
    for label, name in enumerate(own):
        positions.setdefault(_plain(name), label)
    labels = np.array([positions.get(_plain(name), -1) for name in names], np.int64)
    known = set(labels[labels >= 0].tolist())
    if not known:
        raise DataError(
            f"the model and the dataset {dataset.name} share no class: the model has {_listed(names)}; "
            f"the dataset has {_listed(own)}",
            hint="name the dataset that the model was trained for, or rename the categories of one of them",
            code="classes-differ",
        )
    only_model = [name for name, label in zip(names, labels, strict=True) if label < 0]
    only_data = [label for label in range(len(own)) if label not in known]
    notes: list[str] = []
    if only_model:
        notes.append(
            f"{len(only_model)} classes of the model are not in the dataset and left out: {_listed(only_model)}"
        )
    if only_data:
        missing = _listed([own[label] for label in only_data])
        notes.append(f"{len(only_data)} classes of the dataset are unknown to the model and never found: {missing}")
    if not notes and not np.array_equal(labels, np.arange(len(own))):
        notes.append("the model and the dataset order their classes differently: mapped by name")
    return ClassMap(labels, tuple(notes), tuple(only_data))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown

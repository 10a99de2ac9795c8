from __future__ import annotations

from typing import Any

import pytest

from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.classes import map_classes


def map_names(make: Any, names: tuple[str, ...]) -> Any:
    return map_classes(names, make.dataset(images=1, names=("cat", "dog", "big bird")))


def test_the_same_classes_need_no_map(make: Any) -> None:
    classes = map_names(make, ("cat", "dog", "big bird"))
    assert classes.labels is None
    assert not classes.notes


@pytest.mark.parametrize(
    ("names", "labels", "note"),
    [
        (("dog", "cat", "big bird"), [1, 0, 2], "order their classes differently"),
        (("Cat", "DOG", "big_bird"), [0, 1, 2], ""),
        (("dog", "fish"), [1, -1], "fish"),
        (("dog", "fish"), [1, -1], "the model does not know 2 classes of the dataset: cat, big bird"),
        (("0", "1", "2"), None, "has no class names"),
        (("class 0", "class 1", "class 2"), None, "has no class names"),
        ((), [0, 1, 2], "has no class names"),
    ],
)
def test_classes_are_mapped_by_name(make: Any, names: tuple[str, ...], labels: list[int] | None, note: str) -> None:
    classes = map_names(make, names)
    assert (None if classes.labels is None else classes.labels.tolist()) == labels
    assert note in "; ".join(classes.notes)


def test_no_class_in_common_is_an_error_that_lists_both(make: Any) -> None:
    with pytest.raises(DataError) as raised:
        map_names(make, tuple(f"thing {i}" for i in range(12)))
    assert "have no class in common" in raised.value.message
    assert "thing 7 and 4 more" in raised.value.message
    assert "cat, dog, big bird" in raised.value.message

from __future__ import annotations

from typing import Any

import pytest

from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.classes import map_classes


def mapped(make: Any, names: tuple[str, ...], own: tuple[str, ...] = ("cat", "dog", "big bird")) -> Any:
    return map_classes(names, make.dataset(images=1, names=own))


def test_the_same_classes_need_no_map(make: Any) -> None:
    found = mapped(make, ("cat", "dog", "big bird"))
    assert found.labels is None
    assert not found.notes


@pytest.mark.parametrize(
    ("names", "labels", "said"),
    [
        (("dog", "cat", "big bird"), [1, 0, 2], "order their classes differently"),
        (("Cat", "DOG", "big_bird"), [0, 1, 2], ""),
        (("dog", "fish"), [1, -1], "fish"),
        (("dog", "fish"), [1, -1], "2 classes of the dataset are unknown to the model and never found: cat, big bird"),
        (("0", "1", "2"), None, "have no names"),
        (("class 0", "class 1", "class 2"), None, "have no names"),
        ((), [0, 1, 2], "carries no class names"),
    ],
)
def test_names_decide(make: Any, names: tuple[str, ...], labels: list[int] | None, said: str) -> None:
    found = mapped(make, names)
    assert (None if found.labels is None else found.labels.tolist()) == labels
    assert any(said in note for note in found.notes) or not said


def test_nothing_in_common_is_refused_with_both_lists(make: Any) -> None:
    with pytest.raises(DataError) as raised:
        mapped(make, tuple(f"thing {i}" for i in range(12)))
    assert "share no class" in raised.value.message
    assert "thing 7 and 4 more" in raised.value.message
    assert "cat, dog, big bird" in raised.value.message

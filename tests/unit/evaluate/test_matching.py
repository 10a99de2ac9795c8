from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rtdetr_cli.evaluate import matching
from rtdetr_cli.evaluate.coco import AREA_RANGES, hotcoco_session
from rtdetr_cli.evaluate.matching import CUT, FALSE, IGNORED, TRUE, match


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [4_000_000, 50])
def test_every_fate_is_the_evaluators(make: Any, monkeypatch: pytest.MonkeyPatch, seed: int, chunk: int) -> None:
    """Crowds, sizes, equal scores and more than a hundred detections a class, against the evaluator's own matches."""
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", chunk)
    dataset, table = make.random(seed=seed, images=12 if chunk == 50 else 30, detections=250, classes=2, crowds=0.2)
    found = match(dataset, table)
    sizes = {limits: size for size, limits in enumerate(AREA_RANGES)}
    seen = np.zeros(len(table), int)
    for part in hotcoco_session(dataset, table).eval_imgs:
        if part is None:
            continue
        size = next(s for limits, s in sizes.items() if np.allclose(limits, part["aRng"]))
        rows = np.asarray(part["dtIds"], int) - 1
        expected = np.where(part["dtIgnore"][0], IGNORED, np.where(part["dtMatched"][0], TRUE, FALSE))
        np.testing.assert_array_equal(found.fate[size, rows], expected)
        boxes = np.asarray(part["gtIds"], int) - 1
        np.testing.assert_array_equal(found.counted[size, boxes], ~np.asarray(part["gtIgnore"], bool))
        if size == 0:
            seen[rows] += 1
            taken = np.asarray(part["dtMatches"][0], int) - 1
            np.testing.assert_array_equal(found.matched_box[rows], taken)
    assert set(found.fate[0, seen == 0]) <= {CUT}
    assert (found.fate == CUT).any() or chunk == 50


def test_a_box_and_its_detection_name_each_other(make: Any) -> None:
    dataset, table = make.random(seed=7, crowds=0.0)
    found = match(dataset, table)
    rows = np.flatnonzero(found.matched_box >= 0)
    np.testing.assert_array_equal(found.found_by[found.matched_box[rows]], rows)
    assert (found.fate[0, rows] == TRUE).all()


def test_a_taken_box_leaves_the_second_best(make: Any) -> None:
    """The weaker detection loses its first wish and takes the other box it overlaps enough."""
    dataset = make.dataset(
        images=1, names=("a",), image_index=[0, 0], labels=[0, 0], boxes_xywh=[[0, 0, 100, 100], [0, 10, 100, 100]]
    )
    table = make.table([0, 0, 0], [0, 0, 0], [[0, 1, 100, 100], [0, 2, 100, 100], [0, 3, 100, 100]], [0.9, 0.8, 0.7])
    found = match(dataset, table)
    assert found.matched_box.tolist() == [0, 1, -1]
    assert found.fate[0].tolist() == [TRUE, TRUE, FALSE]


def test_nothing_at_all(make: Any) -> None:
    dataset = make.dataset(images=2, names=("a",))
    assert match(dataset, make.table([], [], [], [])).order.shape == (0,)
    lonely = match(dataset, make.table([0], [0], [[0, 0, 40, 40]], [0.5]))
    assert lonely.fate[:, 0].tolist() == [FALSE, IGNORED, FALSE, IGNORED]

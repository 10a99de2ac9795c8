from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rtdetr_cli.evaluate import matching
from rtdetr_cli.evaluate.coco import AREA_RANGES, hotcoco_session
from rtdetr_cli.evaluate.matching import FALSE_POSITIVE, IGNORED, OVER_LIMIT, TRUE_POSITIVE, match, outcomes_at


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [4_000_000, 50])
def test_outcomes_equal_the_evaluators(make: Any, monkeypatch: pytest.MonkeyPatch, seed: int, chunk: int) -> None:
    """Crowds, sizes, equal scores and more than a hundred detections a class, against the evaluator's own matches."""
    monkeypatch.setattr(matching, "MAX_PAIRS_IN_MEMORY", chunk)
    dataset, table = make.random(seed=seed, images=12 if chunk == 50 else 30, detections=250, classes=2, crowds=0.2)
    matches = match(dataset, table)
    sizes = {limits: size for size, limits in enumerate(AREA_RANGES)}
    evaluated = np.zeros(len(table), bool)
    for part in hotcoco_session(dataset, table).eval_imgs:
        if part is None:
            continue
        size = next(s for limits, s in sizes.items() if np.allclose(limits, part["aRng"]))
        rows = np.asarray(part["dtIds"], int) - 1
        expected = np.where(part["dtIgnore"][0], IGNORED, np.where(part["dtMatched"][0], TRUE_POSITIVE, FALSE_POSITIVE))
        np.testing.assert_array_equal(matches.outcomes[size, rows], expected)
        boxes = np.asarray(part["gtIds"], int) - 1
        np.testing.assert_array_equal(matches.counted[size, boxes], ~np.asarray(part["gtIgnore"], bool))
        if size == 0:
            evaluated[rows] = True
            np.testing.assert_array_equal(matches.matched_box[rows], np.asarray(part["dtMatches"][0], int) - 1)
    assert set(matches.outcomes[0, ~evaluated]) <= {OVER_LIMIT}
    hits = np.flatnonzero(matches.outcomes[0] == TRUE_POSITIVE)
    np.testing.assert_array_equal(matches.matched_detection[matches.matched_box[hits]], hits)
    assert (matches.outcomes == OVER_LIMIT).any() or chunk == 50


def test_a_detection_takes_its_second_choice_when_the_first_is_taken(make: Any) -> None:
    """The detection with the lower score takes the other box that it overlaps enough."""
    dataset = make.dataset(
        images=1, names=("a",), image_index=[0, 0], labels=[0, 0], boxes_xywh=[[0, 0, 100, 100], [0, 10, 100, 100]]
    )
    table = make.table([0, 0, 0], [0, 0, 0], [[0, 1, 100, 100], [0, 2, 100, 100], [0, 3, 100, 100]], [0.9, 0.8, 0.7])
    matches = match(dataset, table)
    assert matches.matched_box.tolist() == [0, 1, -1]
    assert matches.outcomes[0].tolist() == [TRUE_POSITIVE, TRUE_POSITIVE, FALSE_POSITIVE]


def test_without_boxes_every_detection_of_the_size_is_a_false_positive(make: Any) -> None:
    dataset = make.dataset(images=2, names=("a",))
    assert match(dataset, make.table([], [], [], [])).order.shape == (0,)
    alone = match(dataset, make.table([0], [0], [[0, 0, 40, 40]], [0.5]))
    assert alone.outcomes[:, 0].tolist() == [FALSE_POSITIVE, IGNORED, FALSE_POSITIVE, IGNORED]


def test_outcomes_at_several_ious_equal_one_match_each(make: Any) -> None:
    dataset, table = make.random(seed=8, crowds=0.2)
    ious = (0.5, 0.75, 0.95)
    expected = [match(dataset, table, iou=iou).outcomes[0] for iou in ious]
    np.testing.assert_array_equal(outcomes_at(dataset, table, ious), expected)

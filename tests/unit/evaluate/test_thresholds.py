from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import UsageError
from rtdetr_cli.evaluate.matching import match
from rtdetr_cli.evaluate.run import evaluate_table
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.evaluate.thresholds import ScoreCurve, calibrate, parse_target, points_at, score_curve


@pytest.fixture
def simple(make: Any) -> tuple[Dataset, DetectionTable]:
    """Class a: correct at .9 .8 .4, false at .7 .3, four boxes. Class b: correct at .6, false at .95, one box."""
    dataset = make.dataset(
        images=1,
        names=("a", "b", "c"),
        image_index=[0] * 5,
        labels=[0, 0, 0, 0, 1],
        boxes_xywh=[[i * 100, 0, 40, 40] for i in range(5)],
    )
    correct = {i: [i * 100, 0, 40, 40] for i in range(5)}
    false = [0, 300, 40, 40]
    table = make.table(
        [0] * 7,
        [0, 0, 0, 0, 0, 1, 1],
        [correct[0], correct[1], false, correct[2], false, correct[4], false],
        [0.9, 0.8, 0.7, 0.4, 0.3, 0.6, 0.95],
    )
    return dataset, table


def test_best_f1_by_hand(simple: tuple[Dataset, DetectionTable]) -> None:
    dataset, table = simple
    point = score_curve(match(dataset, table), 0).best_point()
    assert (point.true_positives, point.false_positives, point.boxes) == (3, 1, 4)
    assert point.f1 == pytest.approx(6 / 8)
    assert 0.3 < (point.threshold or 0) < 0.4


def test_a_precision_target_takes_the_lowest_threshold_that_reaches_it(simple: tuple[Dataset, DetectionTable]) -> None:
    dataset, table = simple
    matches = match(dataset, table)
    thresholds, notes = calibrate(matches, "precision=0.75", min_boxes=1)
    assert thresholds.per_class[0] == pytest.approx(0.35)  # between .4 (precision 3/4) and .3 (3/5)
    assert thresholds.per_class[1] == pytest.approx(0.3)  # 1/2 at best, below the target
    assert any("b: precision 0.75 is never reached" in note for note in notes)
    assert thresholds.per_class[2] == thresholds.overall
    assert any("c has no boxes" in note for note in notes)
    assert calibrate(matches, "precision=1", min_boxes=1)[0].per_class[0] == pytest.approx(0.75)


def test_classes_without_a_useful_threshold_are_named_in_one_note(make: Any) -> None:
    """a is detected; b has many false positives at every score; of c one object in 200 is detected."""
    boxes = [[(i % 30) * 20, (i // 30) * 20, 15, 15] for i in range(220)]
    dataset = make.dataset(
        images=1,
        names=("a", "b", "c"),
        image_index=[0] * 220,
        labels=[0] * 18 + [1] * 2 + [2] * 200,
        boxes_xywh=boxes,
    )
    false_positives = [[400 + i % 20, 300 + i // 20, 6, 6] for i in range(90)]
    table = make.table(
        [0] * 111,
        [0] * 18 + [1] * 92 + [2],
        [*boxes[:18], *false_positives, *boxes[18:20], boxes[20]],
        [0.9] * 18 + [0.8] * 90 + [0.1] * 2 + [0.9],
    )
    matches = match(dataset, table)
    _, (note,) = calibrate(matches, "f1", min_boxes=1)
    assert "b, c" in note
    assert "a," not in note
    assert not any("b, c" in n for n in calibrate(matches, "precision=0.9", min_boxes=1)[1])


def test_a_class_of_few_boxes_gets_the_overall_threshold(simple: tuple[Dataset, DetectionTable]) -> None:
    dataset, table = simple
    matches = match(dataset, table)
    thresholds, notes = calibrate(matches, "f1")
    assert set(thresholds.per_class) == {thresholds.overall}
    assert "fewer than 30 boxes in the split, so the overall threshold is used for a (4), b (1)" in notes
    four, _ = calibrate(matches, "precision=1", min_boxes=4)
    assert four.per_class == (pytest.approx(0.75), four.overall, four.overall)
    assert four.overall < 0.75


@pytest.mark.parametrize("target", ["f1", "precision=0.6"])
def test_points_at_calibrated_thresholds_lie_on_the_curve(make: Any, target: str) -> None:
    dataset, table = make.random(seed=11)
    matches = match(dataset, table)
    thresholds, _ = calibrate(matches, target, min_boxes=1)
    _, points = points_at(matches, np.array(thresholds.per_class))
    for label, point in enumerate(points):
        curve = score_curve(matches, label)
        row = int(np.searchsorted(-curve.scores, -thresholds.per_class[label]) - 1)
        assert point.precision == pytest.approx(curve.precision[row])
        assert point.recall == pytest.approx(curve.true_positives[row] / curve.boxes)
        if target == "f1":
            assert point.f1 == pytest.approx(curve.f1.max())


def test_small_score_differences_do_not_change_the_points(make: Any) -> None:
    """A threshold lies between two scores, so scores of another backend that differ slightly give the same points."""
    dataset, table = make.random(seed=12)
    matches = match(dataset, table)
    thresholds = np.array(calibrate(matches, "f1", min_boxes=1)[0].per_class)
    perturbed = replace(table, scores=table.scores + np.random.default_rng(0).uniform(-1e-5, 1e-5, len(table)))
    assert points_at(matches, thresholds)[1] == points_at(replace(matches, table=perturbed), thresholds)[1]


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=60), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_curve_equals_counting(rows: list[tuple[int, bool]], missed: int) -> None:
    scores = np.array(sorted((s / 20 for s, _ in rows), reverse=True))
    hits = np.array([h for _, h in rows], bool)
    boxes = int(hits.sum()) + missed
    curve = ScoreCurve.from_outcomes(scores, hits, boxes)
    for row, score in enumerate(curve.scores):
        kept = scores >= score
        assert curve.precision[row] == pytest.approx(hits[kept].mean())
        assert curve.f1[row] == pytest.approx(2 * hits[kept].sum() / max(kept.sum() + boxes, 1))
        assert (scores >= curve.threshold(row)).sum() == kept.sum() or score == 0


def test_without_boxes_or_detections(make: Any) -> None:
    dataset = make.dataset(images=1, names=("a", "b"), image_index=[0], labels=[0], boxes_xywh=[[0, 0, 9, 9]])
    evaluation = evaluate_table(dataset, DetectionTable.empty())
    a, b = evaluation.per_class
    assert (a["precision"], a["recall"], a["f1"], a["threshold"]) == (None, 0, 0, None)
    assert (b["precision"], b["recall"], b["f1"]) == (None, None, None)
    thresholds, notes = calibrate(evaluation.matches, "f1")
    assert thresholds.overall == 0.5
    assert any("no object of the split was detected" in note for note in notes)


@pytest.mark.parametrize("text", ["f2", "precision", "precision=", "precision=2", "precision=0", "f1=3", "recall=0.5"])
def test_invalid_targets(text: str) -> None:
    with pytest.raises(UsageError, match="not a target"):
        parse_target(text)

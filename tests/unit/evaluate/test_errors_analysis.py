from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rtdetr_cli.evaluate.errors_analysis import KINDS, MISSED, RIGHT, analyse
from rtdetr_cli.evaluate.run import metrics_from

BOX = [100, 100, 100, 100]
# One box of class a; a second detection that is wrong in one way.
WRONG = {
    "classification": (1, BOX),
    "location": (0, [100, 165, 100, 100]),
    "both": (1, [100, 165, 100, 100]),
    "duplicate": (0, [100, 105, 100, 100]),
    "background": (0, [400, 300, 50, 50]),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_each_kind_is_told_and_gains_what_tide_says(make: Any, kind: str) -> None:
    """Twenty images with the same single error above the hit: it alone gains, and all of what is lost."""
    label, box = WRONG[kind]
    images = range(20)
    dataset = make.dataset(images=20, names=("a", "b"), image_index=[*images], labels=[0] * 20, boxes_xywh=[BOX] * 20)
    # A duplicate comes after the hit by its nature; every other error is the surer one.
    hit, error = (0.9, 0.8) if kind == "duplicate" else (0.8, 0.9)
    table = make.table(
        [i for i in images for _ in range(2)],
        [0, label] * 20,
        [BOX, box] * 20,
        [hit, error] * 20,
    )
    analysis = analyse(metrics_from(dataset, table), [0.5, 0.5])
    assert analysis.counts == {k: 20 if k == kind else 0 for k in KINDS}
    gains = analysis.gains
    assert gains is not None
    if label == 0 and kind != "duplicate":  # a detection of class b costs class a nothing
        base = analysis.evaluation.metrics["AP50"]
        assert base is not None
        assert gains[kind] == pytest.approx(1 - base, abs=0.02)
    assert all(gain == pytest.approx(0, abs=1e-9) for k, gain in gains.items() if k != kind)


def test_missed_boxes(make: Any) -> None:
    dataset = make.dataset(
        images=1, names=("a",), image_index=[0, 0], labels=[0, 0], boxes_xywh=[BOX, [300, 300, 80, 80]]
    )
    analysis = analyse(metrics_from(dataset, make.table([0], [0], [BOX], [0.9])), [0.5])
    assert analysis.counts["missed"] == 1
    assert analysis.missed.tolist() == [False, True]
    assert analysis.gains is not None
    assert analysis.gains["missed"] == pytest.approx(0.5, abs=0.01)
    assert [s.kind for s in analysis.suspects] == ["never-found"]


def test_a_threshold_above_the_score_makes_a_miss_of_a_hit(make: Any) -> None:
    dataset = make.dataset(images=1, names=("a",), image_index=[0], labels=[0], boxes_xywh=[BOX])
    evaluation = metrics_from(dataset, make.table([0], [0], [BOX], [0.4]))
    assert analyse(evaluation, [0.3]).counts["missed"] == 0
    assert analyse(evaluation, [0.5]).counts["missed"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_kinds_are_the_evaluators_where_there_are_no_crowds(make: Any, seed: int) -> None:
    """Every detection counts at threshold 0, as TIDE counts; at most 100 of a class and image on both sides."""
    dataset, table = make.random(seed=seed, images=20, detections=80, crowds=0)
    analysis = analyse(metrics_from(dataset, table), [0.0] * 3)
    session = analysis.evaluation.coco.session
    expected = session.tide_errors()["counts"]
    names = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), KINDS, strict=True))
    assert analysis.counts == {names[k]: v for k, v in expected.items()}


def test_detections_in_crowds_are_no_errors(make: Any) -> None:
    dataset = make.dataset(
        images=1, names=("a",), image_index=[0], labels=[0], boxes_xywh=[[0, 0, 400, 400]], crowd=[True]
    )
    analysis = analyse(metrics_from(dataset, make.table([0, 0], [0, 0], [BOX, BOX], [0.9, 0.8])), [0.5])
    assert set(analysis.counts.values()) == {0}
    assert analysis.confusion is not None
    assert analysis.confusion.sum() == 0


def test_the_confusion_matrix(make: Any) -> None:
    dataset = make.dataset(
        images=2, names=("a", "b"), image_index=[0, 0, 1], labels=[0, 1, 1], boxes_xywh=[BOX, [300, 100, 90, 90], BOX]
    )
    table = make.table(
        [0, 0, 0, 1], [0, 0, 1, 1], [BOX, [300, 100, 90, 90], [10, 300, 20, 20], BOX], [0.9, 0.8, 0.7, 0.3]
    )
    analysis = analyse(metrics_from(dataset, table), [0.5, 0.5])
    # annotated a: found as a; annotated b: once found as a, once (below the threshold) as nothing; b on nothing
    assert analysis.confusion is not None
    assert analysis.confusion.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_empty_images_worst_images_and_suspects(make: Any) -> None:
    dataset = make.dataset(
        images=4, names=("a", "b"), image_index=[0, 1, 1], labels=[0, 0, 1], boxes_xywh=[BOX, BOX, [300, 100, 90, 90]]
    )
    table = make.table(
        [0, 1, 1, 2, 2],
        [0, 0, 0, 0, 0],
        [BOX, BOX, [300, 100, 90, 90], [10, 10, 50, 50], [200, 200, 50, 50]],
        [0.8, 0.8, 0.95, 0.9, 0.6],
    )
    analysis = analyse(metrics_from(dataset, table), [0.5, 0.5])
    assert analysis.empty == {"pictures": 2, "with_false_positives": 1, "false_positives": 2}
    assert [p.image for p in analysis.worst()] == [2, 1]
    assert analysis.images[3].f1 == 1
    assert [(s.kind, s.image, s.score) for s in analysis.suspects] == [("other-class", 1, 0.95), ("no-box", 2, 0.9)]
    other = analysis.suspects[0]
    assert (other.label, other.annotated) == (0, 1)
    document = analysis.to_json()
    assert document["suspects"][0]["annotated"] == "b"
    assert document["worst"][0]["file"] == "0002.jpg"


def test_a_class_that_is_not_known_yet_casts_no_doubt_on_annotations(make: Any) -> None:
    """Class a is found well, b badly: what b misses, and where b is seen, says something of the model."""
    images = 10
    dataset = make.dataset(
        images=images,
        names=("a", "b", "c"),
        image_index=[i for i in range(images) for _ in range(2)],
        labels=[0, 1] * images,
        boxes_xywh=[BOX, [300, 100, 90, 90]] * images,
    )
    far = [10, 300, 50, 50]
    rows = [(i, 0, BOX, 0.8) for i in range(images - 1)]  # the last a is never found
    rows += [(0, 0, far, 0.9), (0, 1, [300, 100, 90, 90], 0.8), (1, 1, far, 0.95), (2, 1, BOX, 0.9), (3, 2, far, 0.9)]
    rows.sort(key=lambda row: (row[0], -row[3]))
    evaluation = metrics_from(dataset, make.table(*(list(column) for column in zip(*rows, strict=True))))
    assert evaluation.per_class[0]["AP50"] > 0.5 > evaluation.per_class[1]["AP50"]
    analysis = analyse(evaluation, [0.5] * 3)
    assert {s.label for s in analysis.suspects} == {0}
    assert [s.kind for s in analysis.suspects] == ["no-box", "never-found"]
    assert analysis.unjudged == ("b",)
    assert analysis.to_json()["suspects_left_out"] == ["b"]
    assert "cast no doubt on annotations (b)" in analysis.suspects_note
    assert analysis.to_json()["suspects_note"] == analysis.suspects_note
    strong = make.dataset(images=1, names=("a",), image_index=[0], labels=[0], boxes_xywh=[BOX])
    assert analyse(metrics_from(strong, make.table([0], [0], [BOX], [0.9]))).suspects_note == ""


def test_without_hotcoco_the_kinds_remain(make: Any) -> None:
    dataset, table = make.random(seed=3)
    full = analyse(metrics_from(dataset, table), [0.3] * 3)
    plain = analyse(metrics_from(dataset, table, "pycocotools"), [0.3] * 3)
    assert plain.counts == full.counts
    assert plain.gains is None
    assert plain.confusion is None
    assert "confusion" not in plain.to_json()


def test_stored_thresholds_come_first_then_the_best_f1(make: Any) -> None:
    from rtdetr_cli.weights.header import Thresholds

    dataset, table = make.random(seed=4)
    assert "where F1 is highest" in analyse(metrics_from(dataset, table)).origin
    stored = metrics_from(dataset, table, thresholds=Thresholds("f1", 0.5, (0.2, 0.3, 0.4)))
    analysis = analyse(stored)
    assert analysis.thresholds.tolist() == [0.2, 0.3, 0.4]
    assert analysis.origin == "the thresholds stored in the model for f1"
    assert (analysis.kinds[table.scores < 0.2] < RIGHT).all()
    assert MISSED not in np.unique(analysis.kinds)

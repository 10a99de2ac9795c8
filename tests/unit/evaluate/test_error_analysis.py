from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.evaluate.error_analysis import CORRECT, KINDS, analyze_errors
from rtdetr_cli.evaluate.run import evaluate_table
from rtdetr_cli.weights.header import Thresholds

BOX = [100, 100, 100, 100]
# One box of class a, and one more detection with one kind of error.
ERRORS = {
    "classification": (1, BOX),
    "location": (0, [100, 165, 100, 100]),
    "both": (1, [100, 165, 100, 100]),
    "duplicate": (0, [100, 105, 100, 100]),
    "background": (0, [400, 300, 50, 50]),
}


@pytest.mark.parametrize("kind", list(ERRORS))
def test_each_kind_is_counted_and_gains_what_tide_says(make: Any, kind: str) -> None:
    """Twenty images with the same single error: only fixing that kind gains AP, and it gains all that is lost."""
    label, box = ERRORS[kind]
    images = range(20)
    dataset = make.dataset(images=20, names=("a", "b"), image_index=[*images], labels=[0] * 20, boxes_xywh=[BOX] * 20)
    # A duplicate has the lower score by definition; every other error gets the higher one.
    correct, error = (0.9, 0.8) if kind == "duplicate" else (0.8, 0.9)
    table = make.table(
        [i for i in images for _ in range(2)],
        [0, label] * 20,
        [BOX, box] * 20,
        [correct, error] * 20,
    )
    analysis = analyze_errors(evaluate_table(dataset, table), [0.5, 0.5])
    assert analysis.counts == {k: 20 if k == kind else 0 for k in KINDS}
    gains = analysis.gains
    if label == 0 and kind != "duplicate":  # a detection of class b costs class a nothing
        base = analysis.evaluation.metrics["AP50"]
        assert base is not None
        assert gains[kind] == pytest.approx(1 - base, abs=0.02)
    assert all(gain == pytest.approx(0, abs=1e-9) for k, gain in gains.items() if k != kind)


def test_missed_boxes(make: Any) -> None:
    dataset = make.dataset(
        images=1, names=("a",), image_index=[0, 0], labels=[0, 0], boxes_xywh=[BOX, [300, 300, 80, 80]]
    )
    evaluation = evaluate_table(dataset, make.table([0], [0], [BOX], [0.9]))
    analysis = analyze_errors(evaluation, [0.5])
    assert analysis.counts["missed"] == 1
    assert analysis.missed.tolist() == [False, True]
    assert analysis.gains["missed"] == pytest.approx(0.5, abs=0.01)
    assert [s.kind for s in analysis.suspects] == ["never-found"]
    assert analyze_errors(evaluation, [0.95]).counts["missed"] == 2  # a detection below the threshold does not count


@pytest.mark.parametrize("seed", range(3))
def test_kinds_equal_hotcoco_without_crowds(make: Any, seed: int) -> None:
    """Every detection counts at threshold 0, as TIDE counts; at most 100 of a class and image on both sides."""
    dataset, table = make.random(seed=seed, images=20, detections=80, crowds=0)
    analysis = analyze_errors(evaluate_table(dataset, table), [0.0] * 3)
    session = analysis.evaluation.coco.session
    expected = session.tide_errors()["counts"]
    names = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), KINDS, strict=True))
    assert analysis.counts == {names[k]: v for k, v in expected.items()}


def test_detections_in_crowds_are_not_errors(make: Any) -> None:
    dataset = make.dataset(
        images=1, names=("a",), image_index=[0], labels=[0], boxes_xywh=[[0, 0, 400, 400]], crowd=[True]
    )
    analysis = analyze_errors(evaluate_table(dataset, make.table([0, 0], [0, 0], [BOX, BOX], [0.9, 0.8])), [0.5])
    assert set(analysis.counts.values()) == {0}
    assert analysis.confusion.sum() == 0


def test_the_confusion_matrix(make: Any) -> None:
    dataset = make.dataset(
        images=2, names=("a", "b"), image_index=[0, 0, 1], labels=[0, 1, 1], boxes_xywh=[BOX, [300, 100, 90, 90], BOX]
    )
    table = make.table(
        [0, 0, 0, 1], [0, 0, 1, 1], [BOX, [300, 100, 90, 90], [10, 300, 20, 20], BOX], [0.9, 0.8, 0.7, 0.3]
    )
    analysis = analyze_errors(evaluate_table(dataset, table), [0.5, 0.5])
    # annotated a: detected as a; annotated b: once detected as a, once not (below the threshold); b on background
    assert analysis.confusion.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_the_confusion_matrix_agrees_with_the_counts(make: Any, seed: int) -> None:
    dataset, table = make.random(seed=seed, images=20, detections=80)
    analysis = analyze_errors(evaluate_table(dataset, table), [0.3] * 3)
    classes, counts = analysis.confusion[:-1, :-1], analysis.counts
    assert np.trace(classes) == sum(image.true_positives for image in analysis.images)
    assert classes.sum() - np.trace(classes) == counts["classification"]
    assert analysis.confusion[-1].sum() == sum(counts[k] for k in ("location", "both", "duplicate", "background"))
    assert counts["missed"] <= analysis.confusion[:-1, -1].sum() <= analysis.missed.sum()


def test_the_score_that_removes_most_duplicates(make: Any) -> None:
    dataset = make.dataset(images=1, names=("a",), image_index=[0], labels=[0], boxes_xywh=[BOX])
    scores = [0.9, 0.6, 0.5, 0.4, 0.3, 0.2]
    analysis = analyze_errors(evaluate_table(dataset, make.table([0] * 6, [0] * 6, [BOX] * 6, scores)), [0.1])
    assert analysis.counts["duplicate"] == 5
    assert analysis.duplicate_threshold == {
        "score": 0.501, "removed": 4, "of": 5, "correct_removed": 0, "correct": 1,
    }  # fmt: skip
    one = analyze_errors(evaluate_table(dataset, make.table([0], [0], [BOX], [0.9])), [0.1])
    assert one.duplicate_threshold is None


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
    analysis = analyze_errors(evaluate_table(dataset, table), [0.5, 0.5])
    assert analysis.empty == {"pictures": 2, "with_false_positives": 1, "false_positives": 2}
    assert [p.image for p in analysis.worst()] == [2, 1]
    assert analysis.images[3].f1 == 1
    assert [(s.kind, s.image, s.score) for s in analysis.suspects] == [("other-class", 1, 0.95), ("no-box", 2, 0.9)]
    other = analysis.suspects[0]
    assert (other.label, other.annotated) == (0, 1)
    document = analysis.to_json()
    assert document["suspects"][0]["annotated"] == "b"
    assert document["worst"][0]["file"] == "0002.jpg"


def test_annotations_of_a_weak_class_are_not_questioned(make: Any) -> None:
    """The model detects class a well and b badly: errors of b are the model's fault, not the annotations'."""
    images = 10
    dataset = make.dataset(
        images=images,
        names=("a", "b", "c"),
        image_index=[i for i in range(images) for _ in range(2)],
        labels=[0, 1] * images,
        boxes_xywh=[BOX, [300, 100, 90, 90]] * images,
    )
    far = [10, 300, 50, 50]
    rows = [(i, 0, BOX, 0.8) for i in range(images - 1)]  # the last a is never detected
    rows += [(0, 0, far, 0.9), (0, 1, [300, 100, 90, 90], 0.8), (1, 1, far, 0.95), (2, 1, BOX, 0.9), (3, 2, far, 0.9)]
    rows.sort(key=lambda row: (row[0], -row[3]))
    evaluation = evaluate_table(dataset, make.table(*(list(column) for column in zip(*rows, strict=True))))
    assert evaluation.per_class[0]["AP50"] > 0.5 > evaluation.per_class[1]["AP50"]
    analysis = analyze_errors(evaluation, [0.5] * 3)
    assert {s.label for s in analysis.suspects} == {0}
    assert [s.kind for s in analysis.suspects] == ["no-box", "never-found"]
    assert analysis.unreliable_classes == ["b"]
    assert analysis.to_json()["suspects_left_out"] == ["b"]
    assert "annotations of classes with an AP50 below 0.5 are not questioned (b)" in analysis.suspects_note
    assert analysis.to_json()["suspects_note"] == analysis.suspects_note
    strong = make.dataset(images=1, names=("a",), image_index=[0], labels=[0], boxes_xywh=[BOX])
    assert analyze_errors(evaluate_table(strong, make.table([0], [0], [BOX], [0.9]))).suspects_note == ""


def test_pycocotools_counts_the_same_kinds_without_gains(make: Any) -> None:
    dataset, table = make.random(seed=3)
    full = analyze_errors(evaluate_table(dataset, table), [0.3] * 3)
    plain = analyze_errors(evaluate_table(dataset, table, "pycocotools"), [0.3] * 3)
    assert plain.counts == full.counts
    assert plain.gains is None
    assert plain.confusion.tolist() == full.confusion.tolist()


def test_stored_thresholds_are_used_before_the_best_f1(make: Any) -> None:
    dataset, table = make.random(seed=4)
    assert "where F1 is highest" in analyze_errors(evaluate_table(dataset, table)).origin
    stored = replace(evaluate_table(dataset, table), thresholds=Thresholds("f1", 0.5, (0.2, 0.3, 0.4)))
    analysis = analyze_errors(stored)
    assert analysis.thresholds.tolist() == [0.2, 0.3, 0.4]
    assert analysis.origin == "the thresholds stored in the model for f1"
    assert (analysis.kinds[table.scores < 0.2] < CORRECT).all()

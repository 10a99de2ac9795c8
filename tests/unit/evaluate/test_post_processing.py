"""The rescoring of duplicates and the thresholds that are chosen on val."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.error_analysis import analyze_errors
from rtdetr_cli.evaluate.post_processing import GAMMAS, choose_dedupe, fit_post_processing
from rtdetr_cli.evaluate.run import evaluate_table
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.weights.header import Dedupe, ModelHeader


def duplicated(make: Any) -> tuple[Dataset, DetectionTable]:
    """40 images with an object each, detected once well and three times a little beside, with lower scores."""
    images = np.repeat(np.arange(40), 4)
    dataset = make.dataset(
        images=40, names=("a", "b"), image_index=range(40), labels=[0] * 40, boxes_xywh=[[100, 100, 50, 50]] * 40
    )
    boxes = np.tile([[100.0, 100, 50, 50]], (160, 1)) + np.tile([0, 2, 4, 6], 40)[:, None] * [1, 0, 0, 0]
    scores = np.linspace(0.9, 0.3, 40)[images] - np.tile([0, 0.01, 0.02, 0.03], 40)
    return dataset, make.table(images, np.zeros(160), boxes, scores)


def test_rescoring_is_chosen_where_objects_have_several_boxes(make: Any) -> None:
    dataset, table = duplicated(make)
    before = evaluate_table(dataset, table)
    dedupe, best = choose_dedupe(before)
    assert dedupe.gamma in GAMMAS
    assert dedupe.ap_off == before.metrics["AP"]
    assert dedupe.ap == best.metrics["AP"] > before.metrics["AP"] + 0.2
    assert best.without_dedupe is before
    analysis = analyze_errors(best, [0.25, 0.25])
    assert analysis.counts["duplicate"] < 0.5 * analysis.duplicates_without_dedupe
    assert analysis.to_json()["duplicates_without_dedupe"] == 120
    assert best.to_json()["dedupe"] == {"gamma": dedupe.gamma, "without": before.metrics}


def test_rescoring_is_off_where_true_objects_overlap(make: Any) -> None:
    """Two objects in each image with an IoU of 0.82, both detected, the second with the lower score."""
    images, boxes = np.repeat(np.arange(20), 2), np.tile([[100.0, 100, 50, 50], [105, 100, 50, 50]], (20, 1))
    dataset = make.dataset(images=20, names=("a",), image_index=images, labels=[0] * 40, boxes_xywh=boxes)
    # A false positive in every image, which would rank above the second object if that lost its score.
    rows = np.concatenate([np.c_[images, boxes], np.c_[np.arange(20), [[400, 300, 50, 50]] * 20]])
    scores = np.concatenate([np.tile([0.9, 0.8], 20), np.full(20, 0.6)])
    table = DetectionTable.join([make.table(rows[:, 0], np.zeros(60), rows[:, 1:], scores)])
    dedupe, best = choose_dedupe(evaluate_table(dataset, table))
    assert (dedupe.gamma, best.dedupe, best.without_dedupe) == (0.0, 0.0, None)
    assert dedupe.ap == dedupe.ap_off == best.metrics["AP"] > 0.9


def test_a_trained_model_gets_rescoring_thresholds_and_metrics(make: Any) -> None:
    dataset, table = duplicated(make)
    header = ModelHeader(("b", "a"), (2, 1), (64, 96), layers=3, queries=100)
    fitted, best = fit_post_processing(header, evaluate_table(dataset, table))
    assert fitted.thresholds is not None
    assert fitted.metrics["AP"] == fitted.dedupe.ap == best.metrics["AP"]
    stored = fitted.thresholds
    assert (stored.imgsz, stored.layers, stored.queries, stored.dedupe) == ((64, 96), 3, 100, fitted.dedupe.gamma)
    assert stored.per_class == best.thresholds.per_class[::-1]  # in the model's order of classes
    assert ModelHeader.from_json(fitted.to_json()) == fitted
    kept = best.table.scores >= stored.overall
    assert kept.sum() == pytest.approx(40, abs=5)  # about one detection for each object


def test_a_split_without_boxes_changes_nothing(make: Any) -> None:
    dataset = make.dataset(images=1, names=("a",))
    header = ModelHeader(("a",), (1,), (64, 64))
    fitted, _ = fit_post_processing(header, evaluate_table(dataset, make.table([0], [0], [[1, 1, 9, 9]], [0.7])))
    assert fitted.dedupe == Dedupe(0.0, 0.0, 0.0)
    assert fitted.thresholds.per_class == (0.5,)


def test_rows_are_rescored_as_the_detector_does_it(make: Any) -> None:
    """The table works in float64 on the rows of all images, the backends on one image in float32."""
    from rtdetr_cli.infer.detections import Detections
    from rtdetr_cli.infer.duplicates import rescore

    _, table = make.random(seed=5, images=6)
    table = DetectionTable.join([table])
    together = table.rescored(8.0, table.overlap_with_better())
    for image in range(6):
        rows = table.rows(table.image_index == image)
        boxes, scores = rows.boxes_xyxy_px.astype(np.float32), rows.scores.astype(np.float32)
        alone = rescore(Detections(boxes, scores, rows.labels, (640, 480)), 8.0)
        expected = together.rows(together.image_index == image)
        assert alone.scores == pytest.approx(expected.scores, abs=1e-5)


def test_a_split_without_detections_is_rescored() -> None:
    nothing = DetectionTable.join([])
    assert len(nothing.rescored(8.0, nothing.overlap_with_better())) == 0

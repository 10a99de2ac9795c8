from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.bootstrap import (
    Interval,
    Resamples,
    compare,
    draw_weights,
    resample,
    small_split_warning,
)
from rtdetr_cli.evaluate.coco import coco_metrics
from rtdetr_cli.evaluate.matching import box_images
from rtdetr_cli.evaluate.table import DetectionTable


def without_equal_scores(table: DetectionTable) -> DetectionTable:
    """Make all scores distinct: copies of an image interleave equal scores, a weight keeps them together."""
    spread = np.random.default_rng(0).permutation(len(table)) / len(table) * 0.01
    return DetectionTable.join([replace(table, scores=table.scores + spread)])


def copy_images(dataset: Dataset, table: DetectionTable, images: list[int]) -> tuple[Dataset, DetectionTable]:
    """Return a dataset of the listed images; an image listed twice becomes two images."""
    parts = []
    for position, image in enumerate(images):
        rows = table.rows(table.image_index == image)
        parts.append(replace(rows, image_index=np.full(len(rows), position)))
    return replace(dataset.subset(images), image_ids=np.arange(len(images))), DetectionTable.join(parts)


def test_a_resample_equals_evaluating_copies_of_the_images(make: Any) -> None:
    dataset, table = make.random(seed=5, images=25, detections=130, classes=2, crowds=0.2)
    table = without_equal_scores(table)
    resamples = resample(dataset, table, resamples=12)
    weights = draw_weights(len(dataset), 12)
    for draw in range(12):
        images = np.repeat(np.arange(len(dataset)), weights[:, draw].astype(int)).tolist()
        reference = coco_metrics(*copy_images(dataset, table, images)).metrics["AP"]
        # A recall that equals one of the 101 points in exact arithmetic may miss it by rounding in the reference.
        assert resamples.overall()[draw] == pytest.approx(reference, abs=5e-5)


def test_four_times_as_many_images_halve_the_interval(make: Any) -> None:
    dataset, table = make.random(seed=1, images=30)
    four_times = copy_images(dataset, table, list(range(30)) * 4)
    value = coco_metrics(dataset, table).metrics["AP"]
    few, many = resample(dataset, table).interval(value), resample(*four_times).interval(value)
    assert few.lower < value < few.upper
    assert many.half_width == pytest.approx(few.half_width / 2, rel=0.15)
    assert str(many) == f"{value:.3f} ± {many.half_width:.3f} (95%, 120 images)"


def test_a_class_without_boxes_in_a_resample_is_left_out_of_the_mean(make: Any) -> None:
    dataset = make.dataset(
        images=3, names=("a", "rare"), image_index=[0, 1, 2], labels=[0, 0, 1], boxes_xywh=[[0, 0, 40, 40]] * 3
    )
    table = make.table([0, 1], [0, 0], [[0, 0, 40, 40]] * 2, [0.9, 0.8])
    resamples = resample(dataset, table, resamples=200)
    has_rare = draw_weights(3, 200)[2] > 0
    assert np.isnan(resamples.ap[~has_rare, 1]).all()
    assert (resamples.ap[has_rare, 1] == 0).all()
    np.testing.assert_allclose(resamples.overall()[~has_rare], 1)


def test_compare_with_the_same_and_with_a_better_model(make: Any) -> None:
    dataset, table = make.random(seed=2, images=40, crowds=0)
    value = coco_metrics(dataset, table).metrics["AP"]
    same, _ = compare(dataset, (table, table), (value, value))
    assert (same.difference.lower, same.difference.upper, same.verdict) == (0, 0, "undecided")
    assert same.sentence() == "A and B have the same AP on every resample"

    scores = np.full(len(dataset.labels), 0.9)
    truth = DetectionTable(box_images(dataset), dataset.labels, scores, dataset.boxes_xyxy_px)
    better, _ = compare(dataset, (table, truth), (value, 1.0))
    assert better.verdict == "b"
    assert better.probability_b_better == 1
    assert better.sentence().startswith(f"B is better than A by {1 - value:.3f} AP (95%: ")
    worse, _ = compare(dataset, (truth, table), (1.0, value))
    assert worse.sentence().startswith("A is better than B")


def test_pairing_detects_a_difference_that_separate_intervals_miss(make: Any) -> None:
    """B has one more correct detection in most images: the intervals overlap, but that of the difference excludes 0."""
    dataset, table = make.random(seed=4, images=30, detections=40, crowds=0)
    first = np.arange(0, len(dataset.labels), 6)
    boxes = dataset.boxes_xyxy_px[first]
    extra = DetectionTable(box_images(dataset)[first], dataset.labels[first], np.full(30, 0.99), boxes)
    both = DetectionTable.join([table, extra])
    values = tuple(coco_metrics(dataset, t).metrics["AP"] for t in (table, both))
    comparison, _ = compare(dataset, (table, both), values)
    assert comparison.verdict == "b"
    assert comparison.difference.half_width < (comparison.a.half_width + comparison.b.half_width)


def test_a_small_split_gives_a_warning_and_a_split_without_boxes_an_error(make: Any) -> None:
    dataset, table = make.random(seed=6, images=8)
    value = coco_metrics(dataset, table).metrics["AP"]
    assert "the split is small" in small_split_warning(resample(dataset, table).interval(value))
    with pytest.raises(DataError, match="no boxes"):
        resample(make.dataset(images=3, names=("a",)), DetectionTable.empty())


def test_an_interval_contains_its_estimate() -> None:
    resamples = Resamples(np.full((100, 1), 0.3), 40, np.array([40]))
    interval = resamples.interval(0.5)
    assert interval.lower <= interval.value <= interval.upper


def test_an_ap_of_zero_gives_no_warning() -> None:
    assert small_split_warning(Interval(0.0, 0.0, 0.0, 5)) == ""
    assert "halve" not in small_split_warning(Interval(0.5, 0.5, 0.5, 5))

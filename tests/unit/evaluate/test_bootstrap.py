from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.bootstrap import compare, draw_weights, resample, too_small
from rtdetr_cli.evaluate.coco import coco_metrics
from rtdetr_cli.evaluate.table import DetectionTable


def without_equal_scores(table: DetectionTable) -> DetectionTable:
    """Copies of an image interleave equal scores of one image, where a weight keeps them together."""
    spread = np.random.default_rng(0).permutation(len(table)) / len(table) * 0.01
    return DetectionTable.join([replace(table, scores=table.scores + spread)])


def copied(dataset: Dataset, table: DetectionTable, images: list[int]) -> tuple[Dataset, DetectionTable]:
    """Return the images, one listed twice as two images."""
    parts = []
    for position, image in enumerate(images):
        rows = table.rows(table.image_index == image)
        parts.append(replace(rows, image_index=np.full(len(rows), position)))
    return replace(dataset.subset(images), image_ids=np.arange(len(images))), DetectionTable.join(parts)


def test_each_resample_is_the_evaluation_of_copied_images(make: Any) -> None:
    dataset, table = make.random(seed=5, images=25, detections=130, classes=2, crowds=0.2)
    table = without_equal_scores(table)
    found = resample(dataset, table, resamples=12, seed=3)
    weights = draw_weights(len(dataset), 12, seed=3)
    for draw in range(12):
        images = np.repeat(np.arange(len(dataset)), weights[:, draw].astype(int)).tolist()
        reference = coco_metrics(*copied(dataset, table, images)).metrics
        # A recall that equals one of the 101 points in exact arithmetic may miss it by rounding in the reference.
        for which in ("AP", "AP50", "AP75"):
            assert found.overall(which)[draw] == pytest.approx(reference[which], abs=5e-5)


def test_the_interval_narrows_with_the_square_root_of_the_images(make: Any) -> None:
    dataset, table = make.random(seed=1, images=30)
    more = copied(dataset, table, list(range(30)) * 4)
    value = coco_metrics(dataset, table).metrics["AP"]
    few, many = resample(dataset, table).interval(value), resample(*more).interval(value)
    assert few.lower < value < few.upper
    assert many.half == pytest.approx(few.half / 2, rel=0.15)
    assert str(many) == f"{value:.3f} ± {many.half:.3f} (95 %, 120 images)"


def test_a_class_that_no_resample_holds_is_left_out_of_the_mean(make: Any) -> None:
    dataset = make.dataset(
        images=3, names=("a", "rare"), image_index=[0, 1, 2], labels=[0, 0, 1], boxes_xywh=[[0, 0, 40, 40]] * 3
    )
    table = make.table([0, 1], [0, 0], [[0, 0, 40, 40]] * 2, [0.9, 0.8])
    found = resample(dataset, table, resamples=200)
    drawn = draw_weights(3, 200)
    rare = drawn[2] > 0
    assert np.isnan(found.ap[~rare, 1, 0]).all()
    assert (found.ap[rare, 1, 0] == 0).all()
    np.testing.assert_allclose(found.overall()[~rare], 1)


def test_a_model_against_itself_and_against_a_better_one(make: Any) -> None:
    dataset, table = make.random(seed=2, images=40, crowds=0)
    value = coco_metrics(dataset, table).metrics["AP"]
    same, _ = compare(dataset, (table, table), (value, value))
    assert (same.difference.lower, same.difference.upper, same.verdict) == (0, 0, "undecided")
    assert "nothing to choose" in same.sentence()

    truth = make.table(
        np.repeat(np.arange(40), np.diff(dataset.offsets)),
        dataset.labels,
        np.concatenate(
            [dataset.boxes_xyxy_px[:, :2], dataset.boxes_xyxy_px[:, 2:] - dataset.boxes_xyxy_px[:, :2]], axis=1
        ),
        np.full(len(dataset.labels), 0.9),
    )
    better, _ = compare(dataset, (table, truth), (value, 1.0))
    assert better.verdict == "b"
    assert better.better == 1
    assert better.sentence("old", "new").startswith(f"new is better than old by {1 - value:.3f} AP (95 %: ")
    worse, _ = compare(dataset, (truth, table), (1.0, value))
    assert worse.sentence("old", "new").startswith("old is better than new")


def test_pairing_tells_what_two_intervals_hide(make: Any) -> None:
    """B is A with one more hit in most images: the intervals overlap, that of the difference excludes 0."""
    dataset, table = make.random(seed=4, images=30, detections=40, crowds=0)
    first = np.arange(0, len(dataset.labels), 6)
    boxes = dataset.boxes_xyxy_px[first].copy()
    boxes[:, 2:] -= boxes[:, :2]
    extra = make.table(np.searchsorted(dataset.offsets, first, "right") - 1, dataset.labels[first], boxes, [0.99] * 30)
    both = DetectionTable.join([table, extra])
    values = tuple(coco_metrics(dataset, t).metrics["AP"] for t in (table, both))
    found, _ = compare(dataset, (table, both), values)
    assert found.verdict == "b"
    assert found.difference.half < (found.a.half + found.b.half)


def test_small_splits_are_named(make: Any) -> None:
    dataset, table = make.random(seed=6, images=8)
    value = coco_metrics(dataset, table).metrics["AP"]
    assert "too small" in too_small(resample(dataset, table).interval(value))
    with pytest.raises(DataError, match="no boxes"):
        resample(make.dataset(images=3, names=("a",)), DetectionTable.empty())

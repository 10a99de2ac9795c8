from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.evaluate.coco import EVALUATORS, METRICS, coco_metrics
from rtdetr_cli.evaluate.run import evaluate_table
from rtdetr_cli.evaluate.table import DetectionTable

# The reference evaluator's numbers for the public pair: crowds kept or dropped, area of the mask or the box.
PAIR = {
    (True, "mask"): (
        *(0.504581, 0.696973, 0.572982, 0.585626, 0.519400, 0.501398),
        *(0.386813, 0.593680, 0.595353, 0.639811, 0.566421, 0.564291),
    ),
    (False, "box"): (
        *(0.503647, 0.696973, 0.571667, 0.593252, 0.557991, 0.489363),
        *(0.386813, 0.593680, 0.595353, 0.654764, 0.603130, 0.553744),
    ),
    (True, "box"): (
        *(0.504581, 0.696973, 0.572982, 0.593789, 0.559493, 0.489367),
        *(0.386813, 0.593680, 0.595353, 0.654764, 0.603130, 0.553744),
    ),
    (False, "mask"): (
        *(0.503647, 0.696973, 0.571667, 0.585142, 0.517841, 0.501390),
        *(0.386813, 0.593680, 0.595353, 0.639811, 0.566421, 0.564291),
    ),
}


def without_crowds(dataset: Dataset) -> Dataset:
    """Return the dataset without its crowd boxes."""
    keep = ~dataset.crowd
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    columns = ("boxes_xyxy_px", "labels", "areas", "crowd", "annotation_ids")
    offsets = kept_before[dataset.offsets].astype(np.int64)
    return replace(dataset, offsets=offsets, **{column: getattr(dataset, column)[keep] for column in columns})


def with_box_areas(dataset: Dataset) -> Dataset:
    return replace(dataset, areas=np.prod(dataset.boxes_xyxy_px[:, 2:] - dataset.boxes_xyxy_px[:, :2], axis=1))


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize(("crowds", "area"), list(PAIR))
def test_the_public_pair_gives_the_published_metrics(
    pair: tuple[Dataset, DetectionTable], evaluator: str, crowds: bool, area: str
) -> None:
    dataset, table = pair
    dataset = dataset if crowds else without_crowds(dataset)
    dataset = dataset if area == "mask" else with_box_areas(dataset)
    metrics = coco_metrics(dataset, table, evaluator=evaluator).metrics
    expected = dict(zip(METRICS, PAIR[crowds, area], strict=True))
    assert metrics == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_both_evaluators_agree_on_every_curve(make: Any, seed: int) -> None:
    dataset, table = make.random(seed=seed)
    ours, reference = (coco_metrics(dataset, table, evaluator=e) for e in EVALUATORS)
    assert ours.metrics == pytest.approx(reference.metrics, abs=1e-12)
    np.testing.assert_allclose(ours.precision, reference.precision, atol=1e-12)
    np.testing.assert_allclose(ours.recall, reference.recall, atol=1e-12)


def test_only_the_100_best_of_an_image_and_class_count(make: Any) -> None:
    """100 false positives with higher scores push a correct detection over the limit of its class, not of another."""
    dataset = make.dataset(
        images=1, names=("a", "b"), image_index=[0, 0], labels=[0, 1], boxes_xywh=[[0, 0, 50, 50], [100, 100, 50, 50]]
    )
    false_positives = [[300, 300, 20, 20]] * 100
    table = make.table(
        [0] * 102,
        [0] * 101 + [1],
        [*false_positives, [0, 0, 50, 50], [100, 100, 50, 50]],
        np.linspace(1, 0.5, 102),
    )
    for evaluator in EVALUATORS:
        result = coco_metrics(dataset, table, evaluator=evaluator)
        assert result.per_class(0)["AP"] == 0
        assert result.per_class(1)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_undefined_metrics_are_none_with_a_note(make: Any, evaluator: str) -> None:
    nothing = make.dataset(images=2, names=("a",))
    evaluation = evaluate_table(nothing, make.table([0], [0], [[0, 0, 10, 10]], [0.9]), evaluator)
    assert set(evaluation.metrics.values()) == {None}
    assert any("has no boxes, so AP is not defined" in note for note in evaluation.notes)
    assert evaluation.to_json()["per_class"][0]["AP"] is None

    large = make.dataset(images=1, names=("a",), image_index=[0], labels=[0], boxes_xywh=[[0, 0, 200, 200]])
    undetected = evaluate_table(large, DetectionTable.empty(), evaluator).metrics
    assert undetected["AP"] == 0
    assert undetected["APl"] == 0
    assert undetected["APs"] is None


def test_invalid_input_is_an_error(make: Any) -> None:
    with pytest.raises(DataError, match="has no images"):
        coco_metrics(make.dataset(images=0, names=("a",)), DetectionTable.empty())
    dataset = make.dataset(images=1, names=("a",))
    with pytest.raises(DataError, match="does not have"):
        coco_metrics(dataset, make.table([0], [1], [[0, 0, 1, 1]], [0.5]))
    with pytest.raises(UsageError, match="no evaluator"):
        coco_metrics(dataset, DetectionTable.empty(), evaluator="other")

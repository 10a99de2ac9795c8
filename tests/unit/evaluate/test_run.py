from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.run import evaluate, evaluate_table
from rtdetr_cli.images.decode import read_image, stretch
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.weights.header import ModelHeader, Thresholds

NAMES = ("disc", "ring")


class Oracle:
    """A backend that returns the annotations of an image, which it recognizes by its colour."""

    kind = "torch"
    fixed_batch = None
    imgsz = (64, 96)
    dedupe_in_graph = False

    def __init__(self, dataset: Dataset, names: tuple[str, ...] = NAMES, thresholds: Thresholds | None = None) -> None:
        self.dataset = dataset
        self.names = names
        self.header = ModelHeader(names, tuple(range(len(names))), self.imgsz, thresholds=thresholds)
        self.batches: list[int] = []
        self.gives_nan = False
        self.dedupe = 0.0

    def run(self, images: np.ndarray, sizes_wh: np.ndarray) -> list[Detections]:
        assert images.shape[1:] == (*self.imgsz, 3)
        self.batches.append(len(images))
        results = []
        for image, size in zip(images, sizes_wh.tolist(), strict=True):
            index = int(image[0, 0, 0]) // 10
            truth = self.dataset.annotations(index)
            assert tuple(size) == tuple(self.dataset.sizes_wh[index])
            known = [row for row, k in enumerate(truth.labels) if self.dataset.names[k] in self.names]
            labels = np.array([self.names.index(self.dataset.names[truth.labels[row]]) for row in known], np.int64)
            scores = np.full(len(labels), np.nan if self.gives_nan else 0.9, np.float32)
            boxes = truth.boxes_xyxy_px[known].astype(np.float32)
            results.append(Detections(boxes, scores, labels, tuple(size)))
        return results


@pytest.fixture
def painted(tmp_path: Path, make: Any) -> Dataset:
    dataset = make.dataset(
        images=7,
        names=NAMES,
        image_index=[0, 0, 2, 3, 4, 5, 6],
        labels=[0, 1, 1, 0, 1, 0, 0],
        boxes_xywh=[[10, 10, 50, 50], [70, 10, 20, 20], *[[5, 5, 40, 40]] * 5],
        size_wh=(120, 80),
    )
    dataset = replace(dataset, root=tmp_path)
    for index in range(len(dataset)):
        Image.new("RGB", (120, 80), (index * 10 + 3, 0, 0)).save(dataset.path(index), format="png")
    return dataset


def test_images_are_evaluated_in_batches(painted: Dataset) -> None:
    backend, progress = Oracle(painted), []
    evaluation = evaluate(backend, painted, batch=3, progress=progress.append)
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert backend.batches == [3, 3, 1]
    assert sum(progress) == 7
    assert len(evaluation.table) == 7
    assert not evaluation.notes


def test_classes_are_mapped_by_name(painted: Dataset) -> None:
    evaluation = evaluate(Oracle(painted, ("ring", "star", "disc")), painted)
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert any("star" in note for note in evaluation.notes)
    half = evaluate(Oracle(painted, ("ring", "star")), painted)
    assert half.metrics["AP"] == pytest.approx(0.5)


def test_stored_thresholds_are_mapped_with_the_classes(painted: Dataset) -> None:
    stored = Thresholds("f1", 0.3, (0.95, 0.1, 0.2))
    evaluation = evaluate(Oracle(painted, ("ring", "star", "disc"), stored), painted)
    assert evaluation.thresholds == Thresholds("f1", 0.3, (0.2, 0.95))
    at_thresholds = evaluation.to_json()["at_thresholds"]
    assert [row["recall"] for row in at_thresholds["per_class"]] == [1, 0]  # all scores are 0.9


def test_unreadable_images_are_left_out_and_named(painted: Dataset) -> None:
    painted.path(3).write_bytes(b"not an image")
    painted.path(5).unlink()
    evaluation = evaluate(Oracle(painted), painted, batch=2)
    assert [name for name, _ in evaluation.unreadable] == ["0003.jpg", "0005.jpg"]
    assert len(evaluation.dataset) == 5
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert any("2 of 7 images cannot be read" in note for note in evaluation.notes)
    for index in range(7):
        painted.path(index).unlink(missing_ok=True)
    with pytest.raises(DataError, match="none of the 7 images"):
        evaluate(Oracle(painted), painted)


def test_a_model_that_gives_nan_scores_zero_with_a_note(painted: Dataset) -> None:
    backend = Oracle(painted)
    backend.gives_nan = True
    evaluation = evaluate(backend, painted)
    assert evaluation.metrics["AP"] == 0
    assert any("NaN" in note for note in evaluation.notes)


def test_classes_and_sizes_have_all_metrics(make: Any) -> None:
    evaluation = evaluate_table(*make.random(seed=9))
    for row in evaluation.per_class:
        for metrics in (row, *row["sizes"].values()):
            assert {"AP", "AP50", "precision", "recall", "f1", "threshold"} <= set(metrics)
    assert set(evaluation.by_size) == {"small", "medium", "large"}
    mean = np.mean([row["AP"] for row in evaluation.per_class])
    assert evaluation.metrics["AP"] == pytest.approx(mean)
    assert evaluation.by_size["small"]["AP"] == pytest.approx(evaluation.metrics["APs"])


def test_pycocotools_replaces_a_missing_hotcoco_with_a_note(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    dataset, table = make.random(seed=2)
    expected = evaluate_table(dataset, table).metrics
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    evaluation = evaluate_table(dataset, table)
    assert evaluation.coco.evaluator == "pycocotools"
    assert evaluation.metrics == pytest.approx(expected)
    assert any("TIDE" in note for note in evaluation.notes)


def test_the_evaluation_with_and_without_rescoring_of_duplicates(shapes_model: Path, shapes_val: Dataset) -> None:
    val = shapes_val
    backend = open_backend(shapes_model, device="cpu")
    evaluation = evaluate(backend, val)
    assert backend.dedupe == evaluation.dedupe == 8.0
    image, size_wh = read_image(val.path(0)), val.sizes_wh[:1].astype(np.int64)
    (shown,) = backend.run(stretch(image, backend.imgsz)[None], size_wh)
    rows = evaluation.table.rows(evaluation.table.image_index == 0)
    assert rows.scores == pytest.approx(shown.scores, abs=1e-5)
    published = evaluate(open_backend(shapes_model, device="cpu", dedupe=0.0), val)
    assert evaluation.without_dedupe.metrics == published.metrics
    assert published.without_dedupe is None

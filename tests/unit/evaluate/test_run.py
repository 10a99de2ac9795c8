from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.run import evaluate, metrics_from
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.weights.header import ModelHeader, Thresholds

NAMES = ("disc", "ring")


class Oracle:
    """A backend that knows the answers: it finds an image's boxes by the colour that the image is painted in."""

    kind = "torch"
    fixed_batch = None
    imgsz = (64, 96)

    def __init__(self, dataset: Dataset, names: tuple[str, ...] = NAMES, thresholds: Thresholds | None = None) -> None:
        self.dataset = dataset
        self.names = names
        self.header = ModelHeader(names, tuple(range(len(names))), self.imgsz, thresholds=thresholds)
        self.batches: list[int] = []
        self.spoil = False

    def run(self, images: np.ndarray, sizes_wh: np.ndarray) -> list[Detections]:
        assert images.shape[1:] == (*self.imgsz, 3)
        self.batches.append(len(images))
        found = []
        for image, size in zip(images, sizes_wh.tolist(), strict=True):
            index = int(image[0, 0, 0]) // 10
            truth = self.dataset.annotations(index)
            assert tuple(size) == tuple(self.dataset.sizes_wh[index])
            own = [
                self.names.index(self.dataset.names[k]) if self.dataset.names[k] in self.names else -1
                for k in truth.labels
            ]
            scores = np.full(len(own), np.nan if self.spoil else 0.9, np.float32)
            found.append(
                Detections(truth.boxes_xyxy_px.astype(np.float32), scores, np.array(own, np.int64), tuple(size))
            )
        return found


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
        Image.new("RGB", (120, 80), (index * 10 + 3, 0, 0)).save(dataset.path(index).with_suffix(".png"))
        dataset.path(index).with_suffix(".png").rename(dataset.path(index))
    return dataset


def test_images_go_through_in_batches_and_come_out_judged(painted: Dataset) -> None:
    backend, told = Oracle(painted), []
    found = evaluate(backend, painted, batch=3, progress=told.append)
    assert found.metrics["AP"] == pytest.approx(1)
    assert backend.batches == [3, 3, 1]
    assert sum(told) == 7
    assert len(found.table) == 7
    assert not found.notes


def test_classes_are_brought_together_by_name(painted: Dataset) -> None:
    found = evaluate(Oracle(painted, ("ring", "star", "disc")), painted)
    assert found.metrics["AP"] == pytest.approx(1)
    assert any("star" in note for note in found.notes)
    half = evaluate(Oracle(painted, ("ring", "star")), painted)
    assert half.metrics["AP"] == pytest.approx(0.5)
    with pytest.raises(DataError, match="share no class"):
        evaluate(Oracle(painted, ("cat", "dog")), painted)


def test_stored_thresholds_follow_the_map(painted: Dataset) -> None:
    stored = Thresholds("f1", 0.3, (0.95, 0.1, 0.2))
    found = evaluate(Oracle(painted, ("ring", "star", "disc"), stored), painted)
    assert found.thresholds == Thresholds("f1", 0.3, (0.2, 0.95))
    at = found.to_json()["at_thresholds"]
    assert [row["recall"] for row in at["per_class"]] == [1, 0]  # all scores are 0.9


def test_unreadable_images_are_left_out_and_named(painted: Dataset) -> None:
    painted.path(3).write_bytes(b"not an image")
    painted.path(5).unlink()
    found = evaluate(Oracle(painted), painted, batch=2)
    assert [name for name, _ in found.unreadable] == ["0003.jpg", "0005.jpg"]
    assert len(found.dataset) == 5
    assert found.metrics["AP"] == pytest.approx(1)
    assert any("2 of 7 images cannot be read" in note for note in found.notes)
    for index in range(7):
        painted.path(index).unlink(missing_ok=True)
    with pytest.raises(DataError, match="none of the 7 images"):
        evaluate(Oracle(painted), painted)


def test_a_model_that_gives_nan_scores_zero_and_says_so(painted: Dataset) -> None:
    backend = Oracle(painted)
    backend.spoil = True
    found = evaluate(backend, painted)
    assert found.metrics["AP"] == 0
    assert any("NaN" in note for note in found.notes)


def test_an_empty_split_is_refused_before_anything_runs(make: Any) -> None:
    with pytest.raises(DataError, match="has no images"):
        evaluate(Oracle(make.dataset(images=0, names=NAMES)), make.dataset(images=0, names=NAMES))


def test_sizes_and_classes_report_all_five_figures(make: Any) -> None:
    found = metrics_from(*make.random(seed=9))
    for row in found.per_class:
        for figures in (row, *row["sizes"].values()):
            assert {"AP", "AP50", "precision", "recall", "f1", "threshold"} <= set(figures)
    assert set(found.by_size) == {"small", "medium", "large"}
    mean = np.mean([row["AP"] for row in found.per_class])
    assert found.metrics["AP"] == pytest.approx(mean)
    assert found.by_size["small"]["AP"] == pytest.approx(found.metrics["APs"])


def test_a_missing_evaluator_has_a_stand_in_that_says_what_it_lacks(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    dataset, table = make.random(seed=2)
    expected = metrics_from(dataset, table).metrics
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    found = metrics_from(dataset, table)
    assert found.evaluator == "pycocotools"
    assert found.metrics == pytest.approx(expected)
    assert any("TIDE" in note for note in found.notes)

"""Datasets and detections for the evaluation tests, from plain arrays or from the public pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.datasets.records import Category, Dataset, FlatStrings
from rtdetr_cli.evaluate.results import read_results
from rtdetr_cli.evaluate.source import choose_split
from rtdetr_cli.evaluate.table import DetectionTable


def make_dataset(
    *,
    images: int,
    names: tuple[str, ...],
    image_index: Any = (),
    labels: Any = (),
    boxes_xywh: Any = (),
    areas: Any = None,
    crowd: Any = None,
    size_wh: tuple[int, int] = (640, 480),
    image_ids: Any = None,
    category_ids: tuple[int, ...] | None = None,
) -> Dataset:
    order = np.argsort(np.asarray(image_index, np.int64), kind="stable")
    where = np.asarray(image_index, np.int64)[order]
    boxes = np.asarray(boxes_xywh, np.float64).reshape(-1, 4)[order].copy()
    area = boxes[:, 2] * boxes[:, 3] if areas is None else np.asarray(areas, np.float64)[order]
    boxes[:, 2:] += boxes[:, :2]
    return Dataset(
        name="made",
        split="val",
        format="coco",
        root=Path("images"),
        categories=tuple(Category(i, n) for i, n in zip(category_ids or range(1, len(names) + 1), names, strict=True)),
        file_names=FlatStrings([f"{i:04d}.jpg" for i in range(images)]),
        image_ids=np.arange(images) if image_ids is None else np.asarray(image_ids, np.int64),
        sizes_wh=np.tile(np.array([size_wh], np.int32), (images, 1)),
        offsets=np.searchsorted(where, np.arange(images + 1)).astype(np.int64),
        boxes_xyxy_px=boxes,
        labels=np.asarray(labels, np.int64)[order],
        areas=area,
        crowd=np.zeros(len(where), bool) if crowd is None else np.asarray(crowd, bool)[order],
        annotation_ids=np.arange(len(where)),
    )


def make_table(image_index: Any, labels: Any, boxes_xywh: Any, scores: Any) -> DetectionTable:
    boxes = np.asarray(boxes_xywh, np.float64).reshape(-1, 4).copy()
    boxes[:, 2:] += boxes[:, :2]
    return DetectionTable(
        np.asarray(image_index, np.int64), np.asarray(labels, np.int64), np.asarray(scores, np.float64), boxes
    )


def make_random(
    *, seed: int, images: int = 40, classes: int = 3, detections: int = 120, crowds: float = 0.1
) -> tuple[Dataset, DetectionTable]:
    """Boxes with areas of masks and crowds; detections near them or anywhere, many with equal scores."""
    random = np.random.default_rng(seed)
    count = images * 6
    image_index = np.sort(random.integers(0, images, count))
    labels = random.integers(0, classes, count)
    wh = np.exp(random.normal(4, 0.9, (count, 2))).clip(4, 400)
    boxes = np.concatenate([random.random((count, 2)) * 200, wh], axis=1)
    dataset = make_dataset(
        images=images,
        names=tuple(f"class {k}" for k in range(classes)),
        image_index=image_index,
        labels=labels,
        boxes_xywh=boxes,
        areas=wh[:, 0] * wh[:, 1] * random.uniform(0.3, 1, count),
        crowd=random.random(count) < crowds,
    )
    rows = images * detections
    where = np.repeat(np.arange(images), detections)
    source = random.integers(0, count, rows)
    source = np.where(random.random(rows) < 0.5, np.searchsorted(image_index, where).clip(max=count - 1), source)
    detected = boxes[source] + random.normal(0, 0.1, (rows, 4)) * boxes[source][:, [2, 3, 2, 3]]
    detected[:, 2:] = detected[:, 2:].clip(1)
    scores = np.round(random.random(rows), 2)
    order = np.lexsort((-scores, where))
    return dataset, make_table(where[order], labels[source][order], detected[order], scores[order])


@dataclass(frozen=True)
class Make:
    """The functions above, for tests to call: a conftest cannot be imported."""

    dataset = staticmethod(make_dataset)
    table = staticmethod(make_table)
    random = staticmethod(make_random)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()


@pytest.fixture(scope="session")
def pair(eval_pair: Path) -> tuple[Dataset, DetectionTable]:
    """The public pair: 100 images of COCO val2014 with crowds and mask areas, and 734 detections."""
    dataset = choose_split(eval_pair / "ground_truth.json", find_images=False).dataset
    return dataset, read_results(eval_pair / "detections.json", dataset)

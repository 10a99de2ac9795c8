"""Builders of small datasets, of detections, of small runs and of the smallest detector."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.datasets.records import Category, Dataset, FlatStrings
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from tests.images import paint
from tests.small import SETS

WIDTH, HEIGHT = 96, 64


@dataclass
class Builder:
    """Writes a dataset below a folder."""

    folder: Path

    def make(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_texts(self, pattern: str, texts: dict[str, str | bytes | None]) -> None:
        """Write label files; None stands for a file that is missing."""
        for name, text in texts.items():
            if text is not None:
                self.make(pattern.format(name)).write_bytes(text.encode() if isinstance(text, str) else text)


@dataclass
class CocoBuilder(Builder):
    """Two splits of four images, twelve boxes of each class, in `train.json` and `val.json`."""

    documents: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, split in enumerate(("train", "val")):
            images, annotations = [], []
            for i in range(4):
                identifier = 10 * number + i + 1
                name = f"{split}_{i}.jpg"
                paint(identifier, (WIDTH, HEIGHT)).save(self.make(f"images/{name}"))
                images.append({"id": identifier, "file_name": name, "width": WIDTH, "height": HEIGHT})
                for k in range(6):
                    annotations.append(
                        {
                            "id": 100 * identifier + k,
                            "image_id": identifier,
                            "category_id": 1 + k % 2,
                            "bbox": [4.0 + 14 * k, 8.0 + 6 * k, 12.0, 16.0],
                            "area": 192.0,
                            "iscrowd": 0,
                        }
                    )
            self.documents[split] = {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": 1, "name": "nut"}, {"id": 2, "name": "washer"}],
            }

    @property
    def train(self) -> dict[str, Any]:
        return self.documents["train"]

    @property
    def val(self) -> dict[str, Any]:
        return self.documents["val"]

    @property
    def box(self) -> dict[str, Any]:
        """The second annotation of the first image."""
        annotation: dict[str, Any] = self.train["annotations"][1]
        return annotation

    @property
    def image(self) -> Path:
        return self.folder / "images/train_0.jpg"

    def write(self, *, indent: int | None = 1) -> Path:
        for split, document in self.documents.items():
            (self.folder / f"{split}.json").write_text(json.dumps(document, indent=indent), "utf-8")
        return self.folder


@dataclass
class YoloBuilder(Builder):
    """Two splits of three images with label files."""

    yaml: str = "train: images/train\nval: images/val\nnc: 2\nnames: [nut, washer]\n"
    labels: dict[str, str | bytes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, split in enumerate(("train", "val")):
            for i in range(3):
                path = self.make(f"images/{split}/{split}_{i}.jpg")
                paint(50 + 10 * number + i, (WIDTH, HEIGHT)).save(path)
                lines = [f"{k % 2} {0.1 + 0.15 * k:.3f} 0.5 0.125 0.25" for k in range(6)]
                self.labels[f"{split}/{split}_{i}"] = "\n".join(lines) + "\n"

    def write(self) -> Path:
        self.make("data.yaml").write_text(self.yaml, "utf-8")
        self.write_texts("labels/{}.txt", self.labels)
        return self.folder


OBJECT = """\t<object>
\t\t<name>{name}</name>
\t\t<bndbox>
\t\t\t<xmin>{0}</xmin>
\t\t\t<ymin>{1}</ymin>
\t\t\t<xmax>{2}</xmax>
\t\t\t<ymax>{3}</ymax>
\t\t</bndbox>
\t</object>
"""


@dataclass
class VocBuilder(Builder):
    """Two splits of three images with XML files."""

    xml: dict[str, str | bytes | None] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, split in enumerate(("train", "val")):
            self.lists[split] = [f"{split}_{i}" for i in range(3)]
            for i, stem in enumerate(self.lists[split]):
                path = self.make(f"JPEGImages/{stem}.jpg")
                paint(80 + 10 * number + i, (WIDTH, HEIGHT)).save(path)
                objects = "".join(
                    OBJECT.format(4 + 14 * k, 8 + 6 * k, 16 + 14 * k, 24 + 6 * k, name=("nut", "washer")[k % 2])
                    for k in range(6)
                )
                self.xml[stem] = (
                    f"<annotation>\n\t<folder>JPEGImages</folder>\n\t<filename>{stem}.jpg</filename>\n"
                    f"\t<size>\n\t\t<width>{WIDTH}</width>\n\t\t<height>{HEIGHT}</height>\n\t\t<depth>3</depth>\n"
                    f"\t</size>\n{objects}</annotation>\n"
                )

    def write(self) -> Path:
        self.make("Annotations/x").parent.mkdir(exist_ok=True)
        self.write_texts("Annotations/{}.xml", self.xml)
        for split, stems in self.lists.items():
            self.make(f"ImageSets/Main/{split}.txt").write_text("".join(f"{s}\n" for s in stems), "utf-8")
        return self.folder


@pytest.fixture
def coco(tmp_path: Path) -> CocoBuilder:
    return CocoBuilder(tmp_path / "nuts")


@pytest.fixture
def yolo(tmp_path: Path) -> YoloBuilder:
    return YoloBuilder(tmp_path / "nuts-yolo")


@pytest.fixture
def voc(tmp_path: Path) -> VocBuilder:
    return VocBuilder(tmp_path / "nuts-voc")


SMALL = ModelSpec(
    depth=10, width=8, hidden_dim=32, encoder_ffn=32, expansion=0.5, depth_mult=0.34, heads=4, decoder_dim=32,
    decoder_ffn=32, decoder_layers=3, eval_layers=3, num_points=(2, 4, 6), queries=20,
)  # fmt: skip


@pytest.fixture
def small_spec() -> ModelSpec:
    """The smallest detector with all parts, and another number of sampling points for each scale."""
    return SMALL


@pytest.fixture
def make_small() -> Callable[..., RTDETR]:
    """Build it, with weights that are not as regular as the initial ones, and batch norms with a history."""

    def make(*, num_classes: int = 5, seed: int = 0, **changes: object) -> RTDETR:
        torch.manual_seed(seed)
        model = build_detector(SMALL.model_copy(update=changes), num_classes=num_classes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                    module.running_var *= 0.5 + torch.rand_like(module.running_var)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty training images and four held out, 64 pixels wide."""
    from rtdetr_cli.datasets.generate import generate_dataset

    return generate_dataset(tmp_path_factory.mktemp("small") / "shapes", train=20, val=4, imgsz=64)


@pytest.fixture
def small_run(small_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that resolves the settings of a small run; keywords are flags, words are `--set`."""
    from rtdetr_cli.config.run import RunConfig, resolve_run

    def make(*sets: str, **flags: Any) -> RunConfig:
        size = {"preset": "tiny", "imgsz": (64, 64), "effective_batch": 8, "batch": 8, "epochs": 2, "workers": 0}
        places = {"data": str(small_data), "out": str(tmp_path / "runs"), "device": "cpu", "precision": "fp32"}
        return resolve_run({**size, **places, **flags}, sets=[*SETS, *sets])

    return make


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

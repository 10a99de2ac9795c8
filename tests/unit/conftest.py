"""Builders of small datasets and of the smallest detector."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR

WIDTH, HEIGHT = 96, 64


def paint(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Return a textured image, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@dataclass
class CocoBuilder:
    """Two splits of four images, twelve boxes of each class, in `train.json` and `val.json`."""

    folder: Path
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, split in enumerate(("train", "val")):
            images, annotations = [], []
            for i in range(4):
                identifier = 10 * number + i + 1
                name = f"{split}_{i}.jpg"
                paint(identifier).save(self.make(f"images/{name}"))
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

    def make(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, *, indent: int | None = 1) -> Path:
        for split, document in self.documents.items():
            (self.folder / f"{split}.json").write_text(json.dumps(document, indent=indent), "utf-8")
        return self.folder


@dataclass
class YoloBuilder:
    """Two splits of three images with label files."""

    folder: Path
    yaml: str = "train: images/train\nval: images/val\nnc: 2\nnames: [nut, washer]\n"
    labels: dict[str, str | bytes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, split in enumerate(("train", "val")):
            for i in range(3):
                path = self.make(f"images/{split}/{split}_{i}.jpg")
                paint(50 + 10 * number + i).save(path)
                lines = [f"{k % 2} {0.1 + 0.15 * k:.3f} 0.5 0.125 0.25" for k in range(6)]
                self.labels[f"{split}/{split}_{i}"] = "\n".join(lines) + "\n"

    def make(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self) -> Path:
        self.make("data.yaml").write_text(self.yaml, "utf-8")
        for name, text in self.labels.items():
            path = self.make(f"labels/{name}.txt")
            if isinstance(text, bytes):
                path.write_bytes(text)
            elif text is not None:
                path.write_text(text, "utf-8")
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
class VocBuilder:
    """Two splits of three images with XML files."""

    folder: Path
    xml: dict[str, str | bytes | None] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, split in enumerate(("train", "val")):
            self.lists[split] = [f"{split}_{i}" for i in range(3)]
            for i, stem in enumerate(self.lists[split]):
                path = self.make(f"JPEGImages/{stem}.jpg")
                paint(80 + 10 * number + i).save(path)
                objects = "".join(
                    OBJECT.format(4 + 14 * k, 8 + 6 * k, 16 + 14 * k, 24 + 6 * k, name=("nut", "washer")[k % 2])
                    for k in range(6)
                )
                self.xml[stem] = (
                    f"<annotation>\n\t<folder>JPEGImages</folder>\n\t<filename>{stem}.jpg</filename>\n"
                    f"\t<size>\n\t\t<width>{WIDTH}</width>\n\t\t<height>{HEIGHT}</height>\n\t\t<depth>3</depth>\n"
                    f"\t</size>\n{objects}</annotation>\n"
                )

    def make(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self) -> Path:
        self.make("Annotations/x").parent.mkdir(exist_ok=True)
        for stem, text in self.xml.items():
            path = self.make(f"Annotations/{stem}.xml")
            if isinstance(text, bytes):
                path.write_bytes(text)
            elif text is not None:
                path.write_text(text, "utf-8")
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

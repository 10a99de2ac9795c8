"""Datasets are found in folders of any layout, with every image and box."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.checks.repair import repair
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.read import read_raw
from rtdetr_cli.datasets.records import Splits
from rtdetr_cli.errors import DataError

WIDTH, HEIGHT = 64, 48
CLASSES = ("bolt", "nut")

Box = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Sample:
    """One image and its boxes: class name and corners in pixels."""

    split: str
    stem: str
    boxes: tuple[Box, ...]


def samples(count: dict[str, int]) -> list[Sample]:
    result = []
    for split, number in count.items():
        for i in range(number):
            boxes = tuple((CLASSES[(i + k) % 2], 4 + 16 * k, 8 + i, 16 + 16 * k, 24 + i) for k in range(3))
            result.append(Sample(split, f"{split}_{i}", boxes))
    return result


TRAIN_VAL = samples({"train": 4, "val": 2})
ONLY_TRAIN = samples({"train": 6})


class Tree:
    """Writes files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def text(self, name: str, text: str) -> None:
        self.path(name).write_text(text, "utf-8")

    def image(self, name: str, sample: Sample) -> None:
        seed = sum(map(ord, sample.stem)) * 31 + len(sample.boxes)
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        path = self.path(name)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(path, kind)


def voc_xml(sample: Sample) -> str:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object>\n"
        for name, x1, y1, x2, y2 in sample.boxes
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><folder>old</folder><filename>{sample.stem}.jpg</filename>\n{size}\n{objects}</annotation>\n"


def yolo_text(sample: Sample) -> str:
    lines = []
    for name, x1, y1, x2, y2 in sample.boxes:
        values = ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT)
        lines.append(f"{CLASSES.index(name)} " + " ".join(f"{v:.9f}" for v in values))
    return "\n".join(lines) + "\n"


def labelme_json(sample: Sample, kind: str = "rectangle") -> str:
    shapes = []
    for name, x1, y1, x2, y2 in sample.boxes:
        points = [[x2, y1], [x1, y2]] if kind == "rectangle" else [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
        shapes.append({"label": name, "points": points, "group_id": None, "shape_type": kind, "flags": {}})
    document = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{sample.stem}.jpg"}
    document |= {"imageData": base64.b64encode(bytes(300_000)).decode(), "imageHeight": HEIGHT, "imageWidth": WIDTH}
    return json.dumps(document, indent=2)


def coco_json(data: list[Sample], name: Callable[[Sample], str]) -> str:
    images, annotations = [], []
    for number, sample in enumerate(data, 1):
        images.append({"id": number, "file_name": name(sample), "width": WIDTH, "height": HEIGHT})
        for label, x1, y1, x2, y2 in sample.boxes:
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": CLASSES.index(label) + 1,
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def csv_rows(data: list[Sample], form: str) -> str:
    rows = {
        "roboflow": ["filename,width,height,class,xmin,ymin,xmax,ymax"],
        "semicolons": ["image;x1;y1;x2;y2;label"],
        "headerless": [],
    }[form]
    for sample in data:
        for name, x1, y1, x2, y2 in sample.boxes:
            if form == "roboflow":
                rows.append(f"{sample.stem}.jpg,{WIDTH},{HEIGHT},{name},{x1},{y1},{x2},{y2}")
            else:
                row = f"images/{sample.stem}.jpg,{x1},{y1},{x2},{y2},{name}"
                rows.append(row.replace(",", ";") if form == "semicolons" else row)
    return "\n".join(rows) + "\n"


Writer = Callable[[Tree, list[Sample]], None]


def pairs(image: str, label: str, text: Callable[[Sample], str], **files: str) -> Writer:
    """Write an image and a label file for each sample; `files` are further files with their text."""

    def write(tree: Tree, data: list[Sample]) -> None:
        for sample in data:
            fields = {"split": sample.split, "stem": sample.stem}
            tree.image(image.format(**fields), sample)
            tree.text(label.format(**fields), text(sample))
        for name, content in files.items():
            tree.text(name.replace("__", "/").replace("_dot_", "."), content)

    return write


NAMES = "bolt\nnut\n"


def with_lists(write: Writer, line: str, folder: str = "") -> Writer:
    """Add `train.txt` and `val.txt`."""

    def write_all(tree: Tree, data: list[Sample]) -> None:
        write(tree, data)
        for split in ("train", "val"):
            lines = [line.format(stem=s.stem, split=split) for s in data if s.split == split]
            tree.text(f"{folder}{split}.txt", "".join(f"{entry}\n" for entry in lines))

    return write_all


def darknet(tree: Tree, data: list[Sample]) -> None:
    pairs("obj_train_data/{stem}.jpg", "obj_train_data/{stem}.txt", yolo_text, obj_dot_names=NAMES)(tree, data)
    for split, name in (("train", "train"), ("val", "other")):
        lines = "".join(f"data/obj_train_data/{s.stem}.jpg\n" for s in data if s.split == split)
        tree.text(f"{name}.txt", lines)
    tree.text("obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/other.txt\nnames = data/obj.names\n")


def coco_with(name: Callable[[Sample], str], where: str = "images/{stem}.jpg", file: str = "labels.json") -> Writer:
    def write(tree: Tree, data: list[Sample]) -> None:
        for sample in data:
            tree.image(where.format(split=sample.split, stem=sample.stem), sample)
        if "{split}" not in file:
            tree.text(file, coco_json(data, name))
        else:
            for split in ("train", "val"):
                tree.text(file.format(split=split), coco_json([s for s in data if s.split == split], name))

    return write


def csv_with(form: str, image: str, file: str = "annotations.csv") -> Writer:
    def write(tree: Tree, data: list[Sample]) -> None:
        for sample in data:
            tree.image(image.format(split=sample.split, stem=sample.stem), sample)
        if "{split}" not in file:
            tree.text(file, csv_rows(data, form))
        else:
            for split in ("train", "val"):
                tree.text(file.format(split=split), csv_rows([s for s in data if s.split == split], form))

    return write


def linked_images(tree: Tree, data: list[Sample]) -> None:
    for sample in data:
        tree.image(f"../images/{sample.stem}.jpg", sample)
        tree.text(f"labels/{sample.stem}.txt", yolo_text(sample))
    tree.text("classes.txt", NAMES)
    (tree.root / "images").symlink_to("../images")


SPLIT = {  # layouts that keep train and val
    "voc split folders": (
        "voc",
        pairs("images/{split}/{stem}.jpg", "annots/{split}/{stem}.xml", voc_xml),
    ),
    "voc in the folder of each split": (
        "voc",
        pairs("{split}/images/{stem}.jpg", "{split}/annotations/{stem}.xml", voc_xml),
    ),
    "voc labels in split folders, images in one": (
        "voc",
        pairs("photos/{stem}.jpg", "xmls/{split}/{stem}.xml", voc_xml),
    ),
    "voc lists": (
        "voc",
        with_lists(pairs("images/{stem}.jpg", "annotations/xmls/{stem}.xml", voc_xml), "{stem} 1"),
    ),
    "voc lists of files in a folder": (
        "voc",
        with_lists(pairs("images/a/{stem}.JPG", "annots/{stem}.XML", voc_xml), "{stem}.JPG", "sets/"),
    ),
    "yolo train/images": (
        "yolo",
        pairs("{split}/images/{stem}.jpg", "{split}/labels/{stem}.txt", yolo_text, classes_dot_txt=NAMES),
    ),
    "yolo images/train": (
        "yolo",
        pairs("images/{split}2017/{stem}.jpg", "labels/{split}2017/{stem}.txt", yolo_text, obj_dot_names=NAMES),
    ),
    "yolo labels beside images, in split folders": (
        "yolo",
        pairs("{split}/{stem}.jpg", "{split}/{stem}.txt", yolo_text, train__classes_dot_txt=NAMES),
    ),
    "yolo lists": (
        "yolo",
        with_lists(
            pairs("images/{stem}.jpg", "labels/{stem}.txt", yolo_text, classes_dot_txt=NAMES),
            "/content/data/images/{stem}.jpg",
        ),
    ),
    "darknet": ("yolo", darknet),
    "yaml in a folder of its own": (
        "yolo",
        pairs(
            "images/{split}/{stem}.jpg",
            "labels/{split}/{stem}.txt",
            yolo_text,
            config__data_dot_yaml="train: ../images/train\nval: ../images/val\nnames: [bolt, nut]\n",
        ),
    ),
    "yaml with the paths of another machine": (
        "yolo",
        pairs(
            "images/{split}/{stem}.jpg",
            "labels/{split}/{stem}.txt",
            yolo_text,
            data_dot_yaml="train: /content/nuts/images/train\nval: C:\\nuts\\images\\val\nnames: [bolt, nut]\n",
        ),
    ),
    "yaml with labels beside the images": (
        "yolo",
        pairs(
            "images/{split}/{stem}.jpg",
            "images/{split}/{stem}.txt",
            yolo_text,
            data_dot_yaml="train: images/train\nval: images/val\nnames: [bolt, nut]\n",
        ),
    ),
    "yaml with lists of prefixed paths": (
        "yolo",
        with_lists(
            pairs(
                "images/{stem}.jpg",
                "labels/{stem}.txt",
                yolo_text,
                data_dot_yaml="train: train.txt\nval: val.txt\nnames: [bolt, nut]\n",
            ),
            "data/obj/{stem}.jpg",
        ),
    ),
    "coco in the folder of each split": (
        "coco",
        coco_with(lambda s: f"{s.stem}.jpg", "{split}/{stem}.jpg", "{split}/annotations.json"),
    ),
    "coco in a folder of labels": (
        "coco",
        coco_with(lambda s: f"{s.stem}.jpg", "photos/{split}/{stem}.jpg", "labels/{split}.json"),
    ),
    "labelme split folders": ("labelme", pairs("{split}/{stem}.jpg", "{split}/{stem}.json", labelme_json)),
    "csv roboflow": ("csv", csv_with("roboflow", "{split}/{stem}.jpg", "{split}/_annotations.csv")),
    "csv tensorflow": ("csv", csv_with("roboflow", "images/{split}/{stem}.jpg", "images/{split}_labels.csv")),
}

WHOLE = {  # layouts without splits
    "voc annots and images": ("voc", pairs("images/{stem}.jpg", "annots/{stem}.xml", voc_xml)),
    "voc xmls": ("voc", pairs("pictures/{stem}.png", "xmls/{stem}.xml", voc_xml)),
    "voc beside the images": ("voc", pairs("{stem}.jpg", "{stem}.xml", voc_xml)),
    "voc capital suffixes": ("voc", pairs("JPEGImages/{stem}.JPG", "Annotations/{stem}.XML", voc_xml)),
    "voc deep images": ("voc", pairs("a/b/{stem}.jpg", "annotations/{stem}.xml", voc_xml)),
    "yolo": ("yolo", pairs("images/{stem}.jpg", "labels/{stem}.txt", yolo_text, classes_dot_txt=NAMES)),
    "yolo with capital folders": (
        "yolo",
        pairs("Images/{stem}.JPG", "Labels/{stem}.txt", yolo_text, obj_dot_names=NAMES),
    ),
    "yolo beside the images": ("yolo", pairs("{stem}.jpg", "{stem}.txt", yolo_text, classes_dot_txt=NAMES)),
    "yolo with the names beside the labels": (
        "yolo",
        pairs("images/{stem}.jpg", "labels/{stem}.txt", yolo_text, labels__classes_dot_txt=NAMES),
    ),
    "yolo with linked images": ("yolo", linked_images),
    "coco windows": ("coco", coco_with(lambda s: f"images\\{s.stem}.jpg")),
    "coco drive": ("coco", coco_with(lambda s: f"C:\\users\\me\\photos\\{s.stem}.jpg")),
    "coco prefixed": ("coco", coco_with(lambda s: f"data/obj/{s.stem}.jpg", "sets/all/{stem}.jpg")),
    "coco absolute": ("coco", coco_with(lambda s: f"/content/images/{s.stem}.jpg")),
    "labelme": ("labelme", pairs("{stem}.jpg", "{stem}.json", labelme_json)),
    "labelme polygons": (
        "labelme",
        pairs("images/{stem}.jpg", "json/{stem}.json", lambda s: labelme_json(s, "polygon")),
    ),
    "csv headerless": ("csv", csv_with("headerless", "images/{stem}.jpg")),
    "csv semicolons": ("csv", csv_with("semicolons", "images/{stem}.jpg", "data/boxes.csv")),
}


def content(splits: Splits) -> dict[str, dict[str, list[Any]]]:
    """Return split -> stem of an image -> its boxes, sorted."""
    result: dict[str, dict[str, list[Any]]] = {}
    for dataset in (splits.train, splits.val, splits.test):
        if dataset is None:
            continue
        result[dataset.split] = {}
        for i, name in enumerate(dataset.file_names):
            assert dataset.path(i).is_file()
            rows = dataset.annotations(i)
            boxes = [(dataset.names[label], *map(round, box)) for label, box in zip(
                rows.labels.tolist(), rows.boxes_xyxy_px.tolist(), strict=True
            )]  # fmt: skip
            assert np.abs(rows.boxes_xyxy_px - rows.boxes_xyxy_px.round()).max(initial=0) < 1e-4
            result[dataset.split][Path(name).stem] = sorted(boxes)
    return result


def expected(data: list[Sample]) -> dict[str, dict[str, list[Box]]]:
    result: dict[str, dict[str, list[Box]]] = {}
    for sample in data:
        result.setdefault(sample.split, {})[sample.stem] = sorted(sample.boxes)
    return result


def merged(by_split: dict[str, dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {stem: boxes for part in by_split.values() for stem, boxes in part.items()}


def make(tmp_path: Path, layout: str) -> tuple[str, Path, list[Sample]]:
    form, write = (SPLIT | WHOLE)[layout]
    data = TRAIN_VAL if layout in SPLIT else ONLY_TRAIN
    root = tmp_path / "home" / "nuts"
    root.mkdir(parents=True)
    write(Tree(root), data)
    return form, root, data


def check(splits: Splits, form: str, data: list[Sample]) -> None:
    assert splits.format == form
    assert sorted(c.name for c in splits.categories) == sorted(CLASSES)
    found = content(splits)
    if splits.split_made:
        assert merged(found) == merged(expected(data))
    else:
        assert found == expected(data)


@pytest.mark.parametrize("layout", SPLIT | WHOLE)
def test_every_image_and_box_is_read(tmp_path: Path, layout: str) -> None:
    form, root, data = make(tmp_path, layout)
    splits = load_splits(root)
    check(splits, form, data)
    assert splits.split_made == (layout in WHOLE)
    report = examine(root)
    assert not report.counts()["error"]
    unexpected = {"label-missing", "label-orphan", "image-missing", "category-unnamed"}
    assert not unexpected & {f.code for f in report.findings}


@pytest.mark.parametrize("layout", SPLIT | WHOLE)
def test_the_folder_above_and_a_zip_file_do_as_well(tmp_path: Path, layout: str) -> None:
    form, root, data = make(tmp_path, layout)
    check(load_splits(root.parent), form, data)
    archive = tmp_path / "zips" / "download.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.parent.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(root.parent))
    if layout != "yolo with linked images":
        check(load_splits(archive), form, data)


@pytest.mark.parametrize("layout", SPLIT | WHOLE)
def test_a_repaired_copy_has_every_good_box(tmp_path: Path, layout: str) -> None:
    """The first image cannot be decoded; everything else comes back."""
    form, root, data = make(tmp_path, layout)
    first = next(path for path in sorted(root.parent.rglob("train_0.*")) if path.suffix.lower() in (".jpg", ".png"))
    first.write_bytes(first.read_bytes()[:200])
    report = examine(root)
    assert report.counts()["error"]
    repaired = repair(report, tmp_path / "fixed")
    assert not examine(repaired.data).counts()["error"]
    rest = [sample for sample in data if sample.stem != "train_0"]
    check(load_splits(repaired.data), "coco" if form in ("csv", "labelme") else form, rest)

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

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.checks.repair import repair
from rtdetr_cli.datasets.read import read_raw
from rtdetr_cli.datasets.records import Splits
from rtdetr_cli.errors import DataError
from tests.images import paint

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
        path = self.path(name)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        paint(sum(map(ord, sample.stem)) * 31 + len(sample.boxes), (WIDTH, HEIGHT)).save(path, kind)


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
SPLIT_IMAGES, SPLIT_LABELS = "images/{split}/{stem}.jpg", "labels/{split}/{stem}.txt"


def pairs(image: str, label: str, text: Callable[[Sample], str], files: dict[str, str] | None = None) -> Writer:
    """Write an image and a label file for each sample; `files` are further files with their text."""

    def write(tree: Tree, data: list[Sample]) -> None:
        for sample in data:
            fields = {"split": sample.split, "stem": sample.stem}
            tree.image(image.format(**fields), sample)
            tree.text(label.format(**fields), text(sample))
        for name, content in (files or {}).items():
            tree.text(name, content)

    return write


NAMES = "bolt\nnut\n"
YAML_NAMES = "names: [bolt, nut]\n"


def voc(image: str, label: str) -> Writer:
    return pairs(image, label, voc_xml)


def yolo(image: str, label: str, names: str = "classes.txt") -> Writer:
    """Labels of YOLO with a file of class names."""
    return pairs(image, label, yolo_text, {names: NAMES})


def yaml(text: str, image: str = SPLIT_IMAGES, label: str = SPLIT_LABELS, file: str = "data.yaml") -> Writer:
    return pairs(image, label, yolo_text, {file: text + YAML_NAMES})


def with_lists(write: Writer, line: str, folder: str = "") -> Writer:
    """Add `train.txt` and `val.txt`."""

    def write_all(tree: Tree, data: list[Sample]) -> None:
        write(tree, data)
        for split in ("train", "val"):
            lines = [line.format(stem=s.stem, split=split) for s in data if s.split == split]
            tree.text(f"{folder}{split}.txt", "".join(f"{entry}\n" for entry in lines))

    return write_all


def darknet(tree: Tree, data: list[Sample]) -> None:
    yolo("obj_train_data/{stem}.jpg", "obj_train_data/{stem}.txt", "obj.names")(tree, data)
    for split, name in (("train", "train"), ("val", "other")):
        lines = "".join(f"data/obj_train_data/{s.stem}.jpg\n" for s in data if s.split == split)
        tree.text(f"{name}.txt", lines)
    tree.text("obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/other.txt\nnames = data/obj.names\n")


def table_with(text: Callable[[list[Sample]], str], image: str, file: str) -> Writer:
    """Write all images, and one file with all labels, or one for each split if its name has the split."""

    def write(tree: Tree, data: list[Sample]) -> None:
        for sample in data:
            tree.image(image.format(split=sample.split, stem=sample.stem), sample)
        for split in ("train", "val") if "{split}" in file else ("",):
            tree.text(file.format(split=split), text([s for s in data if split in ("", s.split)]))

    return write


def coco_with(name: Callable[[Sample], str], where: str = "images/{stem}.jpg", file: str = "labels.json") -> Writer:
    return table_with(lambda data: coco_json(data, name), where, file)


def csv_with(form: str, image: str, file: str = "annotations.csv") -> Writer:
    return table_with(lambda data: csv_rows(data, form), image, file)


def linked_images(tree: Tree, data: list[Sample]) -> None:
    for sample in data:
        tree.image(f"../images/{sample.stem}.jpg", sample)
        tree.text(f"labels/{sample.stem}.txt", yolo_text(sample))
    tree.text("classes.txt", NAMES)
    (tree.root / "images").symlink_to("../images")


SPLIT: dict[str, tuple[str, Writer]] = {  # layouts that keep train and val
    "voc split folders": ("voc", voc("images/{split}/{stem}.jpg", "annots/{split}/{stem}.xml")),
    "voc in the folder of each split": ("voc", voc("{split}/images/{stem}.jpg", "{split}/annotations/{stem}.xml")),
    "voc labels in split folders, images in one": ("voc", voc("photos/{stem}.jpg", "xmls/{split}/{stem}.xml")),
    "voc lists": ("voc", with_lists(voc("images/{stem}.jpg", "annotations/xmls/{stem}.xml"), "{stem} 1")),
    "voc lists of files in a folder": (
        "voc",
        with_lists(voc("images/a/{stem}.JPG", "annots/{stem}.XML"), "{stem}.JPG", "sets/"),
    ),
    "yolo train/images": ("yolo", yolo("{split}/images/{stem}.jpg", "{split}/labels/{stem}.txt")),
    "yolo images/train": (
        "yolo",
        yolo("images/{split}2017/{stem}.jpg", "labels/{split}2017/{stem}.txt", "obj.names"),
    ),
    "yolo labels beside images, in split folders": (
        "yolo",
        yolo("{split}/{stem}.jpg", "{split}/{stem}.txt", "train/classes.txt"),
    ),
    "yolo lists": (
        "yolo",
        with_lists(yolo("images/{stem}.jpg", "labels/{stem}.txt"), "/content/data/images/{stem}.jpg"),
    ),
    "darknet": ("yolo", darknet),
    "darknet from Roboflow": ("yolo", yolo("{split}/{stem}.jpg", "{split}/{stem}.txt", "train/_darknet.labels")),
    "yaml beside a folder, with the path of another machine": (
        "yolo",
        yaml(
            "path: ../datasets/nuts\ntrain: images/train\nval: images/val\n",
            *("nuts/images/{split}/{stem}.jpg", "nuts/labels/{split}/{stem}.txt", "nuts.yaml"),
        ),
    ),
    "yaml in a folder of its own": (
        "yolo",
        yaml("train: ../images/train\nval: ../images/val\n", file="config/data.yaml"),
    ),
    "yaml with the paths of another machine": (
        "yolo",
        yaml("train: /content/nuts/images/train\nval: C:\\nuts\\images\\val\n"),
    ),
    "yaml with labels beside the images": (
        "yolo",
        yaml("train: images/train\nval: images/val\n", label="images/{split}/{stem}.txt"),
    ),
    "yaml with lists of prefixed paths": (
        "yolo",
        with_lists(
            yaml("train: train.txt\nval: val.txt\n", "images/{stem}.jpg", "labels/{stem}.txt"), "data/obj/{stem}.jpg"
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
LABEL_STUDIO = {
    "classes.txt": NAMES,
    "notes.json": json.dumps({"categories": [{"id": 0, "name": "bolt"}], "info": {"year": 2026}}),
}
WHOLE: dict[str, tuple[str, Writer]] = {  # layouts without splits
    "voc annots and images": ("voc", voc("images/{stem}.jpg", "annots/{stem}.xml")),
    "voc xmls": ("voc", voc("pictures/{stem}.png", "xmls/{stem}.xml")),
    "voc beside the images": ("voc", voc("{stem}.jpg", "{stem}.xml")),
    "voc capital suffixes": ("voc", voc("JPEGImages/{stem}.JPG", "Annotations/{stem}.XML")),
    "voc deep images": ("voc", voc("a/b/{stem}.jpg", "annotations/{stem}.xml")),
    "yolo": ("yolo", yolo("images/{stem}.jpg", "labels/{stem}.txt")),
    "yolo from Label Studio": ("yolo", pairs("images/{stem}.jpg", "labels/{stem}.txt", yolo_text, LABEL_STUDIO)),
    "yolo with capital folders": ("yolo", yolo("Images/{stem}.JPG", "Labels/{stem}.txt", "obj.names")),
    "yolo beside the images": ("yolo", yolo("{stem}.jpg", "{stem}.txt")),
    "yolo with the names beside the labels": (
        "yolo",
        yolo("images/{stem}.jpg", "labels/{stem}.txt", "labels/classes.txt"),
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


# ---- what is said


def refusal(source: Path) -> DataError:
    with pytest.raises(DataError) as refused:
        read_raw(source)
    return refused.value


def codes(source: Path) -> set[str]:
    return {finding.code for finding in examine(source, decode=False).findings}


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    pairs("images/{stem}.jpg", "labels/{stem}.txt", yolo_text)(Tree(tmp_path), ONLY_TRAIN)
    splits = load_splits(tmp_path)
    assert [c.name for c in splits.categories] == ["class0", "class1"]
    assert "category-unnamed" in codes(tmp_path)


def test_polygons_and_points_are_reported_once(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    pairs("{stem}.jpg", "{stem}.json", lambda s: labelme_json(s, "polygon"))(tree, ONLY_TRAIN)
    document = json.loads((tmp_path / "train_0.json").read_text())
    document["shapes"].append({"label": "nut", "points": [[30, 30], [34, 30]], "shape_type": "circle"})
    document["shapes"].append({"label": "nut", "points": [[3, 3]], "shape_type": "point"})
    tree.text("train_0.json", json.dumps(document))
    by_code = {f.code: f.message for f in examine(tmp_path, decode=False).findings}
    assert "18 polygons, 1 circle" in by_code["shape-as-box"]
    assert "1 of type point" in by_code["shape-ignored"]
    assert ("nut", 26, 26, 34, 34) in merged(content(load_splits(tmp_path)))["train_0"]


def test_the_folder_of_the_labels_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voc("images/{stem}.jpg", "annots/{stem}.xml")(Tree(tmp_path), ONLY_TRAIN)
    check(load_splits(tmp_path / "annots"), "voc", ONLY_TRAIN)
    monkeypatch.chdir(tmp_path / "annots")
    check(load_splits(Path(".")), "voc", ONLY_TRAIN)


def test_images_may_lie_in_a_folder_that_the_user_names(tmp_path: Path) -> None:
    voc("a/pictures/{stem}.jpg", "b/xmls/{stem}.xml")(Tree(tmp_path), ONLY_TRAIN)
    check(load_splits(tmp_path / "b", images=tmp_path / "a"), "voc", ONLY_TRAIN)


def test_masks_and_stray_images_are_not_part_of_the_dataset(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    voc("images/{stem}.jpg", "annotations/xmls/{stem}.xml")(tree, ONLY_TRAIN)
    for sample in ONLY_TRAIN:
        tree.image(f"annotations/trimaps/{sample.stem}.png", sample)
    tree.image("preview.jpg", ONLY_TRAIN[0])
    tree.image("docs/example.png", ONLY_TRAIN[0])
    check(load_splits(tmp_path), "voc", ONLY_TRAIN)


def test_equal_names_in_two_splits_stay_apart(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    for sample in TRAIN_VAL:
        stem = sample.stem.removeprefix(f"{sample.split}_")
        tree.image(f"{sample.split}/images/{stem}.jpg", sample)
        tree.text(f"{sample.split}/labels/{stem}.txt", yolo_text(sample))
    tree.text("classes.txt", NAMES)
    found = content(load_splits(tmp_path))
    assert {split: {f"{split}_{stem}": boxes for stem, boxes in part.items()} for split, part in found.items()} == (
        expected(TRAIN_VAL)
    )


def test_coco_paths_are_matched_by_their_end(tmp_path: Path) -> None:
    """Two folders have images of the same name; a third name is in neither."""
    tree = Tree(tmp_path)
    data = [Sample("train", f"{day}/{i}", (("nut", 4, 4 + i, 20, 30),)) for day in ("mon", "tue") for i in range(3)]
    for sample in data:
        tree.image(f"photos/{sample.stem}.jpg", sample)
    document = json.loads(coco_json(data, lambda s: f"C:\\cam\\{s.stem}.jpg".replace("/", "\\")))
    document["images"].append({"id": 99, "file_name": "D:/x/9.jpg", "width": WIDTH, "height": HEIGHT})
    document["images"].append({"id": 100, "file_name": "wed/0.jpg", "width": WIDTH, "height": HEIGHT})
    tree.text("labels.json", json.dumps(document))
    raw = read_raw(tmp_path)
    assert [raw.splits["train"].file_names[i] for i in range(6)] == [f"photos/{s.stem}.jpg" for s in data]
    moved = [f.message for f in raw.findings if f.code == "image-path-moved"]
    assert moved == ["names 6 images by another path, found by the end of it: C:/cam/mon/0.jpg is photos/mon/0.jpg"]
    missing = [f.message for f in examine(tmp_path, decode=False).findings if f.code == "image-missing"]
    assert len(missing) == 2


def test_labelled_images_in_no_list_are_reported(tmp_path: Path) -> None:
    write = with_lists(voc("images/{stem}.jpg", "annots/{stem}.xml"), "{stem}")
    write(Tree(tmp_path), TRAIN_VAL)
    lines = (tmp_path / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join(lines[1:]))
    (message,) = (f.message for f in read_raw(tmp_path).findings if f.code == "image-unlisted")
    assert message == "1 image with labels is not in train.txt and val.txt, and not used: images/train_0.jpg"


def test_images_that_a_csv_file_does_not_name_are_reported(tmp_path: Path) -> None:
    """They may have no objects, or may never have been labelled."""
    csv_with("headerless", "images/{stem}.jpg")(Tree(tmp_path), ONLY_TRAIN)
    table = tmp_path / "annotations.csv"
    kept = [line for line in table.read_text().splitlines() if "train_0" not in line and "train_1" not in line]
    table.write_text("\n".join(kept))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "images/train_0.jpg", tmp_path / "elsewhere/logo.jpg")
    (finding,) = (f for f in read_raw(tmp_path).findings if f.code == "image-unlisted")
    assert finding.message == (
        "2 images are not in annotations.csv, and not used: images/train_0.jpg, images/train_1.jpg"
    )
    assert finding.severity == "warning"


OTHER = {
    "CVAT XML (Annotations/": ("Annotations/a.xml", "<annotations><version>1.1</version></annotations>"),
    "CVAT XML": ("annotations.xml", "<annotations><version>1.1</version><meta></meta></annotations>"),
    "Supervisely": ("ann/a.jpg.json", '{"size": {}, "objects": [{"classTitle": "nut", "points": {}}]}'),
    "Label Studio": ("export.json", '[{"annotations": [{"result": [{"value": {"rectanglelabels": ["nut"]}}]}]}]'),
    "VIA": ("via.json", '{"_via_img_metadata": {}}'),
    "Hugging Face metadata": ("images/metadata.jsonl", '{"file_name": "a.jpg", "objects": {"bbox": []}}\n'),
    "a VGG Image Annotator (VIA) CSV": ("via.csv", "filename,region_count,region_shape_attributes\n"),
    "CreateML": ("a.json", '[{"image": "a.jpg", "annotations": [{"label": "x", "coordinates": {"x": 1}}]}]'),
    "TFRecord": ("train.tfrecord", "x"),
    "KITTI": ("labels/a.txt", "Car 0.00 0 -1.57 599.4 156.4 629.7 189.2 2.8 1.4 1.5 0.47 1.4 69.4 -1.56\n"),
    "DOTA": ("labels/a.txt", "1.0 2.0 3.0 4.0 5.0 6.0 7.0 8.0 plane 0\n"),
    "segmentation masks": ("SegmentationClass/a.png", ""),
    "classification": ("cats/x.jpg", ""),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    file, text = OTHER[name]
    tree = Tree(tmp_path)
    tree.image("images/a.jpg", ONLY_TRAIN[0])
    if text:
        tree.text(file, text)
    else:
        tree.image(file, ONLY_TRAIN[0])
    error = refusal(tmp_path)
    assert error.code == "format-unknown"
    assert name in error.message
    assert "which is not read: found " in error.message
    assert error.hint


def test_the_error_lists_what_was_found(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    for sample in ONLY_TRAIN:
        tree.image(f"images/{sample.stem}.jpg", sample)
        tree.text(f"annots/{sample.stem}.xml", "<root></root>")
    message = refusal(tmp_path).message
    assert "found 6 images in images/ and 6 XML files in annots/" in message or (
        "found 6 XML files in annots/ and 6 images in images/" in message
    )
    assert "no <annotation> element" in message
    tree.image("b/images/x.jpg", ONLY_TRAIN[0])
    tree.text("b/train.csv", "image_id,width,height,bbox\n")
    assert refusal(tmp_path / "b").message.endswith(": train.csv has image_id,width,height,bbox")


def test_images_without_labels_and_labels_without_images(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.image("a/images/x.jpg", ONLY_TRAIN[0])
    assert "1 image in images/, but no label files" in refusal(tmp_path / "a").message
    tree.text("b/annots/x.xml", voc_xml(ONLY_TRAIN[0]))
    error = refusal(tmp_path / "b")
    assert error.code == "images-missing"
    assert "Pascal VOC labels but no images: found 1 XML file in annots/" in error.message
    (tmp_path / "c").mkdir()
    assert "found no files" in refusal(tmp_path / "c").message


def test_coco_is_found_beside_more_images_than_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rtdetr_cli.datasets import survey as module

    coco_with(lambda s: f"{s.stem}.jpg", "a/{stem}.jpg", "annotations/labels.json")(Tree(tmp_path), ONLY_TRAIN)
    monkeypatch.setattr(module, "_MAX_FILES", 3)
    assert len(read_raw(tmp_path).splits["train"]) == len(ONLY_TRAIN)
    (tmp_path / "annotations/labels.json").unlink()
    assert "more than a million files" in refusal(tmp_path).message


def test_several_datasets_are_listed(tmp_path: Path) -> None:
    voc("a/images/{stem}.jpg", "a/annots/{stem}.xml")(Tree(tmp_path), ONLY_TRAIN)
    pairs("b/images/{stem}.jpg", "b/labels/{stem}.txt", yolo_text)(Tree(tmp_path), ONLY_TRAIN)
    error = refusal(tmp_path)
    assert error.code == "format-ambiguous"
    assert "contains 2 datasets: a, b" in error.message
    assert str(tmp_path / "a") in error.hint


def test_two_sets_of_labels_for_the_same_images_are_refused(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    yolo("images/{stem}.jpg", "labels/{stem}.txt")(tree, ONLY_TRAIN)
    pairs("images/{stem}.jpg", "labels_old/{stem}.txt", yolo_text)(tree, ONLY_TRAIN)
    assert "labels and labels_old" in refusal(tmp_path).message
    check(load_splits(tmp_path / "labels_old"), "yolo", ONLY_TRAIN)
    voc("images/{stem}.jpg", "xmls/{stem}.xml")(tree, ONLY_TRAIN)
    assert "labels in several formats: " in refusal(tmp_path).message
    check(load_splits(tmp_path / "xmls"), "voc", ONLY_TRAIN)


def test_coco_without_boxes_is_one_error(tmp_path: Path) -> None:
    coco_with(lambda s: f"{s.stem}.jpg")(Tree(tmp_path), ONLY_TRAIN)
    document = json.loads((tmp_path / "labels.json").read_text())
    for annotation in document["annotations"]:
        del annotation["bbox"]
        annotation["keypoints"] = [1, 2, 2]
    (tmp_path / "labels.json").write_text(json.dumps(document))
    errors = [f for f in examine(tmp_path, decode=False).findings if f.severity == "error"]
    assert [f.code for f in errors][:1] == ["box-none"]
    assert len(errors) <= 2


@pytest.mark.parametrize("layout", ["coco windows", "csv headerless", "voc lists"])
def test_images_that_are_all_missing_are_the_first_error(tmp_path: Path, layout: str) -> None:
    _, root, _data = make(tmp_path, layout)
    for path in root.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError) as refused:
        load_splits(root)
    assert refused.value.code == "images-missing"
    with pytest.raises(DataError, match="images"):
        examine(root)


# ---- zip files


def zip_with(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content_of_entry in entries:
            file.writestr(name, content_of_entry)
    return path


def test_a_zip_file_is_unpacked_once(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    voc("images/{stem}.jpg", "annots/{stem}.xml")(tree, ONLY_TRAIN)
    archive = Path(shutil.make_archive(str(tmp_path / "nuts"), "zip", tree.root))
    raw = read_raw(archive)
    (message,) = (f.message for f in raw.findings if f.code == "dataset-unpacked")
    assert str(raw.folder) in message
    assert raw.name == "nuts"
    marker = raw.folder / "annots/train_0.xml"
    before = marker.stat().st_mtime_ns, marker.stat().st_ino
    assert read_raw(archive).folder == raw.folder
    assert (marker.stat().st_mtime_ns, marker.stat().st_ino) == before
    (tmp_path / "folder").mkdir()
    copy = shutil.copy(archive, tmp_path / "folder" / "nuts.zip")
    (tmp_path / "folder/README.md").write_text("nuts")
    assert read_raw(copy).folder == read_raw(copy.parent).folder == raw.folder, "the same bytes"
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("more.txt", "x")
    os.utime(raw.folder.parent, (1, 1))
    assert read_raw(archive).folder != raw.folder
    assert not raw.folder.exists(), "unused for a long time"


def test_a_zip_file_is_repaired_and_converted(tmp_path: Path, rtdetr: Any) -> None:
    tree = Tree(tmp_path / "tree")
    pairs("images/{stem}.jpg", "images/{stem}.json", labelme_json)(tree, ONLY_TRAIN)
    archive = Path(shutil.make_archive(str(tmp_path / "nuts"), "zip", tree.root))
    ran = rtdetr("validate", archive, "--fix", tmp_path / "fixed", code=0)
    assert "unpacked in" in ran.out
    assert "(written as COCO)" in ran.out
    for number, flags in enumerate((["--convert", "yolo"], ["--resplit", "0.5,0.5"])):
        to = tmp_path / f"out{number}"
        assert rtdetr("validate", archive, *flags, "--to", to).code == 0
        assert merged(content(load_splits(to))) == merged(expected(ONLY_TRAIN))
    voc("images/{stem}.jpg", "annots/{stem}.xml")(Tree(tmp_path / "voc"), ONLY_TRAIN)
    archive = Path(shutil.make_archive(str(tmp_path / "voc-nuts"), "zip", tmp_path / "voc"))
    assert rtdetr("validate", archive, "--fix", tmp_path / "voc-fixed").code == 0
    check(load_splits(tmp_path / "voc-fixed"), "voc", ONLY_TRAIN)


def test_a_zip_file_is_unpacked_beside_itself_if_the_cache_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtdetr_cli.datasets import archive as module

    make_folder = module.tempfile.mkdtemp

    def refuse(prefix: str, dir: Path) -> str:
        if dir != tmp_path:
            raise PermissionError(13, "Permission denied")
        return make_folder(prefix=prefix, dir=dir)

    monkeypatch.setattr(module.tempfile, "mkdtemp", refuse)
    source = zip_with(tmp_path / "a.zip", ("images/a.jpg", b"x"))
    assert module.unpack(source).parent.parent == tmp_path


LINK = zipfile.ZipInfo("images")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("../../evil.txt", "outside of its folder"),
        ("/etc/evil.txt", "outside of its folder"),
        ("..\\evil.txt", "outside of its folder"),
        ("C:\\evil.txt", "outside of its folder"),
        (LINK, "contains the link"),
    ],
)
def test_a_dangerous_zip_file_is_refused(tmp_path: Path, entry: str | zipfile.ZipInfo, said: str) -> None:
    error = refusal(zip_with(tmp_path / "a.zip", ("ok.txt", b"x"), (entry, b"/etc")))
    assert error.code == "zip-unsafe"
    assert said in error.message
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip"]


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rtdetr_cli.datasets import archive as module
    from rtdetr_cli.errors import RtdetrError

    source = zip_with(tmp_path / "a.zip", ("a.txt", bytes(1 << 20)))
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    with pytest.raises(RtdetrError, match="free"):
        module.unpack(source)
    monkeypatch.setattr(module, "_RATIO_BYTES", 1000)
    assert refusal(source).code == "zip-unsafe"


@pytest.mark.parametrize("data", [b"", b"PK", b"no zip", b"cut off"])
def test_a_damaged_zip_file_is_refused(tmp_path: Path, data: bytes) -> None:
    source = zip_with(tmp_path / "a.zip", ("a.txt", bytes(1000)))
    source.write_bytes(source.read_bytes()[:-30] if data == b"cut off" else data)
    assert refusal(source).code == "zip-damaged"


# ---- links, speed, imports


def test_links_are_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    voc("far/away/images/{stem}.jpg", "near/nuts/annots/{stem}.xml")(Tree(tmp_path), ONLY_TRAIN)
    (tmp_path / "near/nuts/images").symlink_to(tmp_path / "far/away/images")
    (tmp_path / "near/nuts/all").symlink_to("/")
    assert refusal(tmp_path / "near/nuts").code == "images-missing"


def test_a_link_in_a_circle_ends(tmp_path: Path) -> None:
    voc("images/{stem}.jpg", "annots/{stem}.xml")(Tree(tmp_path), ONLY_TRAIN)
    (tmp_path / "images/again").symlink_to(tmp_path)
    check(load_splits(tmp_path), "voc", ONLY_TRAIN)


def test_no_layout_needs_torch(tmp_path: Path) -> None:
    voc("a/images/{stem}.jpg", "a/annots/{stem}.xml")(Tree(tmp_path), ONLY_TRAIN)
    csv_with("headerless", "b/images/{stem}.jpg", "b/data.csv")(Tree(tmp_path), ONLY_TRAIN)
    pairs("c/{stem}.jpg", "c/{stem}.json", labelme_json)(Tree(tmp_path), ONLY_TRAIN)
    archive = shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "a")
    sources = [str(tmp_path / name) for name in "abc"] + [archive]
    program = (
        "import sys\nfrom rtdetr_cli.cli.app import run\n"
        f"codes = [run(['validate', source]) for source in {sources!r}]\n"
        "assert codes == [0] * 4, codes\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

"""Images outside the dataset's folder: read and reported, copied only with `--allow-outside`, never from a zip."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.checks.page import write_page

VOC = """<annotation><filename>{name}</filename><size><width>48</width><height>32</height></size>
<object><name>nut</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>14</ymax></bndbox></object></annotation>"""
YOLO_LINE = "0 0.15 0.27 0.2 0.34\n"
LAYOUTS = ("coco", "voc", "csv", "yolo-list", "yolo-folder")
CASES = [*(f"{layout} {way}" for layout in LAYOUTS for way in ("dots", "absolute", "link")), "labelme link"]


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path)) + ord(path.stem[-1])).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_dataset(layout: str, way: str, folder: Path) -> Path:
    """Write images 1 and 2 in `folder`/data, and 3 in `folder`/other/images, which the labels name one way or other."""
    data, other = folder / "data", write_image(folder / "other/images/3.png")
    place = {"voc": "JPEGImages", "labelme": ""}.get(layout, "images")
    names = [write_image(data / place / f"{i}.png").name for i in (1, 2)]
    if way == "link":
        (data / place / "3.png").symlink_to(other)
    home = data / "Annotations" if layout == "voc" else data / place
    relative = os.path.relpath(other, home if layout in ("coco", "voc") else data)
    names.append({"dots": relative, "absolute": str(other), "link": "3.png"}[way])
    if layout == "coco":
        images = [{"id": i, "file_name": name, "width": 48, "height": 32} for i, name in enumerate(names)]
        boxes = [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [2, 3, 10, 11], "area": 110, "iscrowd": 0}
            for i in range(3)
        ]
        document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "nut"}]}
        (data / "train.json").write_text(json.dumps(document))
    elif layout == "csv":
        rows = [f"{name},48,32,nut,2,3,12,14" for name in names]
        (data / "boxes.csv").write_text("\n".join(["filename,width,height,class,xmin,ymin,xmax,ymax", *rows]))
    elif layout in ("voc", "labelme"):
        home.mkdir(exist_ok=True)
        if layout == "voc":
            (data / "ImageSets/Main").mkdir(parents=True)
            (data / "ImageSets/Main/train.txt").write_text("1\n2\n3\n")
        shape = {"label": "nut", "points": [[2, 3], [12, 14]], "shape_type": "rectangle"}
        for i, name in enumerate(names, 1):
            document = {"shapes": [shape], "imagePath": name, "imageHeight": 32, "imageWidth": 48}
            text = VOC.format(name=name) if layout == "voc" else json.dumps(document)
            (home / f"{i}.{'xml' if layout == 'voc' else 'json'}").write_text(text)
    else:
        write_yolo(data, other, names, layout, way)
    return data


def write_yolo(data: Path, other: Path, names: list[str], layout: str, way: str) -> None:
    for label in (
        data / "labels/1.txt",
        data / "labels/2.txt",
        data / "labels/3.txt",
        other.parent.parent / "labels/3.txt",
    ):
        label.parent.mkdir(exist_ok=True)
        label.write_text(YOLO_LINE)
    listed = [f"images/{name}" if "/" not in name else name for name in names]
    (data / "train.txt").write_text("\n".join(listed))
    folders = {"dots": "[images, ../other/images]", "absolute": f"[images, {other.parent}]", "link": "images"}
    train = "train.txt" if layout == "yolo-list" else folders[way]
    (data / "data.yaml").write_text(f"train: {train}\nnc: 1\nnames: [nut]\n")


@pytest.fixture(params=CASES)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_dataset(*request.param.split(), tmp_path)


def test_an_image_outside_is_read_and_reported(data: Path) -> None:
    found = [f for f in examine(data).findings if f.code.startswith("image-")]
    assert [(f.code, f.severity) for f in found] == [("image-elsewhere", "warning")], found
    splits = load_splits(data, val_fraction=0.4)
    assert len(splits.train) + len(splits.val) == 3


def copied(folder: Path) -> list[bytes]:
    return sorted(p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix == ".png")


@pytest.mark.parametrize("words", [["--fix", "copy"], ["--convert", "yolo", "--to", "copy"]], ids=["fix", "convert"])
def test_a_copy_has_it_only_if_that_is_allowed(
    rtdetr: Callable[..., Any], data: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = rtdetr("validate", data, *words, code=0)
    assert "--allow-outside" in ran.out + ran.err
    inside = [p.read_bytes() for p in data.rglob("*.png") if not p.is_symlink()]
    assert copied(tmp_path / "copy") == sorted(inside)
    assert "image-elsewhere" not in {f.code for f in examine(tmp_path / "copy").findings}
    (tmp_path / "copy").rename(tmp_path / "without")
    assert rtdetr("validate", data, *words, "--allow-outside").code == 0
    everything = [*inside, (tmp_path / "other/images/3.png").read_bytes()]
    assert copied(tmp_path / "copy") == sorted(everything)
    report = examine(tmp_path / "copy")
    assert "image-elsewhere" not in {f.code for f in report.findings}
    assert sum(len(split.box_images) for split in report.raw.splits.values()) == 3


def test_a_page_does_not_show_it(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    report = examine(write_dataset("coco", "dots", tmp_path))
    write_page(report, page)
    text = page.read_text()
    assert text.count("data:image/") == 2
    assert "it is outside the dataset folder" in text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["dots", "absolute"])
def test_a_zip_does_not_reach_outside(layout: str, way: str, tmp_path: Path) -> None:
    data = write_dataset(layout, way, tmp_path)
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in data.rglob("*"):
            file.write(path, path.relative_to(data))
    if way == "dots":  # where the paths lead from the folder in the cache
        folder = examine(archive).raw.folder
        write_image(folder.parent / "other/images/3.png")
        (folder.parent / "other/labels").mkdir(exist_ok=True)
        (folder.parent / "other/labels/3.txt").write_text(YOLO_LINE)
    report = examine(archive)
    for split in report.raw.splits.values():
        for image in np.flatnonzero(split.usable).tolist():
            assert split.path(image).resolve().is_relative_to(report.raw.folder.resolve())
    assert "image-elsewhere" not in {f.code for f in report.findings}


@pytest.mark.parametrize("way", ["dots", "absolute"])
def test_labelme_finds_images_by_the_names_of_its_files_only(way: str, tmp_path: Path) -> None:
    report = examine(write_dataset("labelme", way, tmp_path))
    assert [name for split in report.raw.splits.values() for name in split.file_names] == ["1.png", "2.png"]
    assert "label-orphan" in {f.code for f in report.findings}


def test_the_path_of_a_yaml_in_a_zip_does_not_reach_outside(tmp_path: Path) -> None:
    write_image(tmp_path / "private/images/1.png")
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.yaml", f"path: {tmp_path / 'private'}\ntrain: images\nnames: [nut]\n")
        file.write(write_image(tmp_path / "2.png"), "images/2.png")
        file.writestr("labels/2.txt", YOLO_LINE)
    report = examine(archive)
    assert [name for split in report.raw.splits.values() for name in split.file_names] == ["images/2.png"]
    assert "yolo-path" in {f.code for f in report.findings}


@pytest.mark.parametrize("decode", [True, False])
def test_a_link_in_another_case_may_not_leave_the_dataset(coco: Any, decode: bool) -> None:
    target = coco.folder.parent / "elsewhere.jpg"
    shutil.move(coco.image, target)
    coco.image.with_name("TRAIN_0.jpg").symlink_to(target)
    codes = {f.code for f in examine(coco.write(), decode=decode).findings}
    assert {"image-name-case", "image-elsewhere"} <= codes


def test_an_image_in_the_root_folder_is_not_one_in_the_dataset(coco: Any) -> None:
    shutil.copy(coco.image, coco.folder / "train_0.jpg")
    coco.train["images"][0]["file_name"] = "/train_0.jpg"
    finding = next(f for f in examine(coco.write(), images=coco.folder).findings if f.severity == "error")
    assert (finding.code, finding.message) == ("image-missing", "/train_0.jpg is not in /")

"""Detections as documents and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.infer.detections import Detections, save_image
from rtdetr_cli.infer.sources import Source
from rtdetr_cli.infer.write import (
    Results,
    coco_image_ids,
    coco_rows,
    image_document,
    json_line,
    saved_name,
    yolo_lines,
)

FOUND = Detections(
    np.array([[10, 20, 110, 70], [0, 0, 200.004, 99.996]], np.float32),
    np.array([0.9123456, 0.25], np.float32),
    np.array([1, 0], np.int64),
    (200, 100),
    ("cat", "dog"),
    (3, 17),
)
EMPTY = FOUND.keep(np.zeros(2, bool))


def source(path: str, name: str = "") -> Source:
    return Source(Path(path), Path(name or Path(path).stem), path.endswith(".mp4"))


def test_document() -> None:
    assert json.loads(json_line(image_document("a.jpg", FOUND))) == {
        "schema_version": 1,
        "image": "a.jpg",
        "width": 200,
        "height": 100,
        "detections": [
            {"label": "dog", "category_id": 17, "score": 0.91235, "box_xyxy": [10, 20, 110, 70]},
            {"label": "cat", "category_id": 3, "score": 0.25, "box_xyxy": [0, 0, 200, 100]},
        ],
    }
    assert image_document("v.mp4", EMPTY, frame=7)["frame"] == 7
    document = json.loads(json_line({"image": "caf\udce9.jpg"}))  # bytes that are not UTF-8
    assert document["image"] == "caf\udce9.jpg"


def test_coco_and_yolo() -> None:
    assert coco_rows(5, FOUND)[0] == {"image_id": 5, "category_id": 17, "bbox": [10, 20, 100, 50], "score": 0.91235}
    assert yolo_lines(FOUND).splitlines()[0] == "1 0.300000 0.450000 0.500000 0.500000"
    assert yolo_lines(FOUND, scores=True).splitlines()[0] == "1 0.300000 0.450000 0.500000 0.500000 0.912346"
    assert yolo_lines(EMPTY) == ""


def test_coco_ids() -> None:
    sources = [source("000000000030.jpg"), source("street.jpg")]
    assert coco_image_ids(sources) == {"000000000030": 30, "street": "street"}
    assert coco_image_ids(sources, {"street.jpg": 9}) == {"000000000030": 30, "street": 9}
    twins = [source("a/7.jpg", "7"), source("b/007.jpg", "007")]
    assert coco_image_ids(twins) == {"7": "7", "007": "007"}


def test_results(tmp_path: Path) -> None:
    clip, image = source("clip.mp4"), source("in/0012.jpg", "in/0012")
    results = Results(tmp_path, names=("cat", "dog"), lines=True, coco=True, txt=True, image_ids={"in/0012": 12})
    results.add(image, FOUND)
    results.add(clip, FOUND, frame=0)
    results.add(clip, EMPTY, frame=1)
    lines = (tmp_path / "predictions.jsonl").read_text()
    results.close()
    lines = (tmp_path / "predictions.jsonl").read_text()
    assert [json.loads(line).get("frame") for line in lines.splitlines()] == [None, 0, 1]
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [12, 12, "clip_000000", "clip_000000"]
    assert (tmp_path / "labels/in/0012.txt").read_text().count("\n") == 2
    assert (tmp_path / "labels/clip_000001.txt").read_text() == ""
    assert (tmp_path / "labels/classes.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("x/a.JPG", "a.jpg", "JPEG"),
        ("a.jpeg", "a.jpg", "JPEG"),
        ("a.png", "a.png", "PNG"),
        ("a.webp", "a.webp", "WEBP"),
        ("a.tiff", "a.png", "PNG"),
        ("a.gif", "a.png", "PNG"),
    ],
)
def test_annotated_images_keep_their_format(tmp_path: Path, path: str, name: str, kind: str) -> None:
    assert saved_name(source(path)) == name
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    save_image(image, tmp_path / "deep" / name)
    with Image.open(tmp_path / "deep" / name) as saved:
        assert (saved.format, saved.size) == (kind, (30, 20))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == [name]


def test_video_name() -> None:
    assert saved_name(source("a.b.avi".replace("avi", "mp4"))) == "a.b.mp4"

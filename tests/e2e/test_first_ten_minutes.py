"""From a labelled folder to a detector with the commands that the tool prints itself, for every layout it reads.

The first command is `rtdetr validate FOLDER` (or the zip file); each further one is a line `next: ...` of the one
before. To be fast, `SMALL` is appended to `train`, and `CPU` to `predict`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from PIL import Image

from rtdetr_cli.datasets.generate import generate_dataset

CPU = ["--device", "cpu"]
SMALL = [
    "--preset", "tiny", "--imgsz", "64", "--epochs", "1", "--weights", "none", "--workers", "0", *CPU,
    "--effective-batch", "8", "--set", "plots=false",
    *(word for s in ("width=8", "hidden_dim=16", "heads=2", "decoder_dim=16", "queries=12", "num_points=[1,1,1]",
                     "denoising=8", "encoder_ffn=16", "decoder_ffn=16") for word in ("--set", f"model.{s}")),
]  # fmt: skip
MOST_COMMANDS = 5

Truth = dict[str, dict[str, Any]]
"""Split -> the document of its COCO JSON."""
Writer = Callable[[Path, Path, Truth], None]


def boxes_of(document: dict[str, Any], image: dict[str, Any]) -> list[tuple[str, list[float]]]:
    names = {c["id"]: c["name"] for c in document["categories"]}
    rows = [a for a in document["annotations"] if a["image_id"] == image["id"]]
    return [(names[a["category_id"]], a["bbox"]) for a in rows]


def each(truth: Truth) -> list[tuple[str, dict[str, Any], list[tuple[str, list[float]]]]]:
    return [(split, i, boxes_of(d, i)) for split, d in truth.items() for i in d["images"]]


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def coco(root: Path, folder: Path, truth: Truth) -> None:
    for split, document in truth.items():
        write(folder / f"annotations/{split}.json", json.dumps(document))
    shutil.copytree(root / "images", folder / "images")


def roboflow(root: Path, folder: Path, truth: Truth) -> None:
    for split, document in truth.items():
        part = folder / {"val": "valid"}.get(split, split)
        for image in document["images"]:
            put(root / image["file_name"], part / Path(image["file_name"]).name)
        flat = [{**i, "file_name": Path(i["file_name"]).name} for i in document["images"]]
        write(part / "_annotations.coco.json", json.dumps({**document, "images": flat}))


def yolo_without_yaml(root: Path, folder: Path, truth: Truth) -> None:
    names = [c["name"] for c in truth["train"]["categories"]]
    for split, image, boxes in each(truth):
        name, w, h = Path(image["file_name"]).name, image["width"], image["height"]
        put(root / image["file_name"], folder / f"images/{split}/{name}")
        lines = (
            f"{names.index(label)} {(x + bw / 2) / w:.6f} {(y + bh / 2) / h:.6f} {bw / w:.6f} {bh / h:.6f}\n"
            for label, (x, y, bw, bh) in boxes
        )
        write(folder / f"labels/{split}/{Path(name).stem}.txt", "".join(lines))
    write(folder / "classes.txt", "\n".join(names))


def yolo(root: Path, folder: Path, truth: Truth) -> None:
    yolo_without_yaml(root, folder, truth)
    names = (folder / "classes.txt").read_text().split()
    (folder / "classes.txt").unlink()
    write(folder / "data.yaml", f"train: images/train\nval: images/val\nnames: {json.dumps(names)}\n")


def voc(root: Path, folder: Path, truth: Truth, *, pixels: str = "JPEGImages", labels: str = "Annotations") -> None:
    for split, image, boxes in each(truth):
        name = Path(image["file_name"]).name
        put(root / image["file_name"], folder / pixels / name)
        objects = "".join(
            f"<object><name>{escape(label)}</name><bndbox><xmin>{x + 1:.1f}</xmin><ymin>{y + 1:.1f}</ymin>"
            f"<xmax>{x + w:.1f}</xmax><ymax>{y + h:.1f}</ymax></bndbox></object>"
            for label, (x, y, w, h) in boxes
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        write(folder / labels / f"{Path(name).stem}.xml", text)
        if labels == "Annotations":
            sets = folder / f"ImageSets/Main/{split}.txt"
            write(sets, (sets.read_text() if sets.exists() else "") + f"{Path(name).stem}\n")


def voc_other_names(root: Path, folder: Path, truth: Truth) -> None:
    voc(root, folder, truth, pixels="photos", labels="annots")


def zip_file(root: Path, folder: Path, truth: Truth) -> None:
    inside = folder.parent / "inside"
    coco(root, inside, truth)
    folder.mkdir()
    shutil.make_archive(str(folder / "shapes"), "zip", inside)


def csv_file(root: Path, folder: Path, truth: Truth) -> None:
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for _, image, boxes in each(truth):
        name = Path(image["file_name"]).name
        put(root / image["file_name"], folder / "images" / name)
        size = f"{image['width']},{image['height']}"
        lines += [f"{name},{size},{label},{x},{y},{x + w},{y + h}" for label, (x, y, w, h) in boxes]
    write(folder / "labels.csv", "\n".join(lines) + "\n")


def labelme(root: Path, folder: Path, truth: Truth) -> None:
    for _, image, boxes in each(truth):
        name = Path(image["file_name"]).name
        put(root / image["file_name"], folder / name)
        shapes = [
            {"label": label, "shape_type": "rectangle", "points": [[x, y], [x + w, y + h]]}
            for label, (x, y, w, h) in boxes
        ]
        facts = {"imagePath": name, "imageWidth": image["width"], "imageHeight": image["height"]}
        write(folder / f"{Path(name).stem}.json", json.dumps({"version": "5.4.1", "shapes": shapes, **facts}))


LAYOUTS: dict[str, Writer] = {
    "COCO": coco,
    "Roboflow": roboflow,
    "YOLO with data.yaml": yolo,
    "YOLO without a yaml": yolo_without_yaml,
    "VOC": voc,
    "VOC with other names": voc_other_names,
    "zip": zip_file,
    "CSV": csv_file,
    "Labelme": labelme,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_dataset(tmp_path_factory.mktemp("ten") / "shapes", train=24, val=8, imgsz=64)


@pytest.mark.parametrize(
    "layout",
    [name if name == "YOLO without a yaml" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_from_a_folder_to_detections(
    rtdetr: Any, shapes: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    truth = {split: json.loads((shapes / f"{split}.json").read_text()) for split in ("train", "val")}
    LAYOUTS[layout](shapes, tmp_path / "my data", truth)
    data = next((tmp_path / "my data").glob("*.zip"), tmp_path / "my data")
    words, commands, last = ["validate", str(data)], 0, ""
    worked = None
    while commands < MOST_COMMANDS:
        ran = rtdetr(*words, *{"train": SMALL, "predict": CPU}.get(words[0], []))
        commands += 1
        worked = ran.code == 0 if worked is None else worked
        last = (ran.err.strip().splitlines() or [""])[-1]
        if words[0] == "predict":
            break
        steps = [shlex.split(line)[2:] for line in ran.err.splitlines() if line.startswith("next: rtdetr ")]
        assert steps, f"{words[0]} printed no next command: {ran.out}{ran.err}"
        words = next((step for step in steps if step[0] == "predict"), steps[0])
    print(f"\nTEN | {layout} | {'yes' if worked else 'no'} | {commands} | {last}")
    assert words[0] == "predict"
    assert ran.code == 0, ran.err
    drawn = [p for p in (tmp_path / "runs/predict-01").rglob("*") if p.suffix in (".png", ".jpg")]
    assert drawn, ran.err
    with Image.open(drawn[0]) as image:
        assert image.size == (64, 64)
    assert (worked, commands) == (True, 3)

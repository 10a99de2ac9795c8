"""Formats are detected, and all are read into the same arrays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.read import read_raw
from rtdetr_cli.datasets.records import Dataset, Splits
from rtdetr_cli.errors import DataError


def parts(splits: Splits) -> dict[str, Dataset]:
    """Return the splits by name."""
    return {d.split: d for d in (splits.train, splits.val, splits.test) if d is not None}


def file_names(dataset: Dataset | None) -> list[str]:
    return list(dataset.file_names) if dataset is not None else []


def test_flat_arrays_agree_with_the_file(coco: Any) -> None:
    splits = load_splits(coco.write())
    train = splits.train
    assert (len(train), train.format, train.split, splits.name) == (4, "coco", "train", "nuts")
    assert train.names == ("nut", "washer")
    assert train.category_ids == (1, 2)
    assert train.image_ids.tolist() == [1, 2, 3, 4]
    assert train.sizes_wh.tolist() == [[96, 64]] * 4
    for i, image in enumerate(coco.train["images"]):
        own = [a for a in coco.train["annotations"] if a["image_id"] == image["id"]]
        rows = train.annotations(i)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert rows.boxes_xyxy_px.tolist() == corners
        assert rows.annotation_ids.tolist() == [a["id"] for a in own]
        assert rows.labels.tolist() == [a["category_id"] - 1 for a in own]
        assert train.path(i).is_file()


def test_order_of_annotations_and_keys_does_not_matter(coco: Any) -> None:
    before = load_splits(coco.write())
    document = coco.documents["train"]
    # Annotations of one image keep their order, since that is what the fingerprint and duplicates rest on.
    document["annotations"].sort(key=lambda a: (-a["image_id"], a["id"]))
    coco.documents["train"] = dict(reversed(list(document.items())))
    after = load_splits(coco.write(indent=None))
    assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize("layout", ["beside", "images", "split folders", "images/split", "named"])
def test_images_are_found(coco: Any, layout: str, tmp_path: Path) -> None:
    folder = coco.write()
    paths = list((folder / "images").iterdir())
    images = None
    for path in paths:
        split = path.name.split("_")[0]
        target = {
            "beside": folder / path.name,
            "images": path,
            "split folders": folder / split / path.name,
            "images/split": folder / "images" / split / path.name,
            "named": tmp_path / "elsewhere" / path.name,
        }[layout]
        target.parent.mkdir(exist_ok=True, parents=True)
        path.rename(target)
    if layout == "named":
        images = tmp_path / "elsewhere"
    splits = load_splits(folder, images=images)
    for dataset in parts(splits).values():
        assert all(dataset.path(i).is_file() for i in range(len(dataset)))


def test_coco_layout_of_the_original(coco: Any) -> None:
    folder = coco.write()
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / f"{split}.json").rename(folder / "annotations" / f"instances_{split}2017.json")
        (folder / f"{split}2017").mkdir()
        for path in (folder / "images").glob(f"{split}_*"):
            path.rename(folder / f"{split}2017" / path.name)
    (folder / "images").rmdir()
    (folder / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": []}')
    for source in (folder, folder / "annotations/instances_train2017.json"):
        splits = load_splits(source)
        assert {name: len(d) for name, d in parts(splits).items()} == {"train": 4, "val": 4}


def test_roboflow_folder(coco: Any, tmp_path: Path) -> None:
    folder = coco.write()
    export = tmp_path / "export"
    for split, word in (("train", "train"), ("val", "valid")):
        (export / word).mkdir(parents=True)
        shutil.copy(folder / f"{split}.json", export / word / "_annotations.coco.json")
        for path in (folder / "images").glob(f"{split}_*"):
            shutil.copy(path, export / word)
    for source in (export, export / "train/_annotations.coco.json"):
        splits = load_splits(source)
        assert splits.format == "roboflow"
        assert {name: len(d) for name, d in parts(splits).items()} == {"train": 4, "val": 4}


def test_val_is_drawn_from_a_single_file(coco: Any) -> None:
    del coco.documents["val"]
    folder = coco.write()
    splits = load_splits(folder, val_fraction=0.25)
    assert splits.split_made
    assert {name: len(d) for name, d in parts(splits).items()} == {"train": 3, "val": 1}
    assert sum(len(d.labels) for d in parts(splits).values()) == 24
    coco.train["images"].reverse()
    coco.write()
    again = load_splits(folder, val_fraction=0.25)
    assert file_names(again.val) == file_names(splits.val), "the order of the entries decides nothing"


def test_val_is_drawn_from_train_and_never_from_test(coco: Any) -> None:
    coco.documents["test"] = coco.documents.pop("val")
    splits = load_splits(coco.write(), val_fraction=0.25)
    assert splits.split_made
    assert {name: len(d) for name, d in parts(splits).items()} == {"train": 3, "val": 1, "test": 4}


def test_frames_of_a_sequence_and_copies_stay_on_one_side(coco: Any) -> None:
    del coco.documents["val"]
    copies = ("apple.png", "pear.png", "sun.png")
    names = [f"clip{letter}_{frame}.png" for letter in "abcde" for frame in range(4)] + list(copies)
    size = {"width": 96, "height": 64}
    coco.train["images"] = [{"id": i, "file_name": name, **size} for i, name in enumerate(names)]
    coco.train["annotations"] = [{**coco.box, "id": i, "image_id": i} for i in range(len(names))]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(99 if name in copies else number).integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(coco.make(f"images/{name}"))
    splits = load_splits(coco.write())
    sides = [{"copy" if n in copies else n.split("_")[0] for n in d.file_names} for d in parts(splits).values()]
    assert len(sides) == 2
    assert not sides[0] & sides[1]


def test_images_that_a_run_held_out_are_held_out_again(coco: Any) -> None:
    del coco.documents["val"]
    splits = load_splits(coco.write(), val_images=["train_3.jpg", "gone.jpg"])
    assert file_names(splits.val) == ["train_3.jpg"]


def test_version_0_1_drew_by_its_seed(coco: Any) -> None:
    del coco.documents["val"]
    folder = coco.write()
    drawn = [file_names(load_splits(folder, val_fraction=0.25, legacy_seed=seed).val) for seed in range(4)]
    assert drawn == [["train_2.jpg"], ["train_0.jpg"], ["train_3.jpg"], ["train_3.jpg"]]


def test_too_few_images_for_a_val_split_are_reported(coco: Any) -> None:
    del coco.documents["val"]
    coco.train["images"] = coco.train["images"][:1]
    coco.train["annotations"] = [a for a in coco.train["annotations"] if a["image_id"] == coco.train["images"][0]["id"]]
    splits = load_splits(coco.write())
    assert splits.val is None
    finding = next(f for f in splits.findings if f.code == "split-made")
    assert (finding.severity, finding.message) == (
        "warning",
        "there is no val split, and 1 train image cannot be divided into train and val",
    )


def test_yolo_boxes_and_polygons(yolo: Any) -> None:
    yolo.labels["train/train_0"] = "0 0.5 0.5 0.25 0.5\n1 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6\n\n"
    train = load_splits(yolo.write()).train
    rows = train.annotations(0)
    np.testing.assert_allclose(rows.boxes_xyxy_px, [[36, 16, 60, 48], [9.6, 12.8, 48, 38.4]])
    np.testing.assert_allclose(rows.areas, [24 * 32, 38.4 * 25.6])
    assert rows.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "yaml",
    [
        "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: nut\n  1: washer\n",
        "train: ../images/train\nval: ../images/val\nnames: [nut, washer]\n",
        "train: [images/train]\nval: val.txt\nnames: [nut, washer]\n",
        "train: images/train\nvalid: images/val\nnc: 2\nnames: [nut, washer]\n",
    ],
)
def test_variants_of_data_yaml(yolo: Any, yaml: str) -> None:
    yolo.yaml = yaml
    folder = yolo.write()
    (folder / "val.txt").write_text("".join(f"./images/val/val_{i}.jpg\n" for i in range(3)))
    splits = load_splits(folder)
    assert {name: len(d) for name, d in parts(splits).items()} == {"train": 3, "val": 3}
    assert splits.categories[1].name == "washer"


def test_yaml_class_names_like_yes_stay_text(yolo: Any) -> None:
    yolo.yaml = "train: images/train\nval: images/val\nnames: [no, 0101]\n"
    assert [c.name for c in load_splits(yolo.write()).categories] == ["no", "0101"]


def test_voc_without_lists_and_in_split_folders(voc: Any, tmp_path: Path) -> None:
    folder = voc.write()
    flat = tmp_path / "flat"
    for split, word in (("train", "train"), ("val", "valid")):
        (flat / word).mkdir(parents=True)
        for path in folder.rglob(f"{split}_*"):
            shutil.copy(path, flat / word)
    assert {n: len(d) for n, d in parts(load_splits(flat)).items()} == {"train": 3, "val": 3}
    shutil.rmtree(folder / "ImageSets")
    splits = load_splits(folder)
    assert splits.split_made
    assert sum(len(d) for d in parts(splits).values()) == 6


@pytest.mark.parametrize("folder", ["images", "data", "data/train"])
def test_a_folder_whose_name_says_nothing_takes_the_name_above(coco: Any, tmp_path: Path, folder: str) -> None:
    moved = tmp_path / "bolts" / folder
    shutil.copytree(coco.write(), moved)
    assert load_splits(moved).name == "bolts"


@pytest.mark.parametrize(("name", "code"), [("nothing", "dataset-missing"), ("a.txt", "format-unknown")])
def test_a_source_that_is_not_a_dataset_is_refused(tmp_path: Path, name: str, code: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    for source in (tmp_path / name, tmp_path) if code == "format-unknown" else (tmp_path / name,):
        with pytest.raises(DataError) as refused:
            read_raw(source)
        assert refused.value.code == code
        assert refused.value.hint


def test_the_error_counts_all_problems_and_shows_the_first(coco: Any) -> None:
    for annotation in coco.train["annotations"][:8]:
        annotation["category_id"] = 99
    with pytest.raises(DataError) as refused:
        load_splits(coco.write())
    assert refused.value.message.startswith("nuts has 8 errors: train.json:")
    assert "and 3 more" in refused.value.message
    assert "99" in refused.value.message


def test_bccd(bccd: Path) -> None:
    splits = load_splits(bccd)
    assert {n: len(d) for n, d in parts(splits).items()} == {"train": 205, "val": 87, "test": 72}
    assert [c.name for c in splits.categories] == ["Platelets", "RBC", "WBC"]
    counts = sum(np.bincount(d.labels, minlength=3) for d in parts(splits).values())
    assert counts.tolist() == [361, 4155 - 2, 372]
    zero = sorted(f.file for f in splits.findings if f.code == "box-zero-size")
    assert zero == ["Annotations/BloodImage_00338.xml", "Annotations/BloodImage_00343.xml"]
    assert {f.severity for f in splits.findings} <= {"warning", "info"}


def test_coco21(coco21: Path) -> None:
    splits = load_splits(coco21 / "instances.json", split_single=False)
    document = json.loads((coco21 / "instances.json").read_text())
    assert len(splits.val) == 21
    assert sorted(splits.val.annotation_ids.tolist()) == sorted(a["id"] for a in document["annotations"])
    areas = {a["id"]: a["area"] for a in document["annotations"]}
    assert all(
        areas[i] == pytest.approx(a)
        for i, a in zip(splits.val.annotation_ids.tolist(), splits.val.areas.tolist(), strict=True)
    )
    assert splits.val.crowd.sum() == 1
    assert splits.val.category_ids[-1] == 90


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_that_breaks_off_is_said_to_be_cut_off(coco: Any, indent: int | None) -> None:
    """Wherever it does: within a word, a number, a string, an escape, between entries."""
    coco.train["info"] = {"of": [True, None, -1.5e-3, {}, [], {"by": "K\u00e4the\n"}]}
    path = coco.write(indent=indent) / "train.json"
    whole = path.read_text("utf-8").rstrip()
    for length in [*range(1, 180), len(whole) // 2, len(whole) - 1]:
        text = whole[:length]
        path.write_text(text, "utf-8")
        (finding,) = (f for f in read_raw(path).findings if f.severity == "error")
        seen = text.rstrip()
        line, column = seen.count("\n") + 1, len(seen.rpartition("\n")[2]) + 1
        assert finding.message == f"ends at line {line}, column {column}: the file is truncated", text[-30:]
        assert finding.line == line
        assert "again" in finding.hint


def test_a_faulty_file_is_told_from_one_that_breaks_off(coco: Any) -> None:
    path = coco.write() / "train.json"
    whole = path.read_text("utf-8")
    for text, said in (
        ("", "is empty"),
        (" \n", "is empty"),
        (whole.replace('"images"', "images", 1), "a key is expected (column "),
        (whole.rstrip()[:-1] + "]", "a comma or the end of the object is missing (column 1)"),
        ('{"images": [], "categories: []}', "unterminated string starting at (column 16)"),
        (whole.rstrip() + "}", "there is more text after the end of the document (column 2)"),
    ):
        path.write_text(text, "utf-8")
        (finding,) = (f for f in read_raw(path).findings if f.severity == "error")
        assert finding.message.startswith(said), finding.message
    path.write_bytes(whole.encode()[:50] + b"\xc3")
    (finding,) = (f for f in read_raw(path).findings if f.severity == "error")
    assert finding.message == "ends in the middle of a character: the file is truncated"


def test_a_drawn_val_split_has_the_boxes_of_its_images(yolo: Any) -> None:
    yolo.yaml = "train: images/train\nnc: 2\nnames: [nut, washer]\n"
    for i in range(3):
        yolo.labels[f"train/train_{i}"] = f"{i % 2} 0.5 0.5 0.25 {0.1 * (i + 1):.1f}\n"
    splits = load_splits(yolo.write())
    assert splits.train is not None
    assert splits.val is not None
    heights = {
        name: box[3] - box[1]
        for part in (splits.train, splits.val)
        for name, box in zip(part.file_names, part.boxes_xyxy_px.tolist(), strict=True)
    }
    assert len(heights) == 3
    for name, height in heights.items():
        assert height == pytest.approx(6.4 * (int(name[-5]) + 1))

"""A repair leaves the original alone, fixes the copy, and lists every change."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.checks.repair import repair, repairable
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.write import write_dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.images.decode import read_image
from tests.images import exif_of, save_with_orientation
from tests.unit.checks.test_faults import BOXES, FILES, IMAGES, VOC, YOLO, Plant, cases


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def repaired(folder: Path, code: str) -> None:
    """Repair a dataset and check everything that must be true of every repair."""
    before = hashes(folder)
    report = examine(folder)
    assert repairable(report) == any(f.severity != "info" and CODES[f.code].repair for f in report.findings)
    out = folder.parent / "out"
    done = repair(report, out)
    assert hashes(folder) == before, "the original was changed"
    again = examine(done.data)
    assert code not in {f.code for f in again.findings}, [f.message for f in again.findings]
    assert not again.counts()["error"], [f.message for f in again.findings if f.severity == "error"]
    load_splits(done.data)
    changes = json.loads(done.changes_file.read_text())["changes"]
    assert changes
    assert done.changes.get(code), done.changes
    # Every file of the original is in the copy, in `left-out/`, or under the name that the list of changes gives.
    after = hashes(out)
    renamed = {change["from"]: change["to"] for change in changes if change["op"] == "rename"}
    for name, digest in before.items():
        target = renamed.get(name, name)
        assert target in after or f"left-out/{name}" in after, name
        changed = {change.get("file") for change in changes if change["op"] not in ("rename", "leave-out")}
        if target in after and target not in changed:
            assert after[target] == digest, f"{name} is not copied byte for byte"
    twice = repair(again, folder.parent / "twice")
    assert json.loads(twice.changes_file.read_text())["changes"] == [], "a second repair finds something to change"


REPAIRABLE = {code for code, entry in CODES.items() if entry.repair}
IN_COCO = {**{code: [plant] for code, plant in IMAGES.items()}, **BOXES}
# A damaged `data.yaml` has no copy, and `test_outside.py` has the images outside.
IN_YOLO = {**YOLO, "file-malformed": YOLO["file-malformed"][:1]}
NOT_IN_YOLO = {"file-bounds", "image-outside", "image-elsewhere"}


@pytest.mark.parametrize(("code", "plant"), cases(IN_COCO, REPAIRABLE))
def test_coco_repair(coco: Any, code: str, plant: Plant) -> None:
    plant(coco)
    repaired(coco.write(), code)


@pytest.mark.parametrize("code", ["file-bom", "file-crlf"])
def test_byte_order_mark_and_line_endings_of_json(coco: Any, code: str) -> None:
    coco.box["bbox"] = [1, 1, 0, 0]
    folder = coco.write()
    spoil = next(spoil for c, spoil in FILES.values() if c == code)
    path = folder / "train.json"
    path.write_bytes(spoil(path.read_bytes()))
    repaired(folder, code)


@pytest.mark.parametrize(("code", "plant"), cases(IN_YOLO, REPAIRABLE - NOT_IN_YOLO))
def test_yolo_repair(yolo: Any, code: str, plant: Plant) -> None:
    plant(yolo)
    repaired(yolo.write(), code)


@pytest.mark.parametrize(("code", "plant"), cases(VOC, REPAIRABLE))
def test_voc_repair(voc: Any, code: str, plant: Plant) -> None:
    plant(voc)
    repaired(voc.write(), code)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_damaged_file_of_the_whole_dataset_is_not_repairable(form: str, request: pytest.FixtureRequest) -> None:
    """A damaged file that belongs to one image is left out with it."""
    folder = request.getfixturevalue(form).write()
    assert not repairable(examine(folder))
    broken, mended = {
        "coco": (folder / "train.json", False),
        "yolo": (folder / "labels/train/train_0.txt", True),
        "voc": (folder / "Annotations/train_0.xml", True),
    }[form]
    broken.write_bytes(broken.read_bytes()[:40] + b"\xff")
    report = examine(folder)
    assert report.counts()["error"]
    assert repairable(report) == mended


def test_unusable_images_are_removed_from_yolo_lists(yolo: Any) -> None:
    yolo.yaml = "train: train.txt\nval: images/val\nnames: [nut, washer]\n"
    (yolo.folder / "train.txt").write_text("".join(f"images/train/train_{i}.jpg\n" for i in range(3)))
    (yolo.folder / "images/train/train_1.jpg").write_bytes(b"")
    repaired(yolo.write(), "image-empty")
    assert (yolo.folder.parent / "out/train.txt").read_text().split() == [f"images/train/train_{i}.jpg" for i in (0, 2)]


NOTES = {"LICENSE": "CC0", "README.md": "# nuts\r\n", "README.dataset.txt": "from a shelf", "CITATION.cff": "x: y\n"}


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_license_and_readme_are_copied(form: str, request: pytest.FixtureRequest) -> None:
    """A license has to stay with the images."""
    folder = request.getfixturevalue(form).write()
    for name, text in NOTES.items():
        (folder / name).write_bytes(text.encode())
    if form == "coco":
        (folder / "images/train_0.jpg").write_bytes(b"")
    elif form == "yolo":
        (folder / "labels/train/train_0.txt").write_text("0 0.5 0.5 0 0.1\n")
    else:
        (folder / "JPEGImages/train_0.jpg").write_bytes(b"")
    repaired(folder, "box-zero-size" if form == "yolo" else "image-empty")
    for name, text in NOTES.items():
        assert (folder.parent / "out" / name).read_bytes() == text.encode()


def test_every_voc_list_is_copied_without_the_images_left_out(voc: Any) -> None:
    """Also lists that no split is read from: `trainval`, and those of one class, which have a second column."""
    folder = voc.write()
    lists = folder / "ImageSets"
    (lists / "Layout").mkdir()
    names = [*voc.lists["train"], *voc.lists["val"]]
    (lists / "Main/trainval.txt").write_bytes("".join(f"{name}\r\n" for name in names).encode())
    (lists / "Main/nut_train.txt").write_text("".join(f"{name} {n - 1:2d}\n" for n, name in enumerate(names[:3])))
    (lists / "Layout/val.txt").write_text("\n".join(names[3:]))
    (lists / "Main/odd.txt").write_bytes(b"train_0\n\xff\n")
    (folder / "JPEGImages/train_1.jpg").write_bytes(b"")
    repaired(folder, "image-empty")
    out = folder.parent / "out" / "ImageSets"
    assert (out / "Main/trainval.txt").read_text().split() == [n for n in names if n != "train_1"]
    assert (out / "Main/nut_train.txt").read_text() == "train_0 -1\ntrain_2  1\n"
    assert (out / "Layout/val.txt").read_text() == "\n".join(names[3:])
    assert (out / "Main/odd.txt").read_bytes() == b"train_0\n\xff\n", "a list that is not UTF-8 is copied as it is"


def test_other_files_are_not_copied(coco: Any) -> None:
    coco.box["bbox"] = [1, 1, 0, 0]
    folder = coco.write()
    (folder / "diary.txt").write_text("mine")
    (folder / "images/unlisted.jpg").write_bytes(b"x")
    (folder.parent / "elsewhere").write_text("not a note of this dataset")
    (folder / "README").symlink_to(folder.parent / "elsewhere")
    done = repair(examine(folder), folder.parent / "out")
    assert not {"diary.txt", "images/unlisted.jpg", "README"} & set(hashes(folder.parent / "out"))
    changes = json.loads(done.changes_file.read_text())
    assert "license" in changes["holds"]
    assert "not copied" in changes["holds"]


def test_unknown_keys_survive(coco: Any) -> None:
    coco.box.update(bbox=[90.0, 20.0, 20.0, 10.0], area=200.0, attributes={"occluded": True}, note="ä")
    folder = coco.write()
    done = repair(examine(folder), folder.parent / "out")
    document = json.loads((done.data / "train.json").read_text())
    assert document["annotations"][1] == {**coco.box, "bbox": [90.0, 20.0, 6.0, 10.0], "area": 60.0}
    assert document["annotations"][2:] == coco.train["annotations"][2:]


def test_unrepaired_findings_are_listed(coco: Any) -> None:
    coco.train["images"][1]["id"] = 1
    folder = coco.write()
    done = repair(examine(folder), folder.parent / "out")
    assert done.not_repaired["image-id-duplicate"] == 1
    assert "image-id-duplicate" in {f["code"] for f in json.loads(done.changes_file.read_text())["not_repaired"]}


def test_bccd(bccd: Path, tmp_path: Path) -> None:
    report = examine(bccd)
    done = repair(report, tmp_path / "out")
    assert done.changes == {"box-zero-size": 2, "box-duplicate": 7}
    assert {f.code for f in examine(done.data, decode=False).findings} == {"voc-folder"}
    changed = {change["file"] for change in json.loads(done.changes_file.read_text())["changes"]}
    for path in sorted((tmp_path / "out/Annotations").iterdir()):
        name = str(path.relative_to(tmp_path / "out"))
        assert (path.read_bytes() == (bccd / name).read_bytes()) == (name not in changed)


@pytest.mark.parametrize(("suffix", "box_y", "kept"), [(".jpg", 10, True), (".png", 10, True), (".jpg", 64, False)])
def test_truncated_image_is_kept_by_choice(coco: Any, suffix: str, box_y: int, kept: bool) -> None:
    """Its missing part becomes gray; an image with a box there is left out, and so is one that lacks too much."""
    noise = np.random.default_rng(0).integers(0, 255, (72, 96, 3), np.uint8)
    name = f"train_0{suffix}"
    coco.image.unlink()
    Image.fromarray(noise).save(coco.folder / "images" / name)
    coco.train["images"][0]["file_name"] = name
    for box in coco.train["annotations"]:
        if box["image_id"] == coco.train["images"][0]["id"]:
            box["bbox"] = [10, box_y, 8, 8]
    folder = coco.write()
    path = next(folder.rglob(name))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 9 // 10])
    report = examine(folder, keep_truncated=True)
    done = repair(report, folder.parent / "out")
    assert [left.code for left in done.left_out] == ([] if kept else ["image-truncated"])
    assert not examine(done.data).counts()["error"]
    if kept:
        assert done.changes["image-truncated"] == 1
        decoded = read_image(next((folder.parent / "out").rglob(name)))
        assert abs(decoded[:48].astype(int) - noise[:48]).mean() < (60 if suffix == ".jpg" else 1)
        assert decoded.shape == noise.shape
    path.write_bytes(whole[: len(whole) // 2])
    assert repair(examine(folder, keep_truncated=True), folder.parent / "half").left_out


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_image_is_left_out_if_its_orientation_cannot_be_reset(coco: Any, form: str) -> None:
    with Image.open(coco.image) as image:
        image.load()
        plain = image.copy()
    coco.image.unlink()
    plain.save(coco.image.with_suffix(f".{form.lower()}"), exif=exif_of(6))
    coco.train["images"][0]["file_name"] = f"train_0.{form.lower()}"
    repaired(coco.write(), "image-exif-swapped")
    kept = len(json.loads((coco.folder.parent / "out/train.json").read_text())["images"])
    assert kept == (4 if form in ("JPEG", "WEBP") else 3)


def test_line_endings_of_a_large_file(coco: Any) -> None:
    coco.train["info"] = {"description": ["x" * 60] * 40_000}
    folder = coco.write()
    path = folder / "train.json"
    assert path.stat().st_size > 2 << 20
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    repaired(folder, "file-crlf")


def test_image_of_two_splits_is_renamed_in_both(coco: Any) -> None:
    with Image.open(coco.image) as image:
        image.load()
        image.copy().save(coco.image, "PNG")
    entry = {**coco.train["images"][0], "id": 77}
    coco.val["images"].append(entry)
    repaired(coco.write(), "image-extension")


def test_orientations_that_keep_the_size_are_left_out_once_another_is_ignored(coco: Any) -> None:
    for number, orientation in ((0, 6), (1, 3), (2, 1)):
        save_with_orientation(coco.folder / f"images/train_{number}.jpg", orientation)
    folder = coco.write()
    ambiguous = [f.image_id for f in examine(folder).findings if f.code == "image-exif-ambiguous"]
    assert ambiguous == [2]
    repaired(folder, "image-exif-ambiguous")
    assert (folder.parent / "out/left-out/images/train_1.jpg").is_file()


def test_orientations_that_keep_the_size_stay_if_most_labels_are_upright(coco: Any) -> None:
    for image in coco.val["images"]:
        save_with_orientation(coco.folder / "images" / image["file_name"], 6)
        image |= {"width": 64, "height": 96}
    for number, annotation in enumerate(coco.val["annotations"]):
        annotation["bbox"] = [4, 8 + 14 * (number % 6), 12, 12]
    for number, orientation in ((0, 6), (1, 3)):
        save_with_orientation(coco.folder / f"images/train_{number}.jpg", orientation)
    report = examine(coco.write())
    done = repair(report, coco.folder.parent / "out")
    assert done.changes == {"image-exif-swapped": 1}
    assert done.not_repaired == {"image-exif-ambiguous": 1}
    assert done.left_out == ()


def test_image_listed_once_with_and_once_without_its_orientation(coco: Any) -> None:
    """No orientation suits both entries, so the one that disagrees is left out."""
    save_with_orientation(coco.image, 6)
    coco.val["images"].append({"id": 77, "file_name": "train_0.jpg", "width": 64, "height": 96})
    coco.val["annotations"].append({**coco.box, "id": 7777, "image_id": 77, "bbox": [20, 70, 20, 20], "area": 400})
    folder = coco.write()
    done = repair(examine(folder), folder.parent / "out")
    splits = load_splits(done.data)
    assert len(splits.train) == 3
    assert splits.val.annotations(4).boxes_xyxy_px.tolist() == [[20, 70, 40, 90]]


def test_boxes_of_a_resized_image_are_not_clipped(coco: Any) -> None:
    """Its boxes refer to the size that the labels declare, so the image is left out."""
    with Image.open(coco.image) as image:
        image.resize((48, 32)).save(coco.image)
    repaired(coco.write(), "image-size")
    document = json.loads((coco.folder.parent / "out/train.json").read_text())
    assert [image["id"] for image in document["images"]] == [2, 3, 4]


def test_images_that_share_an_id_are_left_out_together(coco: Any) -> None:
    coco.train["images"][1]["id"] = 1
    coco.image.write_bytes(b"")
    folder = coco.write()
    done = repair(examine(folder), folder.parent / "out")
    document = json.loads((done.data / "train.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["train_2.jpg", "train_3.jpg"]
    assert {annotation["image_id"] for annotation in document["annotations"]} == {2, 3, 4} - {2}


def test_keypoints_behind_a_clipped_box_stay(yolo: Any) -> None:
    yolo.yaml += "kpt_shape: [1, 3]\n"
    yolo.labels = dict.fromkeys(yolo.labels, "0 0.5 0.5 0.1 0.2 0.5 0.5 2\n")
    yolo.labels["train/train_0"] = "0 0.98 0.5 0.1 0.2 0.99 0.5 2\n"
    repaired(yolo.write(), "box-partly-outside")
    assert (yolo.folder.parent / "out/labels/train/train_0.txt").read_text() == "0 0.965 0.5 0.07 0.2 0.99 0.5 2\n"


def test_copy_does_not_lead_back_to_the_original(yolo: Any) -> None:
    """Whatever style `data.yaml` is written in."""
    yolo.yaml = f"{{path: {yolo.folder}, train: images/train, val: '{yolo.folder}/images/val', names: [nut, washer]}}\n"
    yolo.labels["train/train_0"] += "0 0.5 0.5 0 0\n"
    folder = yolo.write()
    done = repair(examine(folder), folder.parent / "out")
    shutil.rmtree(folder)
    again = examine(done.data)
    assert not again.counts()["error"]
    assert {name: len(split) for name, split in again.raw.splits.items()} == {"train": 3, "val": 3}


def test_absolute_names_of_images_become_relative(coco: Any, yolo: Any) -> None:
    coco.train["images"][0]["file_name"] = str(coco.image)
    coco.box["bbox"] = [1, 1, 0, 0]
    repaired(coco.write(), "box-zero-size")
    assert json.loads((coco.folder.parent / "out/train.json").read_text())["images"][0]["file_name"] == "train_0.jpg"
    yolo.yaml = yolo.yaml.replace("train: images/train", "train: train.txt")
    yolo.make("train.txt").write_text("".join(f"{yolo.folder}/images/train/train_{i}.jpg\n" for i in range(3)))
    done = repair(examine(yolo.write()), yolo.folder.parent / "out-yolo")
    assert (done.data / "train.txt").read_text().split() == [f"images/train/train_{i}.jpg" for i in range(3)]


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_ids_and_crowds_beside_the_labels_survive(coco: Any, form: str, tmp_path: Path) -> None:
    """The file that holds them is kept in step with the labels."""
    coco.train["annotations"][3]["iscrowd"] = 1
    splits = load_splits(coco.write())
    assert splits.train is not None
    assert splits.val is not None
    folder = tmp_path / form
    data = write_dataset({"train": splits.train, "val": splits.val}, form, folder)
    if form == "yolo":
        label = folder / "labels/train/train_0.txt"
        label.write_text("0 0.5 0.5 0 0\n" + label.read_text().split("\n", 1)[1])
    else:
        label = folder / "Annotations/train_0.xml"
        label.write_text(label.read_text().replace("<xmax>16</xmax>", "<xmax>4</xmax>", 1))
    repaired(folder, "box-zero-size")
    train = load_splits(tmp_path / "out" if data.is_dir() else tmp_path / "out" / data.name).train
    assert train.annotation_ids[:5].tolist() == [101, 102, 103, 104, 105]
    assert train.crowd[:5].tolist() == [False, False, True, False, False]


def test_comments_and_unknown_elements_of_xml_survive(voc: Any) -> None:
    text = voc.xml["train_0"].replace("<object>", "<!-- by hand --><object><mine>1</mine>", 1)
    voc.xml["train_0"] = text.replace("<xmin>4</xmin>", "<xmin>-4</xmin>", 1)
    repaired(voc.write(), "box-partly-outside")
    copy = (voc.folder.parent / "out/Annotations/train_0.xml").read_text()
    assert "<!-- by hand -->" in copy
    assert "<mine>1</mine>" in copy


def test_dataset_without_a_usable_image_is_refused(coco: Any) -> None:
    for path in (coco.folder / "images").iterdir():
        path.write_bytes(b"")
    folder = coco.write()
    with pytest.raises(DataError, match="no image can be used") as refused:
        repair(examine(folder), folder.parent / "out")
    assert refused.value.hint == "rtdetr validate --explain image-empty"
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("words", [["--fix", "copy"], ["--convert", "yolo", "--to", "copy"]], ids=["fix", "convert"])
def test_a_copy_that_is_interrupted_leaves_nothing_under_a_final_name(
    rtdetr: Callable[..., Any], coco: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = coco.write()
    copies = iter(range(100))
    real = shutil.copyfile

    def copy_until_killed(source: Path, to: Path) -> None:
        if next(copies) == 2:
            Path(to).write_bytes(b"half")
            raise KeyboardInterrupt
        real(source, to)

    monkeypatch.setattr(shutil, "copyfile", copy_until_killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # as after SIGKILL
    assert rtdetr("validate", data, *words).code == 130
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [".rtdetr-partial"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert rtdetr("validate", data, *words).code == 0, "and the same command starts again"
    assert ".rtdetr-partial" not in {path.name for path in (tmp_path / "copy").iterdir()}

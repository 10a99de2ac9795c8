"""Every fault that the doctor knows, planted one at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.doctor import Report, examine
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.records import Finding
from rtdetr_cli.errors import DataError
from tests.images import exif_of, png, save_with_orientation

Plant = Callable[[Any], object]


def codes_of(report: Report) -> set[str]:
    return {f.code for f in report.findings}


def finding_of(report: Report, code: str) -> Finding:
    """Return the first finding of a code."""
    assert code in codes_of(report), [(f.code, f.message) for f in report.findings]
    finding = next(f for f in report.findings if f.code == code)
    assert finding.severity == CODES[code].severity
    assert finding.hint
    return finding


def load_or_refuse(source: Path, code: str) -> None:
    """Check that exactly the errors are refused when a dataset is loaded to train on."""
    if CODES[code].severity != "error":
        load_splits(source)
        return
    with pytest.raises(DataError) as refused:
        load_splits(source)
    assert refused.value.message
    assert refused.value.hint.startswith("rtdetr validate")


def cases(table: dict[str, list[Plant]], codes: Container[str] = CODES) -> list[Any]:
    """Return the parameters `code` and `plant` for each way in which the table plants one of the codes."""
    return [pytest.param(c, p, id=f"{c}-{n}") for c, ps in table.items() if c in codes for n, p in enumerate(ps)]


def test_valid_datasets_have_no_findings(coco: Any, yolo: Any, voc: Any) -> None:
    for builder in (coco, yolo, voc):
        folder = builder.write()
        # The three images of YOLO and VOC have nine boxes of each class in train; ten count as enough.
        few = set() if builder is coco else {"category-few"}
        assert codes_of(examine(folder)) == few
        assert {f.code for f in load_splits(folder).findings} == few


# ---- COCO: images


def _set_orientation(c: Any, orientation: int, *, declares_stored_size: bool) -> None:
    save_with_orientation(c.image, orientation)
    if not declares_stored_size and orientation >= 5:
        c.train["images"][0] |= {"width": 64, "height": 96}
        for annotation in c.train["annotations"]:
            if annotation["image_id"] == 1:
                annotation["bbox"] = [4, 4 + annotation["id"] % 10 * 14, 10, 10]


def _ambiguous(c: Any) -> None:
    """The labels of the second image ignore its orientation; those of the first may."""
    _set_orientation(c, 3, declares_stored_size=True)
    save_with_orientation(c.folder / "images/train_1.jpg", 6)


def _saved(c: Any, image: Image.Image, suffix: str, **options: Any) -> None:
    name = f"train_0{suffix}"
    c.image.unlink()
    image.save(c.folder / "images" / name, **options)
    c.train["images"][0]["file_name"] = name


def _sixteen(c: Any) -> None:
    values = np.random.default_rng(0).integers(0, 65535, (64, 96)).astype(np.uint16)
    _saved(c, Image.fromarray(values), ".png")


def _loaded(c: Any) -> Image.Image:
    with Image.open(c.image) as image:
        image.load()
        return image.copy()


def _sixteen_with_alpha(c: Any) -> None:
    import cv2

    values = np.random.default_rng(0).integers(0, 65535, (64, 96, 4)).astype(np.uint16)
    c.image.unlink()
    cv2.imwrite(str(c.folder / "images/train_0.png"), values)
    c.train["images"][0]["file_name"] = "train_0.png"


def _animated(c: Any) -> None:
    first = _loaded(c)
    _saved(c, first, ".gif", save_all=True, append_images=[first.rotate(90), first.rotate(180)])


def _huge(c: Any) -> None:
    Image.new("RGB", (10000, 5200), (90, 20, 60)).save(c.image)
    c.train["images"][0] |= {"width": 10000, "height": 5200}


def _rename(c: Any, name: str | bytes) -> None:
    os.rename(c.image, os.path.join(os.fsencode(c.image.parent), os.fsencode(name)))


def _not_utf8(c: Any) -> None:
    raw = b"train_\xe4.jpg"
    _rename(c, raw)
    c.train["images"][0]["file_name"] = os.fsdecode(raw)


def _copy_inside(c: Any) -> None:
    shutil.copy(c.folder / "images/train_0.jpg", c.folder / "images/train_1.jpg")
    c.train["annotations"] = [
        *(a for a in c.train["annotations"] if a["image_id"] != 2),
        *({**a, "id": a["id"] + 5000, "image_id": 2} for a in c.train["annotations"] if a["image_id"] == 1),
    ]


def _compressed_again(c: Any, to: str) -> None:
    with Image.open(c.image) as image:
        image.save(c.folder / "images" / to, quality=40)


def _other_boxes(c: Any) -> None:
    _copy_inside(c)
    c.train["annotations"][-1]["bbox"] = [30.0, 30.0, 20.0, 20.0]


IMAGES: dict[str, Plant] = {
    "image-missing": lambda c: c.image.unlink(),
    "image-empty": lambda c: c.image.write_bytes(b""),
    "image-unreadable": lambda c: c.image.write_bytes(b"these are no pixels at all"),
    "image-truncated": lambda c: c.image.write_bytes(c.image.read_bytes()[:-400]),
    "image-bomb": lambda c: c.image.write_bytes(png(60000, 60000, 8, 2, b"\0")),
    "image-samples": lambda c: _saved(c, Image.fromarray(np.zeros((64, 96), np.float32)), ".tiff"),
    "image-extension": lambda c: _loaded(c).save(c.image, "PNG"),
    "image-size": lambda c: c.train["images"][0].update(width=100),
    "image-size-undeclared": lambda c: c.train["images"][0].pop("width"),
    "image-exif-orientation": lambda c: _set_orientation(c, 6, declares_stored_size=False),
    "image-exif-swapped": lambda c: _set_orientation(c, 6, declares_stored_size=True),
    "image-exif-invalid": lambda c: _set_orientation(c, 9, declares_stored_size=True),
    "image-exif-ambiguous": _ambiguous,
    "image-16bit": _sixteen,
    "image-palette": lambda c: _saved(c, _loaded(c).quantize(16), ".png"),
    "image-cmyk": lambda c: _loaded(c).convert("CMYK").save(c.image),
    "image-grey": lambda c: _loaded(c).convert("L").save(c.image),
    "image-alpha": lambda c: _saved(c, _loaded(c).convert("RGBA"), ".png"),
    "image-animated": _animated,
    "image-huge": _huge,
    "image-name-case": lambda c: _rename(c, "TRAIN_0.JPG"),
    "image-name-encoding": _not_utf8,
    "image-duplicate": _copy_inside,
    "image-near-duplicate": lambda c: _compressed_again(c, "train_1.jpg"),
    "image-leak": lambda c: shutil.copy(c.image, c.folder / "images/val_0.jpg"),
    "image-near-leak": lambda c: _compressed_again(c, "val_0.jpg"),
    "image-other-boxes": _other_boxes,
    "image-no-objects": lambda c: c.train.update(annotations=[a for a in c.train["annotations"] if a["image_id"] != 1]),
}


@pytest.mark.parametrize("code", IMAGES)
def test_image_fault(coco: Any, code: str) -> None:
    IMAGES[code](coco)
    finding = finding_of(examine(coco.write()), code)
    assert finding.image_id is not None
    if code != "image-leak" and not code.endswith("near-leak"):
        assert finding.file == "train.json"
    assert finding.line > 1


def test_linked_folder_of_images_beside_the_dataset_is_accepted(coco: Any) -> None:
    shutil.move(coco.folder / "images", coco.folder.parent / "kept")
    (coco.folder / "images").symlink_to("../kept")
    folder = coco.write()
    assert codes_of(examine(folder)) == set()
    # A downloaded dataset must not make other files of the machine look like its own.
    (coco.folder.parent / "kept/id_rsa").write_text("x")
    assert "image-elsewhere" in codes_of(examine(folder, decode=False))
    # Named by the user, the same folder is fine.
    assert codes_of(examine(folder, images=coco.folder.parent / "kept")) == set()


def test_linked_folder_of_images_far_away_is_outside(coco: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "images"
    shutil.move(coco.folder / "images", elsewhere)
    (coco.folder / "images").symlink_to(elsewhere)
    assert "image-elsewhere" in codes_of(examine(coco.write(), decode=False))


@pytest.mark.parametrize("decode", [True, False], ids=["full", "fast"])
def test_broken_link_is_a_missing_image(coco: Any, decode: bool) -> None:
    coco.image.unlink()
    coco.image.symlink_to(coco.folder / "images/gone.jpg")
    assert "image-missing" in codes_of(examine(coco.write(), decode=decode))


@pytest.mark.parametrize("decode", [True, False], ids=["full", "fast"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link to a pipe"])
def test_pipes_and_folders_are_unreadable_and_do_not_block(coco: Any, what: str, decode: bool) -> None:
    coco.image.unlink()
    if what == "folder":
        coco.image.mkdir()
    elif what == "pipe":
        os.mkfifo(coco.image)
    else:
        os.mkfifo(coco.folder / "pipe")
        coco.image.symlink_to(coco.folder / "pipe")
    folder = coco.write()
    assert "image-unreadable" in codes_of(examine(folder, decode=decode))
    with pytest.raises(DataError):
        load_splits(folder)


def test_label_file_that_is_a_pipe_does_not_block(yolo: Any) -> None:
    yolo.labels["train/train_0"] = None
    folder = yolo.write()
    os.mkfifo(folder / "labels/train/train_0.txt")
    assert "file-missing" in codes_of(examine(folder, decode=False))


def test_16_bits_with_alpha_are_reported(coco: Any) -> None:
    _sixteen_with_alpha(coco)
    assert {"image-16bit", "image-alpha"} <= codes_of(examine(coco.write()))


@pytest.mark.parametrize("form", ["TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("declares_stored_size", [True, False])
def test_orientation_is_found_in_every_format(coco: Any, form: str, declares_stored_size: bool) -> None:
    _saved(coco, _loaded(coco), f".{form.lower()}", exif=exif_of(6))
    if not declares_stored_size:
        coco.train["images"][0] |= {"width": 64, "height": 96}
        coco.train["annotations"] = [a for a in coco.train["annotations"] if a["image_id"] != 1]
    codes = codes_of(examine(coco.write()))
    assert ("image-exif-swapped" in codes) == declares_stored_size
    assert "image-exif-orientation" in codes
    assert "image-size" not in codes


def test_boxes_stay_if_labels_agree_with_the_orientation(coco: Any) -> None:
    _set_orientation(coco, 6, declares_stored_size=False)
    splits = load_splits(coco.write())
    assert splits.train.sizes_wh[0].tolist() == [64, 96]


def test_two_names_that_differ_in_case_are_ambiguous(coco: Any) -> None:
    coco.image.rename(coco.image.with_name("TRAIN_0.jpg"))
    (coco.folder / "images/Train_0.jpg").write_bytes((coco.folder / "images/train_1.jpg").read_bytes())
    assert "image-missing" in codes_of(examine(coco.write()))


# ---- COCO: boxes, ids, categories


def _near(c: Any, category: int) -> None:
    c.train["annotations"].append(
        {**c.box, "id": 9999, "category_id": category, "bbox": [c.box["bbox"][0] + 0.2, *c.box["bbox"][1:]]}
    )


def _crowded(c: Any) -> None:
    for i in range(301):
        c.train["annotations"].append(
            {**c.box, "id": 20000 + i, "bbox": [i % 30 * 3.0, i // 30 * 5.0, 2.9 + i % 7, 4.9 + i % 5]}
        )


def _append_box(c: Any, **values: Any) -> None:
    c.train["annotations"].append({**c.box, "id": 7777, **values})


def _imbalance(c: Any) -> None:
    c.train["annotations"] = [a for a in c.train["annotations"] if a["category_id"] == 1 or a["id"] == 101]
    c.val["annotations"] = [a for a in c.val["annotations"] if a["category_id"] == 1]
    for i in range(100):
        _append_box(c, id=30000 + i, category_id=1, bbox=[i % 10 * 8.0, i // 10 * 6.0, 7.0, 5.0])


def _rename_category(c: Any, name: str) -> None:
    for document in c.documents.values():
        document["categories"].append({"id": 3, "name": name})


BOXES: dict[str, list[Plant]] = {
    "box-zero-size": [
        lambda c: c.box.update(bbox=[20, 20, 0, 10]),
        lambda c: c.box.update(bbox=[20, 20, 10, 0]),
    ],
    "box-inverted": [
        lambda c: c.box.update(bbox=[20, 20, -5, 10]),
        lambda c: c.box.update(bbox=[20, 20, 5, -10]),
    ],
    "box-not-finite": [
        lambda c: c.box.update(bbox=[20, float("nan"), 5, 10]),
        lambda c: c.box.update(bbox=[20, 20, float("inf"), 10]),
        lambda c: c.box.update(bbox=[1.7e308, 20, 1.7e308, 10]),
        lambda c: c.box.update(bbox=[10**400, 20, 1, 1]),
    ],
    "box-not-number": [
        lambda c: c.box.update(bbox=[20, "20", 5, 10]),
        lambda c: c.box.update(bbox=[20, None, 5, 10]),
        lambda c: c.box.update(bbox=[20, 20, True, 10]),
        lambda c: c.box.update(bbox={"x": 1}),
    ],
    "box-count": [
        lambda c: c.box.update(bbox=[20, 20, 5]),
        lambda c: c.box.update(bbox=[20, 20, 5, 5, 1]),
        lambda c: c.box.pop("bbox"),
    ],
    "box-outside": [
        lambda c: c.box.update(bbox=[200, 20, 5, 10]),
        lambda c: c.box.update(bbox=[-50, 20, 5, 10]),
    ],
    "box-partly-outside": [
        lambda c: c.box.update(bbox=[90, 20, 20, 10]),
        lambda c: c.box.update(bbox=[-8, -8, 20, 20]),
    ],
    "box-whole-image": [lambda c: c.box.update(bbox=[0, 0, 96, 64])],
    "box-below-2px": [lambda c: c.box.update(bbox=[20, 20, 0.2, 10])],
    "box-below-8px": [lambda c: c.box.update(bbox=[20, 20, 0.9, 10])],
    "box-aspect": [lambda c: c.box.update(bbox=[2, 40, 90, 2])],
    "box-duplicate": [lambda c: _near(c, 2)],
    "box-two-classes": [lambda c: _near(c, 1)],
    "box-crowd": [lambda c: c.box.update(iscrowd=1)],
    "box-no-area": [lambda c: c.box.pop("area")],
    "box-over-queries": [_crowded],
    "category-unknown": [lambda c: c.box.update(category_id=9)],
    "category-unused": [lambda c: _rename_category(c, "bolt")],
    "category-gaps": [
        lambda c: (
            [a.update(category_id=a["category_id"] * 7) for d in c.documents.values() for a in d["annotations"]]
            and [k.update(id=k["id"] * 7) for d in c.documents.values() for k in d["categories"]]
        )
    ],
    "category-duplicate-name": [lambda c: _rename_category(c, "nut")],
    "category-similar-names": [
        lambda c: _rename_category(c, "Nut"),
        lambda c: _rename_category(c, "nut "),
        lambda c: _rename_category(c, "nuts"),
        lambda c: _rename_category(c, "waser"),
        lambda c: _rename_category(c, "wacher"),
    ],
    "category-only-val": [
        lambda c: c.train.update(annotations=[a for a in c.train["annotations"] if a["category_id"] == 1])
    ],
    "category-imbalance": [_imbalance],
    "category-few": [lambda c: c.train.update(annotations=c.train["annotations"][:8])],
    "category-conflict": [
        lambda c: c.val["categories"][0].update(name="screw"),
        lambda c: c.train["categories"].append({"id": 1, "name": "screw"}),
    ],
    "category-malformed": [
        lambda c: c.train["categories"].append({"id": 3}),
        lambda c: c.train["categories"].append("bolt"),
        lambda c: c.train["categories"].append({"id": [], "name": "bolt"}),
    ],
    "category-none": [lambda c: [d.update(categories=[], annotations=[]) for d in c.documents.values()]],
    "entry-malformed": [
        lambda c: c.train["images"].append({"id": 77}),
        lambda c: c.train["images"].append({"file_name": "a.jpg"}),
        lambda c: c.train["images"].append(5),
        lambda c: c.train["images"].append({"id": 77, "file_name": "a\0.jpg"}),
        lambda c: c.train["images"].append({"id": 77, "file_name": "\ud800.jpg"}),
    ],
    "annotation-malformed": [
        lambda c: c.box.pop("image_id"),
        lambda c: c.box.update(image_id=[1]),
        lambda c: c.box.update(category_id=None),
        lambda c: c.train["annotations"].append(None),
    ],
    "image-id-duplicate": [lambda c: c.train["images"][1].update(id=1)],
    "annotation-id-duplicate": [lambda c: c.box.update(id=c.train["annotations"][0]["id"])],
    "id-not-integer": [
        lambda c: [i.update(id=f"{i['id']:012d}") for i in c.train["images"]],
        lambda c: c.box.update(id="abc"),
        lambda c: c.box.update(id=4.5),
    ],
    "annotation-orphan": [lambda c: c.box.update(image_id=555)],
    "split-no-objects": [lambda c: c.val.update(annotations=[])],
    "split-empty": [lambda c: c.val.update(annotations=[], images=[])],
    "split-equal": [lambda c: c.documents.update(val=c.documents["train"])],
}


@pytest.mark.parametrize(("code", "plant"), cases(BOXES))
def test_label_fault(coco: Any, code: str, plant: Plant) -> None:
    plant(coco)
    folder = coco.write()
    finding = finding_of(examine(folder, decode=False), code)
    if code.startswith("box-") and code not in ("box-over-queries", "box-no-area"):
        assert finding.file == "train.json"
        assert finding.line > 1
        assert finding.annotation_id is not None
        assert finding.image_id == 1
    load_or_refuse(folder, code)


def test_finding_has_the_line_of_its_entry(coco: Any) -> None:
    coco.box["bbox"] = [20, 20, 0, 10]
    folder = coco.write()
    finding = next(f for f in examine(folder, decode=False).findings if f.code == "box-zero-size")
    lines = (folder / "train.json").read_text().splitlines()
    assert f'"id": {coco.box["id"]}' in "".join(lines[finding.line - 1 : finding.line + 2])


def test_crowd_flags_may_be_strings(coco: Any) -> None:
    for annotation, word in zip(coco.train["annotations"], ("0", "1", False, True, 0, 1), strict=False):
        annotation["iscrowd"] = word
    train = load_splits(coco.write()).train
    assert train.crowd[:6].tolist() == [False, True] * 3


def test_val_with_copies_of_train_is_found(coco: Any) -> None:
    for i in range(4):
        shutil.copy(coco.folder / f"images/train_{i}.jpg", coco.folder / f"images/val_{i}.jpg")
    coco.val["annotations"][0]["bbox"] = [40, 2, 9, 9]
    folder = coco.write()
    report = examine(folder)
    assert "split-equal" in codes_of(report)
    assert "image-leak" not in codes_of(report), "reported once for the split, not for every image"
    assert [f.image_id for f in report.findings if f.code == "image-other-boxes"] == [11]


def test_category_listed_twice_is_not_a_conflict(coco: Any) -> None:
    coco.train["categories"].append(dict(coco.train["categories"][0]))
    report = examine(coco.write())
    assert codes_of(report) == {"category-duplicate-name"}


def test_names_that_differ_on_purpose_are_not_similar(coco: Any) -> None:
    for document in coco.documents.values():
        document["categories"] += [
            {"id": 3 + i, "name": n} for i, n in enumerate(("car", "cat", "type 1", "type 2", "cup", "cap"))
        ]
    assert "category-similar-names" not in codes_of(examine(coco.write(), decode=False))


def test_dropped_and_clipped_boxes_do_not_reach_training(coco: Any) -> None:
    annotations = coco.train["annotations"]
    annotations[0]["bbox"] = [20, 20, 0, 0]
    annotations[1]["bbox"] = [90.0, 60.0, 20.0, 20.0]
    splits = load_splits(coco.write())
    boxes = splits.train.annotations(0).boxes_xyxy_px
    assert len(boxes) == 5
    assert boxes[0].tolist() == [90, 60, 96, 64]
    assert (splits.train.boxes_xyxy_px >= 0).all()


def test_string_ids_that_are_numbers_keep_their_value(coco: Any) -> None:
    for image in coco.train["images"]:
        image["id"] = f"{image['id']:06d}"
    splits = load_splits(coco.write())
    assert splits.train.image_ids.tolist() == [1, 2, 3, 4]
    assert len(splits.train.labels) == 24


def _lettered(c: Any, ids: dict[int, Any]) -> None:
    for document in c.documents.values():
        for category in document["categories"]:
            category["id"] = ids[category["id"]]
        for annotation in document["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]


def test_category_ids_that_are_words_are_numbered_and_reported(coco: Any) -> None:
    before = load_splits(coco.write())
    _lettered(coco, {1: "c1", 2: "c2"})
    splits = load_splits(coco.write())
    assert [(c.id, c.name) for c in splits.categories] == [(1, "nut"), (2, "washer")]
    assert splits.train.labels.tolist() == before.train.labels.tolist()
    said = [(f.code, f.severity, f.message) for f in splits.findings]
    message = "the category ids are not integers, so they are numbered: 'c1' is 1, 'c2' is 2"
    assert said == [("id-not-integer", "warning", message)]
    coco.box["category_id"] = "c9"
    report = examine(coco.write(), decode=False)
    assert (
        "has category c9, which is not among the 2 categories"
        in report.findings[0].message + report.findings[1].message
    )


def test_category_ids_of_words_and_numbers_do_not_collide(coco: Any) -> None:
    _lettered(coco, {1: "c1", 2: 1})
    assert [(c.id, c.name) for c in load_splits(coco.write()).categories] == [(1, "washer"), (2, "nut")]
    for value in (1.5, 1 << 70, "", "a\0b", True):
        for category in coco.train["categories"]:
            if category["name"] == "nut":
                category["id"] = value
        assert "category-malformed" in codes_of(examine(coco.write(), decode=False)), value


def test_category_ids_that_are_numbers_in_quotes_keep_their_value(coco: Any) -> None:
    _lettered(coco, {1: "8", 2: "05"})
    splits = load_splits(coco.write())
    assert [(c.id, c.name) for c in splits.categories] == [(5, "washer"), (8, "nut")]
    assert {f.code for f in splits.findings} == {"category-gaps"}


# ---- files


FILES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut": ("file-malformed", lambda data: data[: len(data) // 2]),
    "a list": ("file-malformed", lambda data: b"[1, 2]"),
    "empty": ("file-malformed", lambda data: b""),
    "no images": ("file-malformed", lambda data: data.replace(b'"images"', b'"frames"', 1)),
    "not UTF-8": ("file-malformed", lambda data: data.replace(b"washer", b"w\xe4sher", 1)),
    "UTF-16": ("file-malformed", lambda data: data.decode().encode("utf-16")),
    "something behind": ("file-malformed", lambda data: data + b"{}"),
    "long number": ("file-malformed", lambda data: data.replace(b"192.0", b"9" * 5000, 1)),
    "deep": ("file-bounds", lambda data: b'{"images": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "key twice": ("file-repeated-key", lambda data: data.rstrip()[:-1] + b', "annotations": []}'),
    "mark": ("file-bom", lambda data: b"\xef\xbb\xbf" + data),
    "CRLF": ("file-crlf", lambda data: data.replace(b"\n", b"\r\n")),
}


@pytest.mark.parametrize("fault", FILES)
def test_json_file_fault(coco: Any, fault: str) -> None:
    code, spoil = FILES[fault]
    path = coco.write() / "train.json"
    path.write_bytes(spoil(path.read_bytes()))
    assert finding_of(examine(path, decode=False), code).file == "train.json"
    load_or_refuse(path, code)


# ---- YOLO


def _first(y: Any, line: str) -> None:
    y.labels["train/train_0"] += line + "\n"


def _pose(y: Any, points: Callable[[float, float], str]) -> None:
    for name in y.labels:
        boxes = [(0.1 + 0.15 * k, 0.3 + 0.1 * k) for k in range(5)]
        y.labels[name] = "".join(f"0 {cx} {cy} 0.16 0.3 {points(cx, cy)}\n" for cx, cy in boxes)


def _pairs(cx: float, cy: float) -> str:
    return " ".join(f"{cx + dx:.3f} {cy + dy:.3f}" for dx, dy in ((0, 0), (-0.07, 0.1), (0.05, -0.1), (0.03, 0.14)))


def _triplets(cx: float, cy: float) -> str:
    return f"{cx:.3f} {cy - 0.1:.3f} 2 {cx + 0.05:.3f} {cy + 0.1:.3f} 1 " + "0 0 0 " * 15


def _polygons(y: Any) -> None:
    for number, name in enumerate(y.labels):
        random = np.random.default_rng(number)
        lines = []
        for cx, cy in random.uniform(0.05, 0.95, (5, 2)):
            around = [(cx + 0.03 * np.cos(a), cy + 0.03 * np.sin(a)) for a in np.arange(8) * np.pi / 4]
            lines.append("0 " + " ".join(f"{x:.4f} {y_:.4f}" for x, y_ in around) + "\n")
        y.labels[name] = "".join(lines)


YOLO: dict[str, list[Plant]] = {
    "yolo-pose": [
        lambda y: _pose(y, _pairs),
        lambda y: _pose(y, _triplets),
        lambda y: _pose(y, lambda cx, cy: f"{cx} {cy} " * 17),
    ],
    "label-columns": [lambda y: _first(y, "0 0.5 0.5 0.1"), lambda y: _first(y, "0 0.5 0.5 0.1 0.1 0.9")],
    "box-not-number": [lambda y: _first(y, "0 0.5 0.5 0.1 zwei"), lambda y: _first(y, "washer 0.5 0.5 0.1 0.1")],
    "box-not-finite": [lambda y: _first(y, "0 nan 0.5 0.1 0.1"), lambda y: _first(y, "0 0.5 0.5 inf 0.1")],
    "box-inverted": [lambda y: _first(y, "0 0.5 0.5 -0.1 0.1")],
    "box-zero-size": [lambda y: _first(y, "0 0.5 0.5 0 0.1")],
    "box-partly-outside": [lambda y: _first(y, "0 0.98 0.5 0.2 0.1")],
    "category-unknown": [lambda y: _first(y, "2 0.5 0.5 0.1 0.1"), lambda y: _first(y, "0.5 0.5 0.5 0.1 0.1")],
    "label-pixels": [lambda y: _first(y, "0 48 32 12 12")],
    "label-beyond-one": [
        lambda y: _first(y, "0 1.01 0.5 0.1 0.1"),
        lambda y: _first(y, "0 0.1 0.1 1.2 0.1 0.5 0.5"),
    ],
    "label-missing": [lambda y: y.labels.update({"train/train_0": None})],
    "image-no-objects": [lambda y: y.labels.update({"train/train_0": ""})],
    "label-orphan": [lambda y: y.labels.update({"train/lost": "0 0.5 0.5 0.1 0.1\n"})],
    "file-bom": [lambda y: y.labels.update({"train/train_0": b"\xef\xbb\xbf0 0.5 0.5 0.1 0.1\n"})],
    "file-crlf": [lambda y: y.labels.update({"train/train_0": b"0 0.5 0.5 0.1 0.1\r\n"})],
    "file-malformed": [
        lambda y: y.labels.update({"train/train_0": b"0 0.5 0.5 \xff 0.1\n"}),
        lambda y: setattr(y, "yaml", "train: [images\nnames: ["),
        lambda y: setattr(y, "yaml", "just words"),
        lambda y: setattr(y, "yaml", "train: {a: b}\nval: images/val\nnames: [nut, washer]\n"),
        lambda y: setattr(y, "yaml", "? [a, b]\n: {c: d}\ntrain: images/train\nnames: [nut, washer]\n"),
    ],
    "file-repeated-key": [lambda y: setattr(y, "yaml", y.yaml + "names: [a, b]\n")],
    "file-bounds": [lambda y: setattr(y, "yaml", "names: " + "[" * 20000 + "]" * 20000)],
    "category-count": [lambda y: setattr(y, "yaml", y.yaml.replace("nc: 2", "nc: 3"))],
    "category-none": [lambda y: setattr(y, "yaml", "train: images/train\nval: images/val\n")],
    "category-malformed": [lambda y: setattr(y, "yaml", y.yaml.replace("[nut, washer]", "{0: nut, x: washer}"))],
    "split-missing": [
        lambda y: setattr(y, "yaml", y.yaml.replace("images/val", "images/nowhere")),
        lambda y: setattr(y, "yaml", "names: [nut, washer]\n"),
    ],
    "file-missing": [
        lambda y: y.labels.update({"train/train_0": None}) or y.make("labels/train/train_0.txt/nothing in it"),
    ],
    "split-empty": [lambda y: [p.unlink() for p in (y.folder / "images/val").iterdir()]],
    "split-equal": [lambda y: setattr(y, "yaml", y.yaml.replace("images/val", "images/train"))],
    "yolo-path": [
        lambda y: setattr(y, "yaml", "path: /content/datasets/nuts\n" + y.yaml),
        lambda y: setattr(y, "yaml", "path: /\n" + y.yaml),
    ],
    "image-outside": [lambda y: setattr(y, "yaml", y.yaml.replace("images/val", ".."))],
    "image-elsewhere": [
        lambda y: (
            shutil.move(y.folder / "images/val", y.folder.parent / "val")
            and setattr(y, "yaml", y.yaml.replace("images/val", "../val"))
        )
    ],
}


@pytest.mark.parametrize(("code", "plant"), cases(YOLO))
def test_yolo_fault(yolo: Any, code: str, plant: Plant) -> None:
    plant(yolo)
    source = yolo.write() / "data.yaml"
    finding = finding_of(examine(source, decode=False), code)
    if code.startswith(("box-", "label-columns", "label-pixels", "label-beyond")):
        assert (finding.file, finding.line) == ("labels/train/train_0.txt", 7)
    load_or_refuse(source, code)


def test_undeclared_keypoints_are_ignored(yolo: Any) -> None:
    _pose(yolo, _triplets)
    yolo.labels["train/train_0"] += "1 0.5 0.5 0.2 0.2\n"
    folder = yolo.write()
    train = load_splits(folder).train
    assert len(train.labels) == 16
    np.testing.assert_allclose(train.boxes_xyxy_px[0], [96 * 0.02, 64 * 0.15, 96 * 0.18, 64 * 0.45], atol=1e-6)
    said = next(f for f in load_splits(folder).findings if f.code == "yolo-pose")
    assert "kpt_shape: [17, 3]" in said.hint
    (folder / "data.yaml").write_text(yolo.yaml + "kpt_shape: [17, 3]\n")
    yolo.labels["train/train_0"] = yolo.labels["train/train_0"].rsplit("1 0.5", 1)[0]
    (folder / "labels/train/train_0.txt").write_text(yolo.labels["train/train_0"])
    assert "yolo-pose" not in {f.code for f in load_splits(folder).findings}


def test_polygons_are_not_keypoints(yolo: Any) -> None:
    _polygons(yolo)
    folder = yolo.write()
    assert "yolo-pose" not in codes_of(examine(folder, decode=False))
    _pose(yolo, _pairs)
    yolo.yaml += "kpt_shape: [0, 2]\n"
    splits = load_splits(yolo.write())
    assert "yolo-pose" not in {f.code for f in splits.findings}
    np.testing.assert_allclose(splits.train.boxes_xyxy_px[0, 2:], [96 * 0.16, 64 * 0.44], atol=1e-6)


# ---- Pascal VOC


def _swap(v: Any, old: str, new: str, stem: str = "train_0") -> None:
    assert old in v.xml[stem]
    v.xml[stem] = v.xml[stem].replace(old, new, 1)


VOC: dict[str, list[Plant]] = {
    "voc-filename": [lambda v: _swap(v, "train_0.jpg", "other.jpg")],
    "voc-folder": [lambda v: _swap(v, "<folder>JPEGImages", "<folder>elsewhere")],
    "image-size": [lambda v: _swap(v, "<width>96", "<width>69")],
    "image-size-undeclared": [lambda v: _swap(v, "<width>96</width>", "")],
    "box-zero-size": [lambda v: _swap(v, "<xmax>16</xmax>", "<xmax>4</xmax>")],
    "box-inverted": [lambda v: _swap(v, "<xmax>16</xmax>", "<xmax>1</xmax>")],
    "box-not-number": [lambda v: _swap(v, "<xmin>4</xmin>", "<xmin>four</xmin>")],
    "box-not-finite": [lambda v: _swap(v, "<xmin>4</xmin>", "<xmin>nan</xmin>")],
    "box-count": [
        lambda v: _swap(v, "<xmin>4</xmin>", ""),
        lambda v: _swap(v, "<xmin>4</xmin>", "<xmin>4</xmin><xmin>5</xmin>"),
        lambda v: v.xml.update(train_0=v.xml["train_0"].replace("bndbox", "box")),
    ],
    "box-partly-outside": [lambda v: _swap(v, "<xmin>4</xmin>", "<xmin>-4</xmin>")],
    "box-outside": [
        lambda v: _swap(v, "<xmin>4</xmin>", "<xmin>-40</xmin>") or _swap(v, "<xmax>16</xmax>", "<xmax>-9</xmax>")
    ],
    "box-difficult": [lambda v: _swap(v, "<name>nut</name>", "<name>nut</name><difficult>1</difficult>")],
    "category-unknown": [
        lambda v: v.make("classes.txt").write_text("washer\n"),
        lambda v: _swap(v, "<name>nut</name>", ""),
    ],
    "label-missing": [lambda v: v.xml.update(train_0=None)],
    "label-orphan": [lambda v: v.xml.update(lost=v.xml["train_0"])],
    "file-malformed": [
        lambda v: _swap(v, "</annotation>", ""),
        lambda v: v.xml.update(train_0=b""),
        lambda v: v.xml.update(train_0="<html></html>"),
        lambda v: v.xml.update(
            train_0='<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
        ),
        lambda v: v.xml.update(
            train_0='<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'
        ),
    ],
    "file-bounds": [lambda v: v.xml.update(train_0="<annotation>" + "<a>" * 90 + "</a>" * 90 + "</annotation>")],
    "file-bom": [lambda v: v.xml.update(train_0=b"\xef\xbb\xbf" + v.xml["train_0"].encode())],
    "file-crlf": [lambda v: v.xml.update(train_0=v.xml["train_0"].replace("\n", "\r\n").encode())],
    "image-missing": [lambda v: v.lists["train"].append("nothing")],
    "split-empty": [lambda v: v.lists.update(val=[])],
    "split-equal": [lambda v: v.lists.update(val=v.lists["train"])],
    "image-leak": [lambda v: v.lists["val"].append("train_0")],
}


@pytest.mark.parametrize(("code", "plant"), cases(VOC))
def test_voc_fault(voc: Any, code: str, plant: Plant) -> None:
    plant(voc)
    folder = voc.write()
    finding = finding_of(examine(folder), code)
    if code.startswith("box-") and code != "box-difficult":
        assert finding.file == "Annotations/train_0.xml"
        assert voc.xml["train_0"].splitlines()[finding.line - 1].strip() == "<object>"
    load_or_refuse(folder, code)


# ---- splits


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_dataset_without_train_is_for_evaluation_only(form: str, request: Any) -> None:
    builder = request.getfixturevalue(form)
    if form == "coco":
        export = builder.folder / "valid"
        export.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            shutil.move(builder.folder / f"images/val_{i}.jpg", export)
        (export / "_annotations.coco.json").write_text(json.dumps(builder.val))
        folder = builder.folder
    elif form == "yolo":
        builder.yaml = builder.yaml.replace("train: images/train\n", "")
        folder = builder.write()
    else:
        del builder.lists["train"]
        folder = builder.write()
    report = examine(folder)
    assert [f.code for f in report.findings if f.severity == "error"] == ["split-missing"]
    assert "train" in next(f.message for f in report.findings if f.code == "split-missing")
    splits = load_splits(folder)
    assert splits.train is None
    assert splits.val is not None


@pytest.mark.parametrize("crowds", [False, True])
def test_train_without_objects_is_an_error_but_can_be_loaded(coco: Any, crowds: bool) -> None:
    for document in coco.documents.values():
        document["annotations"] = [{**a, "iscrowd": 1} for a in document["annotations"]] if crowds else []
    folder = coco.write()
    report = examine(folder)
    told = {f.message.split()[2]: f.severity for f in report.findings if f.code == "split-no-objects"}
    assert told == ({"train": "error"} if crowds else {"train": "error", "val": "warning"})
    assert report.counts()["error"] == 1
    assert next(iter(report.by_code())) == "split-no-objects"
    read = [f.severity for f in load_splits(folder).findings if f.code == "split-no-objects"]
    assert read == ([] if crowds else ["warning", "warning"])


def test_drawn_val_split_is_reported(coco: Any) -> None:
    del coco.documents["val"]
    folder = coco.write()
    splits = load_splits(folder)
    assert splits.split_made
    assert [f.code for f in splits.findings] == ["split-made"]
    assert "split-made" in codes_of(examine(folder))


IN_LAYOUTS = {
    *("image-path-moved", "image-unlisted", "category-unnamed", "shape-as-box", "shape-ignored", "dataset-unpacked"),
    "box-none",
}
"""Codes that `datasets/test_layouts.py` covers."""


def test_every_code_is_planted_somewhere() -> None:
    elsewhere = {"split-made", *IN_LAYOUTS}
    planted = {*IMAGES, *BOXES, *YOLO, *VOC, *(code for code, _ in FILES.values()), *elsewhere}
    assert set(CODES) - planted == set()

"""Round trips through every format keep boxes, ids and names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.records import Splits
from rtdetr_cli.datasets.write import write_dataset
from rtdetr_cli.errors import DataError
from tests.unit.datasets.test_read import parts

FORMS = ("coco", "yolo", "voc")


def same(a: Splits, b: Splits) -> None:
    assert a.categories == b.categories
    assert parts(a).keys() == parts(b).keys()
    for name, one in parts(a).items():
        two = parts(b)[name]
        one, two = (d.subset(np.argsort(d.image_ids)) for d in (one, two))
        assert one.image_ids.tolist() == two.image_ids.tolist()
        assert one.offsets.tolist() == two.offsets.tolist()
        assert [Path(f).name for f in one.file_names] == [Path(f).name for f in two.file_names]
        assert one.sizes_wh.tolist() == two.sizes_wh.tolist()
        assert np.abs(one.boxes_xyxy_px - two.boxes_xyxy_px).max(initial=0) < 0.01
        assert one.labels.tolist() == two.labels.tolist()
        assert one.annotation_ids.tolist() == two.annotation_ids.tolist()
        assert one.crowd.tolist() == two.crowd.tolist()
        np.testing.assert_allclose(one.areas, two.areas, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_round_trip_of_real_data(coco21: Path, tmp_path: Path, first: str, second: str) -> None:
    start = load_splits(coco21)
    middle = load_splits(write_dataset(parts(start), first, tmp_path / "a"))
    end = load_splits(write_dataset(parts(middle), second, tmp_path / "b"))
    same(start, middle)
    same(start, end)


NAMES = st.lists(
    st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12), min_size=2, max_size=2, unique=True
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), names=NAMES, form=st.sampled_from(FORMS))
def test_round_trip_of_any_box_and_name(
    coco: Any, tmp_path_factory: Any, data: Any, names: list[str], form: str
) -> None:
    side = st.floats(0.01, 60, allow_nan=False)
    for document in coco.documents.values():
        for category, name in zip(document["categories"], names, strict=True):
            category["name"] = name
        for annotation in document["annotations"]:
            w, h = data.draw(side), data.draw(side)
            x, y = data.draw(st.floats(0, 96 - w)), data.draw(st.floats(0, 64 - h))
            annotation |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": data.draw(st.integers(0, 1))}
    start = load_splits(coco.write())
    where = write_dataset(parts(start), form, tmp_path_factory.mktemp("written"))
    same(start, load_splits(where))


def test_two_splits_may_have_images_of_the_same_name(coco: Any, tmp_path: Path) -> None:
    for split, document in coco.documents.items():
        for i, image in enumerate(document["images"]):
            source = coco.folder / "images" / image["file_name"]
            image["file_name"] = f"{split}/{i}.jpg"
            source.rename(coco.make(f"images/{split}/{i}.jpg"))
    start = load_splits(coco.write())
    for form in FORMS:
        end = load_splits(write_dataset(parts(start), form, tmp_path / form))
        for name, dataset in parts(end).items():
            for i in range(len(dataset)):
                original = parts(start)[name].path(i).read_bytes()
                assert dataset.path(i).read_bytes() == original


@pytest.mark.parametrize(("name", "form"), [("a\nb", "voc"), (" a", "yolo"), ("a\x01", "voc")])
def test_name_that_a_format_cannot_hold_is_refused(coco: Any, tmp_path: Path, name: str, form: str) -> None:
    for document in coco.documents.values():
        document["categories"][0]["name"] = name
    start = load_splits(coco.write())
    with pytest.raises(DataError, match="cannot be written"):
        write_dataset(parts(start), form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same(start, load_splits(write_dataset(parts(start), "coco", tmp_path / "coco")))


def test_extreme_ids_survive(coco: Any, tmp_path: Path) -> None:
    """Ids from 0, negative ones and those near the ends of 64 bits; the two splits use the same ones."""
    new = {1: -7, 2: 2**62 + 5}
    for document in coco.documents.values():
        for category in document["categories"]:
            category["id"] = new[category["id"]]
        for place, image in enumerate(document["images"]):
            old, image["id"] = image["id"], (0, -3, 2**63 - 1, 12)[place]
            for annotation in document["annotations"]:
                if annotation["image_id"] == old and "_done" not in annotation:
                    annotation |= {"image_id": image["id"], "_done": True}
        for number, annotation in enumerate(document["annotations"]):
            annotation |= {"id": (0, -5, -(2**63), 2**63 - 1)[number] if number < 4 else number}
            annotation["category_id"] = new[annotation["category_id"]]
    start = load_splits(coco.write())
    assert start.train.annotation_ids[:4].tolist() == [0, -5, -(2**63), 2**63 - 1]
    assert sorted(start.train.image_ids.tolist()) == [-3, 0, 12, 2**63 - 1]
    for first in FORMS:
        middle = load_splits(write_dataset(parts(start), first, tmp_path / first))
        same(start, middle)
        for second in FORMS:
            same(start, load_splits(write_dataset(parts(middle), second, tmp_path / f"{first}-{second}")))


@pytest.mark.parametrize(
    "name", ["Schraube ä", "ねじ", "👩‍🔧", "a\u00a0b", "a: b # c", "no", "0101", "<b>&amp;", "- x", "'\""]
)
@pytest.mark.parametrize("form", FORMS)
def test_unusual_class_names_survive(coco: Any, tmp_path: Path, form: str, name: str) -> None:
    for document in coco.documents.values():
        document["categories"][0]["name"] = name
    start = load_splits(coco.write())
    assert start.categories[0].name == name
    same(start, load_splits(write_dataset(parts(start), form, tmp_path / "out")))


FILE_NAMES = {
    "spaces": ("a b.jpg", "a_b.jpg"),
    "a number behind a space": ("shot 1.jpg", "shot -1.jpg"),
    "a folder called images": ("x/images/one.jpg", "x/labels/two.jpg"),
    "no suffix": ("one", "one.two"),
    "rare suffixes": ("one.jfif", "two.jpe"),
    "suffix in capitals": ("one.JPG", "two.JpEg"),
    "one name with two suffixes": ("one.jpg", "one.jpeg"),
    "unicode": ("ねじ 👩‍🔧.jpg", "scha\u0308r.jpg"),
    "not UTF-8": (b"sch\xe4r.jpg", b"sch\xf6r.jpg"),
    "line break": ("a\nb.jpg", "a\x85b.jpg"),
    "edges": (" a.jpg", "a .jpg"),
}


@pytest.mark.parametrize("names", FILE_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_images_with_unusual_names_are_copied(coco: Any, tmp_path: Path, form: str, names: str) -> None:
    for place, raw in enumerate(FILE_NAMES[names]):
        name = os.fsdecode(raw)
        image = coco.train["images"][place]
        source = coco.folder / "images" / image["file_name"]
        source.rename(coco.make(f"images/{name}"))
        image["file_name"] = name
    start = load_splits(coco.write())
    middle = load_splits(write_dataset(parts(start), form, tmp_path / "out"))
    for end in (middle, load_splits(write_dataset(parts(middle), "coco", tmp_path / "back"))):
        assert not [f.message for f in end.findings if f.code not in ("category-few", "image-name-encoding")]
        for name, one in parts(start).items():
            two = parts(end)[name]
            order = [two.image_ids.tolist().index(i) for i in one.image_ids.tolist()]
            two = two.subset(order)
            assert [one.path(i).read_bytes() for i in range(len(one))] == [
                two.path(i).read_bytes() for i in range(len(two))
            ]
            assert np.abs(one.boxes_xyxy_px - two.boxes_xyxy_px).max() < 0.01
            assert one.annotation_ids.tolist() == two.annotation_ids.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_images_without_objects_and_crowds_survive(coco: Any, tmp_path: Path, form: str) -> None:
    coco.train["annotations"] = [a for a in coco.train["annotations"] if a["image_id"] == 2]
    coco.train["annotations"][3]["iscrowd"] = 1
    coco.val["annotations"] = []
    start = load_splits(coco.write())
    end = load_splits(write_dataset(parts(start), form, tmp_path / "out"))
    same(start, end)
    assert end.train.crowd.sum() == 1


def test_voc_class_list_is_used_if_there_are_no_objects(voc: Any) -> None:
    voc.make("classes.txt").write_text("nut\nwasher\n")
    for stem, text in voc.xml.items():
        voc.xml[stem] = text[: text.index("\t<object>")] + "</annotation>\n"
    assert [c.name for c in load_splits(voc.write()).categories] == ["nut", "washer"]

"""Thousands of damaged label files: every one ends in a report, never in a traceback or a hang."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

HANG_SECONDS = 30
RUN = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

ODD_TEXT = st.sampled_from(
    [
        "",
        "\0",
        "\ud800",
        "../../etc/passwd",
        "/",
        ".",
        "a" * 5000,
        "<script>",
        "NaN",
        "1e999",
        "-0",
        "9" * 400,
        "ä",
        "\r",
    ]
)
ODD_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    ODD_TEXT,
    st.text(max_size=8),
    st.lists(st.one_of(st.floats(), st.none(), st.integers()), max_size=6),
    st.dictionaries(st.sampled_from(["id", "name", "bbox"]), st.integers(), max_size=2),
    st.builds(lambda: [[[[]]]]),
)


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"nothing came back in {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_outcome(rtdetr: Callable[..., Any], source: Path, *flags: object) -> None:
    with no_hang():
        ran = rtdetr("validate", source, "--fast", "--json", *flags)
    assert ran.code in (0, 3), ran.err
    assert "Traceback" not in ran.err
    document = ran.json
    assert ("error" in document) or (ran.code == 3) == bool(document["counts"]["error"])


def spoil_bytes(data: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Return the file with a few spans cut, doubled, flipped or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 40))
        new = draw(
            st.one_of(
                st.just(b""),
                st.just(data[at : at + length] * 2),
                st.binary(max_size=12),
                st.sampled_from([b"{", b"]", b'"', b"<", b"&a;", b"-", b"\xff", b"\r\n", b"nan", b"null", b": "]),
            )
        )
        data = data[:at] + new + data[at + length :]
    return data


def spoil_document(document: dict[str, Any], draw: Callable[[Any], Any]) -> None:
    """Change a few values anywhere in a COCO document."""
    for _ in range(draw(st.integers(1, 5))):
        key = draw(st.sampled_from(["images", "annotations", "categories", "top"]))
        entries = document.get(key)
        if key == "top" or not isinstance(entries, list) or not entries:
            document[draw(st.sampled_from(["images", "annotations", "categories", "x"]))] = draw(ODD_VALUE)
            continue
        position = draw(st.integers(0, len(entries) - 1))
        entry = entries[position]
        if not isinstance(entry, dict) or draw(st.integers(0, 5)) == 0:
            entries[position] = draw(ODD_VALUE)
            continue
        name = draw(st.sampled_from([*entry, "iscrowd", "area", "id"]))
        if name == "bbox" and isinstance(entry.get("bbox"), list) and entry["bbox"]:
            entry["bbox"] = list(entry["bbox"])
            entry["bbox"][draw(st.integers(0, len(entry["bbox"]) - 1))] = draw(ODD_VALUE)
        else:
            entry[name] = draw(ODD_VALUE)


def coco_case(coco: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    document = json.loads(json.dumps(coco.train))
    if data.draw(st.booleans()):
        spoil_document(document, data.draw)
        text = json.dumps(document, indent=data.draw(st.sampled_from([None, 1]))).encode()
    else:
        text = spoil_bytes(json.dumps(document, indent=1).encode(), data.draw)
    (coco.folder / "one.json").write_bytes(text)
    check_outcome(rtdetr, coco.folder / "one.json")


def yolo_case(yolo: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    folder = yolo.write()
    name = data.draw(st.sampled_from(["data.yaml", "labels/train/train_0.txt"]))
    path = folder / name
    path.write_bytes(spoil_bytes(path.read_bytes(), data.draw))
    check_outcome(rtdetr, folder / "data.yaml")


def voc_case(voc: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    folder = voc.write()
    name = data.draw(st.sampled_from(["Annotations/train_0.xml", "Annotations/val_1.xml", "ImageSets/Main/train.txt"]))
    path = folder / name
    path.write_bytes(spoil_bytes(path.read_bytes(), data.draw))
    check_outcome(rtdetr, folder)


def layout_case(folder: Path, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    """Labelme, CSV, YOLO without a data.yaml, VOC with unusual folders, and a zip file of them."""
    form = data.draw(st.sampled_from(["labelme", "csv", "yolo", "voc", "zip"]))
    files = {
        "labelme": {"images/a.json": labelme("a"), "images/b.json": labelme("b")},
        "csv": {"boxes.csv": "filename,width,height,class,xmin,ymin,xmax,ymax\n" + 3 * "a.jpg,32,24,nut,2,3,12,14\n"},
        "yolo": {
            "labels/a.txt": "0 0.5 0.5 0.2 0.2\n1 0.4 0.4 0.2 0.2\n",
            "labels/b.txt": "1 0.5 0.5 0.2 0.2\n",
            "obj.data": "classes = 2\ntrain = data/list.txt\nnames = data/obj.names\n",
            "obj.names": "nut\nbolt\n",
            "list.txt": "data/images/a.jpg\ndata/images/b.jpg\n",
        },
        "voc": {"xmls/a.xml": VOC_XML, "xmls/b.xml": VOC_XML, "train.txt": "a\n", "val.txt": "b\n"},
    }
    paths = []
    for name, text in files[data.draw(st.sampled_from(list(files))) if form == "zip" else form].items():
        paths.append(folder / name)
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text(text)
    (folder / "images").mkdir(exist_ok=True)
    for number, name in enumerate("ab"):
        Image.new("RGB", (32, 24), (90 * number, 20, 30)).save(folder / f"images/{name}.jpg")
    source = folder
    spoiled = data.draw(st.sampled_from(paths))
    if form == "zip":
        spoiled = source = Path(shutil.make_archive(str(folder.with_suffix("")) + "-packed", "zip", folder))
    spoiled.write_bytes(spoil_bytes(spoiled.read_bytes(), data.draw))
    check_outcome(rtdetr, source)
    if form in ("labelme", "csv"):
        with no_hang():
            ran = rtdetr("validate", source, "--json", "--fix", folder.with_name(f"{folder.name}-fixed"))
        assert ran.code in (0, 3), ran.err
        assert ran.code == 3 or not ran.json["fix"]["counts"]["error"]


def labelme(stem: str) -> str:
    shapes = [
        {"label": "nut", "points": [[2, 3], [12, 14]], "shape_type": "rectangle"},
        {"label": "bolt", "points": [[2, 3], [12, 14], [5, 20]], "shape_type": "polygon"},
        {"label": "bolt", "points": [[12, 13], [12, 18]], "shape_type": "circle"},
    ]
    return json.dumps({"shapes": shapes, "imagePath": f"{stem}.jpg", "imageHeight": 24, "imageWidth": 32}, indent=1)


VOC_XML = (
    "<annotation><filename>a.jpg</filename><size><width>32</width><height>24</height></size>\n<object><name>nut</name>"
    "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>14</ymax></bndbox></object></annotation>\n"
)


def repair_case(coco: Any, rtdetr: Callable[..., Any], folder: Path, data: st.DataObject) -> None:
    document = json.loads(json.dumps(coco.train))
    spoil_document(document, data.draw)
    (coco.folder / "one.json").write_bytes(json.dumps(document).encode())
    with no_hang():
        ran = rtdetr("validate", coco.folder / "one.json", "--json", "--fix", folder / "out")
    assert ran.code in (0, 3), ran.err
    if ran.code == 0:
        assert not ran.json["fix"]["counts"]["error"]


@settings(RUN, max_examples=60)
@given(data=st.data())
def test_damaged_coco(coco: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    coco_case(coco, rtdetr, data)


@settings(RUN, max_examples=50)
@given(data=st.data())
def test_damaged_yolo(yolo: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    yolo_case(yolo, rtdetr, data)


@settings(RUN, max_examples=40)
@given(data=st.data())
def test_damaged_voc(voc: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    voc_case(voc, rtdetr, data)


@settings(RUN, max_examples=60)
@given(data=st.data())
def test_damaged_files_in_other_layouts(
    rtdetr: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    layout_case(tmp_path_factory.mktemp("layout"), rtdetr, data)


@pytest.mark.slow
@settings(RUN, max_examples=1000)
@given(data=st.data())
def test_much_damaged_files_in_other_layouts(
    rtdetr: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    layout_case(tmp_path_factory.mktemp("layout"), rtdetr, data)


@pytest.mark.slow
@settings(RUN, max_examples=900)
@given(data=st.data())
def test_much_damaged_coco(coco: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    coco_case(coco, rtdetr, data)


@pytest.mark.slow
@settings(RUN, max_examples=600)
@given(data=st.data())
def test_much_damaged_yolo(yolo: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    yolo_case(yolo, rtdetr, data)


@pytest.mark.slow
@settings(RUN, max_examples=500)
@given(data=st.data())
def test_much_damaged_voc(voc: Any, rtdetr: Callable[..., Any], data: st.DataObject) -> None:
    voc_case(voc, rtdetr, data)


@settings(RUN, max_examples=15)
@given(data=st.data())
def test_damaged_coco_is_repaired_or_refused(
    coco: Any, rtdetr: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    repair_case(coco, rtdetr, tmp_path_factory.mktemp("fix"), data)


@pytest.mark.slow
@settings(RUN, max_examples=300)
@given(data=st.data())
def test_much_damaged_coco_is_repaired_or_refused(
    coco: Any, rtdetr: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    repair_case(coco, rtdetr, tmp_path_factory.mktemp("fix"), data)

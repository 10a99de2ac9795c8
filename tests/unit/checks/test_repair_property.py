"""Whatever is wrong with a generated dataset of known truth, `--fix` loses and moves no correct box."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.repair import repair
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.errors import DataError
from tests.images import exif_of, paint

Box = tuple[float, float, float, float]
FORMS = ("coco", "yolo", "voc")
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
FILE_FAULTS = ("truncated", "missing", "empty", "extension", "case", "no labels", "absolute")
BAD_BOXES = ("zero", "inverted", "outside", "nan", "class", "count", "word")


@dataclass
class Truth:
    """One image of a generated dataset.

    Attributes:
        name: the file name on disk.
        listed: the file name in the labels.
        stored: width and height of the stored pixels.
        orientation: the EXIF value; 0 for none.
        frame: width and height of the frame that the labels refer to: stored, or upright.
        declared: width and height in the labels; None for none.
        correct: id -> corners of the boxes that must survive.
        clipped: id -> corners of boxes that reach over the border of the frame.
        bad: kinds of boxes that must go.
        duplicates: how many of the correct boxes are there twice.
    """

    name: str
    listed: str
    kind: str
    stored: tuple[int, int]
    orientation: int
    frame: tuple[int, int]
    labels_are_stored: bool
    declared: tuple[int, int] | None
    fault: str = ""
    correct: dict[int, Box] = field(default_factory=dict)
    clipped: dict[int, Box] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    duplicates: int = 0

    @property
    def stem(self) -> str:
        return Path(self.name).stem


def draw_image(rng: np.random.Generator, number: int, stored_share: float) -> Truth:
    """Draw an image with its labels, of which any may be wrong; a share of them refers to the stored pixels."""
    kind = str(rng.choice(list(SUFFIXES), p=(0.7, 0.15, 0.15)))
    width, height = (int(v) for v in rng.integers(48, 97, 2))
    if rng.random() < 0.1:
        height = width
    orientation = int(rng.choice([0, 9, *range(1, 9)], p=(0.3, 0.05, *([0.65 / 8] * 8))))
    labels_are_stored = bool(rng.random() < stored_share)
    sideways = 5 <= orientation <= 8
    frame = (height, width) if sideways and not labels_are_stored else (width, height)
    declared: tuple[int, int] | None = frame
    if rng.random() < 0.15:
        declared = None
    elif rng.random() < 0.15:
        wrong = [tuple(rng.integers(30, 200, 2)), (frame[0] * 2, frame[1] * 2), (frame[0] + 3, frame[1])]
        declared = wrong[rng.integers(3)]  # type: ignore[assignment]
        declared = (int(declared[0]), int(declared[1]))  # type: ignore[index]
    fault = str(rng.choice(FILE_FAULTS)) if rng.random() < 0.2 else ""
    suffix = SUFFIXES[kind]
    if fault == "extension":
        suffix = ".png" if kind == "JPEG" else ".jpg"
    name = f"image_{number}{suffix}"
    truth = Truth(name, name, kind, (width, height), orientation, frame, labels_are_stored, declared, fault)
    if fault == "case":
        truth.name = f"image_{number}{suffix.upper()}"
    columns, rows = frame[0] // 12, frame[1] // 12
    cells = rng.permutation(columns * rows)[: rng.integers(1, 6)]
    for position, cell in enumerate(cells.tolist()):
        x, y = cell % columns * 12, cell // columns * 12
        w, h = (int(v) for v in rng.integers(4, 12, 2))
        truth.correct[100 * number + position] = (x, y, x + w, y + h)
    if rng.random() < 0.25:
        w, h = frame
        beyond = [(-5, 3, 9, 10), (w - 4, 2, w + 6, 9), (3, h - 5, 8, h + 7), (-3, -4, w + 5, h + 2)]
        truth.clipped[100 * number + 50] = beyond[rng.integers(len(beyond))]
    truth.bad = [str(kind) for kind in rng.choice(BAD_BOXES, rng.integers(0, 3))] if rng.random() < 0.4 else []
    truth.duplicates = int(rng.random() < 0.2)
    return truth


def write_image(path: Path, truth: Truth, number: int) -> None:
    if truth.fault == "missing":
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = {"exif": exif_of(truth.orientation)} if truth.orientation else {}
    paint(number, truth.stored).save(path, truth.kind, **exif)
    if truth.fault == "empty":
        path.write_bytes(b"")
    elif truth.fault == "truncated":
        path.write_bytes(path.read_bytes()[:-200])


def rows_of(truth: Truth) -> list[tuple[int, Box, str]]:
    """Return id, corners and what is wrong (nothing: the empty text) of every label of an image."""
    rows = [(i, box, "") for i, box in truth.correct.items()] + [(i, box, "") for i, box in truth.clipped.items()]
    first = next(iter(truth.correct.values()))
    rows += [(100 * (int(min(truth.correct)) // 100) + 60 + n, first, "twice") for n in range(truth.duplicates)]
    base = 100 * (min(truth.correct) // 100) + 70
    w, h = truth.frame
    for n, kind in enumerate(truth.bad):
        box: Box = (5, 5, 9, 9)
        if kind == "zero":
            box = (7, 7, 7, 11)
        elif kind == "inverted":
            box = (9, 5, 4, 9)
        elif kind == "outside":
            box = (w + 150, h + 150, w + 160, h + 159)
        rows.append((base + n, box, kind))
    return rows


def write_coco(folder: Path, splits: dict[str, list[Truth]]) -> Path:
    for split, images in splits.items():
        entries, annotations = [], []
        for number, truth in enumerate(images, 1):
            write_image(folder / "images" / truth.name, truth, min(truth.correct))
            listed = str(folder / "images" / truth.listed) if truth.fault == "absolute" else truth.listed
            entry: dict[str, Any] = {"id": number, "file_name": listed, "note": {"kept": number}}
            if truth.declared:
                entry |= {"width": truth.declared[0], "height": truth.declared[1]}
            entries.append(entry)
            for identifier, (x1, y1, x2, y2), wrong in rows_of(truth):
                box: list[Any] = [x1, y1, x2 - x1, y2 - y1]
                category = 7 if wrong == "class" else 1 + identifier % 2
                if wrong == "nan":
                    box[1] = float("nan")
                elif wrong == "count":
                    box.pop()
                elif wrong == "word":
                    box[2] = "wide"
                annotation = {"id": identifier, "image_id": number, "category_id": category, "bbox": box}
                annotations.append(annotation | {"area": (x2 - x1) * (y2 - y1), "score": "kept"})
        order = np.random.default_rng(len(annotations)).permutation(len(annotations))
        order = sorted(order.tolist(), key=lambda k: annotations[k]["id"] % 100 >= 60)  # duplicates are the later ones
        document = {
            "images": entries,
            "annotations": [annotations[k] for k in order],
            "categories": [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}],
            "licenses": [{"id": 1}],
        }
        (folder / f"{split}.json").write_text(json.dumps(document, indent=1))
    return folder


def write_yolo(folder: Path, splits: dict[str, list[Truth]]) -> Path:
    for split, images in splits.items():
        for truth in images:
            write_image(folder / "images" / split / truth.name, truth, min(truth.correct))
            w, h = truth.frame
            lines = []
            for identifier, (x1, y1, x2, y2), wrong in rows_of(truth):
                values: list[Any] = [identifier % 2, (x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
                if wrong == "class":
                    values[0] = 7
                elif wrong == "nan":
                    values[2] = "nan"
                elif wrong == "count":
                    values.pop()
                elif wrong == "word":
                    values[3] = "wide"
                lines.append(" ".join(map(str, values)) + "\n")
            label = folder / "labels" / split / f"{truth.stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            if truth.fault != "no labels":
                label.write_text("".join(lines))
        bases = [f"{folder}/" if truth.fault == "absolute" else "" for truth in images]
        text = "".join(f"{base}images/{split}/{t.listed}\n" for base, t in zip(bases, images, strict=True))
        (folder / f"{split}.txt").write_text(text)
    listed = "".join(f"{split}: {split}.txt\n" for split in splits)
    (folder / "data.yaml").write_text(f"# mine\n{listed}names: [nut, bolt]\n")
    return folder / "data.yaml"


def write_voc(folder: Path, splits: dict[str, list[Truth]]) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("nut\nbolt\n")
    for split, images in splits.items():
        for truth in images:
            write_image(folder / "JPEGImages" / truth.name, truth, min(truth.correct))
            text = f"<annotation>\n<filename>{truth.listed}</filename><source>kept</source>\n"
            if truth.declared:
                text += f"<size><width>{truth.declared[0]}</width><height>{truth.declared[1]}</height></size>\n"
            for identifier, corners, wrong in rows_of(truth):
                values: list[Any] = list(corners)
                if wrong == "nan":
                    values[1] = "nan"
                elif wrong == "word":
                    values[2] = "wide"
                sides = [f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True)]
                if wrong == "count":
                    sides.pop()
                name = "screw" if wrong == "class" else ("nut", "bolt")[identifier % 2]
                box = f"<bndbox>{''.join(sides)}</bndbox>"
                text += f"<object><name>{name}</name><mine>{identifier}</mine>{box}</object>\n"
            if truth.fault != "no labels":
                (folder / "Annotations" / f"{truth.stem}.xml").write_text(text + "</annotation>\n")
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{truth.stem}\n" for truth in images))
    return folder


Labels = dict[str, tuple[str, list[tuple[int, Box]]]]
"""Stem of an image -> its file name and its boxes with their ids (-1 where the format has none)."""


def corners(bbox: list[float]) -> Box:
    x, y, w, h = bbox
    return x, y, x + w, y + h


def read_coco(folder: Path, frames: dict[str, tuple[int, int]]) -> Labels:
    labels: Labels = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if path.name == "changes.json":
            continue
        for image in document["images"]:
            assert image["note"]["kept"] == image["id"]
            boxes = [a for a in document["annotations"] if a["image_id"] == image["id"]]
            assert all(a["score"] == "kept" for a in boxes)
            rows = [(a["id"], corners(a["bbox"])) for a in boxes]
            labels[Path(image["file_name"]).stem] = (f"images/{Path(image['file_name']).name}", rows)
    return labels


def read_yolo(folder: Path, frames: dict[str, tuple[int, int]]) -> Labels:
    labels: Labels = {}
    for listed in sorted(folder.glob("*.txt")):
        for name in listed.read_text().split():
            stem = Path(name).stem
            w, h = frames[stem]
            rows = []
            for line in (folder / name.replace("images", "labels")).with_suffix(".txt").read_text().splitlines():
                cx, cy, bw, bh = (float(v) for v in line.split()[1:])
                rows.append((-1, ((cx - bw / 2) * w, (cy - bh / 2) * h, (cx + bw / 2) * w, (cy + bh / 2) * h)))
            labels[stem] = (name, rows)
    return labels


def read_voc(folder: Path, frames: dict[str, tuple[int, int]]) -> Labels:
    labels: Labels = {}
    for listed in sorted((folder / "ImageSets/Main").glob("*.txt")):
        for stem in listed.read_text().split():
            root = ElementTree.parse(folder / "Annotations" / f"{stem}.xml").getroot()
            rows = []
            for element in root.iterfind("object"):
                box = [float(element.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
                rows.append((int(element.findtext("mine") or -1), (box[0], box[1], box[2], box[3])))
            labels[stem] = (f"JPEGImages/{root.findtext('filename')}", rows)
    return labels


WRITERS: dict[str, Callable[[Path, dict[str, list[Truth]]], Path]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
}
READERS: dict[str, Callable[[Path, dict[str, tuple[int, int]]], Labels]] = {
    "coco": read_coco,
    "yolo": read_yolo,
    "voc": read_voc,
}


def orientation_of(path: Path) -> int:
    with Image.open(path) as image:
        return int(image.getexif().get(0x0112, 0))


def stored_pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "changes.json" and "left-out" not in path.relative_to(folder).parts
    }


def expected_clip(truth: Truth, box: Box) -> Box:
    w, h = truth.frame
    return (max(box[0], 0), max(box[1], 0), min(box[2], w), min(box[3], h))


def check(seed: int, folder: Path) -> None:
    """Generate, repair and judge one dataset.

    Every fifth is large and most of its labels refer to the upright images, so that ambiguous ones stay in the copy.
    In every fourth, truncated images are kept if little of them is missing.
    """
    rng = np.random.default_rng(seed)
    form = FORMS[seed % 3]
    count, stored_share = (int(rng.integers(10, 15)), 0.15) if seed % 5 == 0 else (int(rng.integers(3, 7)), 0.5)
    images = [draw_image(rng, number, stored_share) for number in range(1, count)]
    cut = int(rng.integers(1, len(images)))
    splits = {"train": images[:cut], "val": images[cut:]} if rng.random() < 0.5 else {"train": images}
    data = folder / "data"
    data.mkdir(parents=True)
    source = WRITERS[form](data, splits)
    if rng.random() < 0.2:
        for path in data.rglob("*"):
            if path.suffix in (".json", ".txt", ".xml", ".yaml"):
                mark = b"\xef\xbb\xbf" if rng.random() < 0.5 else b""
                path.write_bytes(mark + path.read_bytes().replace(b"\n", b"\r\n"))
    before = files_of(data)
    decode = bool(rng.random() < 0.85)
    keep = decode and seed % 4 == 0
    report = examine(source, decode=decode, keep_truncated=keep)
    try:
        done = repair(report, folder / "out", keep_unlabelled=seed % 2 == 0)
    except DataError as error:
        if "no image can be used" in error.message:
            return
        raise
    assert files_of(data) == before, "the original was changed"
    changes = json.loads(done.changes_file.read_text())["changes"]
    left_out = {Path(c["file"]).stem for c in changes if c["op"] == "leave-out"}
    labels = READERS[form](folder / "out", {truth.stem: truth.frame for truth in images})
    for truth in images:
        if truth.stem not in labels:
            assert truth.stem in left_out, f"{truth} is gone and changes.json does not say so"
            continue
        assert not (decode and (truth.fault == "empty" or (truth.fault == "truncated" and not keep))), truth
        if truth.fault in ("missing", "empty") or (truth.fault == "truncated" and not keep):
            continue
        judge_image(form, truth, labels[truth.stem], folder / "out", data, decode=decode)
    again = examine(folder / "out" if done.data.is_dir() else done.data, decode=decode)
    repaired = {code for code in done.changes if CODES[code].repair} - set(done.not_repaired)
    assert not repaired & {f.code for f in again.findings}, [(f.code, f.message) for f in again.findings]
    twice = repair(again, folder / "twice", keep_unlabelled=seed % 2 == 0)
    assert json.loads(twice.changes_file.read_text())["changes"] == []
    assert files_of(folder / "twice") == files_of(folder / "out")


def judge_image(
    form: str, truth: Truth, labels: tuple[str, list[tuple[int, Box]]], out: Path, data: Path, *, decode: bool
) -> None:
    name, rows = labels
    if truth.fault == "no labels" and form != "coco":
        return
    # Without decoding, the declared size is trusted; and nothing may show which frame a box refers to.
    trusted = not decode and form != "yolo" and truth.declared not in (None, truth.frame)
    frame_unknown = form != "yolo" and truth.declared is None and 5 <= truth.orientation <= 8
    wanted = {identifier: [box] for identifier, box in truth.correct.items()}
    for identifier, box in truth.clipped.items():
        wanted[identifier] = [expected_clip(truth, box), *([box] if trusted or frame_unknown else [])]
    for identifier, boxes in wanted.items():
        found = [box for i, box in rows if i in (-1, identifier)]
        assert any(np.allclose(box, b, atol=1e-4) for box in found for b in boxes), f"{boxes} not in {rows}: {truth}"
    assert len(rows) == len(wanted), f"{truth.name} has {rows} in place of {wanted}; {truth}"
    if truth.fault == "truncated":
        return
    copy = out / name
    original = next(p for p in data.rglob("*") if p.name == truth.name)
    assert stored_pixels(copy) == stored_pixels(original)
    orientation = orientation_of(copy)
    if orientation != truth.orientation and truth.orientation != 9:
        assert orientation == 1
        assert truth.labels_are_stored, (
            f"{truth.name} was turned, although its labels are of the upright image: {truth}"
        )


@pytest.mark.parametrize("start", range(0, 240, 30))
def test_no_correct_box_is_lost_or_moved(tmp_path: Path, start: int) -> None:
    for seed in range(start, start + 30):
        check(seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(10_000, 14_000, 100))
def test_no_correct_box_is_lost_or_moved_in_thousands_of_datasets(tmp_path: Path, start: int) -> None:
    for seed in range(start, start + 100):
        check(seed, tmp_path / str(seed))

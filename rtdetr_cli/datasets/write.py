"""Write a checked dataset as COCO, YOLO or Pascal VOC, images included.

What a format has no place for (ids and areas in YOLO and VOC) goes into a file beside the labels, which our reader
knows and others ignore: a dataset comes back with every id, name and box.
"""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import yaml

from rtdetr_cli.datasets.kept import IDS_FILE
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.datasets.yolo import label_path
from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.images.decode import IMAGE_SUFFIXES, usual_suffix


def write_dataset(parts: dict[str, Dataset], form: str, to: Path) -> Path:
    """Write every split below `to` and return what to train on.

    Args:
        parts: split -> its images and boxes.
        form: `coco`, `yolo` or `voc`.
        to: a folder that is new or empty.

    Raises:
        DataError: a name cannot be written in that format.
        RtdetrError: the folder cannot be written.
    """
    _refuse_names(parts, form)
    try:
        to.mkdir(parents=True, exist_ok=True)
        return _WRITERS[form](parts, to)
    except OSError as error:
        raise RtdetrError(f"{to} cannot be written: {error.strerror or error}", code="output") from error


def _refuse_names(parts: dict[str, Dataset], form: str) -> None:
    categories = next(iter(parts.values())).categories
    names = [c.name for c in categories]
    if form == "voc" and len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two categories are called {twice!r}, which VOC cannot tell apart", hint="--convert coco")
    for name in names:
        # XML 1.0 has no control characters and no ends of its planes, and both readers strip what surrounds a name.
        odd = any(unicodedata.category(c) in _CONTROL or c in "\ufffe\uffff" for c in name)
        if form != "coco" and (odd or name != name.strip()):
            raise DataError(f"the class name {name!r} cannot be written as {form}", hint="--convert coco")


_CONTROL = frozenset(("Cc", "Cs", "Zl", "Zp"))


# ---- images


def image_names(dataset: Dataset, *, flat: bool, stems: bool, taken: set[str]) -> list[str]:
    """Return a name below the split's folder for each image.

    Args:
        dataset: one split.
        flat: no subfolders, and nothing that a line of text cannot hold.
        stems: two images may not differ in their suffix alone, since their label files would be one; and each must
            have a suffix that is known, since a folder's other files count as no images.
        taken: names (or stems) given so far; gets the new ones.
    """
    files = [PurePosixPath(dataset.file_names[i]) for i in range(len(dataset))]
    common = os.path.commonpath([str(f.parent) for f in files]) if files and not _mixed(files) else ""
    result = []
    for index, file in enumerate(files):
        short = file.relative_to(common) if common and common != "." else file
        text = str(short)
        if flat or short.is_absolute() or ".." in short.parts:
            text = "__".join(part for part in short.parts if part not in ("/", ".."))
        stem, suffix = text[: len(text) - len(file.suffix)], file.suffix
        if stems and suffix.lower() not in IMAGE_SUFFIXES:
            stem, suffix = text, usual_suffix(dataset.path(index))
        if flat:
            stem = _one_line(stem)
        unique, number = stem, 2
        while (unique if stems else unique + suffix).lower() in taken:
            unique, number = f"{stem}_{number}", number + 1
        taken.add((unique if stems else unique + suffix).lower())
        result.append(unique + suffix)
    return result


def _one_line(name: str) -> str:
    """Return a name that a list of names can hold: bytes that are not UTF-8 become `%E4`, line breaks `_`."""
    plain = []
    for c in name.strip():
        kind = unicodedata.category(c)
        plain.append(f"%{ord(c) - 0xDC00:02X}" if kind == "Cs" else "_" if kind in _CONTROL else c)
    return "".join(plain)


def _mixed(files: list[PurePosixPath]) -> bool:
    return len({file.is_absolute() for file in files}) > 1


def _copy(dataset: Dataset, index: int, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(dataset.path(index), to)


# ---- COCO


def _write_coco(parts: dict[str, Dataset], to: Path) -> Path:
    (to / "annotations").mkdir(exist_ok=True)
    for split, dataset in parts.items():
        names = image_names(dataset, flat=False, stems=False, taken=set())
        for index, name in enumerate(names):
            _copy(dataset, index, to / split / name)
        document = {
            "info": {"description": f"{dataset.name}, {split}, written by rtdetr-cli"},
            "images": [
                {"id": image_id, "file_name": name, "width": width, "height": height}
                for image_id, name, (width, height) in zip(
                    dataset.image_ids.tolist(), names, dataset.sizes_wh.tolist(), strict=True
                )
            ],
            "annotations": _coco_annotations(dataset),
            "categories": [{"id": c.id, "name": c.name} for c in dataset.categories],
        }
        path = to / "annotations" / f"instances_{split}.json"
        path.write_text(_lines(document), "utf-8")
    if len(parts) == 1:
        return to / "annotations" / f"instances_{next(iter(parts))}.json"
    return to


def _coco_annotations(dataset: Dataset) -> list[dict[str, Any]]:
    images = np.repeat(dataset.image_ids, np.diff(dataset.offsets)).tolist()
    boxes = dataset.boxes_xyxy_px.copy()
    boxes[:, 2:] -= boxes[:, :2]
    ids = np.asarray(dataset.category_ids, np.int64)
    columns = (
        dataset.annotation_ids.tolist(),
        images,
        ids[dataset.labels].tolist() if len(dataset.labels) else [],
        boxes.round(6).tolist(),
        dataset.areas.round(6).tolist(),
        dataset.crowd.astype(int).tolist(),
    )
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _lines(document: dict[str, Any]) -> str:
    """Return JSON with one entry a line: diffs and line numbers then mean something."""
    members = []
    for key, value in document.items():
        if isinstance(value, list):
            entries = ",\n".join(json.dumps(entry) for entry in value)
            members.append(f"{json.dumps(key)}: [\n{entries}\n]" if value else f"{json.dumps(key)}: []")
        else:
            members.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(members) + "\n}\n"


# ---- YOLO


def _write_yolo(parts: dict[str, Dataset], to: Path) -> Path:
    dataset = next(iter(parts.values()))
    kept: dict[str, Any] = {}
    for split, dataset in parts.items():
        names = image_names(dataset, flat=False, stems=True, taken=set())
        kept[split] = {}
        for index, name in enumerate(names):
            _copy(dataset, index, to / "images" / split / name)
            label = label_path(to / "images" / split / name)
            label.parent.mkdir(parents=True, exist_ok=True)
            width, height = dataset.sizes_wh[index].tolist()
            rows = dataset.annotations(index)
            lines = []
            for (x1, y1, x2, y2), category in zip(rows.boxes_xyxy_px.tolist(), rows.labels.tolist(), strict=True):
                shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                lines.append(f"{category} " + " ".join(f"{share:.10g}" for share in shares) + "\n")
            label.write_text("".join(lines), "utf-8")
            kept[split][f"images/{split}/{name}"] = _facts(dataset, index)
    (to / IDS_FILE).write_text(json.dumps({"splits": kept}), "utf-8")
    document = {
        **{split: f"images/{split}" for split in parts},
        "nc": len(dataset.categories),
        "names": [c.name for c in dataset.categories],
        "category_ids": [c.id for c in dataset.categories],
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1_000_000)
    path = to / "data.yaml"
    path.write_text(text, "utf-8")
    return path


def _facts(dataset: Dataset, index: int) -> dict[str, Any]:
    """Return the ids of an image and its boxes, with each box's area as a share of the image."""
    rows = dataset.annotations(index)
    width, height = dataset.sizes_wh[index].tolist()
    return {
        "id": int(dataset.image_ids[index]),
        "boxes": [
            [identifier, float(area) / (width * height), int(crowd)]
            for identifier, area, crowd in zip(
                rows.annotation_ids.tolist(), rows.areas.tolist(), rows.crowd.tolist(), strict=True
            )
        ],
    }


# ---- Pascal VOC


def _write_voc(parts: dict[str, Dataset], to: Path) -> Path:
    taken: set[str] = set()
    lists = to / "ImageSets" / "Main"
    for folder in (to / "Annotations", to / "JPEGImages", lists):
        folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {}
    dataset = next(iter(parts.values()))
    for split, dataset in parts.items():
        names = image_names(dataset, flat=True, stems=True, taken=taken)
        stems = []
        kept[split] = {}
        for index, name in enumerate(names):
            stem = name[: len(name) - len(PurePosixPath(name).suffix)]
            stems.append(stem)
            _copy(dataset, index, to / "JPEGImages" / name)
            (to / "Annotations" / f"{stem}.xml").write_text(_voc_file(dataset, index, name), "utf-8")
            kept[split][stem] = _facts(dataset, index)
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems), "utf-8")
    categories = [[c.id, c.name] for c in dataset.categories]
    (to / IDS_FILE).write_text(json.dumps({"categories": categories, "splits": kept}), "utf-8")
    return to


def _voc_file(dataset: Dataset, index: int, name: str) -> str:
    width, height = dataset.sizes_wh[index].tolist()
    rows = dataset.annotations(index)
    parts = [
        "<annotation>\n\t<folder>JPEGImages</folder>\n"
        f"\t<filename>{escape(name)}</filename>\n"
        f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        "\t<segmented>0</segmented>\n"
    ]
    for corners, label in zip(rows.boxes_xyxy_px.tolist(), rows.labels.tolist(), strict=True):
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"\t\t\t<{side}>{value:.10g}</{side}>\n" for side, value in sides)
        parts.append(
            f"\t<object>\n\t\t<name>{escape(dataset.categories[label].name)}</name>\n\t\t<pose>Unspecified</pose>\n"
            f"\t\t<truncated>0</truncated>\n\t\t<difficult>0</difficult>\n\t\t<bndbox>\n{box}\t\t</bndbox>\n\t</object>\n"
        )
    return "".join(parts) + "</annotation>\n"


_WRITERS: dict[str, Callable[[dict[str, Dataset], Path], Path]] = {
    "coco": _write_coco,
    "yolo": _write_yolo,
    "voc": _write_voc,
}

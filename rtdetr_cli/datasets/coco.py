"""Read and write COCO JSON.

Each image and annotation becomes a few numbers in flat arrays as soon as it is parsed: see `json_text` for why.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.findings import Findings, Spot
from rtdetr_cli.datasets.image_names import copy_image, image_names
from rtdetr_cli.datasets.json_text import JSONFault, lines_of, report_fault, walk_object
from rtdetr_cli.datasets.label_text import MAX_BYTES, Oddities, is_valid_class, is_valid_name
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Category, Dataset
from rtdetr_cli.text import counted, whole_number

_INT64 = 1 << 63
_INT32 = 1 << 31
_MAX_NAMES_LISTED = 10
_NO_BOX = "has no bbox"


@dataclass(slots=True)
class _Document:
    """The entries of one file, column by column; every entry has a row, even a malformed one."""

    findings: Findings
    file: str
    split: str
    image_ids: list[Any] = field(default_factory=list)
    file_names: list[Any] = field(default_factory=list)
    widths: list[Any] = field(default_factory=list)
    heights: list[Any] = field(default_factory=list)
    annotation_ids: list[Any] = field(default_factory=list)
    box_images: list[Any] = field(default_factory=list)
    box_categories: list[Any] = field(default_factory=list)
    boxes: array[float] = field(default_factory=lambda: array("d"))
    areas: list[Any] = field(default_factory=list)
    crowd: list[Any] = field(default_factory=list)
    bad_boxes: dict[int, tuple[str, str]] = field(default_factory=dict)
    categories: list[Any] = field(default_factory=list)
    image_starts: array[int] = field(default_factory=lambda: array("q"))
    box_starts: array[int] = field(default_factory=lambda: array("q"))
    category_starts: array[int] = field(default_factory=lambda: array("q"))

    def image(self, entry: Any) -> None:
        if type(entry) is not dict:
            entry = {}
        self.image_ids.append(entry.get("id"))
        self.file_names.append(entry.get("file_name"))
        self.widths.append(entry.get("width"))
        self.heights.append(entry.get("height"))

    def annotation(self, entry: Any) -> None:
        if type(entry) is not dict:
            entry = {}
        get = entry.get
        self.annotation_ids.append(get("id"))
        self.box_images.append(get("image_id"))
        self.box_categories.append(get("category_id"))
        self.areas.append(get("area"))
        self.crowd.append(get("iscrowd"))
        try:
            x, y, w, h = get("bbox")
            if type(x) is bool or type(y) is bool or type(w) is bool or type(h) is bool:
                raise TypeError  # an array takes `true` for 1
            self.boxes.extend((x, y, w, h))
        except (TypeError, ValueError, OverflowError):
            row = len(self.box_images) - 1
            del self.boxes[4 * row :]  # `extend` may have added the first of the four
            self.boxes.extend((0.0, 0.0, 0.0, 0.0))
            self.bad_boxes[row] = _box_fault(get("bbox"))


def _box_fault(box: Any) -> tuple[str, str]:
    """Return code and message of a bbox that is not four numbers."""
    if box is None:
        return "box-count", _NO_BOX
    if not isinstance(box, list):
        return "box-not-number", f"has the bbox {_short(box)}, which is not a list of four numbers"
    if len(box) != 4:
        return "box-count", f"has a bbox of {counted(len(box), 'value')} instead of x, y, width, height"
    wrong = [v for v in box if not isinstance(v, (int, float)) or isinstance(v, bool)]
    if not wrong:
        return "box-not-finite", "has a bbox with a number that is too large"
    return "box-not-number", f"has {_short(wrong[0])} in its bbox, which is not a number"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_coco(dataset: RawDataset, files: dict[str, tuple[Path, Path]]) -> None:
    """Read one JSON file per split into `dataset`; `files` has each split's label file and folder of images."""
    oddities = Oddities()
    documents: dict[str, tuple[_Document, str]] = {}
    for split, (path, _) in files.items():
        result = _read_document(dataset, path, split, oddities)
        if result is not None:
            documents[split] = result
    oddities.report(dataset.findings)
    names = _categories(documents, dataset.findings)
    ids = _category_ids(names)
    keys = sorted(names, key=lambda key: ids[key])
    dataset.categories = tuple(Category(ids[key], names[key]) for key in keys)
    labels = {key: label for label, key in enumerate(keys)}
    words = [key for key in names if isinstance(key, str)]
    if words:
        first, text = next(iter(documents.values()))
        mapping = ", ".join(f"{_short(word)} is {ids[word]}" for word in words[:_MAX_NAMES_LISTED])
        more = len(words) - _MAX_NAMES_LISTED
        dataset.findings.add(
            "id-not-integer",
            f"the category ids are not integers, so they are numbered: {mapping}"
            + (f", and so on for {more:,} more" if more > 0 else ""),
            file=first.file,
            line=int(lines_of(text, first.category_starts)[0]) if first.category_starts else 0,
        )
    for split, (document, text) in documents.items():
        dataset.splits[split] = _read_split(document, text, labels, files[split][1])


def _read_document(dataset: RawDataset, path: Path, split: str, oddities: Oddities) -> tuple[_Document, str] | None:
    file, text = dataset.read_label(path, oddities, limit=MAX_BYTES)
    if text is None:
        return None
    findings = dataset.findings
    document = _Document(findings, file, split)
    try:
        keys = walk_object(
            text,
            {
                "images": (document.image, document.image_starts),
                "annotations": (document.annotation, document.box_starts),
                "categories": (document.categories.append, document.category_starts),
            },
        )
    except JSONFault as fault:
        report_fault(findings, text, fault, file)
        return None
    absent = [key for key in ("images", "categories") if key not in keys]
    if absent:
        findings.add("file-malformed", f"has no {' and no '.join(absent)}: it is not a COCO file", file=file, line=1)
        return None
    return document, text


def _category_ids(keys: Collection[int | str]) -> dict[int | str, int]:
    """Return the id of each category: itself, or for a word the lowest free number from 1, in their order."""
    used = {key for key in keys if isinstance(key, int)}
    free = (number for number in count(1) if number not in used)
    return {key: key if isinstance(key, int) else next(free) for key in keys}


def _categories(documents: dict[str, tuple[_Document, str]], findings: Findings) -> dict[int | str, str]:
    """Return id -> name over all files."""
    names: dict[int | str, str] = {}
    first: dict[int | str, str] = {}
    for document, text in documents.values():
        seen: set[int | str] = set()
        lines = lines_of(text, document.category_starts)
        for position, entry in enumerate(document.categories):
            where: dict[str, Any] = {"file": document.file, "line": int(lines[position])}
            fields = entry if isinstance(entry, dict) else {}
            identifier, name = fields.get("id"), fields.get("name")
            key = id_key(identifier)
            usable_id = isinstance(key, int) or (isinstance(identifier, str) and is_valid_name(identifier.strip()))
            if key is None or not usable_id or not isinstance(name, str) or not is_valid_class(name):
                findings.add("category-malformed", f"the category {_short(entry)} lacks an id or a name", **where)
                continue
            if names.get(key, name) != name:
                place = "here" if key in seen else f"in {first[key]}"
                message = f"category {key} is called {name!r}, but {names[key]!r} {place}"
                findings.add("category-conflict", message, **where)
            elif key in seen:
                findings.add("category-duplicate-name", f"category {key} ({name!r}) is listed twice", **where)
            seen.add(key)
            names.setdefault(key, name)
            first.setdefault(key, document.file)
    return names


def id_key(value: Any) -> int | str | None:
    """Return an id as an integer where it is one, as text otherwise, None where it is neither."""
    if type(value) is int:
        return value if -_INT64 <= value < _INT64 else f"{value:x}"
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, str):
        number = whole_number(value.strip())
        return value if number is None else number
    return None


def _keys(values: list[Any]) -> tuple[list[Any], list[int]]:
    """Return ids to compare by, and the rows whose id is not an integer."""
    if not values or (set(map(type, values)) == {int} and max(values) < _INT64 and min(values) >= -_INT64):
        return values, []
    return [id_key(v) for v in values], [
        row for row, v in enumerate(values) if v is not None and not (type(v) is int and -_INT64 <= v < _INT64)
    ]


def _integers(keys: list[Any]) -> NDArray[np.int64]:
    """Return the ids, or numbers from 1 if one of them is not an integer."""
    if all(type(k) is int for k in keys):
        return np.asarray(keys, np.int64)
    return np.arange(1, len(keys) + 1, dtype=np.int64)


def _sides(values: list[Any]) -> NDArray[np.int32]:
    """Return widths or heights; 0 where the file declares none."""
    if set(map(type, values)) <= {int} and all(0 < v < _INT32 for v in values):
        return np.asarray(values, np.int32)
    sides = []
    for value in values:
        key = id_key(value)
        sides.append(key if isinstance(key, int) and 0 < key < _INT32 else 0)
    return np.asarray(sides, np.int32)


def _floats(values: list[Any]) -> NDArray[np.float64]:
    """Return areas; NaN where there is none."""
    try:
        return np.asarray(values, np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        good = [float(v) if isinstance(v, float) or (type(v) is int and abs(v) < _INT64) else np.nan for v in values]
        return np.asarray(good, np.float64)


def _read_split(document: _Document, text: str, labels: dict[int | str, int], root: Path) -> RawSplit:
    image_lines = lines_of(text, document.image_starts)
    image_keys, rows, index_of = _check_images(document, image_lines)
    boxes = _Boxes(document, index_of, lines_of(text, document.box_starts))
    classes = np.fromiter((labels.get(k, -1) for k in boxes.category_keys), np.int64, len(boxes.category_keys))
    _check_boxes(boxes, classes, labels)
    annotation_ids = _annotation_ids(boxes)
    count = len(boxes.image_keys)
    keep = (boxes.images >= 0) & (classes >= 0)
    keep[list(document.bad_boxes)] = False
    corners = np.frombuffer(document.boxes, np.float64).reshape(-1, 4).copy() if count else np.zeros((0, 4))
    with np.errstate(over="ignore", invalid="ignore"):
        corners[:, 2:] += corners[:, :2]
    sizes = np.stack([_sides(document.widths), _sides(document.heights)], 1).reshape(-1, 2)
    all_usable = len(rows) == len(image_keys)
    split = RawSplit(
        split=document.split,
        root=root,
        label_files=[document.file],
        # File names made on Windows have the other separator.
        file_names=[document.file_names[row].replace("\\", "/") for row in rows],
        image_ids=_integers(image_keys if all_usable else [image_keys[row] for row in rows]),
        sizes_wh=sizes[rows],
        image_labels=np.zeros(len(rows), np.int32),
        image_lines=image_lines[rows],
        image_entries=np.asarray(rows, np.int32),
        box_images=boxes.images,
        boxes_xyxy_px=corners,
        labels=classes,
        areas=_floats(document.areas),
        crowd=np.fromiter((c not in (None, 0, "0") for c in document.crowd), np.bool_, count),
        annotation_ids=annotation_ids,
        box_lines=boxes.lines,
        box_entries=np.arange(count, dtype=np.int32),
    )
    if not keep.all():
        split.keep_boxes(keep)
    split.sort_boxes()
    return split


def _check_images(
    document: _Document, lines: NDArray[np.int32]
) -> tuple[list[Any], NDArray[np.int64], dict[int | str, int]]:
    """Report malformed images; return the ids of all, the rows of the usable ones, and id -> index among these."""
    keys, not_integer = _keys(document.image_ids)
    _report_odd_ids(document, "image", document.image_ids, not_integer, lines)
    index_of: dict[int | str, int] = {}
    rows: list[int] = []
    for row, (key, name) in enumerate(zip(keys, document.file_names, strict=True)):
        where: dict[str, Any] = {"file": document.file, "line": int(lines[row]), "spot": Spot(document.split, -1, row)}
        if key is None or type(name) is not str or not is_valid_name(name):
            what = f"the id {_short(document.image_ids[row])}" if key is None else f"the file name {_short(name)}"
            document.findings.add("entry-malformed", f"image {row} of the list has {what}", **where)
            continue
        if key in index_of:
            other = document.file_names[rows[index_of[key]]]
            message = f"the image id {key} belongs to {other} and to {name}"
            document.findings.add("image-id-duplicate", message, image_id=key, **where)
        else:
            index_of[key] = len(rows)
        rows.append(row)
    return keys, np.asarray(rows, np.int64), index_of


def _report_odd_ids(document: _Document, kind: str, ids: list[Any], rows: list[int], lines: NDArray[np.int32]) -> None:
    """Report the first id that is not an integer, and how many there are."""
    if not rows:
        return
    more = f" (and {len(rows) - 1:,} more)" if len(rows) > 1 else ""
    message = f"the {kind} id {_short(ids[rows[0]])} is not an integer{more}"
    document.findings.add("id-not-integer", message, file=document.file, line=int(lines[rows[0]]))


class _Boxes:
    """The annotations of one file with the images they belong to, and how findings refer to them."""

    def __init__(self, document: _Document, index_of: dict[int | str, int], lines: NDArray[np.int32]) -> None:
        self.document, self.lines = document, lines
        self.image_keys, _ = _keys(document.box_images)
        self.category_keys, _ = _keys(document.box_categories)
        self.annotation_keys, not_integer = _keys(document.annotation_ids)
        self.images = np.fromiter((index_of.get(k, -1) for k in self.image_keys), np.int64, len(self.image_keys))
        _report_odd_ids(document, "annotation", document.annotation_ids, not_integer, lines)

    def report(self, code: str, row: int, message: str) -> None:
        key = self.annotation_keys[row]
        self.document.findings.add(
            code,
            f"annotation {key if key is not None else f'row {row}'} {message}",
            file=self.document.file,
            line=int(self.lines[row]),
            image_id=self.image_keys[row],
            annotation_id=key,
            spot=Spot(self.document.split, int(self.images[row]), row),
        )


def _check_boxes(boxes: _Boxes, classes: NDArray[np.int64], labels: dict[int | str, int]) -> None:
    """Report annotations without an image, a category or a box."""
    document = boxes.document
    for row in np.flatnonzero(boxes.images < 0).tolist():
        key = boxes.image_keys[row]
        if key is None:
            boxes.report("annotation-malformed", row, f"has the image_id {_short(document.box_images[row])}")
        else:
            boxes.report("annotation-orphan", row, f"belongs to image {key}, which is not in the list of images")
    known = counted(len(labels), "category", "categories")
    numbers = [key for key in labels if isinstance(key, int)]
    known += f" (ids {min(numbers)} to {max(numbers)})" if numbers and len(numbers) == len(labels) else ""
    for row in np.flatnonzero(classes < 0).tolist():
        key = boxes.category_keys[row]
        if key is None:
            boxes.report("annotation-malformed", row, f"has the category_id {_short(document.box_categories[row])}")
        else:
            boxes.report("category-unknown", row, f"has category {key}, which is not among the {known}")
    if len(document.bad_boxes) == len(document.box_images) > 1 and {m for _, m in document.bad_boxes.values()} == {
        _NO_BOX
    }:
        message = f"has {len(document.box_images):,} annotations, and none of them has a bbox"
        document.findings.add("box-none", message, file=document.file, line=int(boxes.lines[0]))
        return
    for row, (code, message) in document.bad_boxes.items():
        boxes.report(code, row, message)


def _annotation_ids(boxes: _Boxes) -> NDArray[np.int64]:
    """Return unique ids; the later ones of an id that appears twice are renumbered."""
    ids = _integers(boxes.annotation_keys)
    unique, first = np.unique(ids, return_index=True)
    if len(unique) == len(ids):
        return ids
    later = np.ones(len(ids), np.bool_)
    later[first] = False
    free = int(unique.max()) + 1
    if free + len(ids) >= _INT64:
        free = 1
    ids = ids.copy()
    used = set(unique.tolist()) if free == 1 else set()
    for row in np.flatnonzero(later).tolist():
        boxes.report("annotation-id-duplicate", row, "appears more than once")
        while free in used:
            free += 1
        ids[row] = free
        free += 1
    return ids


# ---- writing


def write_coco(parts: dict[str, Dataset], to: Path) -> Path:
    """Write every split as `annotations/instances_SPLIT.json` with its images in a folder; return what to train on."""
    (to / "annotations").mkdir(exist_ok=True)
    for split, dataset in parts.items():
        names = image_names(dataset, flat=False, stems=False, used=set())
        for index, name in enumerate(names):
            copy_image(dataset, index, to / split / name)
        document = {
            "info": {"description": f"{dataset.name}, {split}, written by rtdetr-cli"},
            "images": [
                {"id": image_id, "file_name": name, "width": width, "height": height}
                for image_id, name, (width, height) in zip(
                    dataset.image_ids.tolist(), names, dataset.sizes_wh.tolist(), strict=True
                )
            ],
            "annotations": _annotations(dataset),
            "categories": [{"id": c.id, "name": c.name} for c in dataset.categories],
        }
        path = to / "annotations" / f"instances_{split}.json"
        path.write_text(format_document(document), "utf-8")
    if len(parts) == 1:
        return to / "annotations" / f"instances_{next(iter(parts))}.json"
    return to


def _annotations(dataset: Dataset) -> list[dict[str, Any]]:
    images = np.repeat(dataset.image_ids, np.diff(dataset.offsets)).tolist()
    boxes = dataset.boxes_xyxy_px.copy()
    boxes[:, 2:] -= boxes[:, :2]
    ids = np.asarray(dataset.category_ids, np.int64)
    columns = {
        "id": dataset.annotation_ids.tolist(),
        "image_id": images,
        "category_id": ids[dataset.labels].tolist() if len(dataset.labels) else [],
        "bbox": boxes.round(6).tolist(),
        "area": dataset.areas.round(6).tolist(),
        "iscrowd": dataset.crowd.astype(int).tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def format_document(document: dict[str, Any]) -> str:
    """Return JSON with one list entry per line, so that diffs and line numbers are of use."""
    members = []
    for key, value in document.items():
        if isinstance(value, list):
            entries = ",\n".join(json.dumps(entry) for entry in value)
            members.append(f"{json.dumps(key)}: [\n{entries}\n]" if value else f"{json.dumps(key)}: []")
        else:
            members.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(members) + "\n}\n"

"""Read and write COCO JSON.

Each image and annotation becomes a few numbers in flat arrays as soon as it is parsed: see `json_text` for why.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.coco_files import find_image_folder
from rtdetr_cli.datasets.findings import Findings
from rtdetr_cli.datasets.image_names import copy_image, image_names
from rtdetr_cli.datasets.json_text import JSONFault, lines_of, report_fault, walk_object
from rtdetr_cli.datasets.label_text import MAX_BYTES, is_utf8, is_valid_name
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Category, Dataset, Spot
from rtdetr_cli.text import counted, whole_number

_INT64 = 1 << 63
_INT32 = 1 << 31
_MAX_NAMES_LISTED = 10
_NO_BOX = "has no bbox"


class _Document:
    """The entries of one file, column by column; every entry has a row, even a malformed one."""

    def __init__(self, findings: Findings, file: str, split: str) -> None:
        self.findings, self.file, self.split = findings, file, split
        self.images: dict[str, list[Any]] = {key: [] for key in ("id", "file_name", "width", "height")}
        self.annotations: dict[str, list[Any]] = {
            key: [] for key in ("id", "image_id", "category_id", "area", "iscrowd")
        }
        self._image_columns = [(key, column.append) for key, column in self.images.items()]
        self._annotation_columns = [(key, column.append) for key, column in self.annotations.items()]
        self.categories: list[Any] = []
        self.boxes = array("d")
        self.bad_boxes: dict[int, tuple[str, str]] = {}

    def walk(self, text: str) -> set[str]:
        """Take every entry of the file, and return the keys of its object."""
        visits = {"images": self._image, "annotations": self._annotation, "categories": self.categories.append}
        starts: dict[str, array[int]] = {key: array("q") for key in visits}
        keys = walk_object(text, {key: (visit, starts[key]) for key, visit in visits.items()})
        self.image_lines, self.box_lines, self.category_lines = (lines_of(text, where) for where in starts.values())
        return keys

    def _image(self, entry: Any) -> None:
        get = (entry if type(entry) is dict else {}).get
        for key, append in self._image_columns:
            append(get(key))

    def _annotation(self, entry: Any) -> None:
        get = (entry if type(entry) is dict else {}).get
        for key, append in self._annotation_columns:
            append(get(key))
        box: Any = get("bbox")
        try:
            x, y, w, h = box
            if bool in (type(x), type(y), type(w), type(h)):
                raise TypeError  # an array takes `true` for 1
            self.boxes.extend((x, y, w, h))
        except (TypeError, ValueError, OverflowError):
            row = len(self.annotations["id"]) - 1
            del self.boxes[4 * row :]  # `extend` may have added the first of the four
            self.boxes.extend((0.0, 0.0, 0.0, 0.0))
            self.bad_boxes[row] = _box_fault(box)


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


def read_coco(dataset: RawDataset, files: dict[str, Path]) -> None:
    """Read one JSON file per split into `dataset`."""
    documents = {split: _read_document(dataset, path, split) for split, path in files.items()}
    read = [document for document in documents.values() if document is not None]
    dataset.oddities.report(dataset.findings)
    names = _categories(read, dataset.findings)
    ids = _category_ids(names)
    keys = sorted(names, key=lambda key: ids[key])
    dataset.categories = tuple(Category(ids[key], names[key]) for key in keys)
    labels = {key: label for label, key in enumerate(keys)}
    words = [key for key in names if isinstance(key, str)]
    if words:
        mapping = ", ".join(f"{_short(word)} is {ids[word]}" for word in words[:_MAX_NAMES_LISTED])
        more = len(words) - _MAX_NAMES_LISTED
        dataset.findings.add(
            "id-not-integer",
            f"the category ids are not integers, so they are numbered: {mapping}"
            + (f", and so on for {more:,} more" if more > 0 else ""),
            file=read[0].file,
            line=next(iter(read[0].category_lines), 0),
        )
    for document in read:
        root = dataset.images or find_image_folder(files[document.split], document.split, dataset.folder)
        dataset.splits[document.split] = _read_split(document, labels, root)


def _read_document(dataset: RawDataset, path: Path, split: str) -> _Document | None:
    file, text = dataset.read_label(path, limit=MAX_BYTES)
    if text is None:
        return None
    document = _Document(dataset.findings, file, split)
    try:
        keys = document.walk(text)
    except JSONFault as fault:
        report_fault(dataset.findings, text, fault, file)
        return None
    absent = [key for key in ("images", "categories") if key not in keys]
    if absent:
        message = f"has no {' and no '.join(absent)}: it is not a COCO file"
        dataset.findings.add("file-malformed", message, file=file, line=1)
        return None
    return document


def _category_ids(keys: Collection[int | str]) -> dict[int | str, int]:
    """Return the id of each category: itself, or for a word the lowest free number from 1, in their order."""
    used = {key for key in keys if isinstance(key, int)}
    free = (number for number in count(1) if number not in used)
    return {key: key if isinstance(key, int) else next(free) for key in keys}


def _categories(documents: list[_Document], findings: Findings) -> dict[int | str, str]:
    """Return id -> name over all files."""
    names: dict[int | str, str] = {}
    first: dict[int | str, str] = {}
    for document in documents:
        seen: set[int | str] = set()
        for line, entry in zip(document.category_lines, document.categories, strict=True):
            where: dict[str, Any] = {"file": document.file, "line": line}
            fields = entry if isinstance(entry, dict) else {}
            identifier, name = fields.get("id"), fields.get("name")
            key = id_key(identifier)
            usable_id = isinstance(key, int) or (isinstance(identifier, str) and is_valid_name(identifier.strip()))
            if (
                not isinstance(name, str)
                or not is_valid_name(name)
                or not is_utf8(name)
                or key is None
                or not usable_id
            ):
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


def _are_integers(values: list[Any]) -> bool:
    return not values or (set(map(type, values)) == {int} and max(values) < _INT64 and min(values) >= -_INT64)


def _report_odd_ids(document: _Document, kind: str, ids: list[Any], lines: NDArray[np.int32]) -> None:
    """Report the first id that is not an integer, and how many there are."""
    rows = [] if _are_integers(ids) else [n for n, v in enumerate(ids) if v is not None and not _are_integers([v])]
    if rows:
        more = f" (and {len(rows) - 1:,} more)" if len(rows) > 1 else ""
        message = f"the {kind} id {_short(ids[rows[0]])} is not an integer{more}"
        document.findings.add("id-not-integer", message, file=document.file, line=lines[rows[0]])


def _keys(values: list[Any]) -> list[Any]:
    return values if _are_integers(values) else [id_key(v) for v in values]


def _integers(keys: list[Any]) -> NDArray[np.int64]:
    """Return the ids, or numbers from 1 if one of them is not an integer."""
    if all(type(k) is int for k in keys):
        return np.asarray(keys, np.int64)
    return np.arange(1, len(keys) + 1, dtype=np.int64)


def _sides(values: list[Any]) -> NDArray[np.int32]:
    """Return widths or heights; 0 where the file declares none."""
    keys = map(id_key, values)
    return np.asarray([key if isinstance(key, int) and 0 < key < _INT32 else 0 for key in keys], np.int32)


def _floats(values: list[Any]) -> NDArray[np.float64]:
    """Return areas; NaN where there is none."""
    try:
        return np.asarray(values, np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        good = [float(v) if isinstance(v, float) or (type(v) is int and abs(v) < _INT64) else np.nan for v in values]
        return np.asarray(good, np.float64)


def _read_split(document: _Document, labels: dict[int | str, int], root: Path) -> RawSplit:
    _report_odd_ids(document, "image", document.images["id"], document.image_lines)
    rows, index_of = _check_images(document)
    _report_odd_ids(document, "annotation", document.annotations["id"], document.box_lines)
    boxes = _Boxes(document, index_of, labels)
    boxes.check()
    count = len(boxes.images)
    keep = (boxes.images >= 0) & (boxes.labels >= 0)
    keep[list(document.bad_boxes)] = False
    corners = np.array(document.boxes, np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):
        corners[:, 2:] += corners[:, :2]
    sizes = np.stack([_sides(document.images["width"]), _sides(document.images["height"])], 1)
    split = RawSplit(
        split=document.split,
        root=root,
        label_files=[document.file],
        # File names made on Windows have the other separator.
        file_names=[document.images["file_name"][row].replace("\\", "/") for row in rows],
        image_ids=_integers([id_key(document.images["id"][row]) for row in rows]),
        sizes_wh=sizes[rows],
        image_labels=np.zeros(len(rows), np.int32),
        image_lines=document.image_lines[rows],
        image_entries=rows.astype(np.int32),
        box_images=boxes.images,
        boxes_xyxy_px=corners,
        labels=boxes.labels,
        areas=_floats(document.annotations["area"]),
        crowd=np.fromiter((c not in (None, 0, "0") for c in document.annotations["iscrowd"]), np.bool_, count),
        annotation_ids=boxes.unique_ids(),
        box_lines=document.box_lines,
        box_entries=np.arange(count, dtype=np.int32),
    )
    split.take_boxes(keep)
    split.sort_boxes()
    return split


def _check_images(document: _Document) -> tuple[NDArray[np.int64], dict[int | str, int]]:
    """Report malformed images; return the rows of the usable ones, and id -> index among these."""
    index_of: dict[int | str, int] = {}
    rows: list[int] = []

    def report(code: str, message: str, key: int | str | None = None) -> None:
        line, spot = document.image_lines[row], Spot(document.split, -1, row)
        document.findings.add(code, message, file=document.file, line=line, image_id=key, spot=spot)

    ids, names = document.images["id"], document.images["file_name"]
    for row, (key, name) in enumerate(zip(_keys(ids), names, strict=True)):
        if key is None or type(name) is not str or not is_valid_name(name):
            what = f"the id {_short(ids[row])}" if key is None else f"the file name {_short(name)}"
            report("entry-malformed", f"image {row} of the list has {what}")
            continue
        if key in index_of:
            other = names[rows[index_of[key]]]
            report("image-id-duplicate", f"the image id {key} belongs to {other} and to {name}", key)
        index_of.setdefault(key, len(rows))
        rows.append(row)
    return np.asarray(rows, np.int64), index_of


class _Boxes:
    """The annotations of one file with their images and classes (-1 for unknown), and how findings refer to them."""

    def __init__(self, document: _Document, index_of: dict[int | str, int], labels: dict[int | str, int]) -> None:
        self.document, self.known = document, labels
        self.image_keys = _keys(document.annotations["image_id"])
        self.category_keys = _keys(document.annotations["category_id"])
        self.annotation_keys = _keys(document.annotations["id"])
        self.images = np.asarray([index_of.get(key, -1) for key in self.image_keys], np.int64)
        self.labels = np.asarray([labels.get(key, -1) for key in self.category_keys], np.int64)

    def report(self, code: str, row: int, message: str) -> None:
        key = self.annotation_keys[row]
        self.document.findings.add(
            code,
            f"annotation {key if key is not None else f'row {row}'} {message}",
            file=self.document.file,
            line=self.document.box_lines[row],
            image_id=self.image_keys[row],
            annotation_id=key,
            spot=Spot(self.document.split, int(self.images[row]), row),
        )

    def check(self) -> None:
        """Report annotations without an image, a category or a box."""
        document = self.document
        known = counted(len(self.known), "category", "categories")
        numbers = [key for key in self.known if isinstance(key, int)]
        known += f" (ids {min(numbers)} to {max(numbers)})" if numbers and len(numbers) == len(self.known) else ""
        orphan = "belongs to image {}, which is not in the list of images"
        unknown = f"has category {{}}, which is not among the {known}"
        for name, found, keys, code, message in (
            ("image_id", self.images, self.image_keys, "annotation-orphan", orphan),
            ("category_id", self.labels, self.category_keys, "category-unknown", unknown),
        ):
            for row in np.flatnonzero(found < 0).tolist():
                if keys[row] is None:
                    value = _short(document.annotations[name][row])
                    self.report("annotation-malformed", row, f"has the {name} {value}")
                else:
                    self.report(code, row, message.format(keys[row]))
        faults = document.bad_boxes
        if len(faults) == len(self.images) > 1 and all(message == _NO_BOX for _, message in faults.values()):
            message = f"has {len(faults):,} annotations, and none of them has a bbox"
            document.findings.add("box-none", message, file=document.file, line=document.box_lines[0])
            return
        for row, (code, message) in faults.items():
            self.report(code, row, message)

    def unique_ids(self) -> NDArray[np.int64]:
        """Return unique ids; the later ones of an id that appears twice are renumbered."""
        ids = _integers(self.annotation_keys)
        unique, first = np.unique(ids, return_index=True)
        later = np.delete(np.arange(len(ids)), first)
        highest = int(unique[-1]) if len(unique) else 0
        free: Iterator[int] = count(highest + 1)
        if highest + 1 + len(ids) >= _INT64:
            used = set(unique.tolist())
            free = (number for number in count(1) if number not in used)
        for row, number in zip(later.tolist(), free, strict=False):
            self.report("annotation-id-duplicate", row, "appears more than once")
            ids[row] = number
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
        "category_id": ids[dataset.labels].tolist(),
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

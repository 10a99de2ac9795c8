"""Read COCO JSON.

The document is walked entry by entry: each image and annotation becomes a few numbers in flat arrays and is then
forgotten. That needs a tenth of the memory of the parsed document, is as fast, and knows on which line every entry
starts.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.findings import Findings, Spot
from rtdetr_cli.datasets.label_text import CUT_OFF_HINT, MAX_BYTES, Oddities, read_text
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Category
from rtdetr_cli.text import counted

_BLANK = re.compile(r"[ \t\n\r]*").match
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_INT64 = 1 << 63
_INT32 = 1 << 31
_WORDS_SHOWN = 10


class JSONFault(ValueError):
    """The text is no JSON, or not what was expected at `position`."""

    def __init__(self, message: str, position: int, code: str = "file-malformed") -> None:
        super().__init__(message)
        self.message, self.position, self.code = message, position, code


def scan_value(text: str, position: int) -> tuple[Any, int]:
    """Parse one JSON value and return it with the position behind it.

    Raises:
        JSONFault: there is none, or it is nested too deeply.
    """
    try:
        return _scan(text, position)
    except StopIteration as stop:
        raise JSONFault("the JSON ends, or breaks off, where a value should stand", stop.value) from None
    except json.JSONDecodeError as error:
        raise JSONFault(error.msg[:1].lower() + error.msg[1:], error.pos) from None
    except RecursionError:
        raise JSONFault("is nested too deeply", position, "file-bounds") from None
    except ValueError:  # a number of thousands of digits
        raise JSONFault("a number has too many digits", position) from None


def walk_list(text: str, position: int, visit: Callable[[Any], None], starts: array[int], ends: array[int]) -> int:
    """Call `visit` with every element of the list at `position`; note where each starts and ends.

    Returns:
        the position behind the list.

    Raises:
        JSONFault: the list is broken.
    """
    if text[position : position + 1] != "[":
        raise JSONFault("a list is expected", position)
    position = _end(_BLANK(text, position + 1))
    if text[position : position + 1] == "]":
        return position + 1
    follows = text.startswith
    while True:
        starts.append(position)
        value, position = scan_value(text, position)
        ends.append(position)
        visit(value)
        if follows(", {", position):  # how Python writes it: a shortcut for the long lists of one-line files
            position += 2
            continue
        position = _end(_BLANK(text, position))
        mark = text[position : position + 1]
        if mark == ",":
            position = _end(_BLANK(text, position + 1))
        elif mark == "]":
            return position + 1
        else:
            raise JSONFault("a comma or the end of the list is missing", position)


def walk_object(text: str, lists: dict[str, tuple[Callable[[Any], None], array[int], array[int]]]) -> dict[str, int]:
    """Walk the members of the document's object: those of `lists` element by element, others as a whole.

    Returns:
        every key with the position of its value.

    Raises:
        JSONFault: the document is no object, is broken, or has a key twice.
    """
    position = _end(_BLANK(text, 0))
    if text[position : position + 1] != "{":
        found = "a list" if text[position : position + 1] == "[" else "something else"
        raise JSONFault(f"a COCO file is an object with images, annotations and categories; this is {found}", position)
    keys: dict[str, int] = {}
    position = _end(_BLANK(text, position + 1))
    if text[position : position + 1] == "}":
        position += 1
    else:
        while True:
            start = position
            if text[position : position + 1] != '"':
                raise JSONFault("a key is expected", position)
            key, position = scan_value(text, position)
            if key in keys:
                raise JSONFault(f"the key {key!r} appears twice", start, "file-repeated-key")
            position = _end(_BLANK(text, position))
            if text[position : position + 1] != ":":
                raise JSONFault("a colon is missing", position)
            position = _end(_BLANK(text, position + 1))
            keys[key] = position
            if key in lists:
                if text[position : position + 1] != "[":
                    raise JSONFault(f"{key} must be a list", position)
                position = walk_list(text, position, *lists[key])
            else:
                _, position = scan_value(text, position)
            position = _end(_BLANK(text, position))
            mark = text[position : position + 1]
            if mark == ",":
                position = _end(_BLANK(text, position + 1))
            elif mark == "}":
                position += 1
                break
            else:
                raise JSONFault("a comma or the end of the object is missing", position)
    position = _end(_BLANK(text, position))
    if position != len(text):
        raise JSONFault("something follows the end of the document", position)
    return keys


def _end(match: re.Match[str] | None) -> int:
    assert match is not None  # the pattern matches the empty text
    return match.end()


def line_of(text: str, position: int) -> int:
    """Return the line of a position, from 1."""
    return text.count("\n", 0, position) + 1


def lines_of(text: str, positions: array[int]) -> NDArray[np.int32]:
    """Return the lines of many ascending positions, from 1."""
    where = np.frombuffer(positions, np.int64) if len(positions) else np.zeros(0, np.int64)
    if "\n" not in text:
        return np.ones(len(where), np.int32)
    if text.isascii():
        ends = np.flatnonzero(np.frombuffer(text.encode("ascii"), np.uint8) == 10)
    else:
        ends = np.fromiter((m.start() for m in re.finditer("\n", text)), np.int64)
    return (np.searchsorted(ends, where) + 1).astype(np.int32)


@dataclass(slots=True)
class _Document:
    """The entries of one file, column by column; a row each, whatever is wrong with it."""

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
            del self.boxes[4 * row :]  # `extend` may have taken the first of the four
            self.boxes.extend((0.0, 0.0, 0.0, 0.0))
            self.bad_boxes[row] = _box_fault(get("bbox"))


def _box_fault(box: Any) -> tuple[str, str]:
    if box is None:
        return "box-count", "has no bbox"
    if not isinstance(box, list):
        return "box-not-number", f"has the bbox {_short(box)}, which is no list of four numbers"
    if len(box) != 4:
        return "box-count", f"has a bbox of {counted(len(box), 'value')} in place of x, y, width, height"
    wrong = [v for v in box if not isinstance(v, (int, float)) or isinstance(v, bool)]
    if not wrong:
        return "box-not-finite", "has a bbox with a number beyond all bounds"
    return "box-not-number", f"has {_short(wrong[0])} in its bbox, which is no number"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nor(others: int) -> str:
    return f", nor are {others:,} more" if others > 1 else ", nor is one more" if others else ""


def read_coco(dataset: RawDataset, files: dict[str, tuple[Path, Path]]) -> None:
    """Read one JSON file for each split into `dataset`.

    Args:
        dataset: gets categories, splits and findings.
        files: split -> label file and the folder of its images.
    """
    oddities = Oddities()
    documents: dict[str, tuple[_Document, str]] = {}
    for split, (path, _) in files.items():
        shown = dataset.show(path)
        dataset.label_paths[shown] = path
        read = _read_document(path, shown, split, dataset.findings, oddities)
        if read is not None:
            documents[split] = read
    oddities.report(dataset.findings)
    names = _categories(documents, dataset.findings)
    ids = _numbered(names)
    keys = sorted(names, key=lambda key: ids[key])
    dataset.categories = tuple(Category(ids[key], names[key]) for key in keys)
    labels = {key: label for label, key in enumerate(keys)}
    words = [key for key in names if isinstance(key, str)]
    if words:
        first = next(iter(documents.values()))[0]
        mapping = ", ".join(f"{_short(word)} is {ids[word]}" for word in words[:_WORDS_SHOWN])
        more = len(words) - _WORDS_SHOWN
        dataset.findings.add(
            "id-not-integer",
            f"the category ids are not integers, so they are numbered: {mapping}"
            + (f", and so on for {more:,} more" if more > 0 else ""),
            file=first.file,
            line=int(lines_of(documents[first.split][1], first.category_starts)[0]) if first.category_starts else 0,
        )
    for split, (document, text) in documents.items():
        dataset.splits[split] = _split(document, text, labels, files[split][1])


def _read_document(
    path: Path, shown: str, split: str, findings: Findings, oddities: Oddities
) -> tuple[_Document, str] | None:
    text = read_text(path, shown, findings, oddities, limit=MAX_BYTES)
    if text is None:
        return None
    document = _Document(findings, shown, split)
    unused: array[int] = array("q")
    try:
        keys = walk_object(
            text,
            {
                "images": (document.image, document.image_starts, unused),
                "annotations": (document.annotation, document.box_starts, unused),
                "categories": (document.categories.append, document.category_starts, unused),
            },
        )
    except JSONFault as fault:
        message, position, hint = _told(text, fault)
        findings.add(fault.code, message, file=shown, line=line_of(text, position), hint=hint)
        return None
    absent = [key for key in ("images", "annotations", "categories") if key not in keys]
    if "images" in absent or "categories" in absent:
        findings.add("file-malformed", f"has no {' and no '.join(absent)}: it is not a COCO file", file=shown, line=1)
        return None
    return document, text


def _told(text: str, fault: JSONFault) -> tuple[str, int, str]:
    """Return what a fault of the whole file means for people, where it is, and a hint if there is a better one.

    A file that was cut off stops the parser with whatever it happens to wait for there; that says nothing to anybody.
    """
    end = len(text.rstrip())
    if not end:
        return "is empty", 0, CUT_OFF_HINT
    rest = text[fault.position : end]
    # What is left is the start of a value, of an escape, or nothing; for an open string the parser names its start.
    few = len(rest) < len(r"\u00e4") and not set(rest) & set("]}")
    open_string = fault.message.startswith("unterminated string") and not rest.endswith("}")
    if fault.code == "file-malformed" and (few or open_string or any(word.startswith(rest) for word in _WORDS)):
        where = f"line {line_of(text, end)}, column {_column(text, end)}"
        return f"breaks off at {where}: the file is cut off", end, CUT_OFF_HINT
    return f"{fault.message} (column {_column(text, fault.position)})", fault.position, ""


_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


def _column(text: str, position: int) -> int:
    return position - text.rfind("\n", 0, position)


def _numbered(keys: Collection[int | str]) -> dict[int | str, int]:
    """Return the id of each category: itself, or for a word the lowest number from 1 that is free, in their order."""
    taken = {key for key in keys if isinstance(key, int)}
    free = (number for number in count(1) if number not in taken)
    return {key: key if isinstance(key, int) else next(free) for key in keys}


def _categories(documents: dict[str, tuple[_Document, str]], findings: Findings) -> dict[int | str, str]:
    """Join the categories of all files."""
    names: dict[int | str, str] = {}
    first: dict[int | str, str] = {}
    for document, text in documents.values():
        seen: set[int | str] = set()
        lines = lines_of(text, document.category_starts)
        for position, entry in enumerate(document.categories):
            line = int(lines[position])
            said = entry.get("id") if isinstance(entry, dict) else None
            key = id_key(said)
            name = entry.get("name") if isinstance(entry, dict) else None
            word = isinstance(said, str) and sound_name(said.strip())
            if key is None or not (word or isinstance(key, int)) or not isinstance(name, str) or not sound_name(name):
                findings.add(
                    "category-malformed",
                    f"the category {_short(entry)} lacks an id or a name",
                    file=document.file,
                    line=line,
                )
                continue
            if names.get(key, name) != name:
                where = "here" if key in seen else f"in {first[key]}"
                findings.add(
                    "category-conflict",
                    f"category {key} is called {name!r}, but {names[key]!r} {where}",
                    file=document.file,
                    line=line,
                )
            elif key in seen:
                findings.add(
                    "category-duplicate-name",
                    f"category {key} ({name!r}) is listed twice",
                    file=document.file,
                    line=line,
                )
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
        text = value.strip()
        if text.isascii() and text.isdigit() and len(text) < 19:
            return int(text)
        return value
    return None


def _keys(values: list[Any]) -> tuple[list[int | str | None], list[int]]:
    """Return ids to compare by, and the rows whose id is not an integer."""
    if not values or (set(map(type, values)) == {int} and max(values) < _INT64 and min(values) >= -_INT64):
        return values, []
    return [id_key(v) for v in values], [
        row for row, v in enumerate(values) if v is not None and not (type(v) is int and -_INT64 <= v < _INT64)
    ]


def _integers(keys: list[Any]) -> NDArray[np.int64]:
    """Return ids as integers: themselves, or numbered from 1 in order where one of them is no integer."""
    if all(type(k) is int for k in keys):
        return np.asarray(keys, np.int64)
    return np.arange(1, len(keys) + 1, dtype=np.int64)


def _sides(values: list[Any]) -> NDArray[np.int32]:
    """Return widths or heights; 0 where the file does not say one."""
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


def _split(document: _Document, text: str, labels: dict[int | str, int], root: Path) -> RawSplit:
    findings, file, split = document.findings, document.file, document.split
    image_lines = lines_of(text, document.image_starts)
    box_lines = lines_of(text, document.box_starts)

    # ---- images
    image_keys, odd = _keys(document.image_ids)
    if odd:
        row = odd[0]
        findings.add(
            "id-not-integer",
            f"the image id {_short(document.image_ids[row])} is not an integer{_nor(len(odd) - 1)}",
            file=file,
            line=int(image_lines[row]),
        )
    position_of: dict[int | str, int] = {}
    kept: list[int] = []
    for row, (key, name) in enumerate(zip(image_keys, document.file_names, strict=True)):
        if key is None or type(name) is not str or not sound_name(name):
            what = f"the id {_short(document.image_ids[row])}" if key is None else f"the file name {_short(name)}"
            findings.add(
                "entry-malformed",
                f"image {row} of the list has {what}",
                file=file,
                line=int(image_lines[row]),
                spot=Spot(split, -1, row),
            )
            continue
        if key in position_of:
            other = document.file_names[kept[position_of[key]]]
            findings.add(
                "image-id-duplicate",
                f"the image id {key} belongs to {other} and to {name}",
                file=file,
                line=int(image_lines[row]),
                image_id=key,
                spot=Spot(split, -1, row),
            )
        else:
            position_of[key] = len(kept)
        kept.append(row)
    whole = len(kept) == len(image_keys)
    widths, heights = _sides(document.widths), _sides(document.heights)
    sizes = np.stack([widths, heights], 1) if len(widths) else np.zeros((0, 2), np.int32)
    rows = np.asarray(kept, np.int64)

    # ---- boxes
    box_keys, _ = _keys(document.box_images)
    category_keys, _ = _keys(document.box_categories)
    images = np.fromiter((position_of.get(k, -1) for k in box_keys), np.int64, len(box_keys))  # type: ignore[arg-type]
    classes = np.fromiter((labels.get(k, -1) for k in category_keys), np.int64, len(category_keys))  # type: ignore[arg-type]
    annotation_keys, odd = _keys(document.annotation_ids)
    if odd:
        row = odd[0]
        findings.add(
            "id-not-integer",
            f"the annotation id {_short(document.annotation_ids[row])} is not an integer{_nor(len(odd) - 1)}",
            file=file,
            line=int(box_lines[row]),
        )

    def told(row: int) -> dict[str, Any]:
        return {
            "file": file,
            "line": int(box_lines[row]),
            "image_id": box_keys[row],
            "annotation_id": annotation_keys[row],
            "spot": Spot(split, int(images[row]), row),
        }

    def called(row: int) -> str:
        return f"annotation {annotation_keys[row]}" if annotation_keys[row] is not None else f"annotation row {row}"

    for row in np.flatnonzero(images < 0).tolist():
        if box_keys[row] is None:
            findings.add(
                "annotation-malformed",
                f"{called(row)} has the image_id {_short(document.box_images[row])}",
                **told(row),
            )
        else:
            findings.add(
                "annotation-orphan",
                f"{called(row)} belongs to image {box_keys[row]}, which is not in the list of images",
                **told(row),
            )
    known = counted(len(labels), "category", "categories")
    numbers = [key for key in labels if isinstance(key, int)]
    known += f" (ids {min(numbers)} to {max(numbers)})" if numbers and len(numbers) == len(labels) else ""
    for row in np.flatnonzero(classes < 0).tolist():
        if category_keys[row] is None:
            findings.add(
                "annotation-malformed",
                f"{called(row)} has the category_id {_short(document.box_categories[row])}",
                **told(row),
            )
        else:
            findings.add(
                "category-unknown",
                f"{called(row)} has category {category_keys[row]}, which is not among the {known}",
                **told(row),
            )
    for row, (code, message) in document.bad_boxes.items():
        findings.add(code, f"{called(row)} {message}", **told(row))
    annotation_ids = _annotation_ids(annotation_keys, called, told, findings)

    keep = (images >= 0) & (classes >= 0)
    keep[list(document.bad_boxes)] = False
    boxes = np.frombuffer(document.boxes, np.float64).reshape(-1, 4).copy() if len(box_keys) else np.zeros((0, 4))
    with np.errstate(over="ignore", invalid="ignore"):
        boxes[:, 2:] += boxes[:, :2]
    taken = RawSplit(
        split=split,
        root=root,
        label_files=[file],
        file_names=[_native(document.file_names[row]) for row in kept],
        image_ids=_integers(image_keys if whole else [image_keys[row] for row in kept]),
        sizes_wh=sizes[rows],
        image_labels=np.zeros(len(rows), np.int32),
        image_lines=image_lines[rows],
        image_entries=rows.astype(np.int32),
        box_images=images,
        boxes_xyxy_px=boxes,
        labels=classes,
        areas=_floats(document.areas),
        crowd=np.fromiter((c not in (None, 0, "0") for c in document.crowd), np.bool_, len(box_keys)),
        annotation_ids=annotation_ids,
        box_lines=box_lines,
        box_entries=np.arange(len(box_keys), dtype=np.int32),
    )
    if not keep.all():
        taken.keep_boxes(keep)
    taken.sort_boxes()
    return taken


def _annotation_ids(
    keys: list[Any],
    called: Callable[[int], str],
    told: Callable[[int], dict[str, Any]],
    findings: Findings,
) -> NDArray[np.int64]:
    ids = _integers(keys)
    unique, first = np.unique(ids, return_index=True)
    if len(unique) == len(ids):
        return ids
    later = np.ones(len(ids), np.bool_)
    later[first] = False
    fresh = int(unique.max()) + 1
    if fresh + len(ids) >= _INT64:
        fresh = 1
    ids = ids.copy()
    taken = set(unique.tolist()) if fresh == 1 else set()
    for row in np.flatnonzero(later).tolist():
        findings.add("annotation-id-duplicate", f"{called(row)} appears more than once", **told(row))
        while fresh in taken:
            fresh += 1
        ids[row] = fresh
        fresh += 1
    return ids


def sound_name(name: str) -> bool:
    """Tell whether a name can be a file's or a class's at all: not empty, no NUL, nothing that no encoding has."""
    if not name or "\0" in name:
        return False
    if name.isascii():
        return True
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _native(name: str) -> str:
    """Return a file name with this system's separators: files made on Windows have the other one."""
    return name if "\\" not in name else name.replace("\\", "/")

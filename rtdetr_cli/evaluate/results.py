"""Detections as COCO results: read what anything made, write what was found here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.coco import xywh
from rtdetr_cli.evaluate.table import DetectionTable

KEYS = ("image_id", "category_id", "bbox", "score")


def read_results(path: Path, dataset: Dataset) -> DetectionTable:
    """Read a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`.

    An image may be named by the dataset's id or by its file name, with or without folder and suffix.

    Raises:
        DataError: the file is missing or no such list, or names images or classes that the split does not have;
            all kinds of fault are named, with how often each occurs and the first place.
    """
    rows = _load(path)
    faults = _Faults()
    images = {int(i): position for position, i in enumerate(dataset.image_ids)}
    by_name = _names(dataset) if any(isinstance(row.get("image_id"), str) for row in rows) else {}
    labels = {int(i): label for label, i in enumerate(dataset.category_ids)}

    image_index = np.full(len(rows), -1, np.int64)
    label = np.full(len(rows), -1, np.int64)
    boxes = np.zeros((len(rows), 4))
    scores = np.zeros(len(rows))
    for n, row in enumerate(rows):
        missing = [key for key in KEYS if key not in row]
        if missing:
            faults.add("incomplete", n, f"has no {missing[0]}")
            continue
        image, category = row["image_id"], row["category_id"]
        found = by_name.get(image) if isinstance(image, str) else _looked_up(image, images)
        if found is None:
            faults.add("image", n, f"names image {image!r}", image)
        else:
            image_index[n] = found
        known = _looked_up(category, labels)
        if known is None:
            faults.add("category", n, f"names category {category!r}", category)
        else:
            label[n] = known
        try:
            boxes[n] = row["bbox"]
            scores[n] = row["score"]
        except (TypeError, ValueError):
            faults.add(
                "value", n, f"has bbox {row['bbox']!r} and score {row['score']!r}: four numbers and one are wanted"
            )
    bad = np.flatnonzero(~(np.isfinite(boxes).all(axis=1) & np.isfinite(scores)) | (boxes[:, 2:] < 0).any(axis=1))
    for n in bad.tolist():
        faults.add("value", n, f"has bbox {rows[n]['bbox']} and score {rows[n]['score']}, which is no box")
    faults.raise_any(path, dataset)
    boxes[:, 2:] += boxes[:, :2]
    return DetectionTable.join([DetectionTable(image_index, label, scores, boxes)])


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"the results {path} do not exist", code="results-missing") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}", code="results-malformed") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", code="results-malformed") from error
    if isinstance(found, dict):  # a whole COCO file whose annotations carry scores
        found = found.get("annotations", found.get("predictions"))
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(
            f"{path} is not a list of COCO results",
            hint='it should read [{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]',
            code="results-malformed",
        )
    return found


def _looked_up(value: Any, known: Mapping[int, int]) -> int | None:
    """Return what an id stands for; an id written as 7.0 is 7, and nothing but a number is one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return known.get(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _names(dataset: Dataset) -> dict[str, int]:
    """Return the position of each image by its path, file name, stem and id as text, where that is unambiguous."""
    found: dict[str, int] = {}
    ambiguous: set[str] = set()
    for position, name in enumerate(dataset.file_names):
        pure = PurePosixPath(name.replace("\\", "/"))
        for key in {name, pure.name, pure.stem, str(int(dataset.image_ids[position]))}:
            if found.setdefault(key, position) != position:
                ambiguous.add(key)
    for key in ambiguous:
        del found[key]
    return found


class _Faults:
    """Faults of a results file by kind: how many, the first place, and which values."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, str]] = {}
        self._count: Counter[str] = Counter()
        self._values: dict[str, dict[str, None]] = {}

    def add(self, kind: str, entry: int, text: str, value: object = None) -> None:
        self._first.setdefault(kind, (entry, text))
        self._count[kind] += 1
        if value is not None:
            self._values.setdefault(kind, {})[str(value)] = None

    def raise_any(self, path: Path, dataset: Dataset) -> None:
        """Raise a DataError that names every kind of fault, if there is any."""
        parts, hint = [], ""
        for kind, (entry, text) in self._first.items():
            count = self._count[kind]
            values = list(self._values.get(kind, {}))
            if kind == "image":
                what = f"{count} results are for images that the {dataset.split} split does not have: {_some(values)}"
                hint = hint or "name the split they were made on: --split train, or test; or another --data"
            elif kind == "category":
                what = f"{count} results have a category that {dataset.name} does not have: {_some(values)}"
                own = ", ".join(f"{c.id} {c.name}" for c in dataset.categories[:5])
                hint = f"the categories of {dataset.name} are {own}" + (" ..." if len(dataset.categories) > 5 else "")
            else:
                what = f"entry {entry + 1} {text}" + (f" (and {count - 1} more)" if count > 1 else "")
            parts.append(what)
        if parts:
            raise DataError(f"{path}: " + "; ".join(parts), hint=hint, code="results-unknown")


def _some(values: Sequence[str], most: int = 5) -> str:
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


def coco_results(dataset: Dataset, table: DetectionTable) -> list[dict[str, Any]]:
    """Return detections as COCO results, with the dataset's own ids; boxes to 0.001 px, scores to 1e-6."""
    image_ids = dataset.image_ids[table.image_index].tolist()
    categories = np.array(dataset.category_ids, np.int64)[table.labels].tolist()
    boxes = np.round(xywh(table.boxes_xyxy_px), 3).tolist()
    scores = np.round(table.scores, 6).tolist()
    return [
        {"image_id": i, "category_id": c, "bbox": b, "score": s}
        for i, c, b, s in zip(image_ids, categories, boxes, scores, strict=True)
    ]

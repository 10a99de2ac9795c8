"""Detections as COCO results files: read those of any tool, write our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.documents import require_regular
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.coco import xywh
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.text import abbreviate

KEYS = ("image_id", "category_id", "bbox", "score")


def read_results(path: Path, dataset: Dataset) -> DetectionTable:
    """Read a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`.

    `image_id` is the dataset's id or the file name, with or without folder and suffix.

    Raises:
        DataError: the file is missing or not such a list, or has images or classes that the split does not have; the
            message names every kind of problem with its count.
    """
    entries = _load(path)
    images: dict[Any, int] = {int(i): position for position, i in enumerate(dataset.image_ids)}
    if any(isinstance(entry.get("image_id"), str) for entry in entries):
        images |= _positions_by_name(dataset)
    categories = {int(i): label for label, i in enumerate(dataset.category_ids)}

    rows = np.zeros((len(entries), 7))  # image, label, left, top, width, height, score
    unknown_images: list[Any] = []
    unknown_categories: list[Any] = []
    malformed: list[str] = []
    for n, entry in enumerate(entries):
        if missing := [key for key in KEYS if key not in entry]:
            malformed.append(f"entry {n + 1} has no {missing[0]}")
            continue
        image, category, bbox, score = (entry[key] for key in KEYS)
        image_index, label = _lookup(image, images), _lookup(category, categories)
        if image_index < 0:
            unknown_images.append(image)
        if label < 0:
            unknown_categories.append(category)
        try:
            x, y, width, height = bbox
            rows[n] = (image_index, label, x, y, width, height, score)
        except (TypeError, ValueError):
            malformed.append(f"entry {n + 1} has bbox {bbox!r} and score {score!r}, not 4 numbers and 1")
        if not np.isfinite(rows[n]).all() or (rows[n, 4:6] < 0).any():
            malformed.append(f"entry {n + 1} has bbox {bbox} and score {score}, which is not a valid detection")

    problems, hint = [], ""
    if malformed:
        problems.append(malformed[0] + (f" (and {len(malformed) - 1} more entries)" if len(malformed) > 1 else ""))
    if unknown_categories:
        problems.append(
            f"{len(unknown_categories)} results have a category that {dataset.name} does not have: "
            f"{_distinct(unknown_categories)}"
        )
        hint = f"the categories of {dataset.name} are {_distinct([f'{c.id} {c.name}' for c in dataset.categories])}"
    if unknown_images:
        problems.append(
            f"{len(unknown_images)} results are for images that the {dataset.split} split does not have: "
            f"{_distinct(unknown_images)}"
        )
        hint = hint or "choose the split they were made on with --split, or another dataset with --data"
    if problems:
        raise DataError(f"{path}: " + "; ".join(problems), hint=hint, code="results-unknown")
    rows[:, 4:6] += rows[:, 2:4]
    indices = rows[:, :2].astype(np.int64)
    return DetectionTable.join([DetectionTable(indices[:, 0], indices[:, 1], rows[:, 6], rows[:, 2:6])])


def _distinct(values: Sequence[Any]) -> str:
    return abbreviate(list(dict.fromkeys(map(str, values))), 5)


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        require_regular(path)
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"the results file {path} does not exist", code="results-missing") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}", code="results-malformed") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", code="results-unreadable") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, or too deep
        raise DataError(f"{path} is not JSON: {error}", code="results-malformed") from error
    if isinstance(document, dict):  # a whole COCO file whose annotations have scores
        document = document.get("annotations", document.get("predictions"))
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise DataError(
            f"{path} is not a list of COCO results",
            hint='it should read [{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]',
            code="results-malformed",
        )
    return document


def _lookup(value: Any, positions: Mapping[Any, int]) -> int:
    """Return the position of an id, -1 when it is unknown; 7.0 is 7, and true is no id."""
    return positions.get(value, -1) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1


def _positions_by_name(dataset: Dataset) -> dict[str, int]:
    """Return the position of each image by path, file name, stem and id as text, where that is unambiguous."""
    positions: dict[str, int] = {}
    ambiguous: set[str] = set()
    for position, name in enumerate(dataset.file_names):
        path = PurePosixPath(name.replace("\\", "/"))
        for key in {name, path.name, path.stem, str(int(dataset.image_ids[position]))}:
            if positions.setdefault(key, position) != position:
                ambiguous.add(key)
    return {key: position for key, position in positions.items() if key not in ambiguous}


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

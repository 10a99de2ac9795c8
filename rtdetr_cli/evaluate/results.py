"""Detections as COCO results files: read those of any tool, write our own."""

from __future__ import annotations

import json
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

    image_index = np.zeros(len(entries), np.int64)
    labels = np.zeros(len(entries), np.int64)
    boxes = np.zeros((len(entries), 4))
    scores = np.zeros(len(entries))
    unknown_images: list[Any] = []
    unknown_categories: list[Any] = []
    malformed: list[str] = []
    for n, entry in enumerate(entries):
        missing = [key for key in KEYS if key not in entry]
        if missing:
            malformed.append(f"entry {n + 1} has no {missing[0]}")
            continue
        image_index[n] = _lookup(entry["image_id"], images)
        if image_index[n] < 0:
            unknown_images.append(entry["image_id"])
        labels[n] = _lookup(entry["category_id"], categories)
        if labels[n] < 0:
            unknown_categories.append(entry["category_id"])
        try:
            x, y, width, height = entry["bbox"]
            boxes[n] = (x, y, width, height)
            scores[n] = entry["score"]
        except (TypeError, ValueError):
            malformed.append(
                f"entry {n + 1} has bbox {entry['bbox']!r} and score {entry['score']!r}, not 4 numbers and 1"
            )
    for n in np.flatnonzero(~np.isfinite(boxes).all(1) | ~np.isfinite(scores) | (boxes[:, 2:] < 0).any(1)).tolist():
        bbox, score = entries[n]["bbox"], entries[n]["score"]
        malformed.append(f"entry {n + 1} has bbox {bbox} and score {score}, which is not a valid detection")

    if malformed or unknown_images or unknown_categories:
        raise _invalid(path, dataset, malformed, unknown_images, unknown_categories)
    boxes[:, 2:] += boxes[:, :2]
    return DetectionTable.join([DetectionTable(image_index, labels, scores, boxes)])


def _invalid(
    path: Path, dataset: Dataset, malformed: list[str], unknown_images: list[Any], unknown_categories: list[Any]
) -> DataError:
    problems, hint = [], ""
    if malformed:
        problems.append(malformed[0] + (f" (and {len(malformed) - 1} more entries)" if len(malformed) > 1 else ""))
    if unknown_categories:
        problems.append(
            f"{len(unknown_categories)} results have a category that {dataset.name} does not have: "
            f"{_listed(unknown_categories)}"
        )
        hint = f"the categories of {dataset.name} are {_listed([f'{c.id} {c.name}' for c in dataset.categories])}"
    if unknown_images:
        problems.append(
            f"{len(unknown_images)} results are for images that the {dataset.split} split does not have: "
            f"{_listed(unknown_images)}"
        )
        hint = hint or "choose the split they were made on with --split, or another dataset with --data"
    return DataError(f"{path}: " + "; ".join(problems), hint=hint, code="results-unknown")


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"the results file {path} does not exist", code="results-missing") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}", code="results-malformed") from error
    except (UnicodeDecodeError, RecursionError) as error:
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


def _listed(values: Sequence[Any], limit: int = 5) -> str:
    distinct = list(dict.fromkeys(map(str, values)))
    return ", ".join(distinct[:limit]) + (f" and {len(distinct) - limit} more" if len(distinct) > limit else "")


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

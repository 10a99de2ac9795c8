"""Read Labelme: one JSON file per image, whose shapes become their bounding boxes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from rtdetr_cli.datasets.findings import Spot
from rtdetr_cli.datasets.json_text import JSONFault, report_fault, scan_value
from rtdetr_cli.datasets.label_text import Oddities, is_valid_class
from rtdetr_cli.datasets.layouts import Layout
from rtdetr_cli.datasets.raw import RawBox, RawDataset, Rows
from rtdetr_cli.datasets.records import Category
from rtdetr_cli.text import counted

_POINTS = {"rectangle": 2, "polygon": 3, "circle": 2, "rotation": 3, "mask": 2}
"""Shapes with an area, and the fewest points they have."""


def read_labelme(dataset: RawDataset, layout: Layout) -> None:
    """Read every image's JSON file into `dataset`; classes are sorted by name."""
    oddities = Oddities()
    documents: dict[str, dict[str, Any]] = {}
    for image, path in layout.labels.items():
        file, text = dataset.read_label(path, oddities)
        documents[image] = _parse(dataset, text, file) if text is not None else {}
    names = sorted(
        {label for document in documents.values() for shape in _shapes(document) if (label := _label(shape))}
    )
    dataset.categories = tuple(Category(number, name) for number, name in enumerate(names, 1))
    labels = {name: label for label, name in enumerate(names)}
    kinds: Counter[str] = Counter()
    first_id = 1
    for split, images in layout.splits.items():
        rows = Rows()
        for position, image in enumerate(images):
            document, path_of_label = documents.get(image, {}), layout.labels.get(image)
            file = dataset.show(path_of_label) if path_of_label is not None else ""
            size = (_side(document, "imageWidth"), _side(document, "imageHeight"))
            size = size if all(size) else (0, 0)
            rows.add_image(image, image_id=first_id + position, size_wh=size, label_file=file)
            if not file:
                spot = Spot(split, position)
                message = "has no JSON file"
                dataset.findings.add("label-missing", message, file=image, image_id=first_id + position, spot=spot)
            for entry, shape in enumerate(_shapes(document)):
                kinds[_read_shape(dataset, rows, shape, labels, Spot(split, position, entry), file)] += 1
        dataset.splits[split] = rows.split(split, layout.root)
        first_id += len(images)
    _report(dataset, layout, kinds)
    oddities.report(dataset.findings)


def _report(dataset: RawDataset, layout: Layout, kinds: Counter[str]) -> None:
    file = next(iter(dataset.label_paths), "")
    del kinds[""], kinds["rectangle"]
    boxes = {kind: count for kind, count in kinds.items() if kind in _POINTS}
    ignored = {kind: count for kind, count in kinds.items() if kind not in _POINTS}
    if boxes:
        found = ", ".join(counted(count, kind) for kind, count in boxes.items())
        dataset.findings.add("shape-as-box", f"and others have {found}, read as bounding boxes", file=file)
    if ignored:
        found = ", ".join(f"{count:,} of type {kind}" for kind, count in ignored.items())
        dataset.findings.add("shape-ignored", f"and others have shapes without an area: {found}", file=file)
    for path in layout.orphans:
        dataset.findings.add("label-orphan", "has no image", file=dataset.show(path))


def _parse(dataset: RawDataset, text: str, file: str) -> dict[str, Any]:
    try:
        document, _ = scan_value(text, len(text) - len(text.lstrip()))
        if isinstance(document, dict) and isinstance(document.get("shapes"), list):
            return document
        dataset.findings.add("file-malformed", "has no list of shapes: it is not a Labelme file", file=file, line=1)
    except JSONFault as fault:
        report_fault(dataset.findings, text, fault, file)
    return {}


def _shapes(document: dict[str, Any]) -> list[Any]:
    shapes: list[Any] = document.get("shapes", [])
    return shapes


def _label(shape: Any) -> str:
    """Return the class of a shape; empty if it has none."""
    label = shape.get("label") if isinstance(shape, dict) else None
    return label.strip() if isinstance(label, str) and is_valid_class(label.strip()) else ""


def _side(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    return value if type(value) is int and 0 < value < 1 << 31 else 0


def _read_shape(dataset: RawDataset, rows: Rows, shape: Any, labels: dict[str, int], spot: Spot, file: str) -> str:
    """Read one shape into `rows`, or report what is wrong with it; return its type, empty if it is malformed."""

    def report(code: str, message: str) -> str:
        message = f"shape {spot.entry + 1} {message}"
        dataset.findings.add(code, message, file=file, image_id=rows.image_ids[spot.image], spot=spot)
        return ""

    label = _label(shape)
    if not label:
        return report("category-unknown", "has no label")
    kind = str(shape.get("shape_type") or "polygon")[:40]
    if kind not in _POINTS:
        return kind
    points = shape.get("points")
    if not isinstance(points, list) or len(points) < _POINTS[kind]:
        return report("box-count", f"is a {kind} with too few points")
    try:
        pairs = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError, OverflowError):
        return report("box-not-number", "has a point that is not two numbers")
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        return report("box-not-finite", "has a point that is not finite")
    if kind == "circle":  # its center and a point on it
        (x, y), edge = pairs[0], pairs[1]
        radius = math.dist((x, y), edge)
        pairs = [(x - radius, y - radius), (x + radius, y + radius)]
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    rows.boxes.append(RawBox(spot.image, (min(xs), min(ys), max(xs), max(ys)), labels[label], line=0, entry=spot.entry))
    return kind

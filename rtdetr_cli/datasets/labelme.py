"""Read Labelme: one JSON file per image, whose shapes become their bounding boxes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from rtdetr_cli.datasets.json_text import JSONFault, report_fault, scan_value
from rtdetr_cli.datasets.label_text import is_utf8, is_valid_name
from rtdetr_cli.datasets.layouts import Layout
from rtdetr_cli.datasets.raw import RawBox, RawDataset, Rows
from rtdetr_cli.datasets.records import Category
from rtdetr_cli.text import counted

_POINTS = {"rectangle": 2, "polygon": 3, "circle": 2, "rotation": 3, "mask": 2}
"""Shapes with an area, and the fewest points they have."""
_NO_DOCUMENT: dict[str, Any] = {"shapes": []}


def read_labelme(dataset: RawDataset, layout: Layout) -> None:
    """Read every image's JSON file into `dataset`; classes are sorted by name."""
    documents: dict[str, dict[str, Any]] = {}
    for name, path in layout.labels.items():
        file, text = dataset.read_label(path)
        documents[name] = _parse(dataset, text, file) if text is not None else _NO_DOCUMENT
    names = sorted(
        {label for document in documents.values() for shape in document["shapes"] if (label := _label(shape))}
    )
    dataset.categories = tuple(Category(number, name) for number, name in enumerate(names, 1))
    labels = {name: label for label, name in enumerate(names)}
    kinds: Counter[str] = Counter()
    for split, images in layout.splits.items():
        rows = Rows(dataset, split)
        for name in images:
            document, path_of_label = documents.get(name, _NO_DOCUMENT), layout.labels.get(name)
            file = dataset.show(path_of_label) if path_of_label is not None else ""
            size = (_side(document, "imageWidth"), _side(document, "imageHeight"))
            image = rows.add_image(name, label_file=file, size_wh=size)
            if not file:
                rows.report("label-missing", "has no JSON file", image, file=name)
            for entry, shape in enumerate(document["shapes"]):
                kinds[_read_shape(rows, image, entry, shape, labels)] += 1
        rows.finish(layout.root)
    _report(dataset, kinds)
    dataset.oddities.report(dataset.findings)


def _report(dataset: RawDataset, kinds: Counter[str]) -> None:
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


def _parse(dataset: RawDataset, text: str, file: str) -> dict[str, Any]:
    try:
        document, _ = scan_value(text, len(text) - len(text.lstrip()))
        if isinstance(document, dict) and isinstance(document.get("shapes"), list):
            return document
        dataset.findings.add("file-malformed", "has no list of shapes: it is not a Labelme file", file=file, line=1)
    except JSONFault as fault:
        report_fault(dataset.findings, text, fault, file)
    return _NO_DOCUMENT


def _label(shape: Any) -> str:
    """Return the class of a shape; empty if it has none."""
    label = shape.get("label") if isinstance(shape, dict) else None
    label = label.strip() if isinstance(label, str) else ""
    return label if is_valid_name(label) and is_utf8(label) else ""


def _side(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    return value if type(value) is int else 0


def _read_shape(rows: Rows, image: int, entry: int, shape: Any, labels: dict[str, int]) -> str:
    """Read one shape into `rows`, or report what is wrong with it; return its type, empty if it is malformed."""

    def report(code: str, message: str) -> str:
        rows.report(code, f"shape {entry + 1} {message}", image, entry=entry)
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
    rows.boxes.append(RawBox(image, (min(xs), min(ys), max(xs), max(ys)), labels[label], line=0, entry=entry))
    return kind

"""Repair COCO files."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.checks.repair.plan import CLIPPED_BOXES, DROPPED_BOXES, Plan, box_of, read_label
from rtdetr_cli.datasets.coco import format_document, id_key
from rtdetr_cli.datasets.findings import Spot
from rtdetr_cli.datasets.raw import RawSplit
from rtdetr_cli.datasets.records import Finding


@dataclass(slots=True)
class _ListEdit:
    """Changes to one list of the document, by index.

    Attributes:
        dropped: entry -> code and reason.
        values: entry -> new values of its keys.
        reasons: entry -> code and reason of these.
    """

    dropped: dict[int, tuple[str, str]] = field(default_factory=dict)
    values: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    reasons: dict[int, tuple[str, str]] = field(default_factory=dict)

    def change(self, entry: int, code: str, why: str, **values: Any) -> None:
        self.values[entry] |= values
        self.reasons[entry] = (code, why)


def plan_coco(plan: Plan) -> None:
    """Plan the label files of COCO and Roboflow."""
    raw = plan.report.raw
    for path in raw.label_paths.values():
        plan.files[plan.destination(path)] = path
    by_split: dict[str, list[tuple[int, Finding, Spot]]] = defaultdict(list)
    for i, finding, spot in plan.findings():
        by_split[spot.split].append((i, finding, spot))
    for name, split in raw.splits.items():
        images, boxes = _ListEdit(), _ListEdit()
        for i, finding, spot in by_split[name]:
            if _plan_finding(split, finding, spot, images, boxes):
                plan.repaired.add(i)
        _plan_file_names(plan, name, split, images)
        if images.dropped or images.values or boxes.dropped or boxes.values:
            _rewrite(plan, raw.label_paths[split.label_files[0]], split, images, boxes)


def _plan_finding(split: RawSplit, finding: Finding, spot: Spot, images: _ListEdit, boxes: _ListEdit) -> bool:
    """Plan the repair of one finding; return whether there is one."""
    code, why, entry = finding.code, finding.message, spot.entry
    if code == "image-size-undeclared":
        for image in np.flatnonzero(split.usable & ~split.declared).tolist():
            width, height = split.sizes_wh[image].tolist()
            images.change(int(split.image_entries[image]), code, "has no size", width=width, height=height)
        return True
    if code == "box-no-area":
        for row in np.flatnonzero(np.isnan(split.areas)).tolist():
            x1, y1, x2, y2 = split.boxes_xyxy_px[row].tolist()
            boxes.change(int(split.box_entries[row]), code, "has no area", area=round((x2 - x1) * (y2 - y1), 6))
        return True
    if entry < 0:
        return False
    if code == "entry-malformed":
        images.dropped[entry] = (code, why)
    elif code == "image-size":
        width, height = split.sizes_wh[spot.image].tolist()
        images.change(entry, code, why, width=width, height=height)
    elif code == "image-name-case":
        images.change(entry, code, why, file_name=split.file_names[spot.image])
    elif code in DROPPED_BOXES:
        boxes.dropped[entry] = (code, why)
    elif code in CLIPPED_BOXES and (corners := box_of(split, spot.image, entry)) is not None:
        x1, y1, x2, y2 = (round(v, 6) for v in corners)
        boxes.change(entry, code, why, bbox=[x1, y1, round(x2 - x1, 6), round(y2 - y1, 6)])
    elif code == "annotation-id-duplicate":
        rows = np.flatnonzero(split.box_entries == entry)
        if len(rows):
            boxes.change(entry, code, why, id=int(split.annotation_ids[rows[0]]))
    else:
        return False
    return True


def _plan_file_names(plan: Plan, name: str, split: RawSplit, images: _ListEdit) -> None:
    for image, file_name in enumerate(split.file_names):
        entry = int(split.image_entries[image])
        if (name, image) in plan.left_out:
            images.dropped[entry] = plan.left_out[name, image]
        elif (name, image) in plan.renamed:
            new = plan.renamed[name, image]
            images.change(entry, "image-extension", f"{file_name} is renamed to {new}", file_name=_relative(split, new))
        elif os.path.isabs(file_name):
            why = "an absolute path would lead back to the original"
            images.change(entry, "image-outside", why, file_name=_relative(split, file_name))


def _relative(split: RawSplit, file_name: str) -> str:
    """Return a file name relative to the image folder if it lies there."""
    path = Path(file_name)
    return str(path.relative_to(split.root)) if path.is_absolute() and path.is_relative_to(split.root) else file_name


def _rewrite(plan: Plan, path: Path, split: RawSplit, images: _ListEdit, boxes: _ListEdit) -> None:
    """Edit the parsed document and write it with the format's writer."""
    target = plan.destination(path)
    document = json.loads(read_label(path))
    entries = document["images"]
    # Boxes belong to the first image of an id; the boxes of an image that is left out go with it.
    without_image = {id_key(entries[entry]["id"]) for entry in images.dropped if _has_id(entries[entry])}
    annotations = document.get("annotations", [])
    for entry, annotation in enumerate(annotations) if without_image else ():
        key = id_key(annotation.get("image_id")) if isinstance(annotation, dict) else None
        if key is not None and key in without_image:
            boxes.dropped.setdefault(entry, ("image", "its image is left out"))
    for entry, values in boxes.values.items():
        if "bbox" in values and _area_is_of_box(annotations[entry]):
            values["area"] = round(values["bbox"][2] * values["bbox"][3], 6)
    document["images"] = _edit(plan, target, "image", entries, images)
    if "annotations" in document:
        document["annotations"] = _edit(plan, target, "annotation", annotations, boxes)
    plan.texts[target] = format_document(document)


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("id") is not None


def _edit(plan: Plan, target: str, kind: str, entries: list[Any], edit: _ListEdit) -> list[Any]:
    result = []
    for number, entry in enumerate(entries):
        if number in edit.dropped:
            plan.record("drop", edit.dropped[number][0], target, edit.dropped[number][1], entry=kind, old=entry)
            continue
        if number in edit.values:
            values = edit.values[number]
            old = {key: entry.get(key) for key in values}
            code, why = edit.reasons[number]
            plan.record("edit", code, target, why, entry=kind, id=entry.get("id"), old=old, new=values)
            entry = entry | values
        result.append(entry)
    return result


def _area_is_of_box(annotation: dict[str, Any]) -> bool:
    """Return whether an annotation's area is the area of its box, and not that of a mask."""
    try:
        area = float(annotation["area"])
        return abs(area - float(annotation["bbox"][2]) * float(annotation["bbox"][3])) <= 1e-3 * max(1.0, abs(area))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return False

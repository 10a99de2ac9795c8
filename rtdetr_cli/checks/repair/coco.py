"""Repair COCO files."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.checks.repair.plan import CLIPPED_BOXES, DROPPED_BOXES, Plan, box_of, box_row, read_label
from rtdetr_cli.datasets.coco import format_document, id_key
from rtdetr_cli.datasets.raw import RawSplit
from rtdetr_cli.datasets.records import Finding


def plan_coco(plan: Plan) -> None:
    """Plan the label files of COCO and Roboflow."""
    raw = plan.report.raw
    for path in raw.label_paths.values():
        plan.files[plan.destination(path)] = path
    files = {name: _CocoFile(plan, split) for name, split in raw.splits.items()}
    for i, finding in plan.findings():
        if finding.spot.split in files and _repair(files[finding.spot.split], finding):
            plan.repaired.add(i)
    for name, split in raw.splits.items():
        file = files[name]
        for image, file_name in enumerate(split.file_names):
            entry = int(split.image_entries[image])
            if (name, image) in plan.left_out:
                file.drop("images", entry, *plan.left_out[name, image])
            elif (name, image) in plan.renamed:
                new = plan.renamed[name, image]
                file.change("images", entry, "image-extension", "the file is renamed", file_name=_relative(split, new))
            elif os.path.isabs(file_name):
                new = _relative(split, file_name)
                file.change("images", entry, "image-outside", "would lead back to the original", file_name=new)
            elif image in split.label_names and file.document["images"][entry].get("file_name") != file_name:
                file.change("images", entry, "image-path-moved", "has another path", file_name=file_name)
        file.finish()


class _CocoFile:
    """One label file, parsed once something in it has to change. Entries are named by list and index."""

    def __init__(self, plan: Plan, split: RawSplit) -> None:
        self.plan, self.split = plan, split
        self.path = plan.report.raw.label_paths[split.label_files[0]]
        self.target = plan.destination(self.path)
        self.dropped: dict[str, set[int]] = {"images": set(), "annotations": set()}

    @cached_property
    def document(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(read_label(self.path))
        return parsed

    def change(self, key: str, entry: int, code: str, why: str, **values: Any) -> None:
        old: dict[str, Any] = self.document[key][entry]
        before = {name: old.get(name) for name in values}
        self.plan.record("edit", code, self.target, why, list=key, id=old.get("id"), old=before, new=values)
        old.update(values)

    def drop(self, key: str, entry: int, code: str, why: str) -> None:
        if entry not in self.dropped[key]:
            self.plan.record("drop", code, self.target, why, list=key, old=self.document[key][entry])
            self.dropped[key].add(entry)

    def finish(self) -> None:
        """Drop the boxes of images that are gone, and write the document with the format's writer."""
        if "document" not in self.__dict__:
            return
        images = [self.document["images"][entry] for entry in self.dropped["images"]]
        gone = {id_key(image.get("id")) for image in images if isinstance(image, dict)} - {None}
        for entry, annotation in enumerate(self.document.get("annotations", [])):
            if isinstance(annotation, dict) and id_key(annotation.get("image_id")) in gone:
                self.drop("annotations", entry, "image", "its image is left out")
        for key, dropped in self.dropped.items():
            if dropped:
                self.document[key] = [e for number, e in enumerate(self.document[key]) if number not in dropped]
        self.plan.texts[self.target] = format_document(self.document)


def _repair(file: _CocoFile, finding: Finding) -> bool:
    """Repair what one finding names; return whether that is possible."""
    split, code, why, image, entry = file.split, finding.code, finding.message, finding.spot.image, finding.spot.entry
    if code == "image-size-undeclared":
        for one in np.flatnonzero(split.usable & ~split.declared).tolist():
            width, height = split.sizes_wh[one].tolist()
            file.change("images", int(split.image_entries[one]), code, "has no size", width=width, height=height)
    elif code == "box-no-area":
        for row in np.flatnonzero(np.isnan(split.areas)).tolist():
            x1, y1, x2, y2 = split.boxes_xyxy_px[row].tolist()
            area = round((x2 - x1) * (y2 - y1), 6)
            file.change("annotations", int(split.box_entries[row]), code, "has no area", area=area)
    elif entry < 0:
        return False
    elif code == "entry-malformed":
        file.drop("images", entry, code, why)
    elif code == "image-size":
        width, height = split.sizes_wh[image].tolist()
        file.change("images", entry, code, why, width=width, height=height)
    elif code == "image-name-case":
        file.change("images", entry, code, why, file_name=split.file_names[image])
    elif code in DROPPED_BOXES:
        file.drop("annotations", entry, code, why)
    elif code in CLIPPED_BOXES and (corners := box_of(split, image, entry)) is not None:
        x1, y1, x2, y2 = (round(v, 6) for v in corners)
        values: dict[str, Any] = {"bbox": [x1, y1, round(x2 - x1, 6), round(y2 - y1, 6)]}
        if _area_is_of_box(file.document["annotations"][entry]):
            values["area"] = round(values["bbox"][2] * values["bbox"][3], 6)
        file.change("annotations", entry, code, why, **values)
    elif code == "annotation-id-duplicate" and (box := box_row(split, image, entry)) is not None:
        file.change("annotations", entry, code, why, id=int(split.annotation_ids[box]))
    else:
        return False
    return True


def _relative(split: RawSplit, file_name: str) -> str:
    """Return a file name relative to the image folder if it lies there."""
    path = Path(file_name)
    return str(path.relative_to(split.root)) if path.is_absolute() and path.is_relative_to(split.root) else file_name


def _area_is_of_box(annotation: dict[str, Any]) -> bool:
    """Return whether an annotation's area is the area of its box, and not that of a mask."""
    try:
        area = float(annotation["area"])
        return abs(area - float(annotation["bbox"][2]) * float(annotation["bbox"][3])) <= 1e-3 * max(1.0, abs(area))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return False

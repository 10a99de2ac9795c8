"""Repair Pascal VOC label files and the lists below `ImageSets/`."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np

from rtdetr_cli.checks.repair.ids import plan_ids
from rtdetr_cli.checks.repair.plan import (
    CLIPPED_BOXES,
    DROPPED_BOXES,
    LineEdits,
    Plan,
    box_of,
    edit_list,
    files_in,
    files_of_one_image,
    plan_label_files,
    read_label,
)
from rtdetr_cli.datasets.raw import RawSplit
from rtdetr_cli.datasets.voc import CLASS_LISTS, SIDES, format_xml, label_xml, listed_name, parse_keeping_comments


class _LabelFile:
    """One label file, parsed once something in it has to change."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.target = plan, plan.destination(path)
        text = read_label(path)
        self.has_declaration = text.lstrip().startswith("<?xml")
        self.root = parse_keeping_comments(text)
        self.objects = self.root.findall("object")
        self.dropped: set[int] = set()

    def set(self, code: str, why: str, texts: dict[str, str], parent: Element | None = None, **where: int) -> None:
        """Set the texts of elements, by their paths below `parent`, or below the root."""
        old = {}
        for path, text in texts.items():
            element = self.root if parent is None else parent
            for tag in path.split("/"):
                child = element.find(tag)
                element = child if child is not None else SubElement(element, tag)
            old[path], element.text = element.text, text
        self.plan.record("edit", code, self.target, why, **where, old=old, new=texts)

    def clip(self, entry: int, corners: list[float], code: str, why: str) -> None:
        """Write the corners that differ."""
        box = self.objects[entry].find("bndbox")
        assert box is not None  # the reader took a box from it
        sides = zip(SIDES, corners, strict=True)
        texts = {s: f"{value:.10g}" for s, value in sides if abs(float(box.findtext(s, "nan")) - value) > 1e-9}
        self.set(code, why, texts, box, object=entry + 1)

    def drop(self, entry: int, code: str, why: str) -> None:
        """Remove an object."""
        if entry not in self.dropped:
            self.dropped.add(entry)
            self.root.remove(self.objects[entry])
            old = tostring(self.objects[entry], "unicode").strip()
            self.plan.record("drop", code, self.target, why, object=entry + 1, old=old)


def plan_voc(plan: Plan) -> None:
    """Plan the label files of a Pascal VOC dataset."""
    raw = plan.report.raw
    copied = plan_label_files(plan) & files_of_one_image(raw)
    _plan_lists(plan)
    files: dict[str, _LabelFile] = {}

    def opened(file: str) -> _LabelFile:
        if file not in files:
            files[file] = _LabelFile(plan, raw.label_paths[file])
        return files[file]

    dropped: dict[tuple[str, int], set[int]] = defaultdict(set)
    for i, finding in plan.findings():
        code, why, spot = finding.code, finding.message, finding.spot
        if code == "label-missing":
            _create(plan, raw.splits[spot.split], spot.image, why)
        elif code == "image-size-undeclared":
            split = raw.splits[spot.split]
            for image in np.flatnonzero(split.usable & ~split.declared).tolist():
                if split.label_file(image) in copied:
                    opened(split.label_file(image)).set(code, "has no size", _size(split, image))
        elif finding.file not in copied or spot.image < 0:
            continue
        elif code in DROPPED_BOXES and spot.entry >= 0:
            opened(finding.file).drop(spot.entry, code, why)
            dropped[spot.member].add(spot.entry)
        elif code in CLIPPED_BOXES and (corners := box_of(raw.splits[spot.split], spot.image, spot.entry)):
            opened(finding.file).clip(spot.entry, corners, code, why)
        elif code == "image-size":
            opened(finding.file).set(code, why, _size(raw.splits[spot.split], spot.image))
        elif code == "voc-filename" and (name := raw.splits[spot.split].path(spot.image).name).isprintable():
            opened(finding.file).set(code, why, {"filename": name})
        else:
            continue
        plan.repaired.add(i)
    for (name, image), new in plan.renamed.items():
        if (label := raw.splits[name].label_file(image)) in copied:
            opened(label).set("image-extension", "the image is renamed", {"filename": Path(new).name})
    for file in files.values():
        plan.texts[file.target] = format_xml(file.root, declaration=file.has_declaration)
    plan_ids(plan, dropped)


def _size(split: RawSplit, image: int) -> dict[str, str]:
    width, height = split.sizes_wh[image].tolist()
    return {"size/width": str(width), "size/height": str(height)}


def _create(plan: Plan, split: RawSplit, image: int, why: str) -> None:
    path = split.path(image)
    folder = plan.report.raw.folder / "Annotations"
    label = (folder if folder.is_dir() else path.parent) / f"{path.stem}.xml"
    target = plan.destination(label)
    name = path.with_suffix(Path(plan.renamed.get((split.split, image), path.name)).suffix).name
    plan.texts[target] = format_xml(label_xml(name, split.sizes_wh[image].tolist(), []))
    plan.record("create", "label-missing", target, why)


def _plan_lists(plan: Plan) -> None:
    """Copy every list below `ImageSets/`, also those of no split, without the images that are left out."""
    raw = plan.report.raw
    label_files = files_of_one_image(raw)
    left_out: dict[str, bool] = {}  # whether an image is left out of every split
    for name, split in raw.splits.items():
        for image, file_name in enumerate(split.file_names):
            stem = str(Path(split.label_names.get(image, file_name)).with_suffix(""))
            for listed in (stem, Path(stem).name):  # lists may name images without their folder
                left_out[listed] = (name, image) in plan.left_out and left_out.get(listed, True)
    lists = {path for file, path in raw.label_paths.items() if path.suffix == ".txt" and file not in label_files}
    for folder, _, _ in os.walk(raw.folder / "ImageSets"):
        lists.update(path for path in files_in(Path(folder)) if path.suffix == ".txt")
    for path in sorted(lists - {raw.folder / name for name in CLASS_LISTS}):
        plan.files.setdefault(plan.destination(path), path)
        try:
            lines = read_label(path).split("\n") if any(left_out.values()) else []
        except UnicodeDecodeError:
            continue
        names = [listed_name(line, left_out) for line in lines]
        edits: LineEdits = {
            n: (None, "image", f"{name} is left out") for n, name in enumerate(names) if left_out.get(name)
        }
        edit_list(plan, path, lines, edits, emptied=path.stem in raw.splits and plan.is_emptied(path.stem))

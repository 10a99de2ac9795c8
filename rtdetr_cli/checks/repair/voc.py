"""Repair Pascal VOC label files and the lists below `ImageSets/`."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from xml.etree.ElementTree import SubElement, tostring

import numpy as np

from rtdetr_cli.checks.repair.ids import plan_ids
from rtdetr_cli.checks.repair.plan import (
    CLIPPED_BOXES,
    DROPPED_BOXES,
    LineEdits,
    Plan,
    box_of,
    edit_lines,
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

    def set(self, code: str, why: str, **texts: str) -> None:
        """Set the texts of elements; the path of `size__width` is `size/width`."""
        old = {}
        for name, text in texts.items():
            element = self.root
            for tag in name.split("__"):
                child = element.find(tag)
                element = child if child is not None else SubElement(element, tag)
            old[name.replace("__", "/")], element.text = element.text, text
        new = {name.replace("__", "/"): text for name, text in texts.items()}
        self.plan.record("edit", code, self.target, why, old=old, new=new)

    def clip(self, entry: int, corners: list[float], code: str, why: str) -> None:
        """Write the corners that differ."""
        old, new = {}, {}
        for side, value in zip(SIDES, corners, strict=True):
            element = self.objects[entry].find(f"bndbox/{side}")
            if element is not None and abs(float(element.text or "nan") - value) > 1e-9:
                old[side], new[side] = element.text, f"{value:.10g}"
                element.text = new[side]
        self.plan.record("edit", code, self.target, why, object=entry + 1, old=old, new=new)

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
    for i, finding, spot in plan.findings():
        code, why = finding.code, finding.message
        if code == "label-missing":
            _create(plan, raw.splits[spot.split], spot.image, why)
        elif code == "image-size-undeclared":
            split = raw.splits[spot.split]
            for image in np.flatnonzero(split.usable & ~split.declared).tolist():
                if split.label_file(image) in copied:
                    opened(split.label_file(image)).set(code, "has no size", **_size(split, image))
        elif finding.file not in copied or spot.image < 0:
            continue
        elif code in DROPPED_BOXES and spot.entry >= 0:
            opened(finding.file).drop(spot.entry, code, why)
            dropped[spot.split, spot.image].add(spot.entry)
        elif code in CLIPPED_BOXES and (corners := box_of(raw.splits[spot.split], spot.image, spot.entry)):
            opened(finding.file).clip(spot.entry, corners, code, why)
        elif code == "image-size":
            opened(finding.file).set(code, why, **_size(raw.splits[spot.split], spot.image))
        elif code == "voc-filename" and (name := raw.splits[spot.split].path(spot.image).name).isprintable():
            opened(finding.file).set(code, why, filename=name)
        else:
            continue
        plan.repaired.add(i)
    for (name, image), new in plan.renamed.items():
        if (label := raw.splits[name].label_file(image)) in copied:
            opened(label).set("image-extension", "the image is renamed", filename=Path(new).name)
    for file in files.values():
        plan.texts[file.target] = format_xml(file.root, declaration=file.has_declaration)
    plan_ids(plan, dropped)


def _size(split: RawSplit, image: int) -> dict[str, str]:
    width, height = split.sizes_wh[image].tolist()
    return {"size__width": str(width), "size__height": str(height)}


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
        if path.stem in plan.report.raw.splits and plan.is_emptied(path.stem):
            plan.leave_out(path, "split-empty", "every image of the split is left out")
            del plan.files[plan.destination(path)]
        else:
            edit_lines(plan, path, lines, edits)

"""Repair Pascal VOC label files and the lists below `ImageSets/`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from rtdetr_cli.checks.repair.ids import plan_ids
from rtdetr_cli.checks.repair.plan import (
    CLIPPED_BOXES,
    DROPPED_BOXES,
    Plan,
    box_of,
    files_in,
    files_of_one_image,
    plan_label_files,
    read_label,
)
from rtdetr_cli.datasets.findings import Spot
from rtdetr_cli.datasets.raw import RawSplit
from rtdetr_cli.datasets.records import Finding
from rtdetr_cli.datasets.voc import CLASS_LISTS, SIDES, format_xml, label_xml, listed_name, parse_keeping_comments

Edit = Callable[[Element], None]


@dataclass(slots=True)
class _FileEdits:
    """The edits of one label file; objects are dropped last, since edits name them by index.

    Attributes:
        edits: code, reason, edit.
        dropped: object -> code and reason.
    """

    edits: list[tuple[str, str, Edit]]
    dropped: dict[int, tuple[str, str]]


def plan_voc(plan: Plan) -> None:
    """Plan the label files of a Pascal VOC dataset."""
    raw = plan.report.raw
    copied = plan_label_files(plan) & files_of_one_image(raw)
    _plan_lists(plan)
    files: dict[str, _FileEdits] = defaultdict(lambda: _FileEdits([], {}))
    dropped: dict[tuple[str, int], set[int]] = defaultdict(set)
    for i, finding, spot in plan.findings():
        if finding.code == "label-missing":
            _create(plan, raw.splits[spot.split], spot.image, finding.message)
        elif finding.code == "image-size-undeclared":
            split = raw.splits[spot.split]
            for image in np.flatnonzero(split.usable & ~split.declared).tolist():
                if split.label_file(image) in copied:
                    edit = _set_size(*split.sizes_wh[image].tolist())
                    files[split.label_file(image)].edits.append((finding.code, "has no size", edit))
        elif finding.file not in copied:
            continue
        elif spot.entry >= 0 and finding.code in DROPPED_BOXES:
            files[finding.file].dropped[spot.entry] = (finding.code, finding.message)
            dropped[spot.split, spot.image].add(spot.entry)
        elif (edit_ := _edit_of(plan, finding, spot)) is not None:
            files[finding.file].edits.append((finding.code, finding.message, edit_))
        else:
            continue
        plan.repaired.add(i)
    for (name, image), new in plan.renamed.items():
        if (file := raw.splits[name].label_file(image)) in copied:
            edit = _set_text("filename", Path(new).name)
            files[file].edits.append(("image-extension", f"its image is renamed to {new}", edit))
    for file, edits in files.items():
        _rewrite(plan, raw.label_paths[file], edits)
    plan_ids(plan, dropped)


def _edit_of(plan: Plan, finding: Finding, spot: Spot) -> Edit | None:
    """Return the edit that repairs a finding, other than dropping an object."""
    split = plan.report.raw.splits[spot.split] if spot.split else None
    if split is None or spot.image < 0:
        return None
    if finding.code in CLIPPED_BOXES and (corners := box_of(split, spot.image, spot.entry)) is not None:
        return _clip(spot.entry, corners)
    if finding.code == "image-size":
        return _set_size(*split.sizes_wh[spot.image].tolist())
    if finding.code == "voc-filename":
        name = Path(split.label_names.get(spot.image, split.file_names[spot.image])).name
        return _set_text("filename", name) if name.isprintable() else None
    return None


def _clip(entry: int, corners: list[float]) -> Edit:
    def edit(root: Element) -> None:
        for side, value in zip(SIDES, corners, strict=True):
            element = root.findall("object")[entry].find(f"bndbox/{side}")
            if element is not None and abs(float(element.text or "nan") - value) > 1e-9:
                element.text = f"{value:.10g}"

    return edit


def _set_size(width: int, height: int) -> Edit:
    def edit(root: Element) -> None:
        size = _child(root, "size")
        _child(size, "width").text = str(width)
        _child(size, "height").text = str(height)

    return edit


def _set_text(tag: str, text: str) -> Edit:
    def edit(root: Element) -> None:
        _child(root, tag).text = text

    return edit


def _child(element: Element, tag: str) -> Element:
    child = element.find(tag)
    return child if child is not None else SubElement(element, tag)


def _rewrite(plan: Plan, path: Path, edits: _FileEdits) -> None:
    """Edit the parsed document and write it with the format's writer."""
    target = plan.destination(path)
    text = read_label(path)
    root = parse_keeping_comments(text)
    objects = root.findall("object")
    before = [format_xml(element) for element in objects]
    for code, why, edit in edits.edits:
        edit(root)
        plan.record("edit", code, target, why)
    for entry, (code, why) in sorted(edits.dropped.items()):
        root.remove(objects[entry])
        plan.record("drop", code, target, why, old=before[entry])
    plan.texts[target] = format_xml(root, declaration=text.lstrip().startswith("<?xml"))


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
    own = files_of_one_image(raw)
    left_out: dict[str, bool] = {}  # whether an image is left out of every split
    for name, split in raw.splits.items():
        for image, file_name in enumerate(split.file_names):
            stem = str(Path(split.label_names.get(image, file_name)).with_suffix(""))
            left_out[stem] = (name, image) in plan.left_out and left_out.get(stem, True)
    lists = {path for file, path in raw.label_paths.items() if path.suffix == ".txt" and file not in own}
    for folder, _, _ in os.walk(raw.folder / "ImageSets"):
        lists.update(path for path in files_in(Path(folder)) if path.suffix == ".txt")
    for path in sorted(lists - {raw.folder / name for name in CLASS_LISTS}):
        target = plan.destination(path)
        plan.files.setdefault(target, path)
        if not any(left_out.values()):
            continue
        try:
            lines = read_label(path).split("\n")
        except UnicodeDecodeError:
            continue
        kept = []
        for number, line in enumerate(lines, 1):
            name = listed_name(line, left_out)
            if left_out.get(name):
                plan.record("drop", "image", target, f"{name} is left out", line=number, old=line)
            else:
                kept.append(line)
        if len(kept) < len(lines):
            plan.texts[target] = "\n".join(kept)

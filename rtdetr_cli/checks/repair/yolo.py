"""Repair YOLO labels, lists of images and `data.yaml`."""

from __future__ import annotations

import os
from collections import defaultdict
from functools import cache
from os.path import normpath
from pathlib import Path

import yaml

from rtdetr_cli.checks.repair.ids import plan_ids
from rtdetr_cli.checks.repair.plan import (
    CLIPPED_BOXES,
    DROPPED_BOXES,
    LineEdits,
    Plan,
    box_of,
    edit_lines,
    edit_list,
    files_of_one_image,
    plan_label_files,
    read_label,
)
from rtdetr_cli.datasets.data_yaml import SPLIT_KEYS
from rtdetr_cli.datasets.image_paths import ImageIndex
from rtdetr_cli.datasets.raw import RawSplit
from rtdetr_cli.datasets.yolo import label_path


def plan_yolo(plan: Plan) -> None:
    """Plan the label files of a YOLO dataset."""
    raw = plan.report.raw
    copied = plan_label_files(plan)
    lines = cache(lambda file: read_label(raw.label_paths[file]).split("\n"))
    edits: dict[str, LineEdits] = defaultdict(dict)
    dropped: dict[tuple[str, int], set[int]] = defaultdict(set)
    # Boxes are dropped first: one that is dropped needs no clipping.
    for i, finding in sorted(plan.findings(), key=lambda item: item[1].code in CLIPPED_BOXES):
        code, file, spot, entry = finding.code, finding.file, finding.spot, finding.spot.entry
        if code == "label-missing":
            target = plan.destination(label_path(raw.splits[spot.split].path(spot.image)))
            plan.texts[target] = ""
            plan.record("create", code, target, finding.message)
        elif file in copied and entry >= 0 and code in DROPPED_BOXES | CLIPPED_BOXES:
            if entry not in edits[file]:
                new = None
                if code in CLIPPED_BOXES:
                    new = _clip_line(lines(file)[entry], raw.splits[spot.split], spot.image, entry)
                else:
                    dropped[spot.member].add(sum(1 for line in lines(file)[:entry] if line.strip()))
                edits[file][entry] = (new, code, finding.message)
        else:
            continue
        plan.repaired.add(i)
    for file, file_edits in edits.items():
        edit_lines(plan, raw.label_paths[file], lines(file), file_edits)
    _plan_yaml(plan)
    _plan_lists(plan)
    plan_ids(plan, dropped)


def _clip_line(line: str, split: RawSplit, image: int, entry: int) -> str:
    """Return a label line with its box or polygon inside the image; keypoints stay as they are."""
    words = line.split()
    values = [float(word) for word in words[1:]]
    cx, cy, w, h = values[:4]
    x1, x2 = (min(max(v, 0.0), 1.0) for v in (cx - w / 2, cx + w / 2))
    y1, y2 = (min(max(v, 0.0), 1.0) for v in (cy - h / 2, cy + h / 2))
    as_box = len(values) == 4
    if not as_box and (corners := box_of(split, image, entry)) is not None:
        width, height = split.sizes_wh[image].tolist()
        sides = (x1 * width, y1 * height, x2 * width, y2 * height)
        as_box = all(abs(a - b) < 1e-3 for a, b in zip(sides, corners, strict=True))
    if as_box:
        clipped, rest = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], words[5:]
    else:
        clipped, rest = [min(max(v, 0.0), 1.0) for v in values], []
    return " ".join([words[0], *(f"{v:.10g}" for v in clipped), *rest])


def _plan_yaml(plan: Plan) -> None:
    """Make the copy's `data.yaml` refer to the copy: `path` and absolute folders would lead back to the original."""
    raw = plan.report.raw
    base = next(iter(raw.splits.values())).root
    emptied = {key for split in raw.splits if plan.is_emptied(split) for key in SPLIT_KEYS[split]}
    for file, path in raw.label_paths.items():
        target = plan.destination(path)
        if path.suffix.lower() not in (".yaml", ".yml") or target not in plan.files:
            continue
        text = read_label(path)
        edits: list[tuple[int, int, str]] = []
        root = yaml.compose(text, yaml.BaseLoader)
        assert isinstance(root, yaml.MappingNode)  # the reader took a dataset from it
        for key, value in root.value:
            if key.value in emptied:
                edits.append((value.start_mark.index, value.end_mark.index, ""))
                why = "every image of the split is left out"
                plan.record("edit", "split-empty", target, why, old={key.value: text[slice(*edits[-1][:2])]}, new="")
                continue
            for node in value.value if isinstance(value, yaml.SequenceNode) else (value,):
                if not isinstance(key, yaml.ScalarNode) or not isinstance(node, yaml.ScalarNode):
                    continue
                new = _inside_copy(key.value, node.value, base, path.parent)
                if new != node.value:
                    why = "the copy's files are next to its data.yaml"
                    edits.append((node.start_mark.index, node.end_mark.index, new))
                    plan.record("edit", "yolo-path", target, why, old={key.value: node.value}, new={key.value: new})
        for start, end, new in reversed(edits):
            text = text[:start] + _quoted(new) + text[end:]
            plan.texts[target] = text
        for i, finding in plan.findings():
            if finding.code == "yolo-path" and finding.file == file and edits:
                plan.repaired.add(i)


def _inside_copy(key: str, value: str, base: Path, home: Path) -> str:
    """Return a value of the file in the folder `home` that leads to the copy; other splits' paths start from `base`."""
    if key == "path":
        inside = os.path.relpath(base.absolute(), home.absolute())
        return value if value in ("", ".", "./", "null", "~") else "." if inside.startswith("..") else inside
    return _relative(value, base) if any(key in keys for keys in SPLIT_KEYS.values()) else value


def _quoted(value: str) -> str:
    return value if value == "." else "'" + value.replace("'", "''") + "'"


def _plan_lists(plan: Plan) -> None:
    """Remove images that are left out from lists of images, and write new names into them."""
    raw = plan.report.raw
    left_out = {normpath(raw.splits[n].path(i)): code for (n, i), (code, _) in plan.left_out.items()}
    new_names = {normpath(raw.splits[n].path(i)): Path(new).name for (n, i), new in plan.renamed.items()}
    label_files = files_of_one_image(raw)
    index = ImageIndex(name for split in raw.splits.values() for name in split.file_names)
    root = next(iter(raw.splits.values())).root
    # As the labels name them, which matters where the disk has the name in another case.
    for split in raw.splits.values():
        for image, label_name in split.label_names.items():
            listed, on_disk = normpath(split.root / label_name), normpath(split.path(image))
            for table in (left_out, new_names):
                if on_disk in table:
                    table[listed] = table[on_disk]
    for file, path in raw.label_paths.items():
        if path.suffix != ".txt" or file in label_files or plan.destination(path) not in plan.files:
            continue
        bases = {path.parent, *(s.root for s in raw.splits.values())}
        lines, edits = read_label(path).split("\n"), LineEdits()
        for number, line in enumerate(lines):
            name = line.strip()
            paths = {normpath(base / name) for base in bases} if name else set()
            if (match := index.find(name)) is not None:
                paths.add(normpath(root / match))
            new = _relative(name, root)
            if gone := paths & left_out.keys():
                edits[number] = (None, left_out[min(gone)], f"{name} is left out")
            elif renamed := paths & new_names.keys():
                new = str(Path(new).with_name(new_names[min(renamed)]))
                edits[number] = (new, "image-extension", "the image is renamed")
            elif new != name:
                edits[number] = (new, "image-outside", "an absolute path would lead back to the original")
        kept = any(line.strip() and edits.get(n, ("",))[0] is not None for n, line in enumerate(lines))
        edit_list(plan, path, lines, edits, emptied=not kept and any(map(plan.is_emptied, raw.splits)))


def _relative(name: str, root: Path) -> str:
    """Return a name that doesn't lead back to the original."""
    if not os.path.isabs(name):
        return name
    inside = os.path.relpath(normpath(name), normpath(root.absolute()))
    return name if inside.startswith("..") else inside

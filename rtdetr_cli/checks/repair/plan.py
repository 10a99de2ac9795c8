"""The plan of a repair: which files the copy gets, their new texts, and the list of changes."""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.checks.doctor import Report
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Finding

LEFT_OUT = "left-out"
DROPPED_BOXES = frozenset(
    {
        *("box-count", "box-not-number", "box-not-finite", "box-inverted", "box-zero-size", "box-outside"),
        *("box-duplicate", "category-unknown", "annotation-orphan", "annotation-malformed"),
        *("label-columns", "label-pixels"),
    }
)
CLIPPED_BOXES = frozenset({"box-partly-outside", "label-beyond-one"})
BROKEN_FILE = frozenset({"file-missing", "file-malformed", "file-bounds"})
"""Label files that cannot be read; the image is left out if the file belongs to that image only."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An image that is not in the copy: its split and name, its number of usable boxes, and why."""

    split: str
    image: str
    boxes: int
    code: str
    why: str


@dataclass(slots=True)
class Plan:
    """What the copy will contain, and what is changed on the way.

    Attributes:
        report: findings with every image in the frame that it has in the copy.
        keep_unlabelled: give images without a label file an empty one.
        files: destination below the copy -> source.
        texts: destination -> text to write in place of the source's.
        orientations: destination of an image -> offset and new bytes of its EXIF orientation.
        completed: truncated images whose missing part becomes gray in the copy.
        left_out: split and image -> code and reason.
        renamed: split and image -> new file name in the labels.
        changes: the entries of `changes.json`.
        repaired: positions of the findings that are dealt with.
        repaired_before: the same by code, of findings that are no longer in `report`.
        assumed: findings that are no longer in `report` and were not repaired either.
    """

    report: Report
    keep_unlabelled: bool = False
    allow_outside: bool = False
    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    orientations: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    completed: set[Path] = field(default_factory=set)
    left_out: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    renamed: dict[tuple[str, int], str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    repaired: set[int] = field(default_factory=set)
    repaired_before: Counter[str] = field(default_factory=Counter)
    assumed: list[Finding] = field(default_factory=list)

    def findings(self) -> Iterator[tuple[int, Finding]]:
        """Yield every finding that is not dealt with yet, with its position."""
        return ((i, finding) for i, finding in enumerate(self.report.findings) if i not in self.repaired)

    def not_repaired(self) -> list[Finding]:
        """Return the errors and warnings that stay as they are."""
        findings = (finding for _, finding in self.findings() if finding.severity in ("error", "warning"))
        return [*findings, *self.assumed]

    def images_left_out(self) -> tuple[LeftOut, ...]:
        """Return the images that are not in the copy, those with the most boxes first."""
        splits = self.report.raw.splits
        images = [
            LeftOut(name, splits[name].file_names[image], self.count_boxes(name, image), code, why)
            for (name, image), (code, why) in self.left_out.items()
        ]
        return tuple(sorted(images, key=lambda left: -left.boxes))

    def count_boxes(self, split: str, image: int) -> int:
        """Return the boxes of an image; YOLO boxes are counted in the label file if the image's size is unknown."""
        raw = self.report.raw
        count = len(raw.splits[split].labels[raw.splits[split].rows(image)])
        path = raw.label_paths.get(raw.splits[split].label_file(image))
        if not count and raw.format == "yolo" and path is not None and path.is_file():
            count = sum(bool(line.strip()) for line in path.read_bytes().splitlines())
        return count

    def is_emptied(self, split: str) -> bool:
        """Return whether every image of a split is left out."""
        return all((split, image) in self.left_out for image in range(len(self.report.raw.splits[split])))

    def destination(self, path: Path) -> str:
        """Return where a file of the dataset goes in the copy."""
        raw = self.report.raw
        path = Path(normpath(path))
        for root in raw.roots:
            if path.is_relative_to(normpath(root)):
                inside = path.relative_to(normpath(root))
                # Images from elsewhere (--images) go where the reader looks for them.
                elsewhere = root != raw.folder and raw.format != "yolo"
                return str(("JPEGImages" if raw.format == "voc" else "images") / inside) if elsewhere else str(inside)
        return path.name

    def leave_out(self, path: Path, code: str, why: str, **facts: Any) -> None:
        """Leave a file out of the copy, but keep it below `left-out/` if it belongs to the dataset."""
        target = self.destination(path)
        if code not in ("image-missing", "image-outside", "image-elsewhere") and path.is_file():
            facts["kept"] = f"{LEFT_OUT}/{target}"
            self.files[facts["kept"]] = path
        self.record("leave-out", code, target, why, **facts)

    def record(self, op: str, code: str, target: str, why: str, **facts: Any) -> None:
        """Add an entry to `changes.json`."""
        self.changes.append({"op": op, "code": code, "file": target, "why": why, **facts})

    def rename(self, old: str, new: str, code: str) -> None:
        """Record that a file has another name in the copy."""
        self.changes.append({"op": "rename", "code": code, "from": old, "to": new})

    def normalize_text(self) -> None:
        """Remove byte order marks and Windows line endings; their findings name only the first of several files."""
        positions = [i for i, finding in self.findings() if finding.code in ("file-bom", "file-crlf")]
        self.repaired.update(positions)
        for path in self.report.raw.label_paths.values() if positions else ():
            target = self.destination(path)
            if target not in self.files:
                continue
            data = path.read_bytes()
            odd = {"file-bom": data.startswith(codecs.BOM_UTF8), "file-crlf": b"\r\n" in data}
            if any(odd.values()):
                self.texts.setdefault(target, read_label(path))
            for code, present in odd.items():
                if present:
                    self.record("normalize", code, target, "has a byte order mark or Windows line endings")


def read_label(path: Path) -> str:
    """Return a label file's text without byte order mark and with Unix line endings."""
    return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")


def files_of_one_image(raw: RawDataset) -> set[str]:
    """Return the label files, as findings name them, that belong to one image."""
    if raw.format not in ("yolo", "voc", "labelme"):
        return set()
    return {split.label_file(image) for split in raw.splits.values() for image in range(len(split))} - {""}


def box_row(split: RawSplit, image: int, entry: int) -> int | None:
    """Return the row of a box, or None if the checks dropped it."""
    rows = split.rows(image)
    same = np.flatnonzero(split.box_entries[rows] == entry)
    return rows.start + int(same[0]) if len(same) else None


def box_of(split: RawSplit, image: int, entry: int) -> list[float] | None:
    """Return the clipped corners of one box in pixels, or None if the checks dropped it."""
    row = box_row(split, image, entry)
    return None if row is None else [float(v) for v in split.boxes_xyxy_px[row]]


def plan_label_files(plan: Plan) -> set[str]:
    """Copy the label files of YOLO or VOC except those whose image is left out; return the files that are copied."""
    raw = plan.report.raw
    of_left_out: dict[str, str] = {}
    of_kept: set[str] = set()
    for name, split in raw.splits.items():
        for image in range(len(split)):
            if (name, image) in plan.left_out:
                of_left_out[split.label_file(image)] = split.file_names[image]
            else:
                of_kept.add(split.label_file(image))
    copied = set()
    for file, path in raw.label_paths.items():
        if file in of_left_out and file not in of_kept:
            plan.leave_out(path, "image", f"{of_left_out[file]} is left out")
        elif path.is_file():
            plan.files[plan.destination(path)] = path
            copied.add(file)
    for i, finding in plan.findings():
        if finding.code == "label-orphan":
            plan.leave_out(raw.folder / finding.file, finding.code, finding.message)
            plan.repaired.add(i)
    return copied


LineEdits = dict[int, tuple[str | None, str, str]]
"""Index of a line -> its new text (None to drop it), code and reason."""


def edit_lines(plan: Plan, path: Path, lines: Sequence[str], edits: LineEdits) -> None:
    """Plan the new text of a file of lines."""
    target = plan.destination(path)
    for number, (new, code, why) in sorted(edits.items()):
        op = "drop" if new is None else "edit"
        plan.record(op, code, target, why, line=number + 1, old=lines[number], new=new)
    if edits:
        new_lines = (edits[number][0] if number in edits else line for number, line in enumerate(lines))
        plan.texts[target] = "\n".join(line for line in new_lines if line is not None)


def edit_list(plan: Plan, path: Path, lines: Sequence[str], edits: LineEdits, *, emptied: bool) -> None:
    """Plan the new text of a list of images; that of a split without any is left out."""
    if emptied:
        plan.leave_out(path, "split-empty", "every image of the split is left out")
        del plan.files[plan.destination(path)]
    else:
        edit_lines(plan, path, lines, edits)


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder except links, which may lead anywhere."""
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return []

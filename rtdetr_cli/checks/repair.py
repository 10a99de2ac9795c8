"""Write a repaired copy of a dataset, and a patch that says each change and undoes it.

Nothing is ever changed in place. Label files are mended by replacing spans of their text, so everything else in them
stays to the byte: other keys, spaces, comments. What cannot be mended safely is left out of the copy and said; files
that are left out are kept under `left-out/`, so that copy and patch alone bring the original back.

The copy holds what makes up the dataset: label files, the images they name, lists of images, and the texts that
belong to all of them, such as a licence. Undoing brings every one of these files back to the byte. What else lies in
the original's folder (images that no label names, masks, programs) was never part of what is checked: it is not
copied, and undoing does not bring it back. `patch.json` says so too.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
import struct
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from rtdetr_cli.checks.doctor import Report
from rtdetr_cli.datasets.coco import id_key, walk_object
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.findings import Spot
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Finding
from rtdetr_cli.datasets.voc import CLASS_LISTS, listed_name
from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.images.decode import FORMATS, SUFFIXES

PATCH_FILE = "patch.json"
LEFT_OUT = "left-out"
HOLDS = (
    "label files, the images they name, lists of images, and texts such as licence and readme; whatever else lies "
    "in the original's folder was not copied, and undoing does not bring it back"
)
_NOTE = re.compile(
    r"(licen[cs]es?|copying|copyright|notice|readme|read_me|citation|authors|changelog|classes|labels|class_names)"
    r"([._-].*)?",
    re.IGNORECASE,
)
_NOTE_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".bib", ".cff")
_NOTE_BYTES = 1 << 20

_DROPPED_BOXES = frozenset(
    {
        *("box-count", "box-not-number", "box-not-finite", "box-inverted", "box-zero-size", "box-outside"),
        *("box-duplicate", "category-unknown", "annotation-orphan", "annotation-malformed"),
        *("label-columns", "label-pixels"),
    }
)
_CLIPPED_BOXES = frozenset({"box-partly-outside", "label-beyond-one"})
_LOST_IMAGES = frozenset(code for code, entry in CODES.items() if entry.repair.startswith("leaves the image"))
_LOST_LABELS = frozenset({"file-missing", "file-malformed", "file-bounds"})
_BOM = "\ufeff"
_ANNOTATION = re.compile(r"<annotation(?:\s[^>]*)?(?<!/)>")
_SIZE = re.compile(r"<size\s*/>|<size\b.*?</size\s*>", re.DOTALL)
_OBJECT = re.compile(r"[ \t]*<object\b.*?</object\s*>[ \t]*(?:\r?\n)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did.

    Attributes:
        data: what to train on.
        patch: the patch file.
        changes: code -> how many findings were repaired.
        not_repaired: code -> how many errors and warnings were left as they are.
    """

    data: Path
    patch: Path
    changes: dict[str, int]
    not_repaired: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Edit:
    """Replace `text[start:end]` by `new`."""

    start: int
    end: int
    new: str
    code: str
    why: str


@dataclass(slots=True)
class _Plan:
    """What will be copied, and what is changed on the way.

    Attributes:
        files: destination below the copy -> source.
        edits: destination -> replacements in its text.
        changes: records of the patch, in the order they are made.
        done: positions of the findings that are taken care of.
    """

    report: Report
    out: Path
    files: dict[str, Path] = field(default_factory=dict)
    edits: dict[str, list[_Edit]] = field(default_factory=lambda: defaultdict(list))
    line_ends: set[str] = field(default_factory=set)
    changes: list[dict[str, Any]] = field(default_factory=list)
    done: set[int] = field(default_factory=set)

    def destination(self, path: Path) -> str:
        """Return where a file of the dataset goes in the copy."""
        raw = self.report.raw
        text = normpath(path)
        for number, root in enumerate((raw.folder, *raw.roots)):
            try:
                inside = Path(text).relative_to(normpath(root))
            except ValueError:
                continue
            # Images that the user keeps elsewhere (--images) come to lie where the reader looks for them.
            apart = number > 0 and raw.format != "yolo"
            return str(("JPEGImages" if raw.format == "voc" else "images") / inside) if apart else str(inside)
        return Path(text).name

    def text(self, path: Path) -> str:
        """Return a label file's text, its byte order mark included."""
        return path.read_bytes().decode("utf-8")

    def lines(self, text: str) -> list[tuple[int, int]]:
        """Return start and end of each line, the line's end included."""
        spans, start = [], 0
        for line in text.split("\n"):
            end = min(start + len(line) + 1, len(text))
            spans.append((start, end))
            start = end
        return spans


def repairable(report: Report) -> bool:
    """Tell whether `repair` mends an error or a warning of a dataset, without planning it all."""
    raw = report.raw
    if not raw.splits:
        return False
    found = [f for f in report.findings if f.severity in ("error", "warning") and CODES[f.code].repair]
    if any(f.code not in _LOST_LABELS for f in found):
        return True
    # A label file that cannot be read is left out with its image, unless it is everybody's.
    return raw.format in ("yolo", "voc") and not _own_files(raw).isdisjoint(f.file for f in found)


def _own_files(raw: RawDataset) -> set[str]:
    """Return the label files that belong to one image."""
    return {split.label_file(image) for split in raw.splits.values() for image in range(len(split))}


def repair(report: Report, out: Path) -> Repaired:
    """Write a repaired copy below `out`.

    Args:
        report: of the dataset, best with its images decoded.
        out: a folder that is new or empty.

    Raises:
        DataError: the dataset is broken in a way that leaves nothing to copy.
        RtdetrError: the folder cannot be written.
    """
    raw = report.raw
    if not raw.splits:
        first = next((f for f in raw.findings if f.severity == "error"), None)
        raise DataError(
            f"{raw.name} cannot be repaired: " + (first.message if first else "no split can be read"),
            hint=f"rtdetr validate {raw.source}",
            code=first.code if first else "split-missing",
        )
    plan = _Plan(report, out)
    lost = _lost_images(plan)
    renamed = _plan_images(plan, lost)
    if raw.format in ("coco", "roboflow"):
        _plan_coco(plan, lost, renamed)
    elif raw.format == "yolo":
        _plan_yolo(plan, lost, renamed)
    else:
        _plan_voc(plan, lost, renamed)
    _plan_marks(plan)
    _plan_line_ends(plan)
    _plan_notes(plan)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _carry_out(plan)
    except OSError as error:
        raise RtdetrError(f"{out} cannot be written: {error.strerror or error}", code="output") from error
    left = Counter(
        f.code for i, f in enumerate(report.findings) if i not in plan.done and f.severity in ("error", "warning")
    )
    repaired = Counter(report.findings[i].code for i in sorted(plan.done))
    patch = out / PATCH_FILE
    document = {
        "schema_version": 1,
        "source": str(raw.source),
        "format": raw.format,
        "holds": HOLDS,
        "changes": plan.changes,
        "not_repaired": [
            {"code": f.code, "file": f.file, "line": f.line, "message": f.message}
            for i, f in enumerate(report.findings)
            if i not in plan.done and f.severity in ("error", "warning")
        ],
    }
    patch.write_text(json.dumps(document, indent=1), "utf-8")
    data = out / plan.destination(raw.source) if raw.source.is_file() else out
    return Repaired(data, patch, dict(repaired), dict(left))


def _plan_notes(plan: _Plan) -> None:
    """Carry over the texts that belong to the dataset as a whole: a licence asks to stay with the images."""
    raw = plan.report.raw
    left_out = {change["file"] for change in plan.changes if change["op"] == "leave-out"}
    for folder in dict.fromkeys((raw.folder, *(path.parent for path in raw.label_paths.values()))):
        for path in _files_in(folder):
            target = plan.destination(path)
            if _is_note(path) and target not in left_out and path.is_relative_to(raw.folder):
                plan.files.setdefault(target, path)


def _files_in(folder: Path) -> list[Path]:
    """Return the files of a folder that are no links: a link may lead anywhere."""
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return []


def _is_note(path: Path) -> bool:
    named = _NOTE.fullmatch(path.name) is not None and path.suffix.lower() in _NOTE_SUFFIXES
    return named and os.access(path, os.R_OK) and path.stat().st_size <= _NOTE_BYTES


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _lost_images(plan: _Plan) -> dict[str, set[int]]:
    """Return the images that cannot be used, and mark the findings that say so, and those of their boxes."""
    raw = plan.report.raw
    lost = {name: set(np.flatnonzero(~split.usable).tolist()) for name, split in raw.splits.items()}
    broken = {f.file for f in raw.findings if f.code in _LOST_LABELS}
    if raw.format in ("yolo", "voc"):
        for name, split in raw.splits.items():
            for image in range(len(split)):
                if split.label_file(image) in broken:
                    lost[name].add(image)
    for spot in _turned_for_good(plan):
        lost[spot.split].add(spot.image)
    own = _own_files(raw) if broken else set()
    for i, (finding, spot) in enumerate(_found(plan)):
        if finding.code in _LOST_IMAGES and spot.image >= 0:
            plan.done.add(i)
        elif finding.code in _LOST_LABELS and raw.format in ("yolo", "voc"):
            if finding.file in own:
                plan.done.add(i)
        elif spot.image >= 0 and spot.image in lost.get(spot.split, ()):
            plan.done.add(i)  # gone with its image
    return lost


def _turned_for_good(plan: _Plan) -> list[Spot]:
    """Return the images whose labels disagree with an orientation that cannot be taken out of the file."""
    splits = plan.report.raw.splits
    swapped = [spot for finding, spot in _found(plan) if finding.code == "image-exif-swapped"]
    return [s for s in swapped if _orientation_edit(splits[s.split].path(s.image), "", "") is None]


def _found(plan: _Plan) -> list[tuple[Finding, Spot]]:
    return list(zip(plan.report.findings, plan.report.spots, strict=True))


def _plan_images(plan: _Plan, lost: dict[str, set[int]]) -> dict[tuple[str, int], str]:
    """Plan which images are copied, under which name and with which bytes; return new file names."""
    raw = plan.report.raw
    renamed: dict[tuple[str, int], str] = {}
    codes: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for i, (finding, spot) in enumerate(_found(plan)):
        if spot.image >= 0 and finding.code.startswith("image-"):
            codes[spot.split, spot.image].setdefault(finding.code, i)
    mended: dict[Path, tuple[str, set[str]]] = {}  # images that are copied: new suffix, faults that were mended
    for name, split in raw.splits.items():
        for image in range(len(split)):
            path = split.path(image)
            if image in lost[name]:
                continue
            said = codes[name, image]
            if path in mended:  # listed more than once
                suffix, done = mended[path]
                plan.done.update(i for code, i in said.items() if code in done)
                if suffix:
                    renamed[name, image] = str(Path(split.file_names[image]).with_suffix(suffix))
                continue
            suffix, done = "", set()
            target = plan.destination(path)
            if "image-name-case" in said and raw.format in ("yolo", "voc"):
                wanted = plan.destination(split.root / split.label_names[image])
                plan.changes.append(_rename(target, wanted, "image-name-case"))
                done.add("image-name-case")
                target = wanted
            if "image-extension" in said and plan.report.image_info:
                usual = SUFFIXES[plan.report.image_info[name][image].format][0]
                wanted = str(Path(target).with_suffix(usual))
                if wanted not in plan.files and not path.with_suffix(usual).exists():
                    plan.changes.append(_rename(target, wanted, "image-extension"))
                    done.add("image-extension")
                    renamed[name, image] = str(Path(split.file_names[image]).with_suffix(usual))
                    target, suffix = wanted, usual
            for code in ("image-exif-swapped", "image-exif-invalid"):
                if code in said:
                    change = _orientation_edit(path, target, code)
                    if change is not None:
                        plan.changes.append(change)
                        done.add(code)
            plan.done.update(said[code] for code in done)
            plan.files[target] = path
            mended[path] = (suffix, done)
    for name, split in raw.splits.items():
        for image in sorted(lost[name]):
            path = split.path(image)
            if path in mended:
                continue
            causes = (*_LOST_IMAGES, "image-exif-swapped")
            code = next((c for c in codes[name, image] if c in causes), "file-malformed")
            _leave_out(plan, path, code, copy=code not in ("image-missing", "image-outside"))
    return renamed


def _rename(old: str, new: str, code: str) -> dict[str, Any]:
    return {"op": "rename", "code": code, "from": old, "to": new}


def _leave_out(plan: _Plan, path: Path, code: str, *, copy: bool = True) -> None:
    target = plan.destination(path)
    change: dict[str, Any] = {"op": "leave-out", "code": code, "file": target}
    if copy and path.is_file():
        change["kept"] = f"{LEFT_OUT}/{target}"
        plan.files[change["kept"]] = path
    plan.changes.append(change)


def _orientation_edit(path: Path, target: str, code: str) -> dict[str, Any] | None:
    """Return the change that sets an image's EXIF orientation to upright, or None where that is not safe."""
    data = path.read_bytes()
    try:
        with Image.open(path, formats=FORMATS) as image:
            exif = image.info.get("exif") if image.format in ("JPEG", "MPO", "WEBP") else None
    except Exception:
        return None
    if not isinstance(exif, bytes) or data.count(exif) != 1:
        return None
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}.get(exif[start : start + 2])
    if order is None or len(exif) < start + 8:
        return None
    (first,) = struct.unpack_from(f"{order}I", exif, start + 4)
    position = start + first
    if position + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, position)
    for entry in range(position + 2, position + 2 + 12 * count, 12):
        if entry + 12 > len(exif):
            return None
        if struct.unpack_from(f"{order}H", exif, entry)[0] == 0x0112:
            offset = data.index(exif) + entry
            new = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 1, 0)
            return {
                "op": "bytes",
                "code": code,
                "file": target,
                "offset": offset,
                "old": data[offset : offset + 12].hex(),
                "new": new.hex(),
            }
    return None


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def _plan_coco(plan: _Plan, lost: dict[str, set[int]], renamed: dict[tuple[str, int], str]) -> None:
    raw = plan.report.raw
    for shown, path in raw.label_paths.items():
        plan.files[plan.destination(path)] = path
        names = [name for name, split in raw.splits.items() if split.label_files == [shown]]
        if names:
            _plan_coco_file(plan, path, names[0], lost[names[0]], renamed)


def _plan_coco_file(plan: _Plan, path: Path, name: str, lost: set[int], renamed: dict[tuple[str, int], str]) -> None:
    split = plan.report.raw.splits[name]
    text = plan.text(path)
    shift = len(_BOM) if text.startswith(_BOM) else 0
    images, annotations = _Entries(), _Entries()
    ignored: array[int] = array("q")
    walk_object(
        text[shift:],
        {
            "images": (images.visit_id("id"), images.starts, images.ends),
            "annotations": (annotations.visit_id("image_id"), annotations.starts, annotations.ends),
            "categories": (lambda entry: None, ignored, ignored),
        },
    )
    drop_images: dict[int, tuple[str, str]] = {}
    drop_boxes: dict[int, tuple[str, str]] = {}
    change_images: dict[int, dict[str, Any]] = defaultdict(dict)
    change_boxes: dict[int, dict[str, Any]] = defaultdict(dict)
    why: dict[tuple[str, int], tuple[str, str]] = {}
    rows = {int(entry): row for row, entry in enumerate(split.box_entries.tolist())}
    gone = {images.keys[int(split.image_entries[p])] for p in lost}
    for image in lost:
        drop_images[int(split.image_entries[image])] = ("image", f"{split.file_names[image]} cannot be used")
    for i, (finding, spot) in enumerate(_found(plan)):
        if finding.file not in split.label_files:
            continue
        code, entry = finding.code, spot.entry
        told = (code, finding.message)
        if code == "entry-malformed" and entry >= 0:
            drop_images[entry] = told
        elif code in _DROPPED_BOXES and entry >= 0:
            drop_boxes[entry] = told
        elif code in _CLIPPED_BOXES and entry in rows:
            x1, y1, x2, y2 = split.boxes_xyxy_px[rows[entry]].round(6).tolist()
            change_boxes[entry]["bbox"] = [x1, y1, round(x2 - x1, 6), round(y2 - y1, 6)]
            why["box", entry] = told
        elif code == "annotation-id-duplicate" and entry in rows:
            change_boxes[entry]["id"] = int(split.annotation_ids[rows[entry]])
            why["box", entry] = told
        elif code == "box-no-area":
            for row in np.flatnonzero(np.isnan(split.areas)).tolist():
                x1, y1, x2, y2 = split.boxes_xyxy_px[row].tolist()
                change_boxes[int(split.box_entries[row])]["area"] = round((x2 - x1) * (y2 - y1), 6)
                why["box", int(split.box_entries[row])] = (code, "has no area")
        elif code == "image-size" and entry >= 0:
            change_images[entry] |= dict(zip(("width", "height"), split.sizes_wh[spot.image].tolist(), strict=True))
            why["image", entry] = told
        elif code == "image-size-undeclared":
            for image in np.flatnonzero(split.usable & ~split.declared).tolist():
                place = int(split.image_entries[image])
                change_images[place] |= dict(zip(("width", "height"), split.sizes_wh[image].tolist(), strict=True))
                why["image", place] = (code, "has no size")
        elif code == "image-name-case" and entry >= 0:
            change_images[entry]["file_name"] = split.file_names[spot.image]
            why["image", entry] = told
        else:
            continue
        plan.done.add(i)
    for (name_, image), new in renamed.items():
        if name_ == name:
            place = int(split.image_entries[image])
            change_images[place]["file_name"] = new
            why["image", place] = ("image-extension", f"{split.file_names[image]} is called {new}")
    for entry, key in enumerate(annotations.keys):
        if key in gone and key is not None:
            drop_boxes.setdefault(entry, ("image", "its image is left out"))
    edits = plan.edits[plan.destination(path)]
    for entries, drops, changes, kind in (
        (images, drop_images, change_images, "image"),
        (annotations, drop_boxes, change_boxes, "box"),
    ):
        for entry, (start, end) in entries.removals(set(drops)).items():
            edits.append(_Edit(start + shift, end + shift, "", *drops[entry]))
        for entry, values in changes.items():
            if entry in drops or not values:
                continue
            start, end = entries.starts[entry] + shift, entries.ends[entry] + shift
            old = json.loads(text[start:end])
            if "bbox" in values and _is_box_area(old):
                values["area"] = round(values["bbox"][2] * values["bbox"][3], 6)
            edits.append(_Edit(start, end, json.dumps(old | values), *why[kind, entry]))


def _is_box_area(entry: dict[str, Any]) -> bool:
    try:
        area = float(entry["area"])
        return abs(area - float(entry["bbox"][2]) * float(entry["bbox"][3])) <= 1e-3 * max(1.0, abs(area))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return False


class _Entries:
    """Where the entries of a list lie in the text, and one id of each."""

    def __init__(self) -> None:
        self.starts: array[int] = array("q")
        self.ends: array[int] = array("q")
        self.keys: list[int | str | None] = []

    def visit_id(self, name: str) -> Callable[[Any], None]:
        """Return a visitor that notes the id called `name`."""

        def visit(entry: Any) -> None:
            self.keys.append(id_key(entry.get(name)) if isinstance(entry, dict) else None)

        return visit

    def removals(self, drops: set[int]) -> dict[int, tuple[int, int]]:
        """Return entry -> the span to delete, so that exactly the commas between the others stay."""
        spans: dict[int, tuple[int, int]] = {}
        kept_before = False
        for entry in range(len(self.starts)):
            if entry not in drops:
                kept_before = True
            elif kept_before:
                spans[entry] = (self.ends[entry - 1], self.ends[entry])
            elif entry + 1 < len(self.starts):
                spans[entry] = (self.starts[entry], self.starts[entry + 1])
            else:
                spans[entry] = (self.starts[entry], self.ends[entry])
        return spans


# ---------------------------------------------------------------------------------------------------------------------
# YOLO


def _plan_yolo(plan: _Plan, lost: dict[str, set[int]], renamed: dict[tuple[str, int], str]) -> None:
    raw = plan.report.raw
    labels_lost = {raw.splits[n].label_file(p) for n, images in lost.items() for p in images}
    labels_kept = {s.label_file(p) for n, s in raw.splits.items() for p in range(len(s)) if p not in lost[n]}
    labels_lost -= labels_kept
    for shown, path in raw.label_paths.items():
        if shown in labels_lost:
            _leave_out(plan, path, "image")
        elif path.is_file():
            plan.files[plan.destination(path)] = path
    texts: dict[str, tuple[str, list[tuple[int, int]], int]] = {}
    dropped: set[tuple[str, int]] = set()

    def opened(shown: str) -> tuple[str, list[tuple[int, int]], int]:
        if shown not in texts:
            text = plan.text(raw.label_paths[shown])
            shift = len(_BOM) if text.startswith(_BOM) else 0
            texts[shown] = (text, [(a + shift, b + shift) for a, b in plan.lines(text[shift:])], shift)
        return texts[shown]

    _mend_base(plan, opened)
    found = _found(plan)
    for i, (finding, spot) in enumerate(found):
        if finding.code in _DROPPED_BOXES and spot.entry >= 0 and finding.file not in labels_lost:
            _, spans, _ = opened(finding.file)
            if (finding.file, spot.entry) not in dropped:
                dropped.add((finding.file, spot.entry))
                _edit(plan, finding.file, *spans[spot.entry], "", finding)
            plan.done.add(i)
    for i, (finding, spot) in enumerate(found):
        code = finding.code
        if finding.file in labels_lost:
            continue
        if code in _CLIPPED_BOXES and spot.entry >= 0:
            if (finding.file, spot.entry) not in dropped:
                dropped.add((finding.file, spot.entry))
                text, spans, _ = opened(finding.file)
                start, end = spans[spot.entry]
                _edit(plan, finding.file, start, end, _clip_line(text[start:end]), finding)
            plan.done.add(i)
        elif code == "label-missing":
            label = raw.splits[spot.split].path(spot.image)
            if spot.image not in lost[spot.split]:
                from rtdetr_cli.datasets.yolo import label_path

                plan.changes.append(
                    {"op": "create", "code": code, "file": plan.destination(label_path(label)), "text": ""}
                )
                plan.done.add(i)
        elif code == "label-orphan":
            _leave_out(plan, raw.folder / finding.file, code)
            plan.done.add(i)
        elif code == "yolo-path":
            _, spans, _ = opened(finding.file)
            _edit(plan, finding.file, *spans[finding.line - 1], "", finding)
            plan.done.add(i)
    _mend_lists(plan, lost, renamed, opened)


def _mend_base(plan: _Plan, opened: Callable[[str], tuple[str, list[tuple[int, int]], int]]) -> None:
    """Let the copy's `path:` name the copy: the original's would lead back to the original."""
    raw = plan.report.raw
    if all(normpath(split.root) == normpath(raw.folder) for split in raw.splits.values()):
        return
    for shown, path in raw.label_paths.items():
        if path.suffix.lower() not in (".yaml", ".yml"):
            continue
        text, spans, _ = opened(shown)
        for start, end in spans:
            if text[start:end].startswith("path:"):
                told = Finding("yolo-path", "info", "the copy lies beside its data.yaml")
                _edit(plan, shown, start, end, "path: .\n", told)


def _clip_line(line: str) -> str:
    """Return a label line with its box or polygon inside the image."""
    body = line.rstrip("\r\n")
    words = body.split()
    values = [float(word) for word in words[1:]]
    if len(values) == 4:
        cx, cy, w, h = values
        x1, x2 = (min(max(v, 0.0), 1.0) for v in (cx - w / 2, cx + w / 2))
        y1, y2 = (min(max(v, 0.0), 1.0) for v in (cy - h / 2, cy + h / 2))
        values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    else:
        values = [min(max(v, 0.0), 1.0) for v in values]
    return " ".join([words[0], *(f"{v:.10g}" for v in values)]) + line[len(body) :]


def _edit(plan: _Plan, shown: str, start: int, end: int, new: str, finding: Finding) -> None:
    target = plan.destination(plan.report.raw.label_paths[shown])
    plan.edits[target].append(_Edit(start, end, new, finding.code, finding.message))


def _mend_lists(
    plan: _Plan,
    lost: dict[str, set[int]],
    renamed: dict[tuple[str, int], str],
    opened: Callable[[str], tuple[str, list[tuple[int, int]], int]],
) -> None:
    """Take lost images out of lists of images, and write new names into them."""
    raw = plan.report.raw
    lost_paths = {normpath(raw.splits[n].path(p)) for n, images in lost.items() for p in images}
    new_names = {normpath(raw.splits[n].path(p)): Path(new).name for (n, p), new in renamed.items()}
    own = _own_files(raw)
    if not lost_paths and not new_names:
        return
    for shown, path in raw.label_paths.items():
        if path.suffix != ".txt" or shown in own:
            continue
        text, spans, _ = opened(shown)
        bases = {path.parent, *(s.root for s in raw.splits.values())}
        for start, end in spans:
            name = text[start:end].strip()
            if not name:
                continue
            here = {normpath(base / name) for base in bases}
            if here & lost_paths:
                _edit(plan, shown, start, end, "", Finding("image-missing", "error", f"{name} cannot be used"))
            for image in here & set(new_names):
                new = text[start:end].replace(Path(name).name, new_names[image])
                _edit(plan, shown, start, end, new, Finding("image-extension", "warning", f"{name} was renamed"))


# ---------------------------------------------------------------------------------------------------------------------
# Pascal VOC


def _plan_voc(plan: _Plan, lost: dict[str, set[int]], renamed: dict[tuple[str, int], str]) -> None:
    raw = plan.report.raw
    labels_lost = {raw.splits[n].label_file(p) for n, images in lost.items() for p in images}
    labels_lost -= {s.label_file(p) for n, s in raw.splits.items() for p in range(len(s)) if p not in lost[n]}
    own = _own_files(raw)
    for shown, path in raw.label_paths.items():
        if shown in labels_lost:
            _leave_out(plan, path, "image")
        elif path.is_file():
            plan.files[plan.destination(path)] = path
    _plan_voc_lists(plan, lost, own)
    texts: dict[str, str] = {}

    def opened(shown: str) -> str:
        if shown not in texts:
            texts[shown] = plan.text(raw.label_paths[shown])
        return texts[shown]

    dropped: set[tuple[str, int]] = set()
    found = _found(plan)
    order = sorted(range(len(found)), key=lambda i: found[i][0].code in _CLIPPED_BOXES)
    for i in order:
        finding, spot = found[i]
        code, shown = finding.code, finding.file
        if code == "label-orphan":
            _leave_out(plan, raw.folder / shown, code)
            plan.done.add(i)
        elif code == "label-missing" and spot.image not in lost[spot.split]:
            _create_voc(plan, raw.splits[spot.split], spot.image)
            plan.done.add(i)
        if shown not in own or shown in labels_lost:
            continue
        text = opened(shown)
        if spot.entry >= 0 and code in _DROPPED_BOXES | _CLIPPED_BOXES:
            if (shown, spot.entry) in dropped:
                plan.done.add(i)
                continue
            spans = [m.span() for m in _OBJECT.finditer(text)]
            if spot.entry >= len(spans) or len(spans) != len(re.findall(r"<object[\s>/]", text)):
                continue
            start, end = spans[spot.entry]
            if code in _DROPPED_BOXES:
                _edit(plan, shown, start, end, "", finding)
            else:
                split = raw.splits[spot.split]
                row = np.flatnonzero((split.box_images == spot.image) & (split.box_entries == spot.entry))
                new = _clip_object(text[start:end], split.boxes_xyxy_px[int(row[0])].tolist()) if len(row) else None
                if new is None:
                    continue
                _edit(plan, shown, start, end, new, finding)
            dropped.add((shown, spot.entry))
            plan.done.add(i)
        elif code == "voc-filename":
            file_name = renamed.get((spot.split, spot.image), raw.splits[spot.split].file_names[spot.image])
            if _replace_value(plan, shown, text, "filename", Path(file_name).name, finding):
                plan.done.add(i)
        elif code == "image-size":
            width, height = raw.splits[spot.split].sizes_wh[spot.image].tolist()
            both = [
                _replace_value(plan, shown, text, side, str(value), finding, after="<size")
                for side, value in (("width", width), ("height", height))
            ]
            if all(both):
                plan.done.add(i)
        elif code == "image-size-undeclared":
            split = raw.splits[spot.split]
            undeclared = np.flatnonzero(split.usable & ~split.declared).tolist()
            files = {p: split.label_file(p) for p in undeclared if split.label_file(p) not in ("", *labels_lost)}
            declared = [_declare_size(plan, split, p, opened(file), finding) for p, file in files.items()]
            if all(declared):
                plan.done.add(i)
    for (name, image), new in renamed.items():
        shown = raw.splits[name].label_file(image)
        if shown and not any(f.code == "voc-filename" and f.file == shown for f in raw.findings):
            text = opened(shown)
            told = Finding("image-extension", "warning", f"its image is called {new}")
            _replace_value(plan, shown, text, "filename", Path(new).name, told)


def _plan_voc_lists(plan: _Plan, lost: dict[str, set[int]], own: set[str]) -> None:
    """Carry over every list below `ImageSets/`, also those that no split is read from, without the lost images."""
    raw = plan.report.raw
    stems: dict[str, bool] = {}  # whether an image is lost everywhere
    for name, split in raw.splits.items():
        for image, file_name in enumerate(split.file_names):
            stem = str(Path(split.label_names.get(image, file_name)).with_suffix(""))
            stems[stem] = image in lost[name] and stems.get(stem, True)
    lists = {path for shown, path in raw.label_paths.items() if path.suffix == ".txt" and shown not in own}
    for folder, _, _ in os.walk(raw.folder / "ImageSets"):
        lists.update(path for path in _files_in(Path(folder)) if path.suffix == ".txt")
    for path in sorted(lists - {raw.folder / name for name in CLASS_LISTS}):
        target = plan.destination(path)
        plan.files.setdefault(target, path)
        if not any(stems.values()):
            continue
        try:
            text = plan.text(path)
        except UnicodeDecodeError:
            continue
        shift = len(_BOM) if text.startswith(_BOM) else 0
        for start, end in plan.lines(text[shift:]):
            listed = listed_name(text[start + shift : end + shift], stems)
            if stems.get(listed):
                plan.edits[target].append(_Edit(start + shift, end + shift, "", "image", f"{listed} cannot be used"))


def _clip_object(text: str, corners: list[float]) -> str | None:
    at = text.find("<bndbox")
    if at < 0:
        return None
    box = text[at:]
    for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
        box, count = re.subn(rf"(<{side}\b[^>]*>)[^<]*(</{side}\s*>)", rf"\g<1>{value:.10g}\g<2>", box, count=1)
        if not count:
            return None
    return text[:at] + box


def _replace_value(
    plan: _Plan, shown: str, text: str, tag: str, value: str, finding: Finding, *, after: str = ""
) -> bool:
    start = text.find(after) if after else 0
    match = re.compile(rf"<{tag}\b[^>]*>([^<]*)</{tag}\s*>").search(text, max(start, 0))
    if match is None or start < 0:
        return False
    _edit(plan, shown, *match.span(1), escape(value), finding)
    return True


def _declare_size(plan: _Plan, split: RawSplit, image: int, text: str, finding: Finding) -> bool:
    block = _size_block(*split.sizes_wh[image].tolist())
    span = _SIZE.search(text)
    start = _ANNOTATION.search(text)
    if span is not None:
        _edit(plan, split.label_file(image), *span.span(), block, finding)
    elif start is not None:
        _edit(plan, split.label_file(image), start.end(), start.end(), f"\n\t{block}", finding)
    return span is not None or start is not None


def _size_block(width: int, height: int) -> str:
    return f"<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>"


def _create_voc(plan: _Plan, split: RawSplit, image: int) -> None:
    path = split.path(image)
    width, height = split.sizes_wh[image].tolist()
    folder = plan.report.raw.folder / "Annotations"
    label = (folder if folder.is_dir() else path.parent) / f"{path.stem}.xml"
    text = f"<annotation>\n\t<filename>{escape(path.name)}</filename>\n\t{_size_block(width, height)}\n</annotation>\n"
    plan.changes.append({"op": "create", "code": "label-missing", "file": plan.destination(label), "text": text})


# ---------------------------------------------------------------------------------------------------------------------
# Doing and undoing


def _odd_files(plan: _Plan, code: str) -> list[tuple[str, bytes]]:
    """Return the label files of the copy, with their bytes, where `code` was found; it names only the first of them."""
    positions = [i for i, finding in enumerate(plan.report.findings) if finding.code == code]
    plan.done.update(positions)
    paths = plan.report.raw.label_paths.values() if positions else ()
    return [(to, path.read_bytes()) for path in paths if (to := plan.destination(path)) in plan.files]


def _plan_marks(plan: _Plan) -> None:
    for target, data in _odd_files(plan, "file-bom"):
        if data.startswith(codecs.BOM_UTF8):
            plan.edits[target].append(_Edit(0, 1, "", "file-bom", "has a byte order mark"))


def _plan_line_ends(plan: _Plan) -> None:
    plan.line_ends.update(target for target, data in _odd_files(plan, "file-crlf") if b"\r\n" in data)


def _carry_out(plan: _Plan) -> None:
    for target, path in plan.files.items():
        to = plan.out / target
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    for target, edits in plan.edits.items():
        if not edits or target not in plan.files:
            continue
        text = (plan.out / target).read_bytes().decode("utf-8")
        # From the end to the start: the positions of those still to come stay what they are.
        for edit in sorted(edits, key=lambda e: (-e.start, -e.end)):
            plan.changes.append(
                {
                    "op": "edit",
                    "code": edit.code,
                    "file": target,
                    "start": edit.start,
                    "old": text[edit.start : edit.end],
                    "new": edit.new,
                    "why": edit.why,
                }
            )
            text = text[: edit.start] + edit.new + text[edit.end :]
        (plan.out / target).write_bytes(text.encode("utf-8"))
    for target in sorted(plan.line_ends):
        text = (plan.out / target).read_bytes().decode("utf-8")
        lines = text.split("\n")
        changed = [number for number, line in enumerate(lines[:-1]) if line.endswith("\r")]
        if changed:
            every = len(changed) == len(lines) - 1
            plan.changes.append(
                {"op": "line-ends", "code": "file-crlf", "file": target, "lines": "all" if every else changed}
            )
            (plan.out / target).write_bytes(text.replace("\r\n", "\n").encode("utf-8"))
    for change in plan.changes:
        if change["op"] == "create":
            to = plan.out / change["file"]
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(change["text"], "utf-8")
        elif change["op"] == "bytes":
            _replace_bytes(plan.out / change["file"], change["offset"], bytes.fromhex(change["new"]))


def _replace_bytes(path: Path, offset: int, new: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(new)


def undo(patch: Path, to: Path) -> int:
    """Write the dataset as it was before a repair below `to`, from the repaired copy around `patch`.

    Args:
        patch: the `patch.json` of a repair.
        to: a folder that is new or empty.

    Returns:
        how many changes were undone.

    Raises:
        DataError: the patch is no such file, or the copy was changed since.
    """
    try:
        document = json.loads(patch.read_text("utf-8"))
        changes = document["changes"]
        if not isinstance(changes, list):
            raise TypeError("changes is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{patch} is no patch of a repair", code="patch-malformed") from error
    copy = patch.parent
    try:
        to.mkdir(parents=True, exist_ok=True)
        for path in sorted(copy.rglob("*")):
            inside = path.relative_to(copy)
            if path.is_file() and inside.parts[0] != LEFT_OUT and str(inside) != PATCH_FILE:
                (to / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to / inside)
        for change in reversed(changes):
            _undo_one(change, copy, to)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{patch} is no patch of a repair: {error}", code="patch-malformed") from error
    except OSError as error:
        raise RtdetrError(f"{error.filename or to}: {error.strerror or error}", code="output") from error
    return len(changes)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"the patch names {name}, which lies outside the folder", code="patch-malformed")
    return path


def _undo_one(change: dict[str, Any], copy: Path, to: Path) -> None:
    op = change["op"]
    if op == "leave-out":
        if "kept" in change:
            target = _inside(to, change["file"])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_inside(copy, change["kept"]), target)
    elif op == "rename":
        old = _inside(to, change["from"])
        old.parent.mkdir(parents=True, exist_ok=True)
        _inside(to, change["to"]).rename(old)
    elif op == "create":
        _inside(to, change["file"]).unlink()
    elif op == "bytes":
        _replace_bytes(_inside(to, change["file"]), int(change["offset"]), bytes.fromhex(change["old"]))
    elif op == "line-ends":
        path = _inside(to, change["file"])
        lines = path.read_bytes().decode("utf-8").split("\n")
        chosen = range(len(lines) - 1) if change["lines"] == "all" else change["lines"]
        for number in chosen:
            lines[number] += "\r"
        path.write_bytes("\n".join(lines).encode("utf-8"))
    elif op == "edit":
        path = _inside(to, change["file"])
        text = path.read_bytes().decode("utf-8")
        start, new = int(change["start"]), change["new"]
        if text[start : start + len(new)] != new:
            raise DataError(
                f"{change['file']} was changed after the repair, so the patch does not fit it",
                hint="undo it in the copy as it was written",
                code="patch-mismatch",
            )
        path.write_bytes((text[:start] + change["old"] + text[start + len(new) :]).encode("utf-8"))
    else:
        raise ValueError(f"unknown operation {op}")

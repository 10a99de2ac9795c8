"""Write a repaired copy of a dataset, and `changes.json`, which lists every change.

The original is never touched, so the copy needs no undo. Label files with something to repair are read, edited in
their parsed form (unknown keys and XML elements are kept) and written again; every other file is copied byte for byte.
What cannot be repaired safely is left out of the copy and kept below `left-out/`.

The copy holds what makes up the dataset: label files, the images they name, lists of images, and the texts that belong
to all of them, such as a license. Other files in the original's folder are not copied.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.checks.doctor import Report
from rtdetr_cli.checks.repair.coco import plan_coco
from rtdetr_cli.checks.repair.images import choose_left_out, plan_images, reset_orientations
from rtdetr_cli.checks.repair.plan import BROKEN_FILE, LeftOut, Plan, files_in, files_of_one_image
from rtdetr_cli.checks.repair.rewrite import is_rewritten, plan_rewrite, write_rewritten
from rtdetr_cli.checks.repair.voc import plan_voc
from rtdetr_cli.checks.repair.yolo import plan_yolo
from rtdetr_cli.datasets.coco_files import CHANGES_FILE
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.files import whole_folder
from rtdetr_cli.images.decode import complete_truncated

_HOLDS = (
    "label files, the images they name, lists of images, and texts such as license and readme; "
    "other files in the original's folder were not copied"
)
_NOTE = re.compile(
    r"(licen[cs]es?|copying|copyright|notice|readme|read_me|citation|authors|changelog|classes|labels|class_names)"
    r"([._-].*)?",
    re.IGNORECASE,
)
_NOTE_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".bib", ".cff")
_NOTE_BYTES = 1 << 20
_PLANNERS = {"coco": plan_coco, "roboflow": plan_coco, "yolo": plan_yolo, "voc": plan_voc}


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did.

    Attributes:
        data: the copy's label file or folder, to train on.
        changes_file: the list of all changes.
        changes: code -> number of findings that were repaired.
        not_repaired: code -> number of errors and warnings that were left as they are.
        left_out: the images that are not in the copy.
        rewritten: True if the copy is written as COCO.
    """

    data: Path
    changes_file: Path
    changes: dict[str, int]
    not_repaired: dict[str, int]
    left_out: tuple[LeftOut, ...]
    rewritten: bool = False


def repairable(report: Report) -> bool:
    """Return whether `repair` can fix at least one error or warning."""
    raw = report.raw
    if not raw.splits:
        return False
    findings = [f for f in report.findings if f.severity in ("error", "warning") and CODES[f.code].repair]
    if any(f.code not in BROKEN_FILE for f in findings):
        return True
    # An unreadable label file is left out with its image, unless it describes other images as well.
    return not files_of_one_image(raw).isdisjoint(f.file for f in findings)


def repair(report: Report, out: Path, *, keep_unlabelled: bool = False, allow_outside: bool = False) -> Repaired:
    """Write a repaired copy below `out`.

    Args:
        report: findings of the dataset, preferably with its images decoded.
        out: a folder that is new or empty.
        keep_unlabelled: give images without a label file an empty one, instead of leaving them out.
        allow_outside: copy images from outside the dataset's folder too, instead of leaving them out.

    Raises:
        DataError: the dataset is broken in a way that leaves nothing to copy.
        RtdetrError: the folder cannot be written.
    """
    raw = report.raw
    if not raw.splits:
        first = next((f for f in raw.findings if f.severity == "error"), None)
        code = first.code if first else "split-missing"
        raise DataError(
            f"{raw.name} cannot be repaired: " + (first.message if first else "no split can be read"),
            hint=f"rtdetr validate --explain {code}",
            code=code,
        )
    # Resetting the orientation swaps an image's sides, so the dataset is checked again before boxes are clipped.
    rewritten = is_rewritten(report, allow_outside=allow_outside)
    upright, reset = (report, {}) if rewritten else reset_orientations(report)
    plan = Plan(upright, keep_unlabelled, allow_outside)
    choose_left_out(plan, report, reset)
    if len(plan.left_out) == sum(map(len, raw.splits.values())):
        code, why = next(iter(plan.left_out.values()), ("split-empty", "it has no images"))
        raise DataError(
            f"{raw.name} cannot be repaired, because no image can be used: {why}",
            hint=f"rtdetr validate --explain {code}",
            code=code,
        )
    if rewritten:
        plan_rewrite(plan)
    else:
        plan_images(plan, reset)
        _PLANNERS[raw.format](plan)
        plan.normalize_text()
    _plan_notes(plan)
    left = plan.not_repaired()
    repaired = Counter(upright.findings[i].code for i in sorted(plan.repaired))
    repaired.update({code: count for code, count in plan.repaired_before.items() if count})
    document = {
        "schema_version": 1,
        "source": str(raw.source),
        "format": raw.format,
        "holds": _HOLDS,
        "changes": plan.changes,
        "not_repaired": [{"code": f.code, "file": f.file, "line": f.line, "message": f.message} for f in left],
    }
    # A dataset may have a file of that name itself.
    changes_file = CHANGES_FILE if CHANGES_FILE not in plan.files else f"rtdetr-{CHANGES_FILE}"
    data = out / plan.destination(raw.source) if raw.source in raw.label_paths.values() else out
    try:
        with whole_folder(out) as folder:
            if rewritten:
                data = out / write_rewritten(plan, folder).relative_to(folder)
            _write(plan, folder)
            (folder / changes_file).write_text(json.dumps(document, indent=1), "utf-8")
    except OSError as error:
        raise RtdetrError(f"{out} cannot be written: {error.strerror or error}", code="output") from error
    not_repaired = dict(Counter(f.code for f in left))
    return Repaired(data, out / changes_file, dict(repaired), not_repaired, plan.images_left_out(), rewritten)


def _plan_notes(plan: Plan) -> None:
    """Copy the texts that belong to the dataset as a whole: a license has to stay with the images."""
    raw = plan.report.raw
    left_out = {change["file"] for change in plan.changes if change["op"] == "leave-out"}
    for folder in dict.fromkeys((raw.folder, *(path.parent for path in raw.label_paths.values()))):
        for path in files_in(folder):
            target = plan.destination(path)
            if _is_note(path) and target not in left_out and path.is_relative_to(raw.folder):
                plan.files.setdefault(target, path)


def _is_note(path: Path) -> bool:
    named = _NOTE.fullmatch(path.name) is not None and path.suffix.lower() in _NOTE_SUFFIXES
    return named and os.access(path, os.R_OK) and path.stat().st_size <= _NOTE_BYTES


def _write(plan: Plan, folder: Path) -> None:
    for target in dict.fromkeys((*plan.files, *plan.texts)):
        to = folder / target
        to.parent.mkdir(parents=True, exist_ok=True)
        if target in plan.texts:
            to.write_bytes(plan.texts[target].encode("utf-8"))
        else:
            shutil.copyfile(plan.files[target], to)
        if target in plan.orientations:
            offset, tag = plan.orientations[target]
            with open(to, "r+b") as file:
                file.seek(offset)
                file.write(tag)
        if plan.files.get(target) in plan.completed and target not in plan.texts:
            complete_truncated(to)

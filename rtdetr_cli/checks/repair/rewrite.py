"""Repair formats that are only read, Labelme and CSV, or with images outside the folder: the copy is COCO."""

from __future__ import annotations

from copy import copy
from pathlib import Path

from rtdetr_cli.checks.doctor import Report
from rtdetr_cli.checks.repair.plan import BROKEN_FILE, Plan
from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.image_names import image_names
from rtdetr_cli.datasets.splits import to_splits
from rtdetr_cli.datasets.write import write_dataset
from rtdetr_cli.images.decode import complete_truncated

REWRITTEN = ("labelme", "csv")
_NOT_REPAIRED = BROKEN_FILE | {"image-extension", "image-exif-invalid"}
"""Findings about files that are copied as they are, or that concern several images."""


def is_rewritten(report: Report, *, allow_outside: bool) -> bool:
    """Return whether the copy is written as COCO, because its label files could not name its images."""
    elsewhere = bool(report.images_with("image-elsewhere"))
    return report.raw.format in REWRITTEN or (elsewhere and (allow_outside or report.raw.format == "yolo"))


def plan_rewrite(plan: Plan) -> None:
    """Plan what is left out, and list what the checks have dropped, clipped or corrected."""
    raw = plan.report.raw
    why = "" if raw.format in REWRITTEN else " with images outside its folder"
    plan.record("convert", "format", "", f"a repaired copy of a {raw.format} dataset{why} is written as COCO")
    for (name, image), (code, why) in plan.left_out.items():
        plan.leave_out(raw.splits[name].path(image), code, why, boxes=plan.count_boxes(name, image))
    for i, finding in plan.findings():
        if CODES[finding.code].repair and finding.code not in _NOT_REPAIRED:
            plan.record("edit", finding.code, finding.file, finding.message, line=finding.line)
            plan.repaired.add(i)


def write_rewritten(plan: Plan, folder: Path) -> Path:
    """Write the images that are not left out, with their checked boxes; return the path to train on."""
    raw = copy(plan.report.raw)
    raw.splits = raw.without(plan.left_out)
    parts = to_splits(raw).parts
    data = write_dataset(parts, "coco", folder)
    for name, part in parts.items() if plan.completed else ():
        for index, image in enumerate(image_names(part, flat=False, stems=False, used=set())):
            if part.path(index) in plan.completed:
                complete_truncated(folder / name / image)
    return data

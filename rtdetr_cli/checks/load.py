"""Load a dataset: detect its format, read it, check it, and return its splits."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

from rtdetr_cli.checks.boxes import check_boxes
from rtdetr_cli.checks.duplicates import check_duplicates, groups_by_path
from rtdetr_cli.checks.files import check_files, measure_images
from rtdetr_cli.checks.structure import check_structure
from rtdetr_cli.checks.val_split import VAL_FRACTION, draw_val
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.read import read_raw
from rtdetr_cli.datasets.records import Finding, Splits
from rtdetr_cli.datasets.splits import to_splits
from rtdetr_cli.errors import DataError
from rtdetr_cli.text import counted

MAX_ERRORS_SHOWN = 5


def load_splits(
    source: Path,
    *,
    images: Path | None = None,
    val_fraction: float = VAL_FRACTION,
    val_images: Collection[str] | None = None,
    legacy_seed: int | None = None,
    split_single: bool = True,
    find_images: bool = True,
) -> Splits:
    """Read a dataset, check its annotations, and return its splits as flat arrays.

    Args:
        source: a COCO JSON file, a `data.yaml`, or a folder in any known layout.
        images: the image folder, if it cannot be guessed.
        val_fraction: fraction of the train images held out as `val` if the dataset has no such split.
        val_images: names of the images that a run has held out before.
        legacy_seed: of a run of version 0.1, which drew these images by its seed.
        split_single: False uses a dataset that is not split as `val` as a whole, to evaluate on a single file.
        find_images: False doesn't look for the images at all and trusts the declared sizes, to evaluate detections from
            a file.

    Raises:
        DataError: the dataset cannot be found or read, or a check found errors; the first few are listed.
    """
    raw = read_raw(source, images=images)
    if find_images:
        check_files(raw)
    measure_images(raw, all_images=find_images)
    check_boxes(raw)
    check_structure(raw)
    if not split_single and set(raw.splits) == {"train"}:
        raw.splits = {"val": raw.splits["train"]}
        raw.splits["val"].split = "val"
    draw_val(raw, val_fraction, val_images=val_images, legacy_seed=legacy_seed, read_files=find_images)
    check_duplicates(raw, groups_by_path(raw))
    refuse_errors(raw)
    return to_splits(raw)


def refuse_errors(raw: RawDataset) -> None:
    """Raise a DataError that lists the first errors, if there are any."""
    errors = [f for f in raw.findings if f.severity == "error"]
    if not errors:
        return
    shown = [format_finding(f) for f in errors[:MAX_ERRORS_SHOWN]]
    if len(errors) == 1:
        message = shown[0]
    else:
        message = f"{raw.name} has {len(errors):,} errors: " + "; ".join(shown)
        if len(errors) > len(shown):
            message += f"; and {len(errors) - len(shown)} more"
    images = ["--images", str(raw.images)] if raw.images is not None else []
    hint = shlex.join(["rtdetr", "validate", str(raw.source), *images])
    raise DataError(message, hint=hint, code=errors[0].code)


def unlabelled_note(findings: Iterable[Finding]) -> str:
    """Return how many images have no label file, and what that may mean; empty if all have one."""
    count = sum(f.code == "label-missing" for f in findings)
    if not count:
        return ""
    they, have = ("it contains", "has") if count == 1 else ("they contain", "have")
    labelled = "it was never labelled" if count == 1 else "they were never labelled"
    return f"{counted(count, 'image')} {have} no label file: either {they} no objects, or {labelled}"


def format_finding(finding: Finding) -> str:
    """Return a finding as one line that starts with its file and line number."""
    location = f"{finding.file}:{finding.line}" if finding.file and finding.line else finding.file
    if not location or finding.message.startswith(f"{location} "):
        return finding.message
    return f"{location}: {finding.message}"

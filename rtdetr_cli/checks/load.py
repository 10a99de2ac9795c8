"""Load a dataset: find its format, read it, check it, and return its splits."""

from __future__ import annotations

from pathlib import Path

from rtdetr_cli.checks.checks import (
    check_boxes,
    check_copies,
    check_equal_splits,
    check_files,
    check_structure,
    groups_by_path,
    measure_images,
)
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.read import read_raw
from rtdetr_cli.datasets.records import Finding, Splits
from rtdetr_cli.datasets.splits import draw_val, to_splits
from rtdetr_cli.errors import DataError


def load_splits(
    source: Path,
    *,
    images: Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    split_single: bool = True,
    headers: bool = True,
    find_images: bool = True,
) -> Splits:
    """Read a dataset, check its annotations, and return its splits as flat arrays.

    Args:
        source: a COCO JSON file, a `data.yaml`, or a folder in any known layout.
        images: the folder of the images, where it cannot be guessed.
        val_fraction: share of the images that is drawn as `val` where the dataset has no such split.
        seed: of that draw.
        split_single: False takes a dataset without a val split whole, as `val`: what evaluation of one file wants.
        headers: False trusts declared sizes in place of reading them from the images.
        find_images: False does not even look for the images: what judging detections from a file wants.

    Raises:
        DataError: the dataset cannot be found or read, or a check found an error; all of them are counted, the first
            few told.
    """
    raw = read_raw(source, images=images)
    if find_images:
        check_files(raw)
    measure_images(raw, all_images=headers and find_images)
    check_boxes(raw)
    check_structure(raw)
    if split_single:
        draw_val(raw, val_fraction, seed)
    elif set(raw.splits) == {"train"}:
        raw.splits = {"val": raw.splits["train"]}
        raw.splits["val"].split = "val"
    groups = groups_by_path(raw)
    check_copies(raw, groups, check_equal_splits(raw, groups))
    refuse_errors(raw)
    return to_splits(raw)


def refuse_errors(raw: RawDataset) -> None:
    """Raise a DataError that tells the first errors, if there are any."""
    errors = [f for f in raw.findings if f.severity == "error"]
    if not errors:
        return
    shown = [place(f) for f in errors[:5]]
    if len(errors) == 1:
        message = shown[0]
    else:
        message = f"{raw.name} has {len(errors):,} errors: " + "; ".join(shown)
        if len(errors) > len(shown):
            message += f"; and {len(errors) - len(shown)} more"
    raise DataError(message, hint=f"rtdetr validate {raw.source}", code=errors[0].code)


def place(finding: Finding) -> str:
    """Return a finding as one sentence with its place in front."""
    where = f"{finding.file}:{finding.line}" if finding.file and finding.line else finding.file
    if where and finding.message.startswith(f"{where} "):
        return finding.message
    return f"{where} {finding.message}" if where else finding.message

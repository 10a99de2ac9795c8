"""The file that our writer leaves beside YOLO and VOC labels: ids, areas and crowds, which they have no place for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtdetr_cli.datasets.coco import JSONFault, line_of, scan_value
from rtdetr_cli.datasets.label_text import MAX_BYTES, Oddities, read_text
from rtdetr_cli.datasets.raw import RawDataset

IDS_FILE = "rtdetr_ids.json"


@dataclass(frozen=True, slots=True)
class KeptBox:
    """Facts of one box: its id, its area as a share of the image (NaN for none), whether a crowd."""

    annotation_id: int | None = None
    area_share: float = math.nan
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """What the file says; everything in it was checked, and what is odd left out.

    Attributes:
        categories: id and name in label order; empty where it says none.
        splits: split -> name of an image (YOLO: its path, VOC: its stem) -> the raw entry.
    """

    categories: tuple[tuple[int, str], ...] = ()
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def image(self, split: str, name: str) -> tuple[int | None, list[KeptBox]]:
        """Return the image id (None for none) and the facts of an image's boxes, in the order of its labels."""
        entry = self.splits.get(split, {}).get(name)
        if not isinstance(entry, dict):
            return None, []
        image_id, boxes = entry.get("id"), entry.get("boxes")
        return (
            image_id if _is_id(image_id) else None,
            [_box(box) for box in boxes] if isinstance(boxes, list) else [],
        )


def _is_id(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _box(entry: Any) -> KeptBox:
    if not isinstance(entry, list) or len(entry) != 3:
        return KeptBox()
    identifier, share, crowd = entry
    return KeptBox(
        identifier if _is_id(identifier) else None,
        share if isinstance(share, float) and math.isfinite(share) else math.nan,
        crowd == 1,
    )


def read_kept(dataset: RawDataset, folder: Path, oddities: Oddities) -> Kept:
    """Read the file of a folder; nothing where there is none."""
    path = folder / IDS_FILE
    if not path.is_file():
        return Kept()
    shown = dataset.show(path)
    text = read_text(path, shown, dataset.findings, oddities, limit=MAX_BYTES)
    if text is None:
        return Kept()
    dataset.label_paths[shown] = path
    try:
        document, _ = scan_value(text, len(text) - len(text.lstrip(" \t\r\n")))
    except JSONFault as fault:
        dataset.findings.add(fault.code, fault.message, file=shown, line=line_of(text, fault.position))
        return Kept()
    if not isinstance(document, dict):
        return Kept()
    splits, categories = document.get("splits"), document.get("categories")
    pairs: list[tuple[int, str]] = []
    for pair in categories if isinstance(categories, list) else ():
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], str)):
            pairs = []
            break
        pairs.append((pair[0], pair[1]))
    if len({i for i, _ in pairs}) != len(pairs) or len({n for _, n in pairs}) != len(pairs):
        pairs = []
    return Kept(
        tuple(pairs),
        {s: p for s, p in splits.items() if isinstance(p, dict)} if isinstance(splits, dict) else {},
    )

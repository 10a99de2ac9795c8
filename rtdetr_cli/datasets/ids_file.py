"""`rtdetr_ids.json`, which our writer puts beside YOLO and VOC labels: ids, areas and crowds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtdetr_cli.datasets.json_text import JSONFault, report_fault, scan_value
from rtdetr_cli.datasets.label_text import MAX_BYTES
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.records import Dataset

IDS_FILE = "rtdetr_ids.json"


@dataclass(frozen=True, slots=True)
class BoxFacts:
    """What labels don't say of a box: id, area as a fraction of the image (NaN for none), and whether it is a crowd."""

    annotation_id: int | None = None
    area_fraction: float = math.nan
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class IdsFile:
    """The content of the file. Everything is checked when it is used; malformed entries are ignored.

    Attributes:
        categories: id and name in label order; empty if it names none.
        splits: split -> name of an image (YOLO: its path, VOC: its stem) -> the raw entry.
    """

    categories: tuple[tuple[int, str], ...] = ()
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def image(self, split: str, name: str) -> tuple[int | None, list[BoxFacts]]:
        """Return the image id (None for none) and the facts of an image's boxes, in the order of its labels."""
        entry = self.splits.get(split, {}).get(name)
        if not isinstance(entry, dict):
            return None, []
        image_id, boxes = entry.get("id"), entry.get("boxes")
        facts = [_box_facts(box) for box in boxes] if isinstance(boxes, list) else []
        return (image_id if _is_id(image_id) else None), facts


def _is_id(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _box_facts(entry: Any) -> BoxFacts:
    match entry:
        case [int(identifier), float(fraction), crowd] if _is_id(identifier):
            return BoxFacts(identifier, fraction if math.isfinite(fraction) else math.nan, crowd == 1)
    return BoxFacts()


def read_ids(dataset: RawDataset, folder: Path) -> IdsFile:
    """Read the file of a folder; an empty one if there is none."""
    path = folder / IDS_FILE
    if not path.is_file():
        return IdsFile()
    file, text = dataset.read_label(path, limit=MAX_BYTES)
    if text is None:
        del dataset.label_paths[file]  # so that a repaired copy does without it
        return IdsFile()
    try:
        document, _ = scan_value(text, len(text) - len(text.lstrip(" \t\r\n")))
    except JSONFault as fault:
        report_fault(dataset.findings, text, fault, file)
        return IdsFile()
    if not isinstance(document, dict):
        return IdsFile()
    categories, splits = document.get("categories"), document.get("splits")
    return IdsFile(
        _categories(categories) if isinstance(categories, list) else (),
        {s: p for s, p in splits.items() if isinstance(p, dict)} if isinstance(splits, dict) else {},
    )


def _categories(entries: list[Any]) -> tuple[tuple[int, str], ...]:
    pairs = tuple((e[0], e[1]) for e in entries if isinstance(e, list) and [type(v) for v in e] == [int, str])
    unique = len(dict(pairs)) == len({name for _, name in pairs}) == len(entries)
    return pairs if unique else ()


def image_facts(dataset: Dataset, index: int) -> dict[str, Any]:
    """Return the entry of one image: its id, and per box its id, area as a fraction of the image, and crowd flag."""
    rows = dataset.annotations(index)
    width, height = dataset.sizes_wh[index].tolist()
    columns = (rows.annotation_ids.tolist(), rows.areas.tolist(), rows.crowd.tolist())
    return {
        "id": int(dataset.image_ids[index]),
        "boxes": [[i, float(area) / (width * height), int(crowd)] for i, area, crowd in zip(*columns, strict=True)],
    }


def write_ids(folder: Path, splits: dict[str, dict[str, Any]], **more: Any) -> None:
    """Write the file of a folder."""
    (folder / IDS_FILE).write_text(json.dumps({**more, "splits": splits}), "utf-8")

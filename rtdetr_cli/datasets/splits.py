"""Turn checked records into datasets."""

from __future__ import annotations

import numpy as np

from rtdetr_cli.datasets.fingerprint import fingerprint
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Dataset, FlatStrings, Splits


def to_splits(raw: RawDataset) -> Splits:
    """Return checked records as flat arrays."""
    datasets = {name: _dataset(raw, split) for name, split in raw.splits.items()}
    return Splits(
        source=raw.source,
        name=raw.name,
        format=raw.format,
        categories=raw.categories,
        train=datasets.get("train"),
        val=datasets.get("val"),
        test=datasets.get("test"),
        fingerprint=fingerprint(datasets),
        findings=tuple(raw.findings),
        split_made=raw.split_made,
    )


def _dataset(raw: RawDataset, split: RawSplit) -> Dataset:
    count = len(split)
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(split.box_images, minlength=count), out=offsets[1:])
    boxes = split.boxes_xyxy_px
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = np.where(np.isfinite(split.areas) & (split.areas > 0), split.areas, sides[:, 0] * sides[:, 1])
    return Dataset(
        name=raw.name,
        split=split.split,
        format=raw.format,
        root=split.root,
        categories=raw.categories,
        file_names=FlatStrings(split.file_names),
        image_ids=split.image_ids,
        sizes_wh=split.sizes_wh,
        offsets=offsets,
        boxes_xyxy_px=boxes,
        labels=split.labels,
        areas=areas,
        crowd=split.crowd,
        annotation_ids=split.annotation_ids,
    )

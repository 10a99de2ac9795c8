"""Turn checked records into datasets, and draw a val split if there is none."""

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


def draw_val(raw: RawDataset, val_fraction: float, seed: int) -> None:
    """Draw a val split from a dataset that has only a train split."""
    if set(raw.splits) != {"train"} or len(raw.splits["train"]) < 2:
        return
    train = raw.splits["train"]
    count = min(len(train) - 1, max(1, round(val_fraction * len(train))))
    # By file name, so that the draw doesn't depend on the order of the entries in the label file.
    order = np.argsort(np.asarray(train.file_names, object), kind="stable")
    drawn = np.zeros(len(train), np.bool_)
    drawn[order[np.random.default_rng(seed).permutation(len(train))[:count]]] = True
    raw.splits = {"train": train.select_images(~drawn, "train"), "val": train.select_images(drawn, "val")}
    raw.split_made = True
    raw.findings.add(
        "split-made",
        f"there is no val split: {count} of {len(train)} images were drawn for it (seed {seed})",
        file=raw.main_file(),
    )

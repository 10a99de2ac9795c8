"""New splits for a whole dataset that do not leak: related images stay together, classes are spread evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rtdetr_cli.checks.clusters import assign_clusters, class_counts, related_images
from rtdetr_cli.checks.doctor import Report
from rtdetr_cli.checks.duplicates import all_members
from rtdetr_cli.checks.images import find_duplicates
from rtdetr_cli.datasets.records import Dataset, FlatStrings
from rtdetr_cli.errors import DataError
from rtdetr_cli.text import counted

NAMES = ("train", "val", "test")
_CONCATENATED = ("image_ids", "sizes_wh", "boxes_xyxy_px", "labels", "areas", "crowd", "annotation_ids")


@dataclass(frozen=True, slots=True, eq=False)
class Resplit:
    """New splits.

    Attributes:
        parts: split -> images, sorted by name.
        clusters: number of groups that were assigned as a whole, single images included.
        groups: how many of them have more than one image.
        largest: images in the largest of them.
    """

    parts: dict[str, Dataset]
    clusters: int
    groups: int
    largest: int


def resplit(report: Report, parts: dict[str, Dataset], fractions: Sequence[float], *, seed: int = 0) -> Resplit:
    """Assign every image of `parts` to a new split.

    Args:
        report: of the same dataset; near duplicates are known if it decoded the images.
        parts: the current splits, in the order of the report's.
        fractions: of train and val, or of train, val and test.
        seed: decides between splits that are equally good for a cluster.

    Raises:
        DataError: there are fewer clusters than splits.
    """
    dataset = join(list(parts.values()))
    names = list(dataset.file_names)
    counts = class_counts(dataset.labels, np.diff(dataset.offsets), len(dataset.categories))
    groups: list[list[int]] = []
    if report.image_info:
        index = {member: i for i, member in enumerate(all_members(report.raw))}
        groups = [
            [index[m] for m in group] for kind in find_duplicates(report.raw, report.image_info) for group in kind
        ]
    clusters = related_images(names, counts, groups)
    if len(clusters) < len(fractions):
        raise DataError(
            f"the {len(dataset)} images of {dataset.name} form only {counted(len(clusters), 'group')} of related "
            f"images, too few for {len(fractions)} splits",
            hint="add images of other scenes",
            code="split-impossible",
        )
    assigned = assign_clusters(clusters, counts, fractions, seed)
    new_parts = {}
    for number, name in enumerate(NAMES[: len(fractions)]):
        images = [i for cluster, split in zip(clusters, assigned, strict=True) if split == number for i in cluster]
        new_parts[name] = dataset.subset(sorted(images, key=lambda i: names[i]), split=name)
    return Resplit(new_parts, len(clusters), sum(len(c) > 1 for c in clusters), max(len(c) for c in clusters))


def join(parts: Sequence[Dataset]) -> Dataset:
    """Return several splits of one dataset as one, with unique ids; paths are absolute if the roots differ."""
    if len(parts) == 1:
        return parts[0]
    one_root = len({part.root for part in parts}) == 1
    file_names = [
        part.file_names[i] if one_root else str(part.path(i).absolute()) for part in parts for i in range(len(part))
    ]
    boxes_per_image = np.concatenate([np.diff(part.offsets) for part in parts])
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _CONCATENATED}
    for ids in ("image_ids", "annotation_ids"):
        if len(np.unique(arrays[ids])) != len(arrays[ids]):
            arrays[ids] = np.arange(1, len(arrays[ids]) + 1)
    offsets = np.concatenate([[0], np.cumsum(boxes_per_image)]).astype(np.int64)
    return replace(parts[0], split="train", file_names=FlatStrings(file_names), offsets=offsets, **arrays)

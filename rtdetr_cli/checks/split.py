"""Make splits that do not leak: related images stay in one split, and classes are spread evenly.

`resplit` replaces all splits; `draw_val` takes a val split from train if a dataset has none.

Related images are identical images, nearly identical ones, Roboflow's copies of one image, and the frames of a
sequence, which are recognized by folder and file names. A sequence too large for one split is cut into blocks of
consecutive frames.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.checks.duplicates import all_members, equal_groups, members_by_label, merge_groups
from rtdetr_cli.checks.images import find_duplicates
from rtdetr_cli.datasets.fingerprint import image_digests
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Dataset, FlatStrings
from rtdetr_cli.errors import DataError
from rtdetr_cli.text import counted

if TYPE_CHECKING:
    from rtdetr_cli.checks.doctor import Report

NAMES = ("train", "val", "test")
_CONCATENATED = ("image_ids", "sizes_wh", "boxes_xyxy_px", "labels", "areas", "crowd", "annotation_ids")
_ROBOFLOW = re.compile(r"[._](jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9a-zA-Z]+$", re.IGNORECASE)
_LABEL_STUDIO = re.compile(r"^[0-9a-f]{8}-")
_DIGITS = re.compile(r"[0-9]+")
_SPLIT_FOLDER = re.compile(r"(train|val|valid|validation|dev|test)[^a-z]*", re.IGNORECASE)

_MAX_SEQUENCE = 1 / 4
"""A sequence with more than this fraction of the images is cut: only train could take it as a whole."""

_BLOCKS = 20
"""Blocks that a dataset of a single sequence is cut into.

The number of cuts decides how many images have a neighbor in another split, whatever the length: of 20 blocks a val
split of a fifth takes four, so at most eight of its images do. With fewer blocks there would be little to choose
from: if the numbers mean nothing (`IMG_0001` to `IMG_9999`), blocks of 5% still let the classes be spread evenly.
"""

_BLOCKS_PER_SEQUENCE = 10
"""Blocks, at least, that one of several sequences is cut into, so that each split can have some of the images of a
class that only this sequence shows."""

_MIN_REGULAR_STEPS = 3 / 4
"""Numbers count frames if at least this fraction of the steps between them is half to twice the median step. Random
numbers, such as COCO's ids, reach less than two thirds."""

_PAUSE = 10
"""A step of this many median steps starts a new run: the next frame shows another scene."""

VAL_FRACTION = 0.2
"""Fraction of train that training holds out by default if there is no val split."""

FEW_VAL_IMAGES = 10
"""With fewer images in a drawn val split a single object changes the metrics visibly."""

_MAX_REFINED = 1000
"""Clusters up to which the assignment is refined; the time grows with the square of their number."""


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


class Sequences(NamedTuple):
    """Images that are related by their names.

    Attributes:
        groups: images that stay in one split: sequences, and copies of one image.
        runs: (images sorted by frame number, images per block) of sequences that are too large for that.
    """

    groups: list[list[int]]
    runs: list[tuple[list[int], int]]


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
    counts = _class_counts(dataset.labels, np.diff(dataset.offsets), len(dataset.categories))
    groups: list[list[int]] = []
    if report.image_info:
        index = {member: i for i, member in enumerate(all_members(report.raw))}
        groups = [
            [index[m] for m in group] for kind in find_duplicates(report.raw, report.image_info) for group in kind
        ]
    clusters = _clusters(names, counts, groups)
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


def _clusters(names: Sequence[str], counts: NDArray[np.int64], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return groups of images that have to stay in one split, single images included.

    They are sorted by name, so that the order of the entries in the label file doesn't matter.

    Args:
        names: paths of the images.
        counts: (N, K + 1) boxes of each class in each image; the last column is 1.
        groups: images that are related by their content.
    """
    by_name = sequences(names, counts)
    groups = [*groups, *by_name.groups]
    blocks = cut_into_blocks(by_name.runs, merge_groups(len(names), groups))
    merged = members_by_label(merge_groups(len(names), [*groups, *blocks]))
    return sorted((sorted(c, key=lambda i: names[i]) for c in merged), key=lambda c: names[c[0]])


# ---- a val split from train


def draw_val(
    raw: RawDataset,
    fraction: float,
    *,
    val_images: Collection[str] | None = None,
    legacy_seed: int | None = None,
    read_files: bool = True,
) -> None:
    """Take a val split from train if the dataset has none; report what was done.

    Args:
        raw: gets the split and the finding.
        fraction: of the train images.
        val_images: file names of the split that a run has drawn before.
        legacy_seed: of a run of version 0.1, which drew by its seed and did not keep the split.
        read_files: False doesn't look for copies of one image, which reads the files.
    """
    if "val" in raw.splits or not len(raw.splits.get("train", ())):
        return
    train = raw.splits["train"]
    val: NDArray[np.bool_] | None = None
    if val_images:
        known = frozenset(val_images)
        val = np.asarray([name in known for name in train.file_names], np.bool_)
    elif legacy_seed is not None:
        if len(raw.splits) > 1:  # version 0.1 chose the best epoch by the test split
            return
        val = _draw_by_seed(train, fraction, legacy_seed)
    if val is None or val.all() or not val.any():
        val = choose_val(raw, fraction, read_files=read_files)
    report_drawn(raw, val)
    if val is not None:
        others = {name: split for name, split in raw.splits.items() if name != "train"}
        raw.splits = {"train": train.select_images(~val, "train"), "val": train.select_images(val, "val"), **others}
        raw.split_made = True


def choose_val(raw: RawDataset, fraction: float, *, read_files: bool = True) -> NDArray[np.bool_] | None:
    """Return which images of train to hold out, or None if they cannot be divided.

    The choice depends on the dataset alone, so that the metrics of two runs can be compared. Copies of one image and
    frames of one sequence stay on one side; nearly identical images are not looked for, because that would decode all.
    """
    train = raw.splits["train"]
    boxes = np.bincount(train.box_images, minlength=len(train))
    counts = _class_counts(train.labels, boxes, len(raw.categories))
    clusters = _clusters(train.file_names, counts, _identical_files(train) if read_files else [])
    if len(clusters) < 2:
        return None
    val = np.zeros(len(train), np.bool_)
    assigned = assign_clusters(clusters, counts, (1 - fraction, fraction), seed=0)
    for cluster, split in zip(clusters, assigned, strict=True):
        val[cluster] = split == 1
    return val


def report_drawn(raw: RawDataset, val: NDArray[np.bool_] | None) -> None:
    """Report the val split that is taken from train; None for none."""
    images = counted(len(raw.splits["train"]), "train image")
    if val is None:
        message, severity = f"there is no val split, and {images} cannot be divided into train and val", "warning"
    else:
        message, severity = f"there is no val split: {int(val.sum()):,} of {images} are held out for it", "info"
        message += ", too few for reliable metrics" if val.sum() < FEW_VAL_IMAGES else ""
    raw.findings.add("split-made", message, file=raw.main_file(), severity=severity)


def _draw_by_seed(train: RawSplit, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Draw the images that version 0.1 drew."""
    count = min(len(train) - 1, max(1, round(fraction * len(train))))
    drawn = np.zeros(len(train), np.bool_)
    order = np.argsort(np.asarray(train.file_names, object), kind="stable")
    drawn[order[np.random.default_rng(seed).permutation(len(train))[:count]]] = True
    return drawn


def _identical_files(split: RawSplit) -> list[list[int]]:
    """Return groups of images with the same content; only files of the same length are read."""
    lengths = [0] * len(split)
    for image in np.flatnonzero(split.usable).tolist():
        try:
            lengths[image] = os.stat(split.path(image)).st_size
        except OSError:  # `check_files` reports it
            continue
    candidates = [image for group in equal_groups(lengths) for image in group]
    paths = [str(split.path(image)) for image in candidates]
    digests = image_digests(paths, max_read=len(paths)).tolist()
    return [[candidates[i] for i in group] for group in equal_groups(digests)]


# ---- sequences


def sequences(names: Sequence[str], counts: NDArray[np.int64] | None = None) -> Sequences:
    """Find frames of the same sequence, and Roboflow's copies of one image, by their names.

    `cam1_0007` and `cam1_0008` are frames of one sequence, and so are `clip1/0007` and `clip1/0008`. If a sequence has
    too many images (one camera, or `IMG_0001` to `IMG_9999`), or too many of one class, to stay in one split, only
    consecutive frames stay together.

    Args:
        names: paths of the images.
        counts: (N, K + 1) boxes of each class in each image; the last column is 1.
    """
    copies: dict[str, list[int]] = defaultdict(list)
    keys: list[tuple[str, str]] = []  # folder and stem of each image
    for i, name in enumerate(names):
        path = PurePosixPath(name)
        stem = name.removesuffix(path.suffix)
        original = _ROBOFLOW.sub("", stem)
        if original != stem:
            copies[original].append(i)
        # The old splits cut through sequences, so their folders are ignored.
        folder = "/".join(part for part in path.parts[:-1] if not _SPLIT_FOLDER.fullmatch(part))
        keys.append((folder, _LABEL_STUDIO.sub("", PurePosixPath(original).name)))

    found = Sequences([group for group in copies.values() if len(group) > 1], [])
    has_class = None if counts is None else counts[:, :-1] > 0
    for frames in _numbered_frames(keys):
        images = [i for _, i in frames]
        block = min(round(len(names) / _BLOCKS), max(1, round(len(frames) / _BLOCKS_PER_SEQUENCE)))
        if len(frames) <= _MAX_SEQUENCE * len(names) and not _has_most_of_a_class(has_class, images, block):
            found.groups.append(images)
        elif block > 1:
            found.runs.extend((run, block) for run in _runs(frames))
    return found


def _numbered_frames(keys: Sequence[tuple[str, str]]) -> list[list[tuple[int, int]]]:
    """Return sequences of at least two (frame number, image), sorted, of images given by folder and stem."""
    by_pattern: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, (folder, stem) in enumerate(keys):
        by_pattern[folder, _DIGITS.sub("0", stem)].append(i)
    numbered: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for images in by_pattern.values():
        field = _frame_field([_DIGITS.findall(keys[i][1]) for i in images])
        if field is None:
            continue
        for i in images:
            folder, stem = keys[i]
            number = list(_DIGITS.finditer(stem))[field]
            # Only what precedes the number identifies the sequence: the rest may differ from frame to frame.
            numbered[folder, stem[: number.start()]].append((int(number[0][-18:]), i))
    return [sorted(frames) for frames in numbered.values() if len(frames) > 1]


def _frame_field(numbers: Sequence[Sequence[str]]) -> int | None:
    """Return which of the numbers in otherwise equal names is the frame number: the last one that varies.

    `cam1_0007_640x480` has four.
    """
    for field in reversed(range(len(numbers[0]))):
        if len({row[field] for row in numbers}) > 1:
            return field
    return len(numbers[0]) - 1 if numbers[0] else None


def _has_most_of_a_class(has_class: NDArray[np.bool_] | None, images: Sequence[int], block: int) -> bool:
    """Return whether a sequence has most images of some class, and enough of them to divide among the splits."""
    if has_class is None:
        return False
    here = has_class[images].sum(axis=0)
    return bool(np.any((here > block) & (2 * here > has_class.sum(axis=0))))


def _runs(frames: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Cut a sequence where the numbers pause; return nothing if the numbers don't count frames."""
    images = [i for _, i in frames]
    steps = np.diff([number for number, _ in frames])
    positive = steps[steps > 0]
    if not len(positive):
        return [images]
    typical = float(np.median(positive))
    if np.mean((positive >= typical / 2) & (positive <= typical * 2)) < _MIN_REGULAR_STEPS:
        return []
    edges = [0, *(np.flatnonzero(steps > _PAUSE * typical) + 1).tolist(), len(images)]
    return [images[a:b] for a, b in pairwise(edges)]


def cut_into_blocks(runs: Sequence[tuple[Sequence[int], int]], group: NDArray[np.int64]) -> list[list[int]]:
    """Cut runs into blocks of about equal size, each of whole groups; return one image per group in each block.

    A group belongs to the block in which it begins, and to no other: otherwise a few near duplicates far from each
    other would merge all blocks.

    Args:
        runs: (images sorted by frame number, images per block).
        group: (N,) number of each image's group.
    """
    sizes = np.bincount(group)
    used: set[int] = set()
    blocks: list[list[int]] = []
    for run, block_size in runs:
        first_of_group: dict[int, int] = {}
        for image in run:
            if int(group[image]) not in used:
                first_of_group.setdefault(int(group[image]), image)
        heads = list(first_of_group.values())
        used.update(first_of_group)
        before = np.cumsum([0, *(sizes[group[i]] for i in heads)])
        count = max(1, round(float(before[-1]) / block_size))
        parts: dict[int, list[int]] = defaultdict(list)
        for image, start in zip(heads, before[:-1].tolist(), strict=True):
            parts[int(start * count // before[-1])].append(image)
        blocks += parts.values()
    return blocks


# ---- assigning clusters to splits


def assign_clusters(
    clusters: Sequence[Sequence[int]], counts: NDArray[np.int64], fractions: Sequence[float], seed: int
) -> list[int]:
    """Return the split of each cluster: the rarest class first, each cluster to the split that lacks it most.

    After Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data" (2011), with clusters in place
    of examples.

    Args:
        clusters: images of each.
        counts: (N, K + 1) boxes of each class in each image; the last column is 1.
        fractions: of the splits.
        seed: breaks ties.
    """
    random = np.random.default_rng(seed)
    table = np.stack([counts[list(cluster)].sum(axis=0) for cluster in clusters]).astype(np.float64)
    wanted = np.outer(np.asarray(fractions, np.float64), table.sum(axis=0))
    splits = np.full(len(clusters), -1, np.int64)
    waiting = np.ones(len(clusters), np.bool_)
    # Larger clusters go first: the small ones then fill the gaps.
    order = sorted(random.permutation(len(clusters)).tolist(), key=lambda c: -len(clusters[c]))
    rank = np.empty(len(clusters), np.int64)
    rank[order] = np.arange(len(clusters))
    left = table.sum(axis=0)
    while waiting.any():
        classes = np.flatnonzero(left[:-1])
        rarest = int(classes[np.argmin(left[classes])]) if len(classes) else table.shape[1] - 1
        candidates = np.flatnonzero(waiting & (table[:, rarest] > 0))
        for cluster in candidates[np.argsort(rank[candidates])].tolist():
            lacking, room = wanted[:, rarest].round(9).tolist(), wanted[:, -1].round(9).tolist()
            _, _, _, best = max((n, r, random.random(), s) for s, (n, r) in enumerate(zip(lacking, room, strict=True)))
            splits[cluster] = best
            wanted[best] -= table[cluster]
            left -= table[cluster]
            waiting[cluster] = False
    filled = _fill_empty(clusters, splits.tolist(), len(fractions))
    # Single images fill every gap that is left; a few blocks do not.
    if len(clusters) <= _MAX_REFINED and max(map(len, clusters)) > 1:
        return _refine(table, filled, fractions)
    return filled


def _fill_empty(clusters: Sequence[Sequence[int]], splits: list[int], count: int) -> list[int]:
    """Give each empty split the smallest cluster of the split with the most clusters."""
    for split in range(count):
        if split not in splits:
            most = max(set(splits), key=splits.count)
            smallest = min((c for c in range(len(splits)) if splits[c] == most), key=lambda c: len(clusters[c]))
            splits[smallest] = split
    return splits


def _refine(table: NDArray[np.float64], splits: list[int], fractions: Sequence[float]) -> list[int]:
    """Move or swap clusters as long as the splits come closer to their fractions of the images and of each class.

    The error of a split is the sum of squares of its deviations, as fractions of all images and of all boxes of a
    class; the images count as much as all classes together.
    """
    count = len(table)
    total = table.sum(axis=0)
    # An empty last row: swapping a cluster with it moves the cluster.
    rows = np.vstack([table, np.zeros_like(total)]) / np.maximum(total, 1)
    rows[:, -1] *= max(1, int(np.count_nonzero(total[:-1]))) ** 0.5
    square = (rows**2).sum(axis=1)
    distance = square[:, None] + square[None] - 2 * rows @ rows.T
    split_of = np.asarray([*splits, -1])
    errors = np.stack([rows[split_of == s].sum(axis=0) - f * rows.sum(axis=0) for s, f in enumerate(fractions)])
    for _ in range(_MAX_REFINED):
        best = (-1e-9, -1, -1, -1, -1)
        for one, other in combinations(range(len(fractions)), 2):
            here, there = np.flatnonzero(split_of == one), np.flatnonzero(split_of == other)
            # The last cluster of a split can only be swapped.
            givers = [*here, count] if len(there) > 1 else here
            takers = [*there, count] if len(here) > 1 else there
            gain = rows @ (errors[other] - errors[one])
            change = 2 * (gain[givers][:, None] - gain[takers][None] + distance[np.ix_(givers, takers)])
            a, b = np.unravel_index(int(change.argmin()), change.shape)
            best = min(best, (float(change[a, b]), one, other, int(givers[a]), int(takers[b])))
        _, one, other, given, received = best
        if one < 0:
            break
        errors[one] += rows[received] - rows[given]
        errors[other] += rows[given] - rows[received]
        split_of[given], split_of[received] = other, one
        split_of[count] = -1
    return [int(split) for split in split_of[:count]]


def _class_counts(labels: NDArray[np.int64], boxes_per_image: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Return boxes of each class in each image (N, K + 1); the last column is 1."""
    count, width = len(boxes_per_image), classes + 1
    images = np.repeat(np.arange(count), boxes_per_image)
    flat = np.bincount(images * width + labels, minlength=count * width)
    counts = flat.reshape(count, width).astype(np.int64)
    counts[:, -1] = 1
    return counts


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

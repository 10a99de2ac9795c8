"""Groups of related images, which stay in one split, and their assignment to splits with evenly spread classes.

Related images are Roboflow's copies of one image and the frames of a sequence, which are recognized by folder and file
names. A sequence too large for one split is cut into blocks of consecutive frames.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.checks.duplicates import members_by_label, merge_groups

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

_MAX_REFINED = 1000
"""Clusters up to which the assignment is refined; the time grows with the square of their number."""


class Sequences(NamedTuple):
    """Images that are related by their names.

    Attributes:
        groups: images that stay in one split: sequences, and copies of one image.
        runs: (images sorted by frame number, images per block) of sequences that are too large for that.
    """

    groups: list[list[int]]
    runs: list[tuple[list[int], int]]


def related_images(names: Sequence[str], counts: NDArray[np.int64], groups: Sequence[Sequence[int]]) -> list[list[int]]:
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


def sequences(names: Sequence[str], counts: NDArray[np.int64]) -> Sequences:
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
    has_class = counts[:, :-1] > 0
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


def _has_most_of_a_class(has_class: NDArray[np.bool_], images: Sequence[int], block: int) -> bool:
    """Return whether a sequence has most images of some class, and enough of them to divide among the splits."""
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


def class_counts(labels: NDArray[np.int64], boxes_per_image: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Return boxes of each class in each image (N, K + 1); the last column is 1."""
    count, width = len(boxes_per_image), classes + 1
    images = np.repeat(np.arange(count), boxes_per_image)
    flat = np.bincount(images * width + labels, minlength=count * width)
    counts = flat.reshape(count, width).astype(np.int64)
    counts[:, -1] = 1
    return counts

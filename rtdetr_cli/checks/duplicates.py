"""Find images that are identical or nearly so: video frames, copies that were resized or compressed again.

For near duplicates each image is reduced to 32x32 gray values, with brightness and contrast normalized. Two of them
are compared by their lowest cosine frequencies first; the distance there is a lower bound of the full distance, so
no near pair is missed.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.checks.boxes import EDGE_PX
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.records import Spot
from rtdetr_cli.text import counted

THUMBNAIL = 32
"""Side of the gray thumbnails."""

MAX_DIFFERENCE = 0.2
"""Root of one minus the correlation. Copies compressed or resized again stay below 0.1; unrelated images of one
microscope lie above 0.59."""

_FREQUENCIES = 8
_MIN_CONTRAST = 2.0
_ROWS_PER_BLOCK = 256
_PAIRS_PER_BLOCK = 8192

Member = tuple[str, int]
"""Split of an image, and its index there."""


# ---- groups of indices


def equal_groups(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return groups of indices with equal keys; an empty key equals no other."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key:
            members[key].append(index)
    return [group for group in members.values() if len(group) > 1]


def component_labels(count: int, first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return for each of `count` nodes the number of its connected component; edges join `first` to `second`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(first), np.bool_), (first, second)), shape=(count, count))
    return np.asarray(connected_components(edges, directed=False)[1], np.int64)


def merge_groups(count: int, groups: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """Return for each of `count` indices the number of its group; groups that share an index become one."""
    edges = np.asarray([(group[0], index) for group in groups for index in group[1:]], np.int64).reshape(-1, 2)
    return component_labels(count, edges[:, 0], edges[:, 1])


def members_by_label(labels: NDArray[np.integer]) -> list[list[int]]:
    """Return the indices of each label, in ascending order; the groups are in the order of their first indices."""
    order = np.argsort(labels, kind="stable")
    bounds = np.flatnonzero(np.diff(labels[order])) + 1
    return sorted(part.tolist() for part in np.split(order, bounds) if len(part))


def near_groups(thumbnails: NDArray[np.uint8]) -> list[list[int]]:
    """Return groups of images that look nearly the same, each in ascending order.

    Args:
        thumbnails: (N, 32, 32) uint8, gray.

    Returns:
        Groups of at least two indices; a chain of small differences ends in one group.
    """
    values = thumbnails.reshape(len(thumbnails), THUMBNAIL * THUMBNAIL).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1)
    # Plain images (all black, all white) have no structure to compare: they are never near duplicates.
    usable = np.flatnonzero(spread >= _MIN_CONTRAST)
    values = values[usable] / spread[usable, None]
    # Half the squared distance of standardized images, per pixel, is one minus their correlation.
    limit = 2 * MAX_DIFFERENCE**2 * THUMBNAIL * THUMBNAIL
    group = np.arange(len(usable))
    for first, second in _candidates(values, limit):
        # A thousand frames of one scene are half a million near pairs: those already in one group are skipped.
        apart = group[first] != group[second]
        first, second = first[apart], second[apart]
        near = np.square(values[first] - values[second]).sum(axis=1) <= limit
        if near.any():
            group = component_labels(int(group.max()) + 1, group[first[near]], group[second[near]])[group]
    return [usable[members].tolist() for members in members_by_label(group) if len(members) > 1]


def _candidates(values: NDArray[np.float32], limit: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield pairs whose squared distance in the lowest frequencies is at most `limit`."""
    pixels, frequencies = np.arange(THUMBNAIL), np.arange(_FREQUENCIES)
    basis = np.cos(np.pi / THUMBNAIL * np.outer(frequencies, pixels + 0.5)) * np.sqrt(2 / THUMBNAIL)
    basis[0] /= np.sqrt(2)
    basis = basis.astype(np.float32)
    low = (basis @ values.reshape(len(values), THUMBNAIL, THUMBNAIL) @ basis.T).reshape(len(values), _FREQUENCIES**2)
    # |a - b|^2 <= limit as one product: a b - |a|^2 / 2 - |b|^2 / 2 >= -limit / 2.
    half = np.square(low).sum(axis=1, keepdims=True) / 2
    one = np.ones_like(half)
    left, right = np.concatenate([low, one, -half], axis=1), np.concatenate([low, -half, one], axis=1).T.copy()
    for start in range(0, len(low), _ROWS_PER_BLOCK):
        near = left[start : start + _ROWS_PER_BLOCK] @ right[:, start:] >= -limit / 2 - 1e-2
        first, second = np.divmod(np.flatnonzero(near), near.shape[1])
        later = second > first
        first, second = first[later] + start, second[later] + start
        for part in range(0, len(first), _PAIRS_PER_BLOCK):
            yield first[part : part + _PAIRS_PER_BLOCK], second[part : part + _PAIRS_PER_BLOCK]


# ---- images of a dataset


def all_members(dataset: RawDataset) -> list[Member]:
    """Return every image of every split, in order."""
    return [(name, image) for name, split in dataset.splits.items() for image in range(len(split))]


def groups_by_path(dataset: RawDataset) -> list[list[Member]]:
    """Return the images that are listed more than once."""
    members = all_members(dataset)
    roots = {name: str(split.root) for name, split in dataset.splits.items()}
    names = ((roots[name], dataset.splits[name].file_names[image]) for name, image in members)
    paths = [name if name.startswith("/") else os.path.normpath(f"{root}/{name}") for root, name in names]
    return [[members[i] for i in group] for group in equal_groups(paths)]


def check_duplicates(
    dataset: RawDataset, identical: list[list[Member]], near: list[list[Member]] | None = None
) -> None:
    """Report images that are the same or nearly so, in one split or in two, and identical ones whose boxes differ."""
    equal_splits = _check_equal_splits(dataset, identical)
    for group in identical:
        _check_identical(dataset, group, equal_splits)
    for group in near or []:
        first_split, first = group[0]
        for name, image in group[1:]:
            split, original = dataset.splits[name], dataset.splits[first_split].file_names[first]
            if name == first_split:
                code, message = "image-near-duplicate", f"{split.file_names[image]} looks nearly the same as {original}"
            else:
                code = "image-near-leak"
                message = f"{split.file_names[image]} ({name}) looks nearly the same as {original} ({first_split})"
            dataset.report_image(split, image, code, message, other=group[0])


def _check_equal_splits(dataset: RawDataset, identical: list[list[Member]]) -> set[frozenset[str]]:
    """Report pairs of splits that hold the same images, and return them."""
    order = list(dataset.splits)
    shared: Counter[tuple[str, str]] = Counter()
    for group in identical:
        shared.update(combinations(sorted({name for name, _ in group}, key=order.index), 2))
    equal = set()
    for (a, b), count in shared.items():
        if count == len(dataset.splits[a]) == len(dataset.splits[b]):
            equal.add(frozenset((a, b)))
            message = f"{b} contains the same {counted(count, 'image')} as {a}"
            dataset.findings.add("split-equal", message, file=dataset.main_file(), spot=Spot(b))
    return equal


def _check_identical(dataset: RawDataset, group: list[Member], equal_splits: set[frozenset[str]]) -> None:
    """Report the copies of one image; copies in splits that are equal as a whole are reported once, for the split."""
    first_split, first = group[0]
    original = dataset.splits[first_split]
    for name, image in group[1:]:
        split = dataset.splits[name]
        message = f"{split.file_names[image]} is the same image as {original.file_names[first]}"
        if frozenset((first_split, name)) not in equal_splits:
            code = "image-duplicate" if name == first_split else "image-leak"
            listed_twice = split.path(image) == original.path(first)
            problem = f"{split.file_names[image]} is listed twice" if listed_twice else message
            where = "" if name == first_split else f", once in {first_split} and once in {name}"
            dataset.report_image(split, image, code, problem + where, other=group[0])
        if not _same_boxes(original, first, split, image):
            message += f" ({first_split}), but their boxes differ"
            dataset.report_image(split, image, "image-other-boxes", message, other=group[0])


def _same_boxes(a: RawSplit, first: int, b: RawSplit, second: int) -> bool:
    boxes, others = _sorted_boxes(a, first), _sorted_boxes(b, second)
    return boxes.shape == others.shape and bool(np.allclose(boxes, others, atol=EDGE_PX, rtol=0))


def _sorted_boxes(split: RawSplit, image: int) -> NDArray[np.float64]:
    """Return the labels and boxes of one image (N, 5), sorted."""
    rows = split.rows(image)
    table = np.column_stack([split.labels[rows], split.boxes_xyxy_px[rows]])
    return np.asarray(table[np.lexsort(table.T[::-1])])

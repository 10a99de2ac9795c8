"""Make splits that do not leak: images that belong together stay on one side, classes are spread evenly.

Together belong: the same image twice, images that look nearly the same, copies that Roboflow made of one image,
and the frames of a sequence, which folders and file names tell. A sequence too large for one side is cut into blocks of
neighbours.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.checks.doctor import Report, look_alikes, members_of
from rtdetr_cli.checks.duplicates import Joined
from rtdetr_cli.datasets.records import Dataset, FlatStrings
from rtdetr_cli.errors import DataError

NAMES = ("train", "val", "test")
_ROBOFLOW = re.compile(r"[._](jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9a-zA-Z]+$", re.IGNORECASE)
_LABEL_STUDIO = re.compile(r"^[0-9a-f]{8}-")
_DIGITS = re.compile(r"[0-9]+")
_SPLIT_FOLDER = re.compile(r"(train|val|valid|validation|dev|test)[^a-z]*", re.IGNORECASE)
_TOO_LARGE = 1 / 4
"""A sequence of more than this share of the images is cut: no side but train could take it, or take it alone."""

_BLOCKS = 20
"""Into how many blocks a dataset that is one sequence is cut.

The number of cuts decides how many images have a neighbour on the other side, whatever the length: of 20 blocks a val
of a fifth takes four, so at most eight images of it do. Fewer would leave nothing to choose from, and the numbers may
mean nothing at all (`IMG_0001` to `IMG_9999`): with blocks of 5 % the classes can still be spread evenly.
"""

_BLOCKS_OF_ONE = 10
"""Into how many blocks, at least, one of several sequences is cut: each side can then have its share of a class that
only this one shows."""

_REGULAR = 3 / 4
"""Numbers count something if this share of the steps between them is half to twice the median step. Numbers drawn at
random, such as COCO's, reach less than two thirds."""

_EXCHANGED = 1000
"""Clusters up to which the placement is refined; the time grows with the square."""

_PAUSE = 10
"""A step of so many median steps ends a run: the next frame is of another scene."""


@dataclass(frozen=True, slots=True, eq=False)
class Resplit:
    """New splits.

    Attributes:
        parts: split -> images, in the order of their names.
        clusters: how many groups of images were placed as one (single images count too).
        groups: how many of them have more than one image.
        largest: images in the largest of them.
    """

    parts: dict[str, Dataset]
    clusters: int
    groups: int
    largest: int


class Sequences(NamedTuple):
    """Images that belong together by their names.

    Attributes:
        whole: groups that stay on one side: sequences, and copies of one image.
        runs: (images in the order of their numbers, images in a block) of what is too large for that.
    """

    whole: list[list[int]]
    runs: list[tuple[list[int], int]]


def resplit(report: Report, parts: dict[str, Dataset], shares: Sequence[float], *, seed: int = 0) -> Resplit:
    """Place every image of `parts` anew.

    Args:
        report: of the same dataset; look-alikes are known where it decoded the images.
        parts: the splits as they are, in the order of the report's.
        shares: of train and val, or of train, val and test.
        seed: decides between splits that are equally good for a cluster.

    Raises:
        DataError: there are fewer clusters than splits.
    """
    whole = join(list(parts.values()))
    names = [whole.file_names[i] for i in range(len(whole))]
    joined = Joined(len(whole))
    position = {member: i for i, member in enumerate(members_of(report.raw))}
    if report.looks:
        exact, near = look_alikes(report.raw, report.looks)
        for group in (*exact, *near):
            joined.join_all([position[member] for member in group])
    counts = _class_counts(whole)
    found = sequences(names, counts)
    for sequence in found.whole:
        joined.join_all(sequence)
    for block in blocks(found.runs, joined):
        joined.join_all(block)
    members: dict[int, list[int]] = defaultdict(list)
    for image in range(len(whole)):
        members[joined.root(image)].append(image)
    # The order on disk must not matter: clusters are sorted by the name of their first image.
    clusters = sorted((sorted(c, key=lambda i: names[i]) for c in members.values()), key=lambda c: names[c[0]])
    if len(clusters) < len(shares):
        raise DataError(
            f"the {len(whole)} images of {whole.name} form only {len(clusters)} groups that belong together, "
            f"too few for {len(shares)} splits",
            hint="add images of other scenes",
            code="split-impossible",
        )
    sides = place_clusters(clusters, counts, shares, seed)
    made = {}
    for side, name in enumerate(NAMES[: len(shares)]):
        images = [i for cluster, chosen in zip(clusters, sides, strict=True) if chosen == side for i in cluster]
        made[name] = whole.subset(sorted(images, key=lambda i: names[i]), split=name)
    return Resplit(made, len(clusters), sum(len(c) > 1 for c in clusters), max(len(c) for c in clusters))


def sequences(names: Sequence[str], counts: NDArray[np.int64] | None = None) -> Sequences:
    """Find the images that are frames of one sequence, or Roboflow's copies of one image, by their names.

    `cam1_0007` and `cam1_0008` are of one sequence, and so are `clip1/0007` and `clip1/0008`. Where a sequence has so
    many images (one camera, or `IMG_0001` to `IMG_9999`), or so many of one class, that it cannot stay on one side,
    only neighbours stay together.

    Args:
        names: paths of the images.
        counts: (N, K + 1) boxes of each class in each image; the last column is 1.
    """
    copies: dict[str, list[int]] = defaultdict(list)
    folders: list[str] = []
    stems: list[str] = []
    shapes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        path = PurePosixPath(name)
        stem = name[: len(name) - len(path.suffix)] if path.suffix else name
        plain = _ROBOFLOW.sub("", stem)
        if plain != stem:
            copies[plain].append(i)
        # The old splits cut through sequences: their folders say nothing.
        folders.append("/".join(part for part in path.parts[:-1] if not _SPLIT_FOLDER.fullmatch(part)))
        stems.append(_LABEL_STUDIO.sub("", PurePosixPath(plain).name))
        shapes[folders[i], _DIGITS.sub("0", stems[i])].append(i)
    numbered: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for members in shapes.values():
        place = _frame_number([_DIGITS.findall(stems[i]) for i in members])
        if place is None:
            continue
        for i in members:
            number = list(_DIGITS.finditer(stems[i]))[place]
            # What follows the number may differ from frame to frame.
            numbered[folders[i], stems[i][: number.start()]].append((int(number[0][-18:]), i))

    result = Sequences([group for group in copies.values() if len(group) > 1], [])
    shown = None if counts is None else counts[:, :-1] > 0
    for frames in numbered.values():
        if len(frames) < 2:
            continue
        frames.sort()
        images = [i for _, i in frames]
        block = min(round(len(names) / _BLOCKS), max(1, round(len(frames) / _BLOCKS_OF_ONE)))
        if len(frames) <= _TOO_LARGE * len(names) and not _only_one_to_show(shown, images, block):
            result.whole.append(images)
        elif block > 1:
            result.runs.extend((run, block) for run in _runs(frames))
    return result


def _frame_number(fields: Sequence[Sequence[str]]) -> int | None:
    """Return which of the numbers in names that are otherwise equal counts frames: the last that varies.

    `cam1_0007_640x480` has four.
    """
    for place in reversed(range(len(fields[0]))):
        if len({row[place] for row in fields}) > 1:
            return place
    return len(fields[0]) - 1 if fields[0] else None


def _only_one_to_show(shown: NDArray[np.bool_] | None, images: Sequence[int], block: int) -> bool:
    """Tell whether most images with some class are in one sequence, and enough of them to share them out."""
    if shown is None:
        return False
    here = shown[images].sum(axis=0)
    return bool(np.any((here > block) & (2 * here > shown.sum(axis=0))))


def _runs(frames: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Cut where the numbers pause; nothing is left of numbers that do not count."""
    steps = np.diff([number for number, _ in frames])
    positive = steps[steps > 0]
    if not len(positive):
        return [[i for _, i in frames]]
    typical = float(np.median(positive))
    if np.mean((positive >= typical / 2) & (positive <= typical * 2)) < _REGULAR:
        return []
    edges = [0, *(np.flatnonzero(steps > _PAUSE * typical) + 1).tolist(), len(frames)]
    return [[i for _, i in frames[a:b]] for a, b in pairwise(edges)]


def blocks(runs: Sequence[tuple[Sequence[int], int]], joined: Joined) -> list[list[int]]:
    """Cut runs into blocks of about equal size, whole groups of `joined` each.

    A group belongs to the block in which it begins, and to no other: a few look-alikes far from each other would
    otherwise tie all the blocks together.
    """
    size = Counter(joined.root(image) for image in range(len(joined.parent)))
    taken: set[int] = set()
    made: list[list[int]] = []
    for run, block in runs:
        heads = [root for root in dict.fromkeys(joined.root(i) for i in run) if root not in taken]
        taken.update(heads)
        before = np.cumsum([0, *(size[root] for root in heads)])
        count = max(1, round(float(before[-1]) / block))
        parts: dict[int, list[int]] = defaultdict(list)
        for root, start in zip(heads, before[:-1].tolist(), strict=True):
            parts[int(start * count // before[-1])].append(root)
        made += parts.values()
    return made


def place_clusters(
    clusters: Sequence[Sequence[int]], counts: NDArray[np.int64], shares: Sequence[float], seed: int
) -> list[int]:
    """Return the split of each cluster: rarest classes first, each to the split that lacks it most.

    After Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data" (2011), with clusters in place
    of examples.

    Args:
        clusters: images of each.
        counts: (N, K + 1) boxes of each class in each image; the last column is 1.
        shares: of the splits.
        seed: breaks ties.
    """
    random = np.random.default_rng(seed)
    table = np.stack([counts[list(cluster)].sum(axis=0) for cluster in clusters]).astype(np.float64)
    wanted = np.outer(np.asarray(shares, np.float64), table.sum(axis=0))
    sides = np.full(len(clusters), -1, np.int64)
    waiting = np.ones(len(clusters), np.bool_)
    # The larger of two clusters goes first: the small ones then fill what is left.
    order = sorted(random.permutation(len(clusters)).tolist(), key=lambda c: -len(clusters[c]))
    rank = np.empty(len(clusters), np.int64)
    rank[order] = np.arange(len(clusters))
    while waiting.any():
        left = table[waiting].sum(axis=0)
        classes = np.flatnonzero(left[:-1])
        rarest = int(classes[np.argmin(left[classes])]) if len(classes) else table.shape[1] - 1
        candidates = np.flatnonzero(waiting & (table[:, rarest] > 0))
        for cluster in candidates[np.argsort(rank[candidates])].tolist():
            need, room = wanted[:, rarest].round(9).tolist(), wanted[:, -1].round(9).tolist()
            best = max((n, r, random.random(), side) for side, (n, r) in enumerate(zip(need, room, strict=True)))[3]
            sides[cluster] = best
            wanted[best] -= table[cluster]
            waiting[cluster] = False
    filled = _fill_empty(clusters, sides.tolist(), len(shares))
    # Single images fill every gap that is left; a few blocks do not.
    if len(clusters) <= _EXCHANGED and max(map(len, clusters)) > 1:
        return _exchange(table, filled, shares)
    return filled


def _fill_empty(clusters: Sequence[Sequence[int]], sides: list[int], count: int) -> list[int]:
    """Give a split that got nothing the smallest cluster of the one with the most."""
    for side in range(count):
        if side not in sides:
            most = max(set(sides), key=sides.count)
            smallest = min((c for c in range(len(sides)) if sides[c] == most), key=lambda c: len(clusters[c]))
            sides[smallest] = side
    return sides


def _exchange(table: NDArray[np.float64], sides: list[int], shares: Sequence[float]) -> list[int]:
    """Move or swap clusters as long as the splits come closer to their shares of the images and of each class.

    How far off a split is is the sum of squares of its errors, as fractions of all images and of all boxes of a
    class; the images count as much as all classes together.
    """
    count = len(table)
    total = table.sum(axis=0)
    # A last row of nothing: to swap with it is to move.
    rows = np.vstack([table, np.zeros_like(total)]) / np.maximum(total, 1)
    rows[:, -1] *= max(1, int(np.count_nonzero(total[:-1]))) ** 0.5
    square = (rows**2).sum(axis=1)
    apart = square[:, None] + square[None] - 2 * rows @ rows.T
    where = np.asarray([*sides, -1])
    errors = np.stack([rows[where == s].sum(axis=0) - share * rows.sum(axis=0) for s, share in enumerate(shares)])
    for _ in range(_EXCHANGED):
        best = (-1e-9, -1, -1, -1, -1)
        for one, other in combinations(range(len(shares)), 2):
            here, there = np.flatnonzero(where == one), np.flatnonzero(where == other)
            # The last cluster of a split may only be swapped.
            givers = [*here, count] if len(there) > 1 else here
            takers = [*there, count] if len(here) > 1 else there
            pull = rows @ (errors[other] - errors[one])
            change = 2 * (pull[givers][:, None] - pull[takers][None] + apart[np.ix_(givers, takers)])
            a, b = np.unravel_index(int(change.argmin()), change.shape)
            best = min(best, (float(change[a, b]), one, other, int(givers[a]), int(takers[b])))
        _, one, other, given, taken = best
        if one < 0:
            break
        errors[one] += rows[taken] - rows[given]
        errors[other] += rows[given] - rows[taken]
        where[given], where[taken] = other, one
        where[count] = -1
    return [int(side) for side in where[:count]]


def _class_counts(whole: Dataset) -> NDArray[np.int64]:
    images = np.repeat(np.arange(len(whole)), np.diff(whole.offsets))
    width = len(whole.categories) + 1
    flat = np.bincount(images * width + whole.labels, minlength=len(whole) * width)
    counts = flat.reshape(len(whole), width).astype(np.int64)
    counts[:, -1] = 1
    return counts


def join(parts: Sequence[Dataset]) -> Dataset:
    """Return several splits of one dataset as one; paths become relative to a common folder where they have one."""
    if len(parts) == 1:
        return parts[0]
    roots = {part.root for part in parts}
    same = len(roots) == 1
    file_names = [
        part.file_names[i] if same else str(part.path(i).absolute()) for part in parts for i in range(len(part))
    ]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))])
    image_ids = np.concatenate([part.image_ids for part in parts])
    if len(np.unique(image_ids)) != len(image_ids):
        image_ids = np.arange(1, len(image_ids) + 1)
    annotation_ids = np.concatenate([part.annotation_ids for part in parts])
    if len(np.unique(annotation_ids)) != len(annotation_ids):
        annotation_ids = np.arange(1, len(annotation_ids) + 1)
    return replace(
        parts[0],
        split="train",
        file_names=FlatStrings(file_names),
        image_ids=image_ids.astype(np.int64),
        sizes_wh=np.concatenate([part.sizes_wh for part in parts]),
        offsets=offsets.astype(np.int64),
        boxes_xyxy_px=np.concatenate([part.boxes_xyxy_px for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        areas=np.concatenate([part.areas for part in parts]),
        crowd=np.concatenate([part.crowd for part in parts]),
        annotation_ids=annotation_ids.astype(np.int64),
    )

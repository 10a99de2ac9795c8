"""Make splits that do not leak: pictures that belong together stay on one side, classes are spread evenly.

Together belong: the same picture twice, pictures that look nearly the same, copies that Roboflow made of one picture,
and the frames of a sequence, which the file names tell.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.data.doctor import Report, look_alikes, members_of
from rtdetr_cli.data.duplicates import Joined
from rtdetr_cli.data.records import Dataset, FlatStrings
from rtdetr_cli.errors import DataError

NAMES = ("train", "val", "test")
_ROBOFLOW = re.compile(r"[._](jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9a-zA-Z]+$", re.IGNORECASE)
_NUMBER = re.compile(r"^(.*?)(\d+)$", re.DOTALL)
_DOMINANT = 1 / 3
"""A prefix that more than this share of the pictures have is no sequence, but how the dataset is numbered."""


@dataclass(frozen=True, slots=True, eq=False)
class Resplit:
    """New splits.

    Attributes:
        parts: split -> pictures, in the order of their names.
        clusters: how many groups of pictures were placed as one (single pictures count too).
        largest: pictures in the largest of them.
    """

    parts: dict[str, Dataset]
    clusters: int
    largest: int


def resplit(report: Report, parts: dict[str, Dataset], shares: Sequence[float], *, seed: int = 0) -> Resplit:
    """Place every picture of `parts` anew.

    Args:
        report: of the same dataset; look-alikes are known where it decoded the pictures.
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
            for member in group[1:]:
                joined.join(position[group[0]], position[member])
    for group_ in same_sequence(names):
        for other in group_[1:]:
            joined.join(group_[0], other)
    members: dict[int, list[int]] = defaultdict(list)
    for picture in range(len(whole)):
        members[joined.root(picture)].append(picture)
    # The order on disk must not matter: clusters are sorted by the name of their first picture.
    clusters = sorted((sorted(c, key=lambda i: names[i]) for c in members.values()), key=lambda c: names[c[0]])
    if len(clusters) < len(shares):
        raise DataError(
            f"the {len(whole)} pictures of {whole.name} form only {len(clusters)} groups that belong together, "
            f"too few for {len(shares)} splits",
            hint="add pictures of other scenes",
            code="split-impossible",
        )
    sides = place_clusters(clusters, _class_counts(whole), shares, seed)
    made = {}
    for side, name in enumerate(NAMES[: len(shares)]):
        pictures = [i for cluster, chosen in zip(clusters, sides, strict=True) if chosen == side for i in cluster]
        made[name] = whole.subset(sorted(pictures, key=lambda i: names[i]), split=name)
    return Resplit(made, len(clusters), max(len(c) for c in clusters))


def same_sequence(names: Sequence[str]) -> list[list[int]]:
    """Return groups of file names that are frames of one sequence, or Roboflow's copies of one picture.

    `cam1_0007` and `cam1_0008` are of one sequence; but where many pictures share one prefix (`IMG_0001` to
    `IMG_9999`, or `train_1`) the number is only a number, and looking alike decides alone.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    copies: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        path = PurePosixPath(name)
        stem = name[: len(name) - len(path.suffix)] if path.suffix else name
        plain = _ROBOFLOW.sub("", stem)
        if plain != stem:
            copies[plain].append(i)
        numbered = _NUMBER.match(PurePosixPath(plain).name)
        if numbered and numbered.group(1):
            groups[(str(path.parent), numbered.group(1))].append(i)
    found = [group for group in copies.values() if len(group) > 1]
    for group in groups.values():
        if 1 < len(group) <= _DOMINANT * len(names):
            found.append(group)
    return found


def place_clusters(
    clusters: Sequence[Sequence[int]], counts: NDArray[np.int64], shares: Sequence[float], seed: int
) -> list[int]:
    """Return the split of each cluster: rarest classes first, each to the split that lacks it most.

    After Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data" (2011), with clusters in place
    of examples.

    Args:
        clusters: pictures of each.
        counts: (N, K + 1) boxes of each class in each picture; the last column is 1.
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
    return _fill_empty(clusters, sides.tolist(), len(shares))


def _fill_empty(clusters: Sequence[Sequence[int]], sides: list[int], count: int) -> list[int]:
    """Give a split that got nothing the smallest cluster of the one with the most."""
    for side in range(count):
        if side not in sides:
            most = max(set(sides), key=sides.count)
            smallest = min((c for c in range(len(sides)) if sides[c] == most), key=lambda c: len(clusters[c]))
            sides[smallest] = side
    return sides


def _class_counts(whole: Dataset) -> NDArray[np.int64]:
    pictures = np.repeat(np.arange(len(whole)), np.diff(whole.offsets))
    width = len(whole.categories) + 1
    flat = np.bincount(pictures * width + whole.labels, minlength=len(whole) * width)
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

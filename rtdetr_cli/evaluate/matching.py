"""Match detections to boxes by COCO's rules: the basis of precision, recall, thresholds and intervals.

The detections of one image and class choose in the order of their scores, and each takes the free box that it overlaps
most, a counted box before an ignored one. Different images and classes don't interact, so that all detections of one
rank can choose at once: 100 rounds over arrays replace a loop over every detection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli import boxes as box_math
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.coco import AREA_RANGES, SIZES
from rtdetr_cli.evaluate.table import DetectionTable

MAX_PER_CLASS = 100  # COCO counts this many detections for one image and class
MAX_PAIRS_IN_MEMORY = 4_000_000  # bounds the memory of overlap computations to about 300 MB
HIGHEST_IOU = 1 - 1e-10  # COCO's: an IoU of 1 may come out a little lower

TRUE_POSITIVE, FALSE_POSITIVE, IGNORED, OVER_LIMIT = 1, 0, -1, -2


class Pairs(NamedTuple):
    """Overlapping (detection, box) pairs: `rows` of the table, `boxes` of the dataset, and their `ious`."""

    rows: NDArray[np.int64]
    boxes: NDArray[np.int64]
    ious: NDArray[np.float64]

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> Pairs:
        """Return the pairs selected by a mask or by positions."""
        return Pairs(self.rows[keep], self.boxes[keep], self.ious[keep])


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """The outcome of every detection and box at one IoU, for each of COCO's sizes.

    D detections (rows of the table), G boxes of the dataset, A sizes (`coco.SIZES`).

    Attributes:
        dataset: with the boxes.
        table: the detections, in the dataset's labels.
        outcomes: (A, D) int8: TRUE_POSITIVE, FALSE_POSITIVE, IGNORED (matched a crowd or a box of another size, or is
            itself of another size) or OVER_LIMIT (not among the 100 best of its image and class).
        matched_box: (D,) int64, the box that a detection matched at size `all`, -1 for none.
        matched_detection: (G,) int64, the detection that matched a box at size `all`, -1 for none.
        counted: (A, G) bool: boxes in the denominator of recall.
        order: (D,) int64, rows by class, best first inside each.
        class_offsets: (K + 1,) int64: class k is `order[class_offsets[k]:class_offsets[k + 1]]`.
    """

    dataset: Dataset
    table: DetectionTable
    outcomes: NDArray[np.int8]
    matched_box: NDArray[np.int64]
    matched_detection: NDArray[np.int64]
    counted: NDArray[np.bool_]
    order: NDArray[np.int64]
    class_offsets: NDArray[np.int64]

    def rows_of(self, label: int) -> NDArray[np.int64]:
        """Return the rows of one class, best first."""
        return self.order[self.class_offsets[label] : self.class_offsets[label + 1]]


def box_images(dataset: Dataset) -> NDArray[np.int64]:
    """Return the image of each box, (G,)."""
    return np.repeat(np.arange(len(dataset), dtype=np.int64), np.diff(dataset.offsets))


def overlapping_pairs(dataset: Dataset, table: DetectionTable, *, min_iou: float, same_class: bool = True) -> Pairs:
    """Return all pairs of a detection and a box of one image (and class) with at least this IoU."""
    box_key, row_key = box_images(dataset), table.image_index
    if same_class:
        classes = max(len(dataset.categories), 1)
        box_key, row_key = box_key * classes + dataset.labels, row_key * classes + table.labels
    box_order = np.argsort(box_key, kind="stable")
    first = np.searchsorted(box_key[box_order], row_key, "left")
    count = np.searchsorted(box_key[box_order], row_key, "right") - first
    candidates = np.flatnonzero(count)
    ends = np.cumsum(count[candidates])
    total = int(ends[-1]) if len(ends) else 0
    limits = np.arange(MAX_PAIRS_IN_MEMORY, total, MAX_PAIRS_IN_MEMORY)
    parts: list[Pairs] = []
    for chunk in np.split(candidates, np.searchsorted(ends, limits)):
        repeats = count[chunk]
        rows = np.repeat(chunk, repeats)
        position = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        boxes = box_order[first[rows] + position]
        detections_xyxy, boxes_xyxy = table.boxes_xyxy_px[rows], dataset.boxes_xyxy_px[boxes]
        ious = box_math.iou(detections_xyxy, boxes_xyxy)
        # Of a crowd, COCO takes the part of the detection that is inside it.
        crowd = dataset.crowd[boxes]
        detections_xyxy = detections_xyxy[crowd]
        area = np.prod(detections_xyxy[:, 2:] - detections_xyxy[:, :2], axis=1)
        inside = box_math.intersection(detections_xyxy, boxes_xyxy[crowd])
        ious[crowd] = np.divide(inside, area, out=np.zeros_like(area), where=area > 0)
        parts.append(Pairs(rows, boxes, ious).select(ious >= min_iou))
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def match(dataset: Dataset, table: DetectionTable, *, iou: float = 0.5) -> Matches:
    """Match detections in the dataset's labels to its boxes; `iou` is the least overlap of a match."""
    rank, pairs = _candidates(dataset, table, iou)
    detection_area = np.prod(table.boxes_xyxy_px[:, 2:] - table.boxes_xyxy_px[:, :2], axis=1)
    outcomes = np.zeros((len(SIZES), len(table)), np.int8)
    counted = np.zeros((len(SIZES), len(dataset.labels)), bool)
    for size, (smallest, largest) in enumerate(AREA_RANGES):
        counted[size] = ~dataset.crowd & (dataset.areas >= smallest) & (dataset.areas <= largest)
        matched, outcomes[size] = _assign(pairs, rank, counted[size], dataset.crowd)
        other_size = (detection_area < smallest) | (detection_area > largest)
        outcomes[size, (outcomes[size] == FALSE_POSITIVE) & other_size] = IGNORED
        if size == 0:
            matched_box = matched
    matched_detection = np.full(len(dataset.labels), -1, np.int64)
    hits = np.flatnonzero(outcomes[0] == TRUE_POSITIVE)
    matched_detection[matched_box[hits]] = hits
    order = np.lexsort((-table.scores, table.labels))
    class_offsets = np.searchsorted(table.labels[order], np.arange(len(dataset.categories) + 1))
    return Matches(dataset, table, outcomes, matched_box, matched_detection, counted, order, class_offsets)


def outcomes_at(dataset: Dataset, table: DetectionTable, ious: Sequence[float]) -> NDArray[np.int8]:
    """Return the outcomes, (T, D), at several IoUs among boxes of every size; see `Matches.outcomes`."""
    rank, pairs = _candidates(dataset, table, min(ious))
    counted = ~dataset.crowd
    outcomes = np.zeros((len(ious), len(table)), np.int8)
    for row, iou in enumerate(ious):
        _, outcomes[row] = _assign(pairs.select(pairs.ious >= min(iou, HIGHEST_IOU)), rank, counted, dataset.crowd)
    return outcomes


def _candidates(dataset: Dataset, table: DetectionTable, iou: float) -> tuple[NDArray[np.int64], Pairs]:
    """Return each detection's rank by score in its image and class, (D,), and the pairs that may match.

    Those overlap enough, and their detections are within the limit of each image and class.
    """
    group = table.image_index * max(len(dataset.categories), 1) + table.labels
    order = np.lexsort((-table.scores, group))
    rank = np.empty(len(table), np.int64)
    rank[order] = np.arange(len(table)) - np.searchsorted(group[order], group[order])
    pairs = overlapping_pairs(dataset, table, min_iou=min(iou, HIGHEST_IOU))
    return rank, pairs.select(rank[pairs.rows] < MAX_PER_CLASS)


def _assign(
    pairs: Pairs, rank: NDArray[np.int64], counted: NDArray[np.bool_], crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return the box that each detection matches, (D,), -1 for none; and the outcomes, (D,).

    A box that is not `counted` is matched only when no counted one is free; any number of detections match a `crowd`.
    """
    # Rank by rank; then a detection's preferences: counted boxes, more overlap, and (COCO's >=) the later box.
    keys = (-pairs.boxes, -pairs.ious, ~counted[pairs.boxes], pairs.rows, rank[pairs.rows])
    pairs = pairs.select(np.lexsort(keys))
    matched = np.full(len(rank), -1, np.int64)
    free = np.ones(len(counted), bool)
    for start, stop in pairwise(np.searchsorted(rank[pairs.rows], np.arange(MAX_PER_CLASS + 1)).tolist()):
        rows, boxes = pairs.rows[start:stop], pairs.boxes[start:stop]
        available = free[boxes] | crowd[boxes]
        winners, first = np.unique(rows[available], return_index=True)
        matched[winners] = boxes[available][first]
        free[matched[winners]] = False
    outcomes = np.full(len(matched), FALSE_POSITIVE, np.int8)
    has_box = matched >= 0
    outcomes[has_box] = np.where(counted[matched[has_box]], TRUE_POSITIVE, IGNORED)
    outcomes[rank >= MAX_PER_CLASS] = OVER_LIMIT
    return matched, outcomes

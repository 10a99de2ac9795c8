"""Which detection found which box, at one IoU, by the rules of COCO: the ground for precision, recall and thresholds.

The evaluators give curves on 101 recall points and, at great cost, one Python object an image and class; precision
and recall at a score need every detection's fate. All of it here is array work over the whole split.

COCO's matching lets the detections of an image and class choose in the order of their scores: each takes the free
box it overlaps most, a counted box before an ignored one. That is a serial dictatorship, whose outcome is the one
stable matching when every box prefers the higher score. So all detections may propose at once, each box keeps its
best suitor, and the rejected propose again: a few rounds over arrays in place of a loop over half a million rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.coco import AREA_RANGES, SIZES, xywh
from rtdetr_cli.evaluate.table import DetectionTable

MAX_PER_CLASS = 100  # COCO's limit of detections counted for one image and class
PAIRS_AT_ONCE = 4_000_000  # bounds the memory of overlap computations to about 300 MB

TRUE, FALSE, IGNORED, CUT = 1, 0, -1, -2


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Overlapping (detection, box) pairs: `rows` into the table, `boxes` into the dataset, and their `ious`."""

    rows: NDArray[np.int64]
    boxes: NDArray[np.int64]
    ious: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class MatchTable:
    """The fate of every detection and box at one IoU, for each of COCO's sizes.

    D detections (rows of the table), G boxes of the dataset, A sizes (`coco.SIZES`).

    Attributes:
        fate: (A, D) int8: TRUE (found a counted box), FALSE (false positive), IGNORED (matched a crowd or a box of
            another size, or is itself of another size) or CUT (beyond the 100 best of its image and class).
        matched_box: (D,) int64, the box that a detection took at size `all`, -1 for none.
        found_by: (G,) int64, the detection that took a box at size `all`, -1 for none.
        counted: (A, G) bool: boxes in the recall's denominator.
        order: (D,) int64, rows by class, best first inside each.
        class_offsets: (K + 1,) int64: class k is `order[class_offsets[k]:class_offsets[k + 1]]`.
    """

    fate: NDArray[np.int8]
    matched_box: NDArray[np.int64]
    found_by: NDArray[np.int64]
    counted: NDArray[np.bool_]
    order: NDArray[np.int64]
    class_offsets: NDArray[np.int64]

    def rows_of(self, label: int) -> NDArray[np.int64]:
        """Return the rows of one class, best first."""
        return self.order[self.class_offsets[label] : self.class_offsets[label + 1]]


def box_images(dataset: Dataset) -> NDArray[np.int64]:
    """Return the image of each box, (G,)."""
    return np.repeat(np.arange(len(dataset), dtype=np.int64), np.diff(dataset.offsets))


def overlapping_pairs(dataset: Dataset, table: DetectionTable, *, least_iou: float, same_class: bool = True) -> Pairs:
    """Return all pairs of a detection and a box of one image (and class) that overlap enough.

    A crowd's IoU is the part of the detection inside it, as COCO defines it.
    """
    classes = max(len(dataset.categories), 1)
    box_key = box_images(dataset) * classes + dataset.labels if same_class else box_images(dataset)
    row_key = table.image_index * classes + table.labels if same_class else table.image_index
    box_order = np.argsort(box_key, kind="stable")
    sorted_key = box_key[box_order]
    first = np.searchsorted(sorted_key, row_key, "left")
    count = np.searchsorted(sorted_key, row_key, "right") - first
    truth = xywh(dataset.boxes_xyxy_px)
    found = xywh(table.boxes_xyxy_px)
    with_boxes = np.flatnonzero(count)
    ends = np.cumsum(count[with_boxes])
    parts: list[Pairs] = []
    start = 0
    while start < len(with_boxes):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, done + PAIRS_AT_ONCE, "right")), start + 1)
        some = with_boxes[start:stop]
        rows = np.repeat(some, count[some])
        step = np.arange(len(rows)) - np.repeat(ends[start:stop] - count[some] - done, count[some])
        boxes = box_order[first[rows] + step]
        ious = _iou(found[rows], truth[boxes], dataset.crowd[boxes])
        keep = ious >= least_iou
        parts.append(Pairs(rows[keep], boxes[keep], ious[keep]))
        start = stop
    if not parts:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Pairs(
        np.concatenate([p.rows for p in parts]),
        np.concatenate([p.boxes for p in parts]),
        np.concatenate([p.ious for p in parts]),
    )


def _iou(found: NDArray[np.float64], truth: NDArray[np.float64], crowd: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the IoU of paired boxes, (P, 4) left, top, width, height each."""
    right = np.minimum(found[:, 0] + found[:, 2], truth[:, 0] + truth[:, 2])
    bottom = np.minimum(found[:, 1] + found[:, 3], truth[:, 1] + truth[:, 3])
    width = np.maximum(right - np.maximum(found[:, 0], truth[:, 0]), 0)
    height = np.maximum(bottom - np.maximum(found[:, 1], truth[:, 1]), 0)
    shared = width * height
    area = found[:, 2] * found[:, 3]
    union = np.where(crowd, area, area + truth[:, 2] * truth[:, 3] - shared)
    overlap: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap


def match(dataset: Dataset, table: DetectionTable, *, iou: float = 0.5) -> MatchTable:
    """Match detections to boxes of their image and class by COCO's rules, for every size.

    Args:
        dataset: N images with G boxes.
        table: D detections; equal scores keep the table's order.
        iou: least overlap of a match.
    """
    rows, boxes = len(table), len(dataset.labels)
    rank = _ranks(dataset, table)
    cut = rank >= MAX_PER_CLASS
    pairs = _counted_pairs(dataset, table, cut, iou)
    found_area = np.prod(xywh(table.boxes_xyxy_px)[:, 2:], axis=1)

    fate = np.zeros((len(SIZES), rows), np.int8)
    counted = np.zeros((len(SIZES), boxes), bool)
    matched_box = np.full(rows, -1, np.int64)
    found_by = np.full(boxes, -1, np.int64)
    for size, (least, most) in enumerate(AREA_RANGES):
        ignored = dataset.crowd | (dataset.areas < least) | (dataset.areas > most)
        counted[size] = ~ignored
        taken = _settle(pairs, rank, ignored, dataset.crowd, rows)
        fate[size] = _fates(taken, ignored, cut)
        fate[size, (fate[size] == FALSE) & ((found_area < least) | (found_area > most))] = IGNORED
        if size == 0:
            matched_box = taken
            one_to_one = np.flatnonzero(taken >= 0)
            one_to_one = one_to_one[~dataset.crowd[taken[one_to_one]]]
            found_by[taken[one_to_one]] = one_to_one
    order = np.lexsort((-table.scores, table.labels))
    class_offsets = np.searchsorted(table.labels[order], np.arange(len(dataset.categories) + 1))
    return MatchTable(fate, matched_box, found_by, counted, order, class_offsets)


def fates_at(dataset: Dataset, table: DetectionTable, ious: Sequence[float]) -> NDArray[np.int8]:
    """Return the fates, (T, D), at several IoUs among boxes of every size; see `MatchTable.fate`."""
    rank = _ranks(dataset, table)
    cut = rank >= MAX_PER_CLASS
    pairs = _counted_pairs(dataset, table, cut, min(ious))
    found = np.zeros((len(ious), len(table)), np.int8)
    for position, iou in enumerate(ious):
        keep = pairs.ious >= min(iou, 1 - 1e-10)
        enough = Pairs(pairs.rows[keep], pairs.boxes[keep], pairs.ious[keep])
        taken = _settle(enough, rank, dataset.crowd, dataset.crowd, len(table))
        found[position] = _fates(taken, dataset.crowd, cut)
    return found


def _ranks(dataset: Dataset, table: DetectionTable) -> NDArray[np.int64]:
    """Return each detection's place among those of its image and class, (D,), 0 the best."""
    group = table.image_index * max(len(dataset.categories), 1) + table.labels
    order = np.lexsort((-table.scores, group))
    grouped = group[order]
    new = np.ones(len(table), bool)
    new[1:] = grouped[1:] != grouped[:-1]
    starts = np.flatnonzero(new)
    rank = np.empty(len(table), np.int64)
    rank[order] = np.arange(len(table)) - np.repeat(starts, np.diff(np.append(starts, len(table))))
    return rank


def _counted_pairs(dataset: Dataset, table: DetectionTable, cut: NDArray[np.bool_], iou: float) -> Pairs:
    pairs = overlapping_pairs(dataset, table, least_iou=min(iou, 1 - 1e-10))
    keep = ~cut[pairs.rows]
    return Pairs(pairs.rows[keep], pairs.boxes[keep], pairs.ious[keep])


def _fates(taken: NDArray[np.int64], ignored: NDArray[np.bool_], cut: NDArray[np.bool_]) -> NDArray[np.int8]:
    fate = np.zeros(len(taken), np.int8)
    has = taken >= 0
    fate[has] = np.where(ignored[taken[has]], IGNORED, TRUE)
    fate[cut] = CUT
    return fate


def _settle(
    pairs: Pairs,
    rank: NDArray[np.int64],
    ignored: NDArray[np.bool_],
    crowd: NDArray[np.bool_],
    rows: int,
) -> NDArray[np.int64]:
    """Return the box that each detection gets, (D,), -1 for none: proposals and rejections until nobody moves.

    Args:
        pairs: pairs that overlap enough.
        rank: (D,) place of a detection in its image and class, 0 the best.
        ignored: (G,) boxes that count for nothing; chosen only when no counted one is left.
        crowd: (G,) boxes with room for any number of detections.
        rows: D.
    """
    taken = np.full(rows, -1, np.int64)
    # A detection's wishes in order: counted before ignored, then more overlap, then (COCO's >=) the later box.
    wishes = np.lexsort((-pairs.boxes, -pairs.ious, ignored[pairs.boxes], pairs.rows))
    row, box = pairs.rows[wishes], pairs.boxes[wishes]
    if not len(row):
        return taken
    new = np.ones(len(row), bool)
    new[1:] = row[1:] != row[:-1]
    next_wish = np.flatnonzero(new)  # of each detection that still looks, the pair it proposes next
    last_wish = np.append(next_wish[1:], len(row))
    holder = np.full(len(ignored), -1, np.int64)  # which of the wish lists above holds a box
    looking = np.arange(len(next_wish))
    owner = row[next_wish]
    while len(looking):
        wanted = box[next_wish[looking]]
        open_to_all = crowd[wanted]
        taken[owner[looking[open_to_all]]] = wanted[open_to_all]
        looking, wanted = looking[~open_to_all], wanted[~open_to_all]
        # Everybody who asks for a box, and whoever holds it, best last: plain assignment keeps the last.
        holding = holder[np.unique(wanted)]
        suitors = np.concatenate([looking, holding[holding >= 0]])
        asked = box[next_wish[suitors]]
        best_last = np.argsort(-rank[owner[suitors]], kind="stable")
        holder[asked[best_last]] = suitors[best_last]
        turned_down = suitors[holder[asked] != suitors]
        next_wish[turned_down] += 1
        looking = turned_down[next_wish[turned_down] < last_wish[turned_down]]
    held = np.flatnonzero(holder >= 0)
    taken[owner[holder[held]]] = held
    return taken

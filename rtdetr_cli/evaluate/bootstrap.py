"""Confidence intervals of AP by bootstrap: draw N of the N images with replacement, many times (Efron 1979).

Detections are matched once: a resample only weights each image by how often it was drawn, and AP is computed from
weighted counts. hotcoco's `compare` evaluates the *set* of drawn images and ignores how often each was drawn, so its
standard errors are about three quarters of the right ones (0.0109 against 0.0141 for AR of 40 synthetic images).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.coco import image_numbers
from rtdetr_cli.evaluate.matching import TRUE_POSITIVE, box_images, outcomes_at
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.text import counted

IOUS = tuple(0.5 + 0.05 * step for step in range(10))
CONFIDENCE = 0.95
RESAMPLES_AT_ONCE = 250  # bounds the memory: one float32 for each resample and true positive of a class
FEW_IMAGES = 30
FEW_WITH_CLASS = 5  # resamples of a class in fewer images are too much alike: the interval would be far too narrow
WIDE = 0.05  # half an interval above which a split is called too small


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its 95% confidence interval."""

    value: float
    lower: float
    upper: float
    images: int

    @property
    def half_width(self) -> float:
        """Half the interval's width, for `0.412 ± 0.028`."""
        return (self.upper - self.lower) / 2

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half_width:.3f} ({CONFIDENCE:.0%}, {counted(self.images, 'image')})"

    def to_json(self) -> dict[str, float | int]:
        """Return the figures by name."""
        bounds = {"value": self.value, "lower": self.lower, "upper": self.upper, "half": self.half_width}
        return bounds | {"confidence": CONFIDENCE, "pictures": self.images}


@dataclass(frozen=True, slots=True, eq=False)
class Resamples:
    """AP under each of B resamples of the images.

    Attributes:
        ap: (B, K) AP of each class; NaN where the resample has no box of it.
        images: N.
        images_with_class: (K,) images that have a box of each class.
    """

    ap: NDArray[np.float64]
    images: int
    images_with_class: NDArray[np.int64]

    def overall(self) -> NDArray[np.float64]:
        """Return (B,) the mean AP over classes, without resamples that have no box at all."""
        return np.asarray(np.nanmean(self.ap[~np.isnan(self.ap).all(axis=1)], axis=1))

    def interval(self, value: float, *, minus: Resamples | None = None) -> Interval:
        """Return the interval of AP over all classes, or of the difference from another model on the same resamples."""
        return _interval(value, self.overall() - (0 if minus is None else minus.overall()), self.images)

    def class_interval(self, value: float, label: int, *, minus: Resamples | None = None) -> Interval | None:
        """Return the same for one class; None where too few images have the class."""
        images = int(self.images_with_class[label])
        if images < FEW_WITH_CLASS:
            return None
        values = self.ap[:, label] - (0 if minus is None else minus.ap[:, label])
        return _interval(value, values[~np.isnan(values)], images)


def _interval(value: float, resampled: NDArray[np.float64], images: int) -> Interval:
    """Return the basic bootstrap interval: the quantiles of the resamples, mirrored at the value.

    AP of few images is too high, and AP of a resample, which repeats images, is higher again by about as much;
    mirroring cancels the two errors. On synthetic images (20 classes, most of them rare, samples of 100 from 6,000)
    the interval covered the true AP in 83% of samples, plain quantiles in 49%; with 3 classes 91% and 88%.
    """
    tail = (1 - CONFIDENCE) / 2
    lower, upper = np.quantile(resampled, [tail, 1 - tail]) if len(resampled) else (value, value)
    # With few images or APs near 0 the value may lie outside the quantiles; an interval contains its estimate.
    return Interval(value, min(value, 2 * value - float(upper)), max(value, 2 * value - float(lower)), images)


def draw_weights(images: int, resamples: int) -> NDArray[np.float32]:
    """Return (N, B): how often each image is in each resample, the same at every call, so that models can be paired."""
    random = np.random.default_rng(0)
    weights = np.empty((images, resamples), np.float32)
    for column in range(resamples):
        weights[:, column] = np.bincount(random.integers(0, images, images), minlength=images)
    return weights


def resample(dataset: Dataset, table: DetectionTable, *, resamples: int = 1000) -> Resamples:
    """Compute AP under resamples of the images; raises DataError where there are no boxes."""
    objects = ~dataset.crowd
    if not len(dataset) or not objects.any():
        message = f"the {dataset.split} split of {dataset.name} has no boxes, so AP has no interval"
        raise DataError(message, code="empty-split")
    classes = len(dataset.categories)
    outcomes = outcomes_at(dataset, table, IOUS)
    # Equal scores rank by image number, as in the evaluators.
    order = np.lexsort((image_numbers(dataset)[table.image_index], -table.scores, table.labels))
    class_offsets = np.searchsorted(table.labels[order], np.arange(classes + 1))
    # (N, K) boxes of each class in each image
    boxes_in = np.zeros((len(dataset), classes), np.float32)
    np.add.at(boxes_in, (box_images(dataset)[objects], dataset.labels[objects]), 1)
    images_with_class = np.count_nonzero(boxes_in, axis=0)
    ap = np.full((resamples, classes), np.nan)
    weights = draw_weights(len(dataset), resamples)
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        chunk = slice(start, start + RESAMPLES_AT_ONCE)
        chunk_weights = np.ascontiguousarray(weights[:, chunk])
        for label in np.flatnonzero(images_with_class).tolist():
            boxes = boxes_in[:, label] @ chunk_weights  # (b,)
            rows = order[class_offsets[label] : class_offsets[label + 1]]
            per_iou = _weighted_ap(table.image_index[rows], outcomes[:, rows], boxes, chunk_weights)
            ap[chunk, label] = np.where(boxes > 0, per_iou.mean(axis=0), np.nan)
    return Resamples(ap, len(dataset), images_with_class)


def _weighted_ap(
    images: NDArray[np.int64], outcomes: NDArray[np.int8], boxes: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return (T, b) AP of one class at each IoU under b weightings of the images.

    Between two true positives precision only falls, so the envelope needs the rows of true positives alone; one
    sparse product sums up what lies between them. Detections are best first, with their `images` (D,) and `outcomes`
    (T, D); `boxes` (b,) are the weighted numbers of boxes, and `weights` (N, b) those of the images.
    """
    from scipy.sparse import csr_matrix

    ious, width = outcomes.shape[0], weights.shape[1]
    result = np.zeros((ious, width))
    correct = outcomes == TRUE_POSITIVE
    positions = np.flatnonzero(correct.any(axis=0))  # of detections that are correct at any IoU
    if not len(positions):
        return result
    last = int(positions[-1]) + 1
    segment = np.searchsorted(positions, np.arange(last))

    def weight_up_to(included: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return (P, b) the weight of the included detections up to each of `positions`."""
        rows = np.flatnonzero(included[:last])
        ones = np.ones(len(rows), np.float32)
        matrix = csr_matrix((ones, (segment[rows], images[rows])), shape=(len(positions), len(weights)))
        total: NDArray[np.float32] = np.cumsum(matrix @ weights, axis=0)
        return total

    # Detections in a crowd or over the limit count at no IoU or at some; those are rare, and are added for each IoU.
    countable = outcomes >= 0
    always = np.all(countable, axis=0)
    common = weight_up_to(always)
    at_least_one = np.maximum(boxes, 1)
    for row in range(ious):
        hits_here = correct[row, positions]
        if not hits_here.any():
            continue
        hits = np.cumsum(weights[images[positions[hits_here]]], axis=0)
        detections = common[hits_here]
        sometimes = countable[row] & ~always
        if sometimes.any():
            detections = detections + weight_up_to(sometimes)[hits_here]
        precision = np.divide(hits, detections, out=np.zeros_like(hits), where=detections > 0)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        # How many of the recall points 0, 0.01, ... 1 each true positive is the first to reach.
        reached = np.floor(hits / at_least_one * np.float32(100) + np.float32(1e-4)) + 1
        reached[hits == 0] = 0
        gained = np.diff(reached, axis=0, prepend=np.zeros((1, width), np.float32))
        result[row] = (gained * envelope).sum(axis=0) / 101
    return result


def small_split_warning(interval: Interval) -> str:
    """Return a sentence when a split is too small for a useful AP, else an empty string."""
    if interval.images >= FEW_IMAGES and interval.half_width <= WIDE:
        return ""
    small = f"the split is small: with {counted(interval.images, 'image')}, "
    if interval.half_width < 0.0005:
        return f"{small}the interval of AP is not reliable" if interval.value else ""
    return f"{small}AP is only known to ± {interval.half_width:.3f}; four times as many images would halve that"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same images.

    `difference` is the AP of B minus that of A with the interval of the paired difference, `probability_b_better` the
    share of resamples in which B is better, and `verdict` is `a`, `b` or `undecided`.
    """

    a: Interval
    b: Interval
    difference: Interval
    probability_b_better: float
    verdict: str

    def sentence(self) -> str:
        """Return the result in words."""
        gap, low, high = self.difference.value, self.difference.lower, self.difference.upper
        images = counted(self.difference.images, "image")
        if low == high == 0:
            return "A and B have the same AP on every resample"
        if self.verdict == "b":
            return f"B is better than A by {gap:.3f} AP (95%: {low:.3f} to {high:.3f}, {images})"
        if self.verdict == "a":
            return f"A is better than B by {-gap:.3f} AP (95%: {-high:.3f} to {-low:.3f}, {images})"
        advice = ""
        if abs(gap) >= 0.001:
            needed = self.difference.images * (self.difference.half_width / gap) ** 2
            step = 10 ** max(0, int(math.log10(max(needed, 1))) - 1)  # two digits are enough
            needed = max(self.difference.images + 1, math.ceil(needed / step) * step)
            advice = f"; a difference of this size needs about {needed:,} images"
        return (
            f"no significant difference: B minus A is {gap:+.3f} AP (95%: {low:+.3f} to {high:+.3f}, {images}){advice}"
        )


def compare(
    dataset: Dataset,
    tables: tuple[DetectionTable, DetectionTable],
    values: tuple[float, float],
    *,
    resamples: int = 1000,
) -> tuple[Comparison, tuple[Resamples, Resamples]]:
    """Compare the detections of A and B, whose APs are `values`, on the same resamples of the images."""
    a = resample(dataset, tables[0], resamples=resamples)
    b = resample(dataset, tables[1], resamples=resamples)
    difference = b.interval(values[1] - values[0], minus=a)
    verdict = "b" if difference.lower > 0 else "a" if difference.upper < 0 else "undecided"
    b_better = float((b.overall() > a.overall()).mean())
    return Comparison(a.interval(values[0]), b.interval(values[1]), difference, b_better, verdict), (a, b)

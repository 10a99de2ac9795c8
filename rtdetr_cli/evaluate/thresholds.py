"""Precision and recall at every score, and the score threshold that meets a target best."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import UsageError
from rtdetr_cli.evaluate.matching import FALSE_POSITIVE, TRUE_POSITIVE, Matches
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.weights.header import Thresholds

USEFUL_F1, USEFUL_RECALL = 0.1, 0.01  # a class whose best threshold gives less is named in a warning


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Precision, recall and F1 at one threshold, with the counts behind them.

    Precision is None when there are no detections, recall and F1 are None when there are no boxes.
    """

    threshold: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    true_positives: int
    false_positives: int
    boxes: int

    @classmethod
    def from_counts(cls, threshold: float | None, true: int, false: int, boxes: int) -> OperatingPoint:
        """Return the point of so many true and false positives among so many boxes."""
        return cls(
            threshold,
            true / (true + false) if true + false else None,
            true / boxes if boxes else None,
            2 * true / (true + false + boxes) if boxes else None,
            true,
            false,
            boxes,
        )

    def rates(self) -> dict[str, float | None]:
        """Return the figures by name, without the counts."""
        return {"precision": self.precision, "recall": self.recall, "f1": self.f1, "threshold": self.threshold}

    def to_json(self) -> dict[str, float | int | None]:
        """Return all figures by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreCurve:
    """Counts when all detections from a score upwards are kept; one row for each distinct score.

    Attributes:
        scores: (S,) descending.
        true_positives, false_positives: (S,).
        boxes: counted boxes.
    """

    scores: NDArray[np.float64]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    boxes: int

    @classmethod
    def from_outcomes(cls, scores: NDArray[np.float64], correct: NDArray[np.bool_], boxes: int) -> ScoreCurve:
        """Return the curve of descending scores and whether each detection is correct."""
        # No threshold can separate detections that share a score.
        last_of_score = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, int)
        true = np.cumsum(correct)[last_of_score]
        return cls(scores[last_of_score], true, last_of_score + 1 - true, boxes)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Precision at each score."""
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Recall at each score; 0 throughout when there are no boxes."""
        return self.true_positives / max(self.boxes, 1)

    @property
    def f1(self) -> NDArray[np.float64]:
        """F1 at each score."""
        precision, recall = self.precision, self.recall
        total = precision + recall
        return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)

    def threshold(self, row: int) -> float:
        """Return a threshold that keeps the rows up to this one: half-way to the next score.

        Scores of another backend differ in the sixth digit: a threshold at the score itself would lose the row.
        """
        following = self.scores[row + 1] if row + 1 < len(self.scores) else 0.0
        return float((self.scores[row] + following) / 2)

    def best_point(self) -> OperatingPoint:
        """Return the point of the highest F1, the one with the highest threshold among equals."""
        if not self.boxes or not self.true_positives.any():
            return OperatingPoint.from_counts(None, 0, 0, self.boxes)
        row = int(np.argmax(self.f1))
        true, false = int(self.true_positives[row]), int(self.false_positives[row])
        return OperatingPoint.from_counts(self.threshold(row), true, false, self.boxes)


def score_curve(
    dataset: Dataset, table: DetectionTable, matches: Matches, label: int | None, *, size: int = 0
) -> ScoreCurve:
    """Return the curve of one class, or of all classes together (None), among boxes of one of `coco.SIZES`."""
    if label is None:
        rows = np.argsort(-table.scores, kind="stable")
        boxes = int(np.count_nonzero(matches.counted[size]))
    else:
        rows = matches.rows_of(label)
        boxes = int(np.count_nonzero(matches.counted[size] & (dataset.labels == label)))
    rows = rows[matches.outcomes[size, rows] >= 0]
    return ScoreCurve.from_outcomes(table.scores[rows], matches.outcomes[size, rows] == TRUE_POSITIVE, boxes)


def points_at(
    dataset: Dataset, table: DetectionTable, matches: Matches, thresholds: NDArray[np.float64]
) -> tuple[OperatingPoint, list[OperatingPoint]]:
    """Return the points at given thresholds, (K,) one for each class: over all classes together, and of each class."""
    classes = len(dataset.categories)
    kept = table.scores >= thresholds[table.labels] if len(table) else np.zeros(0, bool)
    outcomes = matches.outcomes[0]
    true = np.bincount(table.labels[kept & (outcomes == TRUE_POSITIVE)], minlength=classes)
    false = np.bincount(table.labels[kept & (outcomes == FALSE_POSITIVE)], minlength=classes)
    boxes = np.bincount(dataset.labels[matches.counted[0]], minlength=classes)
    shared = float(thresholds[0]) if len(set(thresholds.tolist())) == 1 else None
    overall = OperatingPoint.from_counts(shared, int(true.sum()), int(false.sum()), int(boxes.sum()))
    columns = zip(thresholds.tolist(), true.tolist(), false.tolist(), boxes.tolist(), strict=True)
    return overall, [OperatingPoint.from_counts(*values) for values in columns]


# ---------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds calibrated on a split, and where the target was not met (`notes`)."""

    thresholds: Thresholds
    notes: tuple[str, ...]


def parse_target(text: str) -> tuple[str, float]:
    """Read `f1` or `precision=0.9`.

    Raises:
        UsageError: it is neither, or the precision is not between 0 and 1.
    """
    kind, equals, value = text.strip().lower().partition("=")
    if kind == "f1" and not equals:
        return "f1", 0.0
    if kind == "precision" and equals:
        try:
            target = float(value)
        except ValueError:
            target = -1.0
        if 0 < target <= 1:
            return "precision", target
    raise UsageError(
        f"--calibrate {text} is not a target", hint="--calibrate f1, or --calibrate precision=0.9", code="target"
    )


def calibrate(dataset: Dataset, table: DetectionTable, matches: Matches, target: str) -> Calibration:
    """Find the score threshold for each class and for all classes together.

    `f1` takes the highest F1. `precision=P` takes the lowest threshold that still has precision P, and so the most
    recall; where P is never reached, the threshold of the highest precision. A class that is not in the split, or
    never detected, gets the overall threshold. Classes that `f1` cannot serve are named in one note.

    Raises:
        UsageError: there is no such target.
    """
    kind, precision = parse_target(target)
    notes: list[str] = []

    def threshold_of(curve: ScoreCurve, name: str) -> float | None:
        threshold, reached = _threshold_for(curve, kind, precision)
        if threshold is not None and reached < precision:
            notes.append(
                f"{name}: precision {precision:g} is never reached; the highest is {reached:.3f}, at {threshold:.3f}"
            )
        return threshold

    overall = threshold_of(score_curve(dataset, table, matches, None), "all classes together")
    if overall is None:
        overall = 0.5
        notes.append("no object of the split was detected at any score; the threshold stays 0.5")
    per_class: list[float] = []
    weak: list[str] = []
    for label, name in enumerate(dataset.names):
        curve = score_curve(dataset, table, matches, label)
        threshold = threshold_of(curve, name)
        if threshold is None:
            reason = "is never detected" if curve.boxes else "has no boxes"
            notes.append(f"{name} {reason} in the split: it gets the overall threshold")
        elif kind == "f1":
            best = curve.best_point()
            if (best.f1 or 0) < USEFUL_F1 or (best.recall or 0) < USEFUL_RECALL:
                weak.append(name)
        per_class.append(overall if threshold is None else threshold)
    if weak:
        notes.append(
            f"{', '.join(weak)}: even the best threshold gives an F1 below {USEFUL_F1:g} or detects fewer than "
            f"{USEFUL_RECALL:.0%} of the objects, so its predictions are of little use: train longer, then calibrate "
            "again"
        )
    return Calibration(Thresholds(target.strip().lower(), overall, tuple(per_class)), tuple(notes))


def _threshold_for(curve: ScoreCurve, kind: str, precision: float) -> tuple[float | None, float]:
    """Return the threshold and the precision there, which may be below the target; None when nothing is detected."""
    if not curve.boxes or not curve.true_positives.any():
        return None, 0.0
    if kind == "f1":
        row = int(np.argmax(curve.f1))
    else:
        enough = np.flatnonzero((curve.precision >= precision) & (curve.true_positives > 0))
        rows = enough if len(enough) else np.flatnonzero(curve.precision == curve.precision.max())
        row = int(rows[-1])
    return curve.threshold(row), float(curve.precision[row])

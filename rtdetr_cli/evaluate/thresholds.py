"""Precision and recall at every score, and the score threshold that serves a purpose best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import UsageError
from rtdetr_cli.evaluate.matching import FALSE, TRUE, MatchTable
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.weights.header import Thresholds

LEAST_F1, LEAST_RECALL = 0.1, 0.01  # of a class whose best threshold is worth using


@dataclass(frozen=True, slots=True, eq=False)
class ScoreCurve:
    """Precision and recall when everything from a score upwards is kept; one row for each distinct score.

    Attributes:
        scores: (S,) descending.
        precision, recall: (S,).
        boxes: counted boxes; recall is 0 throughout when there are none.
        lower: (S,) the next score down, 0 after the last: a threshold in between keeps just these rows.
    """

    scores: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    boxes: int
    lower: NDArray[np.float64]

    @property
    def f1(self) -> NDArray[np.float64]:
        """F1 at each score."""
        total = self.precision + self.recall
        return np.divide(2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0)

    def threshold(self, row: int) -> float:
        """Return a threshold that keeps the rows up to this one, half-way to the next score.

        Another backend's scores differ in the sixth digit: a threshold at the score itself would lose the row.
        """
        return float((self.scores[row] + self.lower[row]) / 2)


@dataclass(frozen=True, slots=True)
class Point:
    """What one threshold gives. Precision is None when nothing was kept, recall and F1 when there is no box."""

    threshold: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    true_positives: int
    false_positives: int
    boxes: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return the figures by name."""
        return {
            "threshold": self.threshold,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "boxes": self.boxes,
        }


def score_curve(
    dataset: Dataset, table: DetectionTable, matches: MatchTable, label: int | None, *, size: int = 0
) -> ScoreCurve:
    """Return the curve of one class, or of all classes together (None), among boxes of one of `coco.SIZES`."""
    if label is None:
        rows = np.argsort(-table.scores, kind="stable")
        boxes = int(np.count_nonzero(matches.counted[size]))
    else:
        rows = matches.rows_of(label)
        boxes = int(np.count_nonzero(matches.counted[size] & (dataset.labels == label)))
    fate = matches.fate[size, rows]
    rows, fate = rows[fate >= 0], fate[fate >= 0]
    return _curve(table.scores[rows], fate == TRUE, boxes)


def _curve(scores: NDArray[np.float64], hits: NDArray[np.bool_], boxes: int) -> ScoreCurve:
    """Turn descending scores and their fates into a curve over distinct scores."""
    found = np.cumsum(hits)
    last = np.ones(len(scores), bool)  # of the rows that share a score: a threshold cannot part them
    last[:-1] = scores[:-1] != scores[1:]
    at = np.flatnonzero(last)
    kept = scores[at]
    return ScoreCurve(
        scores=kept,
        precision=found[at] / (at + 1),
        recall=found[at] / max(boxes, 1),
        boxes=boxes,
        lower=np.append(kept[1:], 0.0),
    )


def best_point(curve: ScoreCurve) -> Point:
    """Return the point of the highest F1; of equals the one with the highest threshold."""
    if not curve.boxes:
        return Point(None, None, None, None, 0, 0, 0)
    f1 = curve.f1
    if not len(f1) or f1.max() <= 0:
        return Point(None, None, 0.0, 0.0, 0, 0, curve.boxes)
    return _point(curve, int(np.argmax(f1)))


def _point(curve: ScoreCurve, row: int) -> Point:
    hits = round(float(curve.recall[row]) * curve.boxes)
    kept = round(hits / float(curve.precision[row])) if hits else 0
    return Point(
        curve.threshold(row),
        float(curve.precision[row]),
        float(curve.recall[row]),
        float(curve.f1[row]),
        hits,
        kept - hits,
        curve.boxes,
    )


def points_at(
    dataset: Dataset, table: DetectionTable, matches: MatchTable, thresholds: NDArray[np.float64]
) -> tuple[Point, list[Point]]:
    """Return what given thresholds give: over all classes together, and for each.

    Args:
        dataset: K classes.
        table: D detections.
        matches: their fates.
        thresholds: (K,) one for each class.
    """
    classes = len(dataset.categories)
    kept = table.scores >= thresholds[table.labels] if len(table) else np.zeros(0, bool)
    fate = matches.fate[0]
    hits = np.bincount(table.labels[kept & (fate == TRUE)], minlength=classes)
    wrong = np.bincount(table.labels[kept & (fate == FALSE)], minlength=classes)
    boxes = np.bincount(dataset.labels[matches.counted[0]], minlength=classes)
    shared = float(thresholds[0]) if len(set(thresholds.tolist())) == 1 else None
    overall = _counted(shared, int(hits.sum()), int(wrong.sum()), int(boxes.sum()))
    return overall, [
        _counted(float(t), int(h), int(w), int(b)) for t, h, w, b in zip(thresholds, hits, wrong, boxes, strict=True)
    ]


def _counted(threshold: float | None, hits: int, wrong: int, boxes: int) -> Point:
    return Point(
        threshold,
        hits / (hits + wrong) if hits + wrong else None,
        hits / boxes if boxes else None,
        2 * hits / (hits + wrong + boxes) if boxes else None,
        hits,
        wrong,
        boxes,
    )


# ---------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds found on a split, and what could not be had (`notes`)."""

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
            wanted = float(value)
        except ValueError:
            wanted = -1.0
        if 0 < wanted <= 1:
            return "precision", wanted
    raise UsageError(
        f"--calibrate {text} is not a target", hint="--calibrate f1, or --calibrate precision=0.9", code="target"
    )


def calibrate(dataset: Dataset, table: DetectionTable, matches: MatchTable, target: str) -> Calibration:
    """Find the score threshold for each class and for all together.

    `f1` takes the highest F1. `precision=P` takes the lowest threshold that still has precision P, thus the most
    recall; where P is never reached, the threshold of the highest precision. A class without boxes in the split
    gets the overall threshold. Classes that no threshold of `f1` serves are named in one note.

    Raises:
        UsageError: there is no such target.
    """
    kind, wanted = parse_target(target)
    notes: list[str] = []
    overall = _chosen(score_curve(dataset, table, matches, None), kind, wanted)
    if overall is None:
        overall = (0.5, None)
        notes.append("nothing in the split was found at any score; the threshold stays 0.5")
    elif overall[1] is not None:
        notes.append(_short("all classes together", overall, wanted))
    found: list[float] = []
    hopeless: list[str] = []
    for label, name in enumerate(dataset.names):
        curve = score_curve(dataset, table, matches, label)
        chosen = _chosen(curve, kind, wanted)
        if chosen is None:
            found.append(overall[0])
            why = "is never found" if curve.boxes else "has no boxes"
            notes.append(f"{name} {why} in the split: it takes the overall threshold")
            continue
        found.append(chosen[0])
        if chosen[1] is not None:
            notes.append(_short(name, chosen, wanted))
        if kind == "f1" and _keeps_little(best_point(curve)):
            hopeless.append(name)
    if hopeless:
        notes.append(
            f"{', '.join(hopeless)}: even the best threshold has an F1 below {LEAST_F1:g} or finds fewer than "
            f"{LEAST_RECALL:.0%} of the objects, so predictions at it are of little use: train longer, then calibrate "
            "again"
        )
    return Calibration(Thresholds(target.strip().lower(), overall[0], tuple(found)), tuple(notes))


def _chosen(curve: ScoreCurve, kind: str, wanted: float) -> tuple[float, float | None] | None:
    """Return (threshold, the best precision when the wanted one is out of reach), or None when nothing is found."""
    if not curve.boxes or not len(curve.scores) or curve.recall.max() <= 0:
        return None
    if kind == "f1":
        return curve.threshold(int(np.argmax(curve.f1))), None
    enough = np.flatnonzero((curve.precision >= wanted) & (curve.recall > 0))
    if len(enough):
        return curve.threshold(int(enough[-1])), None
    best = curve.precision.max()
    row = int(np.flatnonzero(curve.precision == best)[-1])
    return curve.threshold(row), float(best)


def _keeps_little(point: Point) -> bool:
    """Tell whether a class's best point is so weak that its threshold misleads."""
    return (point.f1 or 0.0) < LEAST_F1 or (point.recall or 0.0) < LEAST_RECALL


def _short(what: str, chosen: tuple[float, float | None], wanted: float) -> str:
    return f"{what}: precision {wanted:g} is never reached; at {chosen[0]:.3f} it is highest, {chosen[1]:.3f}"

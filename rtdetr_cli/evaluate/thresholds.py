"""Precision and recall at every score, the thresholds that meet a target best, and storing those in a model file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import RtdetrError, UsageError
from rtdetr_cli.evaluate.classes import map_classes
from rtdetr_cli.evaluate.matching import FALSE_POSITIVE, TRUE_POSITIVE, Matches
from rtdetr_cli.text import abbreviate
from rtdetr_cli.weights.binding import rebind_thresholds
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, ModelHeader, Thresholds, read_header, rewrite_header

if TYPE_CHECKING:
    from rtdetr_cli.evaluate.run import Evaluation
    from rtdetr_cli.infer.backend import Backend

EXPORT_ORIGINAL = "export-original"
MIN_BOXES = 30
"""A threshold of its own needs this many boxes of a class: F1 on fewer is decided by single detections."""
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
        precision = true / (true + false) if true + false else None
        recall = true / boxes if boxes else None
        f1 = 2 * true / (true + false + boxes) if boxes else None
        return cls(threshold, precision, recall, f1, true, false, boxes)

    def rates(self) -> dict[str, float | None]:
        """Return the figures by name, without the counts."""
        return {"precision": self.precision, "recall": self.recall, "f1": self.f1, "threshold": self.threshold}


@dataclass(frozen=True, slots=True, eq=False)
class ScoreCurve:
    """Counts (S,) when all detections from a score upwards are kept; one row for each distinct score, descending."""

    scores: NDArray[np.float64]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    boxes: int

    @classmethod
    def from_outcomes(cls, scores: NDArray[np.float64], correct: NDArray[np.bool_], boxes: int) -> ScoreCurve:
        """Return the curve of descending scores and whether each detection is correct."""
        # No threshold can separate detections that share a score.
        last_of_score = np.flatnonzero(np.diff(scores, append=-np.inf))
        true = np.cumsum(correct, dtype=np.int64)[last_of_score]
        return cls(scores[last_of_score], true, last_of_score + 1 - true, boxes)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Precision at each score."""
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def f1(self) -> NDArray[np.float64]:
        """F1 at each score."""
        precision, recall = self.precision, self.true_positives / max(self.boxes, 1)
        total = precision + recall
        return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)

    def threshold(self, row: int) -> float:
        """Return a threshold that keeps the rows up to this one: half-way to the next score.

        Scores of another backend differ in the sixth digit: a threshold at the score itself would lose the row.
        """
        following = self.scores[row + 1] if row + 1 < len(self.scores) else 0.0
        return float((self.scores[row] + following) / 2)

    def best_point(self, min_precision: float = 0.0) -> OperatingPoint:
        """Return the point of the highest F1, the one with the highest threshold among equals.

        With `min_precision` it is the lowest threshold that reaches it, and so the most recall, or where it is never
        reached, that of the highest precision. Without a true positive there is no threshold.
        """
        if not self.boxes or not self.true_positives.any():
            return OperatingPoint.from_counts(None, 0, 0, self.boxes)
        if min_precision:
            precision = self.precision
            least = min(min_precision, precision.max())
            row = int(np.flatnonzero((precision >= least) & (self.true_positives > 0))[-1])
        else:
            row = int(np.argmax(self.f1))
        true, false = int(self.true_positives[row]), int(self.false_positives[row])
        return OperatingPoint.from_counts(self.threshold(row), true, false, self.boxes)


def score_curve(matches: Matches, label: int | None, *, size: int = 0) -> ScoreCurve:
    """Return the curve of one class, or of all classes together (None), among boxes of one of `coco.SIZES`."""
    scores, counted = matches.table.scores, matches.counted[size]
    if label is None:
        rows = np.argsort(-scores, kind="stable")
    else:
        rows, counted = matches.rows_of(label), counted & (matches.dataset.labels == label)
    rows = rows[matches.outcomes[size, rows] >= 0]
    correct = matches.outcomes[size, rows] == TRUE_POSITIVE
    return ScoreCurve.from_outcomes(scores[rows], correct, int(np.count_nonzero(counted)))


def points_at(matches: Matches, thresholds: NDArray[np.float64]) -> tuple[OperatingPoint, list[OperatingPoint]]:
    """Return the points at given thresholds, (K,) one for each class: over all classes together, and of each class."""
    dataset, table = matches.dataset, matches.table
    classes = len(dataset.categories)
    kept = table.scores >= thresholds[table.labels]
    outcomes = matches.outcomes[0]
    true = np.bincount(table.labels[kept & (outcomes == TRUE_POSITIVE)], minlength=classes)
    false = np.bincount(table.labels[kept & (outcomes == FALSE_POSITIVE)], minlength=classes)
    boxes = np.bincount(dataset.labels[matches.counted[0]], minlength=classes)
    shared = float(thresholds[0]) if len(set(thresholds.tolist())) == 1 else None
    overall = OperatingPoint.from_counts(shared, int(true.sum()), int(false.sum()), int(boxes.sum()))
    columns = zip(thresholds.tolist(), true.tolist(), false.tolist(), boxes.tolist(), strict=True)
    return overall, [OperatingPoint.from_counts(*values) for values in columns]


# ---------------------------------------------------------------------------------------------- calibration


def parse_target(text: str) -> float:
    """Read a calibration target: 0 for `f1`, P for `precision=P`.

    Raises:
        UsageError: it is neither, or the precision is not between 0 and 1.
    """
    kind, _, value = text.strip().lower().partition("=")
    if text.strip().lower() == "f1":
        return 0.0
    with suppress(ValueError):
        if kind == "precision" and 0 < float(value) <= 1:
            return float(value)
    raise UsageError(
        f"--calibrate {text} is not a target", hint="--calibrate f1, or --calibrate precision=0.9", code="target"
    )


def calibrate(matches: Matches, target: str, *, min_boxes: int = MIN_BOXES) -> tuple[Thresholds, tuple[str, ...]]:
    """Find the score threshold for each class and for all classes together; see `ScoreCurve.best_point`.

    A class with fewer than `min_boxes` boxes in the split, or that is never detected, gets the overall threshold. The
    notes say where the target was not met, and name the classes that `f1` cannot serve.

    Raises:
        UsageError: there is no such target.
    """
    precision, dataset = parse_target(target), matches.dataset
    notes: list[str] = []

    def point_of(label: int | None, name: str) -> OperatingPoint:
        point = score_curve(matches, label).best_point(precision)
        if point.precision is not None and point.precision < precision:
            notes.append(
                f"{name}: precision {precision:g} is never reached; the highest is {point.precision:.3f}, "
                f"at {point.threshold:.3f}"
            )
        return point

    overall = point_of(None, "all classes together").threshold
    if overall is None:
        overall = 0.5
        notes.append("no object of the split was detected at any score; the threshold stays 0.5")
    per_class: list[float] = []
    weak: list[str] = []
    rare: list[str] = []
    counts = np.bincount(dataset.labels[matches.counted[0]], minlength=len(dataset.names)).tolist()
    for label, name in enumerate(dataset.names):
        if 0 < counts[label] < min_boxes:
            per_class.append(overall)
            rare.append(f"{name} ({counts[label]})")
            continue
        point = point_of(label, name)
        per_class.append(overall if point.threshold is None else point.threshold)
        if point.threshold is None:
            reason = "is never detected" if point.boxes else "has no boxes"
            notes.append(f"{name} {reason} in the split: it gets the overall threshold")
        elif not precision and ((point.f1 or 0) < USEFUL_F1 or (point.recall or 0) < USEFUL_RECALL):
            weak.append(name)
    if rare:
        notes.append(
            f"fewer than {min_boxes} boxes in the split, so the overall threshold is used for {abbreviate(rare)}"
        )
    if weak:
        notes.append(
            f"{', '.join(weak)}: even the best threshold gives an F1 below {USEFUL_F1:g} or detects fewer than "
            f"{USEFUL_RECALL:.0%} of the objects, so its predictions are of little use: train longer, then calibrate "
            "again"
        )
    return Thresholds(target.strip().lower(), overall, tuple(per_class)), tuple(notes)


# -------------------------------------------------------------------------------------------- the model file


def check_can_store(path: Path) -> None:
    """Refuse a model file that cannot store thresholds, before anything is run.

    Raises:
        UsageError: it is an export or a published checkpoint.
        ModelError: it is not a model of ours.
    """
    if path.suffix.lower() != ".safetensors":
        raise UsageError(
            f"--calibrate stores thresholds in a .safetensors model, and {path.name} is not one",
            hint="calibrate the model of the run; exports made afterwards carry its thresholds",
            code="calibrate-kind",
        )
    read_header(path)


def calibrate_model(
    path: Path, evaluation: Evaluation, target: str, backend: Backend
) -> tuple[Thresholds, tuple[str, ...], ModelHeader]:
    """Find the thresholds for an evaluation of a model, which `backend` ran, and store them in its file.

    The tensors and the identity stay the same.

    Returns:
        The thresholds in the labels of the dataset, notes for people, and the model's new header.
    """
    thresholds, notes = calibrate(evaluation.matches, target)
    ran = backend.header
    layers, queries = ran.layers or None, ran.queries or None
    used = replace(thresholds, imgsz=backend.imgsz, layers=layers, queries=queries, dedupe=evaluation.dedupe)
    header = store_thresholds(path, used, map_classes(ran.names, evaluation.dataset).labels)
    return thresholds, notes, header


def check_calibration(target: str, split: str) -> None:
    """Refuse an unknown target, and thresholds from images that the model was trained on.

    Raises:
        UsageError: either.
    """
    parse_target(target)
    if split == "train":
        raise UsageError(
            "--calibrate cannot use the train split: scores are higher on images that the model was trained on, "
            "so the thresholds would be too high",
            hint="--split val, or another dataset with --data",
            code="calibrate-split",
        )


def store_thresholds(path: Path, thresholds: Thresholds, label_map: NDArray[np.int64] | None) -> ModelHeader:
    """Write thresholds, in the labels of a dataset, into a model's header, and return it; see `in_model_order`.

    The tensors and the identity stay the same.
    """
    thresholds = in_model_order(thresholds, label_map)
    return rewrite_header(path, rebind_thresholds(replace(read_header(path), thresholds=thresholds)))


def in_model_order(thresholds: Thresholds, label_map: NDArray[np.int64] | None) -> Thresholds:
    """Return thresholds, in the labels of a dataset, in those of a model.

    `label_map` is as in `classes.ClassMap`; a class that the dataset does not have gets the overall threshold.
    """
    if label_map is None:
        return thresholds
    per_class = tuple(thresholds.per_class[k] if k >= 0 else thresholds.overall for k in label_map.tolist())
    return replace(thresholds, per_class=per_class)


def export_folders(path: Path) -> list[Path]:
    """Return the folders that may hold exports of a model: `export/` beside it first, even if it does not exist.

    finetune-discrete also exports the model that it started from, into `export-original/` of its own run.
    """
    runs = sorted({path.parent, *(p.parent for p in path.parent.parent.glob(f"*/{EXPORT_ORIGINAL}"))})
    return [path.parent / "export", *(run / EXPORT_ORIGINAL for run in runs if (run / EXPORT_ORIGINAL).is_dir())]


def stale_exports(path: Path, header: ModelHeader) -> list[Path]:
    """Return the exports of a model, in `export_folders`, that carry other thresholds than the model now has."""
    from rtdetr_cli.infer.inspect import inspect_model

    def decisive(header: Mapping[str, Any]) -> list[Any]:
        """Older files do not record the size, layers and queries."""
        return [(header["thresholds"] or {}).get(key) for key in ("target", "overall", "per_class")]

    current = decisive(asdict(header))
    stale = []
    for folder in export_folders(path):
        for export in sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXPORT_SUFFIXES and p.is_file()):
            try:
                exported = inspect_model(export)["header"]
            except (RtdetrError, OSError):
                continue
            if exported is None:  # of another tool
                continue
            # Without a recorded source, what lies in export/ is of this model; in export-original/ it may not be.
            source = exported["extra"].get("source_identity")
            made_of_model = source == header.identity if source else folder.name != EXPORT_ORIGINAL
            if made_of_model and decisive(exported) != current:
                stale.append(export)
    return stale

"""The errors of a model: how many of each kind, what fixing a kind would gain, and which images and boxes to look at.

The kinds are those of TIDE (Bolya et al. 2020), with IoU 0.5 for a match and 0.1 for any overlap at all; `KINDS` says
what each one means. The gains are over all detections, as TIDE defines them; the counts are at a score threshold,
since errors below it are never seen in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.matching import FALSE_POSITIVE, TRUE_POSITIVE, box_images, overlapping_pairs
from rtdetr_cli.evaluate.run import Evaluation
from rtdetr_cli.text import abbreviate

KINDS = {
    "classification": "the right place, but the wrong class",
    "location": "the right class, but a box that fits badly (IoU 0.1 to 0.5)",
    "both": "the wrong class, and a box that fits badly",
    "duplicate": "a second detection of an object",
    "background": "no object there",
    "missed": "an object that was not detected",
}
CLASSIFICATION, LOCATION, BOTH, DUPLICATE, BACKGROUND = range(5)
MISSED_KIND = "missed"
CORRECT, NOT_COUNTED = -1, -2  # kinds of detections that are no errors; not counted: ignored, or below the threshold
_TIDE_NAMES = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))
MATCH_IOU, OVERLAP_IOU = 0.5, 0.1
NEVER_DETECTED_SCORE = 0.05  # a box that nothing overlaps with even this score is "never detected"
MOST = 0.8  # of the duplicates are below the suggested score
MAX_SUSPECTS = 100
RELIABLE_AP50 = 0.5  # of a class whose detections say more about the annotations than about the model


@dataclass(frozen=True, slots=True)
class ImageErrors:
    """The counts of one image at the thresholds."""

    image: int
    true_positives: int
    false_positives: int
    missed: int

    @property
    def f1(self) -> float:
        """F1 of this image; 1 for an image without objects and detections."""
        total = 2 * self.true_positives + self.false_positives + self.missed
        return 2 * self.true_positives / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Suspect:
    """An annotation that may be wrong, or a detection that may be right.

    The `kind` is `no-box` (a confident detection without an annotation), `other-class` (a confident detection of
    another class on an annotation) or `never-found` (an annotation that the model never detects). `label`, `box_xyxy`
    and `score` are the detection's, or those of the annotation that is never detected, which has no score;
    `annotation_id` and `annotated`, its class, are None where there is no annotation.
    """

    kind: str
    image: int
    box_xyxy: tuple[float, ...]
    label: int
    score: float | None
    annotation_id: int | None
    annotated: int | None


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """All errors at one threshold for each class: D detections, G boxes.

    Attributes:
        thresholds: (K,) score from which a detection of a class is counted.
        origin: where the thresholds come from, in words that follow "at".
        kinds: (D,) position in `KINDS`, CORRECT, or NOT_COUNTED.
        related_box: (D,) the box that decides the kind of a false positive, -1 for none.
        missed: (G,) counted boxes that no counted detection matched.
        explained: (G,) missed boxes that a classification or location error already accounts for.
    """

    evaluation: Evaluation
    thresholds: NDArray[np.float64]
    origin: str
    kinds: NDArray[np.int8]
    related_box: NDArray[np.int64]
    missed: NDArray[np.bool_]
    explained: NDArray[np.bool_]

    @cached_property
    def counts(self) -> dict[str, int]:
        """The number of errors of each kind."""
        counts = np.bincount(self.kinds[self.kinds >= 0], minlength=len(KINDS)).tolist()
        missed = int(np.count_nonzero(self.missed & ~self.explained))
        return dict(zip(KINDS, counts, strict=True)) | {MISSED_KIND: missed}

    @cached_property
    def gains(self) -> dict[str, float] | None:
        """AP50 gained by fixing all errors of a kind, over all detections; None without hotcoco."""
        session = self.evaluation.coco.session
        if session is None or not self.evaluation.boxes:
            return None
        gains = session.tide_errors(pos_thr=MATCH_IOU, bg_thr=OVERLAP_IOU)["delta_ap"]
        return {kind: float(gains[name]) for kind, name in _TIDE_NAMES.items()}

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(K + 1, K + 1) counts by annotated (row) and detected class (column); the last of each is "nothing".

        It agrees with `counts`: the diagonal is correct, the other cells of two classes are classification errors, the
        row "nothing" holds all other false positives, and the column "nothing" the missed boxes, without those of a
        classification error and with those of a location error.
        """
        dataset, labels = self.evaluation.dataset, self.evaluation.table.labels
        nothing = len(dataset.categories)
        correct, confused = self.kinds == CORRECT, self.kinds == CLASSIFICATION
        annotated = np.full(len(labels), nothing)
        annotated[correct] = dataset.labels[self.evaluation.matches.matched_box[correct]]
        annotated[confused] = dataset.labels[self.related_box[confused]]
        undetected = self.missed.copy()
        undetected[self.related_box[confused]] = False
        matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
        counted = self.kinds != NOT_COUNTED
        np.add.at(matrix, (annotated[counted], labels[counted]), 1)
        matrix[:, nothing] += np.bincount(dataset.labels[undetected], minlength=nothing + 1)
        return matrix

    @cached_property
    def duplicate_threshold(self) -> dict[str, float | int] | None:
        """The score that removes most duplicates, how many, and how many correct detections; None without any."""
        duplicates, correct = (self.evaluation.table.scores[self.kinds == kind] for kind in (DUPLICATE, CORRECT))
        if not len(duplicates):
            return None
        score = (math.floor(1000 * np.quantile(duplicates, MOST, method="lower")) + 1) / 1000
        return {
            "score": score,
            "removed": int(np.count_nonzero(duplicates < score)),
            "of": len(duplicates),
            "correct_removed": int(np.count_nonzero(correct < score)),
            "correct": len(correct),
        }

    @cached_property
    def duplicates_without_dedupe(self) -> int | None:
        """How many duplicates there are at the same thresholds without rescoring; None where that is not known."""
        before = self.evaluation.without_dedupe
        return None if before is None else analyze_errors(before, self.thresholds.tolist()).counts["duplicate"]

    @cached_property
    def images(self) -> list[ImageErrors]:
        """The counts of each image, in the order of the dataset."""
        dataset, image_index = self.evaluation.dataset, self.evaluation.table.image_index
        columns = (image_index[self.kinds == CORRECT], image_index[self.kinds >= 0], box_images(dataset)[self.missed])
        counts = zip(*(np.bincount(images, minlength=len(dataset)).tolist() for images in columns), strict=True)
        return [ImageErrors(image, *values) for image, values in enumerate(counts)]

    def worst(self, limit: int = 20) -> list[ImageErrors]:
        """Return images with errors, lowest F1 first, then the most errors."""
        with_errors = [i for i in self.images if i.false_positives or i.missed]
        return sorted(with_errors, key=lambda i: (i.f1, -(i.false_positives + i.missed), i.image))[:limit]

    @cached_property
    def empty(self) -> dict[str, int]:
        """Images without objects: how many, how many with a false positive, and how many false positives."""
        boxes = np.diff(self.evaluation.dataset.offsets).tolist()
        false_positives = [i.false_positives for i, count in zip(self.images, boxes, strict=True) if count == 0]
        return {
            "pictures": len(false_positives),
            "with_false_positives": sum(count > 0 for count in false_positives),
            "false_positives": sum(false_positives),
        }

    @cached_property
    def suspects(self) -> list[Suspect]:
        """Annotations that may be wrong: confident detections first, then the largest boxes never detected.

        A detection on background or on another class is confident at the median score of the correct ones of its
        class. A box is never detected when nothing of any class matches it, down to a score of 0.05. Classes with an
        AP50 below `RELIABLE_AP50` are left out: their errors are the model's fault.
        """
        dataset, table = self.evaluation.dataset, self.evaluation.table
        correct = self.kinds == CORRECT
        confident = np.full(len(dataset.categories), np.inf)
        for label in np.unique(table.labels[correct]).tolist():
            confident[label] = np.median(table.scores[correct & (table.labels == label)])
        questionable = (self.kinds == BACKGROUND) | (self.kinds == CLASSIFICATION)
        rows = np.flatnonzero(questionable & (table.scores >= confident[table.labels]) & self._reliable[table.labels])
        suspects = []
        for row in rows[np.argsort(-table.scores[rows], kind="stable")][:MAX_SUSPECTS].tolist():
            box = int(self.related_box[row]) if self.kinds[row] == CLASSIFICATION else -1
            kind, score = "other-class" if box >= 0 else "no-box", float(table.scores[row])
            image, box_xyxy, label = table.image_index[row], table.boxes_xyxy_px[row], table.labels[row]
            suspects.append(self._suspect(kind, image, box_xyxy, label, score, box))

        detections = table.rows(table.scores >= NEVER_DETECTED_SCORE)
        never = ~dataset.crowd & self._reliable[dataset.labels]
        never[overlapping_pairs(dataset, detections, min_iou=MATCH_IOU, same_class=False).boxes] = False
        boxes, images = np.flatnonzero(never), box_images(dataset)
        for box in boxes[np.argsort(-dataset.areas[boxes], kind="stable")][:MAX_SUSPECTS].tolist():
            box_xyxy, label = dataset.boxes_xyxy_px[box], dataset.labels[box]
            suspects.append(self._suspect("never-found", images[box], box_xyxy, label, None, box))
        return suspects

    def _suspect(self, kind: str, image: int, box_xyxy: Any, label: int, score: float | None, box: int) -> Suspect:
        """Return a suspect with the id and class of its annotation `box`, -1 for none."""
        annotation_id = annotated = None
        if box >= 0:
            dataset = self.evaluation.dataset
            annotation_id, annotated = int(dataset.annotation_ids[box]), int(dataset.labels[box])
        corners = tuple(round(float(v), 2) for v in box_xyxy)
        return Suspect(kind, int(image), corners, int(label), score, annotation_id, annotated)

    @cached_property
    def _reliable(self) -> NDArray[np.bool_]:
        """(K,) whether the model detects a class well enough to question its annotations, or it has no boxes."""
        ap50s = [row["AP50"] for row in self.evaluation.per_class]
        return np.array([ap50 is None or ap50 >= RELIABLE_AP50 for ap50 in ap50s], bool)

    @property
    def unreliable_classes(self) -> list[str]:
        """Names of the classes whose annotations are not questioned, since the model detects them too badly."""
        names = zip(self.evaluation.dataset.names, self._reliable, strict=True)
        return [name for name, reliable in names if not reliable]

    @property
    def suspects_note(self) -> str:
        """A sentence about `unreliable_classes`; empty where there are none."""
        if not self.unreliable_classes:
            return ""
        return (
            f"annotations of classes with an AP50 below {RELIABLE_AP50:g} are not questioned "
            f"({abbreviate(self.unreliable_classes)}): the model is more likely to be wrong than they are"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the part of the document about errors."""
        dataset, gains = self.evaluation.dataset, self.gains or {}
        names = dataset.names
        worst = []
        for i in self.worst():
            figures = {"found": i.true_positives, "wrong": i.false_positives, "missed": i.missed, "f1": i.f1}
            worst.append({**_image_facts(dataset, i.image), **figures})
        suspects = [
            {
                "kind": s.kind,
                **_image_facts(dataset, s.image),
                "box_xyxy": list(s.box_xyxy),
                "label": names[s.label],
                "score": s.score,
                "annotation_id": s.annotation_id,
                "annotated": None if s.annotated is None else names[s.annotated],
            }
            for s in self.suspects
        ]
        return {
            "thresholds": {"origin": self.origin, "per_class": self.thresholds.tolist()},
            "kinds": [{"kind": kind, "count": n, "gain": gains.get(kind)} for kind, n in self.counts.items()],
            "empty_pictures": self.empty,
            "worst": worst,
            "suspects_note": self.suspects_note,
            "suspects_left_out": self.unreliable_classes,
            "suspects": suspects,
            "duplicates": self.duplicate_threshold,
            "duplicates_without_dedupe": self.duplicates_without_dedupe,
            "confusion": {"names": [*names, "nothing"], "matrix": self.confusion.tolist()},
        }


def _image_facts(dataset: Dataset, image: int) -> dict[str, Any]:
    return {"file": dataset.file_names[image], "image_id": int(dataset.image_ids[image])}


def analyze_errors(
    evaluation: Evaluation, thresholds: Sequence[float] | None = None, *, origin: str = "the given thresholds"
) -> ErrorAnalysis:
    """Sort every counted error of an evaluation by its kind.

    Errors are counted from a score for each class: `thresholds`, which come from `origin` in words, else the model's
    stored ones, else the one with the best F1.
    """
    dataset, table, matches = evaluation.dataset, evaluation.table, evaluation.matches
    if thresholds is None and evaluation.thresholds is not None:
        thresholds = evaluation.thresholds.per_class
        origin = f"the thresholds stored in the model for {evaluation.thresholds.target}"
    elif thresholds is None:
        best = evaluation.best.threshold
        thresholds = [0.5 if best is None else best] * len(dataset.categories)
        origin = "score 0.5, as nothing was detected" if best is None else f"score {best:.3f}, where F1 is highest"
    per_class = np.asarray(thresholds, np.float64)
    counted = table.scores >= per_class[table.labels]
    kinds = np.full(len(table), NOT_COUNTED, np.int8)
    kinds[counted & (matches.outcomes[0] == TRUE_POSITIVE)] = CORRECT
    related_box = np.full(len(table), -1, np.int64)
    errors = np.flatnonzero(counted & (matches.outcomes[0] == FALSE_POSITIVE))
    kinds[errors], related_box[errors] = _kinds_of(evaluation, errors)

    detected = np.zeros(len(dataset.labels), bool)
    has_match = matches.matched_detection >= 0
    detected[has_match] = counted[matches.matched_detection[has_match]]
    missed = matches.counted[0] & ~detected
    explained = np.zeros(len(dataset.labels), bool)
    explained[related_box[(kinds == CLASSIFICATION) | (kinds == LOCATION)]] = True
    return ErrorAnalysis(evaluation, per_class, origin, kinds, related_box, missed, explained & missed)


def _kinds_of(evaluation: Evaluation, rows: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Return the kind of each false positive, and the box that decides it (-1 for none)."""
    dataset = evaluation.dataset
    detections = evaluation.table.rows(rows)
    pairs = overlapping_pairs(dataset, detections, min_iou=OVERLAP_IOU, same_class=False)
    pairs = pairs.select(~dataset.crowd[pairs.boxes])
    pairs = pairs.select(np.argsort(pairs.ious, kind="stable"))  # the highest IoU of a detection is assigned last
    same = dataset.labels[pairs.boxes] == detections.labels[pairs.rows]
    iou, box = np.zeros((2, len(rows))), np.full((2, len(rows)), -1, np.int64)
    for index, mask in enumerate((same, ~same)):
        iou[index, pairs.rows[mask]] = pairs.ious[mask]
        box[index, pairs.rows[mask]] = pairs.boxes[mask]
    (iou_same, iou_other), (box_same, box_other) = iou, box

    kinds = np.full(len(rows), BACKGROUND, np.int8)
    related = np.full(len(rows), -1, np.int64)
    # In the order of TIDE: the first rule that applies decides.
    rules = (
        (LOCATION, (iou_same >= OVERLAP_IOU) & (iou_same < MATCH_IOU), box_same),
        (CLASSIFICATION, iou_other >= MATCH_IOU, box_other),
        (DUPLICATE, iou_same >= MATCH_IOU, box_same),
        (BOTH, iou_other >= OVERLAP_IOU, box_other),
    )
    undecided = np.ones(len(rows), bool)
    for kind, applies, boxes in rules:
        decided = undecided & applies
        kinds[decided], related[decided] = kind, boxes[decided]
        undecided &= ~applies
    return kinds, related

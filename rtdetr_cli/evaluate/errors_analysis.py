"""Where a model goes wrong: kinds of error, what fixing each would gain, and the images and boxes to look at.

The kinds are TIDE's (Bolya et al. 2020), at IoU 0.5 for a match and 0.1 for any overlap at all:

    classification  on a box, but of another class
    location        on a box of its class, but not well enough
    both            near a box of another class, and not well
    duplicate       on a box that a surer detection has taken
    background      on nothing
    missed          a box that none of the above would find if it were fixed

The gains are over all detections, as TIDE defines them; the counts are at a score threshold, since below it nobody
sees the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.evaluate.coco import hotcoco_session, without_crowds
from rtdetr_cli.evaluate.matching import FALSE, TRUE, box_images, overlapping_pairs
from rtdetr_cli.evaluate.run import Evaluation

KINDS = ("classification", "location", "both", "duplicate", "background", "missed")
_HOTCOCO_NAMES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
CLASSIFICATION, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
RIGHT, UNSEEN = -1, -2  # of a detection: a true positive; ignored or below the threshold
MATCH_IOU, OVERLAP_IOU = 0.5, 0.1
FOUND_SCORE = 0.05  # a box that nothing overlaps with even this score is "never found"
MOST_SUSPECTS = 100
LEAST_AP50 = 0.5  # of a class whose detections say more about the annotations than about the model


@dataclass(frozen=True, slots=True)
class ImageErrors:
    """How one image went at the thresholds."""

    image: int
    found: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        """F1 of this image; 1 when there was nothing to find and nothing was."""
        total = 2 * self.found + self.wrong + self.missed
        return 2 * self.found / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Suspect:
    """An annotation that may be wrong.

    Attributes:
        kind: `no-box` (a sure detection where nothing is annotated), `other-class` (a sure detection of another
            class on a box) or `never-found` (a box that nothing ever finds).
        image: position in the dataset.
        box_xyxy_px: of the detection, or of the box that is never found.
        label: class of the detection, or of the box.
        score: of the detection; None for a box.
        annotation_id: of the box in question; None where there is none.
        annotated: class of that box.
    """

    kind: str
    image: int
    box_xyxy_px: tuple[float, float, float, float]
    label: int
    score: float | None
    annotation_id: int | None
    annotated: int | None


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """Everything about errors at one threshold for each class.

    D detections, G boxes.

    Attributes:
        evaluation: what is analysed.
        thresholds: (K,) score from which a detection of a class is seen.
        origin: what the errors are counted at, in words that follow "at".
        kinds: (D,) index into `KINDS`, RIGHT, or UNSEEN.
        near_box: (D,) the box that makes a false positive one of its kind, -1 for none.
        missed: (G,) boxes that are counted and that no seen detection found.
        forgiven: (G,) missed boxes that some classification or location error is on.
    """

    evaluation: Evaluation
    thresholds: NDArray[np.float64]
    origin: str
    kinds: NDArray[np.int8]
    near_box: NDArray[np.int64]
    missed: NDArray[np.bool_]
    forgiven: NDArray[np.bool_]

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many errors of each kind are seen."""
        of_detections = np.bincount(self.kinds[self.kinds >= 0], minlength=len(KINDS))
        found = {kind: int(of_detections[k]) for k, kind in enumerate(KINDS)}
        found["missed"] = int(np.count_nonzero(self.missed & ~self.forgiven))
        return found

    @cached_property
    def gains(self) -> dict[str, float] | None:
        """AP50 that fixing each kind would gain, over all detections; None without hotcoco."""
        session = self.evaluation.coco.session
        if session is None or not np.any(~self.evaluation.dataset.crowd):
            return None
        found = session.tide_errors(pos_thr=MATCH_IOU, bg_thr=OVERLAP_IOU)["delta_ap"]
        return {kind: float(found[name]) for kind, name in zip(KINDS, _HOTCOCO_NAMES, strict=True)}

    @cached_property
    def confusion(self) -> NDArray[np.int64] | None:
        """(K + 1, K + 1) boxes by annotated (row) and found class (column); the last of each is "nothing".

        None without hotcoco.
        """
        if self.evaluation.coco.session is None:
            return None
        # Crowds are neither found nor missed, and what lies in them is no error: both are left out.
        dataset = self.evaluation.dataset
        seen = self.evaluation.table.rows(self.kinds != UNSEEN)
        plain = without_crowds(dataset) if dataset.crowd.any() else dataset
        matrix: NDArray[np.int64] = np.asarray(
            hotcoco_session(plain, seen).confusion_matrix(iou_thr=MATCH_IOU, max_det=10_000)["matrix"], np.int64
        )
        return matrix

    @cached_property
    def images(self) -> list[ImageErrors]:
        """Each image's finds and errors, in the order of the dataset."""
        dataset, table = self.evaluation.dataset, self.evaluation.table
        count = len(dataset)
        found = np.bincount(table.image_index[self.kinds == RIGHT], minlength=count)
        wrong = np.bincount(table.image_index[self.kinds >= 0], minlength=count)
        missed = np.bincount(box_images(dataset)[self.missed], minlength=count)
        return [ImageErrors(i, int(found[i]), int(wrong[i]), int(missed[i])) for i in range(count)]

    def worst(self, most: int = 20) -> list[ImageErrors]:
        """Return images with errors, lowest F1 first, then the most errors."""
        bad = [p for p in self.images if p.wrong or p.missed]
        return sorted(bad, key=lambda p: (p.f1, -(p.wrong + p.missed), p.image))[:most]

    @cached_property
    def empty(self) -> dict[str, int]:
        """Images without objects: how many, how many with a false positive, and how many false positives."""
        dataset = self.evaluation.dataset
        without = np.diff(dataset.offsets) == 0
        false = np.bincount(self.evaluation.table.image_index[self.kinds >= 0], minlength=len(dataset))[without]
        return {
            "pictures": int(np.count_nonzero(without)),
            "with_false_positives": int(np.count_nonzero(false)),
            "false_positives": int(false.sum()),
        }

    @cached_property
    def suspects(self) -> list[Suspect]:
        """Annotations that may be wrong: sure detections first, then the largest boxes that nothing finds.

        Only by classes that the model knows, `LEAST_AP50`: what a weak class finds or misses is the model's fault.
        """
        return [*self._sure_detections(), *self._never_found()]

    @cached_property
    def _judges(self) -> NDArray[np.bool_]:
        """(K,) whether the model knows a class well enough to doubt annotations by it; also without any box."""
        found = [row["AP50"] for row in self.evaluation.per_class]
        return np.array([ap50 is None or ap50 >= LEAST_AP50 for ap50 in found], bool)

    @cached_property
    def unjudged(self) -> tuple[str, ...]:
        """Names of the classes whose annotations are not doubted, since the model knows them too badly."""
        return tuple(n for n, judges in zip(self.evaluation.dataset.names, self._judges, strict=True) if not judges)

    @property
    def suspects_note(self) -> str:
        """A sentence about `unjudged`; empty where there are none."""
        names = self.unjudged
        if not names:
            return ""
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return (
            f"classes with an AP50 below {LEAST_AP50:g} cast no doubt on annotations ({shown}): there the model is "
            "more likely to be wrong"
        )

    def _sure_detections(self) -> list[Suspect]:
        """Detections on nothing or on another class, as sure as half of the right ones of their class."""
        dataset, table = self.evaluation.dataset, self.evaluation.table
        right = self.kinds == RIGHT
        sure = np.full(len(dataset.categories), np.inf)
        for label in np.unique(table.labels[right]).tolist():
            sure[label] = np.median(table.scores[right & (table.labels == label)])
        odd = (self.kinds == BACKGROUND) | (self.kinds == CLASSIFICATION)
        rows = np.flatnonzero(odd & (table.scores >= sure[table.labels]) & self._judges[table.labels])
        found = []
        for row in rows[np.argsort(-table.scores[rows], kind="stable")][:MOST_SUSPECTS].tolist():
            box = int(self.near_box[row]) if self.kinds[row] == CLASSIFICATION else -1
            found.append(
                Suspect(
                    "other-class" if box >= 0 else "no-box",
                    int(table.image_index[row]),
                    _corners(table.boxes_xyxy_px[row]),
                    int(table.labels[row]),
                    float(table.scores[row]),
                    int(dataset.annotation_ids[box]) if box >= 0 else None,
                    int(dataset.labels[box]) if box >= 0 else None,
                )
            )
        return found

    def _never_found(self) -> list[Suspect]:
        """Boxes that no detection of any class overlaps well, down to a score of 0.05; largest first."""
        dataset, table = self.evaluation.dataset, self.evaluation.table
        scored = table.rows(table.scores >= FOUND_SCORE)
        pairs = overlapping_pairs(dataset, scored, least_iou=MATCH_IOU, same_class=False)
        never = ~dataset.crowd & self._judges[dataset.labels]
        never[pairs.boxes] = False
        boxes = np.flatnonzero(never)
        images = box_images(dataset)
        return [
            Suspect(
                "never-found",
                int(images[box]),
                _corners(dataset.boxes_xyxy_px[box]),
                int(dataset.labels[box]),
                None,
                int(dataset.annotation_ids[box]),
                int(dataset.labels[box]),
            )
            for box in boxes[np.argsort(-dataset.areas[boxes], kind="stable")][:MOST_SUSPECTS].tolist()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the document's part about errors."""
        dataset = self.evaluation.dataset
        names = dataset.names
        document: dict[str, Any] = {
            "thresholds": {"origin": self.origin, "per_class": self.thresholds.tolist()},
            "kinds": [
                {"kind": kind, "count": self.counts[kind], "gain": None if self.gains is None else self.gains[kind]}
                for kind in KINDS
            ],
            "empty_pictures": self.empty,
            "worst": [
                {
                    "file": dataset.file_names[p.image],
                    "image_id": int(dataset.image_ids[p.image]),
                    "found": p.found,
                    "wrong": p.wrong,
                    "missed": p.missed,
                    "f1": p.f1,
                }
                for p in self.worst()
            ],
            "suspects_note": self.suspects_note,
            "suspects_left_out": list(self.unjudged),
            "suspects": [
                {
                    "kind": s.kind,
                    "file": dataset.file_names[s.image],
                    "image_id": int(dataset.image_ids[s.image]),
                    "box_xyxy": list(s.box_xyxy_px),
                    "label": names[s.label],
                    "score": s.score,
                    "annotation_id": s.annotation_id,
                    "annotated": None if s.annotated is None else names[s.annotated],
                }
                for s in self.suspects
            ],
        }
        if self.confusion is not None:
            document["confusion"] = {"names": [*names, "nothing"], "matrix": self.confusion.tolist()}
        return document


def _corners(box: NDArray[np.float64]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (round(float(v), 2) for v in box)
    return x1, y1, x2, y2


def analyse(evaluation: Evaluation, thresholds: Sequence[float] | None = None) -> ErrorAnalysis:
    """Sort every visible error of an evaluation by its kind.

    Args:
        evaluation: the detections and their fates.
        thresholds: score for each class; the model's stored ones by default, else the one of the best F1.
    """
    dataset, table, matches = evaluation.dataset, evaluation.table, evaluation.matches
    classes = len(dataset.categories)
    if thresholds is not None:
        per_class, origin = np.asarray(thresholds, np.float64), "the thresholds given"
    elif evaluation.thresholds is not None:
        per_class = np.asarray(evaluation.thresholds.per_class, np.float64)
        origin = f"the thresholds stored in the model for {evaluation.thresholds.target}"
    else:
        best = evaluation.best.threshold
        per_class = np.full(classes, 0.5 if best is None else best)
        origin = "score 0.5, as nothing was found" if best is None else f"score {best:.3f}, where F1 is highest"
    fate = matches.fate[0]
    seen = table.scores >= per_class[table.labels] if len(table) else np.zeros(0, bool)
    kinds = np.full(len(table), UNSEEN, np.int8)
    kinds[seen & (fate == TRUE)] = RIGHT
    near_box = np.full(len(table), -1, np.int64)
    wrong = np.flatnonzero(seen & (fate == FALSE))
    kinds[wrong], near_box[wrong] = _kinds_of(evaluation, wrong)

    taken = np.zeros(len(dataset.labels), bool)
    has = matches.found_by >= 0
    taken[has] = seen[matches.found_by[has]]
    missed = matches.counted[0] & ~taken
    excused = wrong[(kinds[wrong] == CLASSIFICATION) | (kinds[wrong] == LOCATION)]
    forgiven = np.zeros(len(dataset.labels), bool)
    forgiven[near_box[excused]] = True
    return ErrorAnalysis(evaluation, per_class, origin, kinds, near_box, missed, forgiven & missed)


def _kinds_of(evaluation: Evaluation, rows: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Return the kind of each false positive, and the box that made it so (-1 for none)."""
    dataset = evaluation.dataset
    some = evaluation.table.rows(rows)
    plain = ~dataset.crowd
    pairs = overlapping_pairs(dataset, some, least_iou=OVERLAP_IOU, same_class=False)
    usable = plain[pairs.boxes]
    row, box, iou = pairs.rows[usable], pairs.boxes[usable], pairs.ious[usable]
    same = dataset.labels[box] == some.labels[row]
    best_same, box_same = _best(row[same], box[same], iou[same], len(rows))
    best_other, box_other = _best(row[~same], box[~same], iou[~same], len(rows))

    kinds = np.full(len(rows), BACKGROUND, np.int8)
    near = np.full(len(rows), -1, np.int64)
    # In the order in which TIDE asks; each takes what the ones before have left.
    rules = (
        (LOCATION, (best_same >= OVERLAP_IOU) & (best_same < MATCH_IOU), box_same),
        (CLASSIFICATION, best_other >= MATCH_IOU, box_other),
        (DUPLICATE, best_same >= MATCH_IOU, box_same),
        (BOTH, best_other >= OVERLAP_IOU, box_other),
    )
    free = np.ones(len(rows), bool)
    for kind, holds, boxes in rules:
        mine = free & holds
        kinds[mine], near[mine] = kind, boxes[mine]
        free &= ~mine
    return kinds, near


def _best(
    rows: NDArray[np.int64], boxes: NDArray[np.int64], ious: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return for each row its highest IoU (0 for none) and the box that has it (-1 for none)."""
    best, box = np.zeros(count), np.full(count, -1, np.int64)
    order = np.argsort(ious, kind="stable")  # the highest is assigned last
    best[rows[order]] = ious[order]
    box[rows[order]] = boxes[order]
    return best, box

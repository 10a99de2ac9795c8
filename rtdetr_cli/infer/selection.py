"""Select the detections to show: score thresholds, classes, a maximum number, and the image's border."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.boxes import iou
from rtdetr_cli.errors import UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.duplicates import gamma_word
from rtdetr_cli.text import abbreviate, counted, whole_number
from rtdetr_cli.weights.header import ModelHeader, Thresholds

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """A rule that selects the detections to show from all rows of a model.

    Attributes:
        threshold: minimum score of a class without its own threshold.
        per_class: (K,) minimum score of each class, or None.
        labels: the requested classes, or None for all.
        max_det: maximum number of detections per image.
        description: the thresholds and where they come from, for people.
    """

    threshold: float = DEFAULT_THRESHOLD
    per_class: NDArray[np.float32] | None = None
    labels: tuple[int, ...] | None = None
    max_det: int = 100
    description: str = ""

    def apply(self, rows: Detections) -> Detections:
        """Return the selected rows, best first, clipped to the image, without rows outside it or with NaN."""
        minimum = np.full(len(rows), self.threshold, np.float32)
        if self.per_class is not None:
            known = (rows.labels >= 0) & (rows.labels < len(self.per_class))
            minimum[known] = self.per_class[rows.labels[known]]
        selected = rows.keep(self._candidates(rows) & (rows.scores >= minimum))
        width, height = rows.size_wh
        limits = np.array([width, height, width, height], np.float32)
        boxes = np.clip(selected.boxes_xyxy_px, 0, limits).astype(np.float32)
        inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return replace(selected, boxes_xyxy_px=boxes).keep(np.flatnonzero(inside)[: self.max_det])

    def best_score(self, rows: Detections) -> float | None:
        """Return the highest score of the requested classes, even below the threshold; None without a row."""
        scores = rows.scores[self._candidates(rows)]
        return float(scores.max()) if len(scores) else None

    def _candidates(self, rows: Detections) -> NDArray[np.bool_]:
        """Return a mask of the finite rows of the requested classes."""
        mask: NDArray[np.bool_] = np.isfinite(rows.scores) & np.isfinite(rows.boxes_xyxy_px).all(axis=1)
        return mask if self.labels is None else mask & np.isin(rows.labels, self.labels)


def select_by(
    header: ModelHeader, *, conf: float | str = "auto", classes: Sequence[str] | None = None, max_det: int = 100
) -> Selection:
    """Make a selection from the user's options and the model's header.

    `conf` is a score from 0 to 1, or `auto`: the stored threshold of each class, else 0.5. `classes` are names, or
    numbers for a model without names; None for all.

    Raises:
        UsageError: a value is out of range, or the model does not have a class.
    """
    if max_det < 1:
        raise UsageError(f"--max-det {max_det} must be at least 1")
    labels = resolve_classes(classes, header.names) if classes else None
    threshold = parse_conf(conf)
    if threshold is not None:
        return Selection(threshold, None, labels, max_det, f"{threshold:g}")
    stored = header.thresholds
    if stored is None:
        description = f"{DEFAULT_THRESHOLD:g} (no thresholds stored in the model)"
        return Selection(labels=labels, max_det=max_det, description=description)
    per_class = np.array(stored.per_class, np.float32)
    if len(per_class) != len(header.names) or not len(per_class):
        stored = replace(stored, per_class=())
    description = f"{describe_thresholds(stored)}, stored in the model"
    return Selection(stored.overall, per_class if stored.per_class else None, labels, max_det, description)


def describe_thresholds(thresholds: Thresholds) -> str:
    """Return the thresholds of a model and what they are for, in words."""
    target = "best F1" if thresholds.target == "f1" else thresholds.target.replace("=", " ")
    values = thresholds.per_class or (thresholds.overall,)
    if max(values) - min(values) < 1e-9:
        return f"{values[0]:.3f} ({target})"
    return f"{min(values):.3f} to {max(values):.3f} by class ({target})"


def overlaps(detections: Detections) -> int:
    """Return how many of the detections of an image, best first, overlap one with a higher score (IoU above 0.7)."""
    boxes = detections.boxes_xyxy_px
    return int((np.triu(iou(boxes[:, None], boxes[None]), k=1) > 0.7).any(axis=0).sum())


def threshold_mismatch(header: ModelHeader, imgsz: tuple[int, int]) -> tuple[str, str] | None:
    """Compare the settings of the stored thresholds' calibration with those in use, since scores depend on them.

    Returns:
        A warning, and the flags for `rtdetr eval --calibrate` at the settings in use; None where all agree or nothing
        is stored. A setting that an older file does not state is not compared.
    """
    stored = header.thresholds
    if stored is None:
        return None
    differences: list[tuple[str, str, str]] = []  # each as calibrated, as used, and as a flag
    size = stored.imgsz or header.imgsz
    if size != imgsz:
        before, now = ("x".join(map(str, sides)) for sides in (size, imgsz))
        differences.append((before, now, f"--imgsz {now}"))
    numbers = (("layer", "layers", stored.layers, header.layers), ("query", "queries", stored.queries, header.queries))
    for singular, plural, old, new in numbers:
        if old and new and old != new:
            differences.append((counted(old, singular, plural), counted(new, singular, plural), f"--{plural} {new}"))
    if stored.dedupe is not None and stored.dedupe != header.dedupe_gamma:
        before, now = (f"--dedupe {gamma_word(gamma)}" for gamma in (stored.dedupe, header.dedupe_gamma))
        differences.append((before, now, now))
    if not differences:
        return None
    calibrated, used, flags = zip(*differences, strict=True)
    warning = (
        f"the stored thresholds were calibrated at {', '.join(calibrated)} and are used at {', '.join(used)}, "
        "where scores differ"
    )
    return warning, " ".join(flags)


def parse_conf(conf: float | str) -> float | None:
    """Return the score of `--conf`, or None for `auto`."""
    if conf == "auto":
        return None
    try:
        value = float(conf)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise UsageError(f"--conf {conf} is neither auto nor a score from 0 to 1", hint="--conf 0.3")
    return value


def resolve_classes(words: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """Return the labels of class names, which may be joined by commas, ignoring case where that is unambiguous.

    Raises:
        UsageError: names that the model does not have; all are listed.
    """
    requested: list[str] = []
    for word in words:
        stripped = word.strip()
        requested += [stripped] if stripped in names else [part.strip() for part in word.split(",") if part.strip()]
    folded = {name.casefold(): label for label, name in reversed(list(enumerate(names)))}
    labels: list[int] = []
    unknown: list[str] = []
    for word in requested:
        label = names.index(word) if word in names else folded.get(word.casefold())
        if label is None and not names:
            label = whole_number(word.removeprefix("class").strip())
        if label is None:
            unknown.append(word)
        else:
            labels.append(label)
    if unknown:
        message = f"the model has no class {', '.join(repr(word) for word in unknown)}"
        if not names:
            message = f"the model has no class names, so --classes {unknown[0]} cannot be resolved"
        raise UsageError(message, hint=_class_hint(unknown, names), code="class-unknown")
    if not labels:
        raise UsageError("--classes names no class", hint=_class_hint([], names))
    return tuple(dict.fromkeys(labels))


def _class_hint(unknown: Sequence[str], names: Sequence[str]) -> str:
    if not names:
        return "give the labels as numbers (--classes 7), or a dataset with class names: --data DATA"
    folded = {name.casefold(): name for name in names}
    close = [folded[m[0]] for word in unknown if (m := get_close_matches(word.casefold(), folded, n=1, cutoff=0.6))]
    if close:
        return f"did you mean {', '.join(dict.fromkeys(close))}?"
    return f"it has {abbreviate(names, 12)}" + (" (rtdetr info MODEL)" if len(names) > 12 else "")

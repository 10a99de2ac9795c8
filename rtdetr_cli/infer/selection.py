"""Which of a model's 300 rows are shown: score thresholds, classes, a largest number, and the image's edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import ModelHeader

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """A rule that turns raw rows into the detections that people see.

    Attributes:
        threshold: least score of a class without one of its own.
        per_class: (K,) least score of each class, or None.
        labels: the classes wanted, or None for all.
        max_det: most detections in an image.
        said: where the thresholds come from, in words.
    """

    threshold: float = DEFAULT_THRESHOLD
    per_class: NDArray[np.float32] | None = None
    labels: tuple[int, ...] | None = None
    max_det: int = 100
    said: str = ""

    def apply(self, found: Detections) -> Detections:
        """Return the rows that pass, best first, clipped to the image; rows outside it or not finite are dropped."""
        finite = _finite(found)
        floor = np.full(len(found), self.threshold, np.float32)
        if self.per_class is not None:
            known = (found.labels >= 0) & (found.labels < len(self.per_class))
            floor[known] = self.per_class[found.labels[known]]
        passing = finite & (found.scores >= floor)
        if self.labels is not None:
            passing &= np.isin(found.labels, self.labels)
        kept = found.keep(passing)
        width, height = found.size_wh
        limits = np.array([width, height, width, height], np.float32)
        boxes = np.clip(kept.boxes_xyxy_px, 0, limits).astype(np.float32)
        inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        clipped = Detections(boxes, kept.scores, kept.labels, kept.size_wh, kept.names, kept.category_ids)
        return clipped.keep(np.flatnonzero(inside)[: self.max_det])

    def best(self, found: Detections) -> float | None:
        """Return the highest score of raw rows of the classes wanted, whatever the threshold; None without a row."""
        usable = _finite(found)
        if self.labels is not None:
            usable &= np.isin(found.labels, self.labels)
        return float(found.scores[usable].max()) if usable.any() else None


def _finite(found: Detections) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = np.isfinite(found.scores) & np.isfinite(found.boxes_xyxy_px).all(axis=1)
    return finite


def select_by(
    header: ModelHeader, *, conf: float | str = "auto", classes: Sequence[str] | None = None, max_det: int = 100
) -> Selection:
    """Make the rule from what the user says and what the model knows.

    Args:
        header: the model's names and calibrated thresholds.
        conf: a score from 0 to 1, or `auto`: the stored thresholds of each class, else 0.5.
        classes: class names wanted, or None for all; of a model without names their numbers.
        max_det: most detections in an image.

    Raises:
        UsageError: a score out of range or a class that the model does not have.
    """
    if max_det < 1:
        raise UsageError(f"--max-det {max_det} must be at least 1")
    labels = resolve_classes(classes, header.names) if classes else None
    threshold = parse_conf(conf)
    if threshold is not None:
        return Selection(threshold, None, labels, max_det, f"{threshold:g}")
    stored = header.thresholds
    if stored is None:
        return Selection(labels=labels, max_det=max_det, said=f"{DEFAULT_THRESHOLD:g}, the model stores no thresholds")
    per_class = np.array(stored.per_class, np.float32) if len(stored.per_class) == len(header.names) else None
    if per_class is None or not len(per_class):
        return Selection(stored.overall, None, labels, max_det, f"{stored.overall:.3f} stored for {stored.target}")
    span = f"{per_class.min():.3f} to {per_class.max():.3f}" if len(per_class) > 1 else f"{per_class[0]:.3f}"
    return Selection(stored.overall, per_class, labels, max_det, f"{span}, stored for each class for {stored.target}")


def used_elsewhere(header: ModelHeader, imgsz: tuple[int, int]) -> tuple[str, str] | None:
    """Say where stored thresholds were calibrated when it is not where they are used: scores differ there.

    Args:
        header: of the model as it is used: with the layers and queries that it runs with.
        imgsz: (height, width) of the input that it runs at.

    Returns:
        A sentence, and the flags of `rtdetr eval --calibrate` that would find fitting ones; None where all agree,
        or nothing is stored.
    """
    stored = header.thresholds
    if stored is None:
        return None
    found, used, flags = [], [], []
    at = stored.imgsz or header.imgsz
    if at != imgsz:
        found.append(f"{at[0]}x{at[1]}")
        used.append(f"{imgsz[0]}x{imgsz[1]}")
        flags.append(f"--imgsz {used[-1]}")
    dials = (("layer", "layers", stored.layers, header.layers), ("query", "queries", stored.queries, header.queries))
    for one, many, then, now in dials:
        if then and now and then != now:
            found.append(counted(then, one, many))
            used.append(counted(now, one, many))
            flags.append(f"--{many} {now}")
    if not flags:
        return None
    said = (
        f"the stored thresholds were calibrated at {', '.join(found)} and are used at {', '.join(used)}, "
        "where scores differ"
    )
    return said, " ".join(flags)


def parse_conf(conf: float | str) -> float | None:
    """Return the score that `--conf` names, or None for `auto`."""
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
    """Return the labels of class names; letters' case aside where that is unambiguous.

    A word may hold several names, parted by commas. All unknown ones are named at once.

    Raises:
        UsageError: a name that the model does not have.
    """
    wanted: list[str] = []
    for word in words:
        whole = word.strip()
        wanted.extend([whole] if whole in names else [part.strip() for part in word.split(",") if part.strip()])
    exact = {name: label for label, name in reversed(list(enumerate(names)))}
    folded = {name.casefold(): label for label, name in reversed(list(enumerate(names)))}
    labels: list[int] = []
    unknown: list[str] = []
    for word in wanted:
        label = exact.get(word, folded.get(word.casefold()))
        if label is None and not names:
            number = word.removeprefix("class").strip()
            label = int(number) if number.isdecimal() else None
        if label is None:
            unknown.append(word)
        else:
            labels.append(label)
    if unknown:
        raise UsageError(_unknown(unknown, names), hint=_suggest(unknown, names), code="class-unknown")
    if not labels:
        raise UsageError("--classes names no class", hint=_suggest([], names))
    return tuple(dict.fromkeys(labels))


def _unknown(words: Sequence[str], names: Sequence[str]) -> str:
    if not names:
        return f"the model carries no class names, so --classes {words[0]} means nothing to it"
    listed = ", ".join(repr(word) for word in words)
    return f"the model has no class {listed}"


def _suggest(words: Sequence[str], names: Sequence[str]) -> str:
    if not names:
        return "name the labels by number (--classes 7), or the dataset that names them: --data DATA"
    folded = {name.casefold(): name for name in names}
    close = [folded[m[0]] for word in words if (m := get_close_matches(word.casefold(), folded, n=1, cutoff=0.6))]
    if close:
        return f"did you mean {', '.join(dict.fromkeys(close))}?"
    shown = ", ".join(names[:12])
    return f"it has {shown}" + (f" and {len(names) - 12} more (rtdetr info MODEL)" if len(names) > 12 else "")

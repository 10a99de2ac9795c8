"""The gate: an export is done when it has been shown, on real images, to detect what the model detects.

A verdict has three parts. The contract: names, types and shapes of the tensors, class list, preprocessing, and a
batch whose elements do not see each other. The agreement: detections of the model and of the export, matched as
sets, since queries with almost equal scores may swap places. The AP of both on the same images, where there are
labels. Nothing in here knows a file format: it sees two backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.weights.header import ModelHeader

MOST_IMAGES = 200
PROBED = 4  # images of a batch, at least
ALONE = 8  # images run by themselves, at most: each costs a whole batch where it is fixed
SCORE_FLOOR = 0.1  # rows below are background: the model itself ranks them by rounding
ROWS_WANTED = 5  # an image, on average, before the floor counts as too high for a weak model
SAME_MODEL_SHARE = 0.95  # of detections that must stay when only the neighbours in the batch change


@dataclass(frozen=True, slots=True)
class Limits:
    """What a format may lose.

    Attributes:
        matched: least share of detections, of both sides, that find their like.
        iou: least overlap of a pair that counts as one detection.
        score_step: largest difference of their scores.
        score_error: largest mean difference of the scores of pairs.
        box_error: largest mean of 1 - IoU of pairs.
        tol_ap: largest difference of AP, 0 to 1.
    """

    matched: float
    iou: float
    score_step: float
    score_error: float
    box_error: float
    tol_ap: float = 0.002


# float32: gather against grid_sample, folded norms and another summation order move scores by about 1e-5; the room
# is for the few queries whose place among the selected ones hangs on such a difference. float16 keeps 11 bits:
# measured figures lie at a tenth of these limits (tests/bench/bench_half_islands.py).
LIMITS = {
    "fp32": Limits(matched=0.99, iou=0.95, score_step=0.02, score_error=0.002, box_error=0.005),
    # The graph's own resize may round a half to the other side: one grey level here and there.
    "resized": Limits(matched=0.98, iou=0.9, score_step=0.05, score_error=0.005, box_error=0.01),
    "fp16": Limits(matched=0.95, iou=0.85, score_step=0.10, score_error=0.01, box_error=0.02),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. A dimension is a number, or None where the graph leaves it open."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Interface:
    """The tensors of a graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a verdict: `passed` is None where it could not be judged, and `findings` say why it failed."""

    passed: bool | None
    findings: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"passed": self.passed, "findings": list(self.findings), **self.figures}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. `half` is the agreement of a half-precision twin that really computes in half."""

    precision: str
    limits: Limits
    images: int
    contract: Part
    agreement: Part
    ap: Part
    half: Part | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name, those that were judged or refused."""
        named = {"contract": self.contract, "agreement": self.agreement, "half": self.half, "ap": self.ap}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def passed(self) -> bool:
        """True when no part failed."""
        return all(part.passed is not False for part in self.parts.values())

    @property
    def failed_parts(self) -> tuple[str, ...]:
        """Names of the parts that failed."""
        return tuple(name for name, part in self.parts.items() if part.passed is False)

    @property
    def summary(self) -> str:
        """Say the outcome in one line."""
        told = [f"{name}: {finding}" for name, part in self.parts.items() for finding in part.findings]
        if self.passed:
            figures = self.agreement.figures
            text = f"{figures.get('matched', 0):.1%} of {figures.get('detections', 0)} detections matched"
            if self.ap.passed is not None:
                text += f", AP {self.ap.figures['ap_model']:.3f} -> {self.ap.figures['ap_export']:.3f}"
            return text + f" on {self.images} images"
        return "; ".join(told)

    @property
    def weak(self) -> str:
        """Say how little a pass proves where the model itself finds hardly anything; else empty."""
        best = self.agreement.figures.get("best_score", 1.0)
        if best >= SCORE_FLOOR:
            return ""
        return f"the model's best score is {best:.3f}: it finds hardly anything yet, so agreement with it proves little"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the headline figures beside the parts."""
        return {
            "passed": self.passed,
            "matched": self.agreement.figures.get("matched"),
            "ap_model": self.ap.figures.get("ap_model"),
            "ap_export": self.ap.figures.get("ap_export"),
            "precision": self.precision,
            "pictures": self.images,
            "limits": {name: getattr(self.limits, name) for name in Limits.__dataclass_fields__},
            **{name: part.to_json() for name, part in self.parts.items()},
        }


# --------------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True, slots=True)
class ImageMatch:
    """How two sides agree on one image: rows that count, how many found their like, and the pairs' errors."""

    rows: int
    matched: int
    score_errors: NDArray[np.float64]
    box_errors: NDArray[np.float64]


def match_sets(ours: Detections, theirs: Detections, *, floor: float, limits: Limits) -> ImageMatch:
    """Match the detections of one image as sets: same label, enough overlap, almost the same score.

    A row counts when its score reaches `floor`; its partner may lie below by the step that scores may differ.
    """
    low = floor - limits.score_step
    ours, theirs = ours.keep(ours.scores >= low), theirs.keep(theirs.scores >= low)
    count_ours, count_theirs = ours.scores >= floor, theirs.scores >= floor
    rows = int(count_ours.sum() + count_theirs.sum())
    nothing = np.zeros(0)
    if not len(ours) or not len(theirs):
        return ImageMatch(rows, 0, nothing, nothing)
    ious = box_iou(ours.boxes_xyxy_px, theirs.boxes_xyxy_px)
    steps = np.abs(ours.scores[:, None].astype(np.float64) - theirs.scores[None, :])
    allowed = (ours.labels[:, None] == theirs.labels[None, :]) & (ious >= limits.iou) & (steps <= limits.score_step)
    cost = np.where(allowed, (1 - ious) + steps, 1e3)
    left, right = linear_sum_assignment(cost)
    real = allowed[left, right]
    left, right = left[real], right[real]
    return ImageMatch(
        rows,
        int(count_ours[left].sum() + count_theirs[right].sum()),
        steps[left, right],
        1 - ious[left, right],
    )


def box_iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the (N, M) overlaps of xyxy boxes; two equal boxes without area overlap fully."""
    a, b = first.astype(np.float64)[:, None], second.astype(np.float64)[None]
    with np.errstate(all="ignore"):
        sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
        shared = np.prod(np.maximum(sides, 0), axis=-1)
        union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - shared
        same = (a == b).all(-1).astype(np.float64)
        ious: NDArray[np.float64] = np.where(union > 0, shared / np.where(union > 0, union, 1), same)
    return ious


def choose_floor(answers: Sequence[Detections]) -> float:
    """Return the score from which rows count: `SCORE_FLOOR`, or less for a model that is not sure of anything."""
    scores = np.sort(np.concatenate([a.scores for a in answers] or [np.zeros(0, np.float32)]))[::-1]
    wanted = min(ROWS_WANTED * len(answers), len(scores))
    return float(min(SCORE_FLOOR, scores[wanted - 1])) if wanted else SCORE_FLOOR


def judge_agreement(ours: Sequence[Detections], theirs: Sequence[Detections], limits: Limits) -> Part:
    """Compare the answers of two sides, image by image."""
    broken = sum(not (np.isfinite(t.scores).all() and np.isfinite(t.boxes_xyxy_px).all()) for t in theirs)
    floor = choose_floor(ours)
    matches = [match_sets(o, finite_rows(t), floor=floor, limits=limits) for o, t in zip(ours, theirs, strict=True)]
    rows, matched = sum(m.rows for m in matches), sum(m.matched for m in matches)
    score_errors = np.concatenate([m.score_errors for m in matches] or [np.zeros(0)])
    box_errors = np.concatenate([m.box_errors for m in matches] or [np.zeros(0)])
    share = matched / rows if rows else 0.0
    figures: dict[str, Any] = {
        "matched": share,
        "detections": rows // 2,
        "score_floor": floor,
        "best_score": best_score(ours),
        "score_error": float(score_errors.mean()) if len(score_errors) else None,
        "score_error_max": float(score_errors.max()) if len(score_errors) else None,
        "box_error": float(box_errors.mean()) if len(box_errors) else None,
        "box_error_max": float(box_errors.max()) if len(box_errors) else None,
        "not_finite": broken,
    }
    findings = []
    if broken:
        findings.append(f"{broken} of {len(theirs)} images give NaN or infinite scores or boxes")
    if share < limits.matched:
        findings.append(
            f"{share:.1%} of the detections of both sides found their like (limit {limits.matched:.0%})"
            + weak_model_note(ours)
        )
    if len(score_errors) and score_errors.mean() > limits.score_error:
        findings.append(f"scores differ by {score_errors.mean():.4f} on average (limit {limits.score_error})")
    if len(box_errors) and box_errors.mean() > limits.box_error:
        findings.append(f"boxes lose {box_errors.mean():.4f} of IoU on average (limit {limits.box_error})")
    return Part(not findings, tuple(findings), figures)


def weak_model_note(answers: Sequence[Detections]) -> str:
    """Say so when the model itself is hardly sure of anything: then rounding decides what it selects."""
    best = best_score(answers)
    if best >= SCORE_FLOOR:
        return ""
    return f"; the model's own best score is {best:.3f}, so it is too little trained to be compared"


def best_score(answers: Sequence[Detections]) -> float:
    """Return the highest score in all answers."""
    return float(max((a.scores.max() for a in answers if len(a)), default=0.0))


def finite_rows(found: Detections) -> Detections:
    """Drop rows with NaN or infinities."""
    return found.keep(np.isfinite(found.scores) & np.isfinite(found.boxes_xyxy_px).all(axis=1))


# ---------------------------------------------------------------------------------------------------- contract


def compare_interfaces(found: Interface, wanted: Interface) -> list[str]:
    """Return what differs in names, types and shapes."""
    findings = []
    for kind, got, want in (("input", found.inputs, wanted.inputs), ("output", found.outputs, wanted.outputs)):
        if [t.name for t in got] != [t.name for t in want]:
            findings.append(f"{kind}s are {', '.join(t.name for t in got)}, not {', '.join(t.name for t in want)}")
            continue
        for a, b in zip(got, want, strict=True):
            if a.dtype != b.dtype:
                findings.append(f"{kind} {a.name} is {a.dtype}, not {b.dtype}")
            if a.shape != b.shape:
                findings.append(f"{kind} {a.name} has shape {show_shape(a.shape)}, not {show_shape(b.shape)}")
    return findings


def show_shape(shape: tuple[int | None, ...]) -> str:
    """Return a shape as people write it, `?` for an open dimension."""
    return "x".join("?" if d is None else str(d) for d in shape)


def compare_headers(found: ModelHeader, wanted: ModelHeader) -> list[str]:
    """Return what an export says about itself that its model does not."""
    findings = []
    if found.names != wanted.names:
        findings.append(
            f"the class list has {len(found.names)} names ({', '.join(found.names[:4])}, ...), "
            f"the model's {len(wanted.names)} ({', '.join(wanted.names[:4])}, ...)"
            if len(found.names) != len(wanted.names)
            else "the class list differs: "
            + ", ".join(f"{a} for {b}" for a, b in zip(found.names, wanted.names, strict=True) if a != b)
        )
    if found.category_ids != wanted.category_ids:
        findings.append("the category ids differ")
    for key in sorted({*found.preprocessing, *wanted.preprocessing}):
        got, want = found.preprocessing.get(key), wanted.preprocessing.get(key)
        if got != want:
            findings.append(f"preprocessing {key} is {got}, not {want}")
    for key in ("imgsz", "sampling", "rounding", "layers", "queries", "thresholds"):
        got, want = getattr(found, key), getattr(wanted, key)
        if got != want:
            findings.append(f"{key} is {got}, not {want}")
    return findings


def judge_batches(
    candidate: Backend, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64], limits: Limits
) -> list[str]:
    """Return what goes wrong when the neighbours in a batch change: order, number, and copies of one image."""
    findings: list[str] = []
    count = len(images)
    some = sorted({round(i) for i in np.linspace(0, count - 1, min(ALONE, count))})

    def answers(order: Sequence[int], together: bool) -> dict[int, Detections] | None:
        what = f"a batch of {len(order)}" if together else "a batch of 1"
        try:
            if together:
                found = candidate.run(images[list(order)], sizes_wh[list(order)])
            else:
                found = [candidate.run(images[i : i + 1], sizes_wh[i : i + 1])[0] for i in order]
        except RtdetrError as error:
            findings.append(f"{what} does not run: {error.message}")
            return None
        except Exception as error:  # each runtime raises its own kind
            findings.append(f"{what} does not run: {first_line(error)}")
            return None
        return dict(zip(order, found, strict=True))

    def compare(first: dict[int, Detections] | None, second: dict[int, Detections] | None, what: str) -> None:
        if first is None or second is None:
            return
        floor = choose_floor(list(first.values()))
        common = [i for i in first if i in second]
        matches = [
            match_sets(finite_rows(first[i]), finite_rows(second[i]), floor=floor, limits=limits) for i in common
        ]
        rows, matched = sum(m.rows for m in matches), sum(m.matched for m in matches)
        if rows and matched / rows < SAME_MODEL_SHARE:
            findings.append(f"{what}: only {matched / rows:.0%} of the detections stay the same")

    alone = answers(some, together=False)
    forwards = answers(range(count), together=True)
    backwards = answers(range(count - 1, -1, -1), together=True)
    compare(alone, forwards, f"batch elements are not independent (alone against a batch of {count})")
    compare(forwards, backwards, "batch elements are not independent (another order)")
    try:
        repeated = candidate.run(np.repeat(images[:1], count, axis=0), np.repeat(sizes_wh[:1], count, axis=0))
    except Exception as error:
        findings.append(f"one image {count} times does not run: {first_line(error)}")
    else:
        for other in repeated[1:]:
            before = len(findings)
            compare({0: repeated[0]}, {0: other}, f"one image repeated {count} times gives several answers")
            if len(findings) > before:
                break
    return findings


def at_a_time(backend: Backend) -> int:
    """Return how many images to give a backend at once: as many as one run of it takes, so that each place counts.

    A graph for one, two or three images gets several runs: the answer to an image must not depend on the last one.
    """
    most = backend.fixed_batch or getattr(backend, "largest_batch", None) or PROBED
    return int(most * math.ceil(PROBED / most))


def first_line(error: Exception) -> str:
    """Return the first line of a runtime's error; they go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# -------------------------------------------------------------------------------------------------------- gate


@dataclass(frozen=True, eq=False)
class Answers:
    """What one backend said about the gate's images."""

    found: list[Detections]
    indices: list[int]  # which images; unreadable ones are left out


class Gate:
    """A model and the images that its exports are held against.

    The model is run once, however many formats are judged.
    """

    def __init__(
        self,
        reference: Backend,
        images: Dataset | Sequence[Path],
        *,
        most: int = MOST_IMAGES,
        threads: int | None = None,
        evaluator: str = "hotcoco",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Choose the images: all, or `most` of them at even distances.

        Args:
            reference: the model, with nothing folded, cast or exchanged for deployment.
            images: a split with labels, or paths without.
            most: images used at most.
            threads: of the decoder.
            evaluator: of the AP.
            progress: told after each batch how many images were answered.

        Raises:
            DataError: there is no image.
        """
        total = len(images)
        if not total:
            raise DataError("there is no image to verify the export on", code="no-images")
        chosen = np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(np.int64))
        self.dataset = images.subset(chosen) if isinstance(images, Dataset) else None
        self.paths = (
            [self.dataset.path(i) for i in range(len(self.dataset))]
            if self.dataset is not None
            else [images[int(i)] for i in chosen]  # type: ignore[index]
        )
        self.reference = reference
        self.threads, self.evaluator, self.progress = threads, evaluator, progress
        self._answers: Answers | None = None

    def judge(
        self,
        candidate: Backend,
        *,
        precision: str = "fp32",
        tol_ap: float | None = None,
        interface: tuple[Interface, Interface] | None = None,
        dynamic: bool | None = None,
        any_size: bool = False,
        twin: Backend | None = None,
        limits: Limits | None = None,
    ) -> Verdict:
        """Hold an export against the model.

        Args:
            candidate: the export, opened from its file.
            precision: `fp32` or `fp16`, which chooses the limits.
            tol_ap: largest difference of AP in place of the default.
            interface: the tensors found in the file and those wanted.
            dynamic: whether the batch was asked to be open; None does not ask.
            any_size: the graph resizes by itself: give it the images as they are, one by one.
            twin: for half precision, a backend that really computes in half (see `export.fp16`).
            limits: in place of the precision's own.
        """
        limits = limits or LIMITS["resized" if any_size and precision == "fp32" else precision]
        if tol_ap is not None:
            limits = replace(limits, tol_ap=tol_ap)
        ours = self.answers()
        contract = self._contract(candidate, interface, dynamic, limits)
        try:
            theirs = self._ask_originals(candidate) if any_size else self.ask(candidate)
        except Exception as error:
            told = f"the export does not run: {error.message if isinstance(error, RtdetrError) else first_line(error)}"
            return Verdict(precision, limits, len(ours.found), contract, Part(False, (told,)), Part(None))
        agreement = judge_agreement(ours.found, theirs.found, limits)
        half = None if twin is None else judge_agreement(ours.found, self.ask(twin).found, limits)
        return Verdict(
            precision, limits, len(ours.found), contract, agreement, self._ap(ours, theirs, candidate, limits), half
        )

    def answers(self) -> Answers:
        """Return the model's own answers, computed once."""
        if self._answers is None:
            self._answers = self.ask(self.reference)
        return self._answers

    def ask(self, backend: Backend) -> Answers:
        """Return what a backend says about the images, given as many at once as it takes."""
        from rtdetr_cli.infer.prefetch import prefetch

        together = at_a_time(backend)
        found: list[Detections] = []
        indices: list[int] = []
        waiting: list[tuple[int, NDArray[np.uint8], tuple[int, int]]] = []
        faults: list[str] = []

        def flush() -> None:
            if not waiting:
                return
            images = np.stack([image for _, image, _ in waiting])
            sizes = np.array([size for _, _, size in waiting], np.int64)
            found.extend(backend.run(images, sizes))
            indices.extend(index for index, _, _ in waiting)
            if self.progress is not None:
                self.progress(len(waiting))
            waiting.clear()

        for index, image, size, fault in prefetch(self.paths, backend.imgsz, threads=self.threads):
            if image is None or size is None:
                faults.append(str(fault))
                continue
            waiting.append((index, image, size))
            if len(waiting) == together:
                flush()
        flush()
        if not found:
            raise DataError(f"none of the {len(self.paths)} images to verify on can be read: {faults[0]}")
        order = np.argsort(indices, kind="stable")
        return Answers([found[i] for i in order], [indices[i] for i in order])

    def _ask_originals(self, backend: Backend) -> Answers:
        from rtdetr_cli.images.decode import read_image

        answers = Answers([], [])
        for index in self.answers().indices:
            image = read_image(self.paths[index])
            size = np.array([[image.shape[1], image.shape[0]]], np.int64)
            answers.found.extend(backend.run(image[None], size))
            answers.indices.append(index)
            if self.progress is not None:
                self.progress(1)
        return answers

    def _contract(
        self,
        candidate: Backend,
        interface: tuple[Interface, Interface] | None,
        dynamic: bool | None,
        limits: Limits,
    ) -> Part:
        from rtdetr_cli.images.decode import read_image, stretch

        findings = compare_headers(candidate.header, self.reference.header)
        if interface is not None:
            findings += compare_interfaces(*interface)
        if dynamic and candidate.fixed_batch is not None:
            findings.append(f"the batch was asked to be open, but the graph has it fixed at {candidate.fixed_batch}")
        count = at_a_time(candidate)
        decoded = [read_image(self.paths[i]) for i in self.answers().indices[:count]]
        places = np.arange(count) % len(decoded)  # too few images are repeated
        images = np.stack([stretch(image, candidate.imgsz) for image in decoded])[places]
        sizes = np.array([(p.shape[1], p.shape[0]) for p in decoded], np.int64)[places]
        findings += judge_batches(candidate, images, sizes, limits)
        figures = {"batch": "dynamic" if candidate.fixed_batch is None else candidate.fixed_batch, "probed": count}
        return Part(not findings, tuple(findings), figures)

    def _ap(self, ours: Answers, theirs: Answers, candidate: Backend, limits: Limits) -> Part:
        if self.dataset is None:
            return Part(None, (), {"why_not": "the images have no labels"})
        if not len(self.dataset.labels):
            return Part(None, (), {"why_not": "none of the images has a labelled object"})
        try:
            scores = [self._ap_of(ours, self.reference.header), self._ap_of(theirs, candidate.header)]
        except DataError as error:  # labelled with other classes than the model's
            return Part(None, (), {"why_not": error.message})
        if scores[0] is None or scores[1] is None:
            return Part(None, (), {"why_not": "AP is undefined on these images"})
        delta = scores[1] - scores[0]
        figures = {"ap_model": scores[0], "ap_export": scores[1], "ap_delta": delta}
        findings: tuple[str, ...] = ()
        if abs(delta) > limits.tol_ap:
            findings = (
                f"AP goes from {scores[0]:.4f} to {scores[1]:.4f}, which is more than the tolerance {limits.tol_ap}",
            )
        return Part(not findings, findings, figures)

    def _ap_of(self, answers: Answers, header: ModelHeader) -> float | None:
        from rtdetr_cli.evaluate.classes import map_classes
        from rtdetr_cli.evaluate.coco import coco_metrics
        from rtdetr_cli.evaluate.table import TableBuilder

        assert self.dataset is not None
        dataset = self.dataset.subset(answers.indices)
        builder = TableBuilder(map_classes(header.names, dataset).labels)
        for index, found in enumerate(answers.found):
            builder.add(index, found)
        return coco_metrics(dataset, builder.build(), evaluator=self.evaluator).metrics["AP"]


def gate(
    reference: Backend,
    candidate: Backend,
    images: Dataset | Sequence[Path],
    limits: Limits | None = None,
    *,
    precision: str = "fp32",
    tol_ap: float | None = None,
) -> Verdict:
    """Hold one export against its model; see `Gate.judge`."""
    return Gate(reference, images).judge(candidate, precision=precision, tol_ap=tol_ap, limits=limits)

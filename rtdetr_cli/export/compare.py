"""Compare an export with its model: tensors, headers and detections. Nothing in here runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from rtdetr_cli.boxes import iou
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.graph import GraphSpec
from rtdetr_cli.infer.inspect import graph_precision
from rtdetr_cli.weights.header import ModelHeader

SCORE_FLOOR = 0.1  # detections below are background, whose ranking depends on rounding
TAIL_ROWS = 100  # of an image: COCO's metrics count no more
TAIL_STEP = 0.5  # relative difference of two scores of the same rank that is much
DETECTIONS_PER_IMAGE = 5  # wanted above the floor, on average; a weak model gets a lower floor


@dataclass(frozen=True, slots=True)
class RowLimits:
    """How far all rows may differ on synthetic images, also those far below the score floor.

    Attributes:
        matched: minimum share of the rows of both sides that are matched.
        bias: maximum relative difference of the sums of the matched scores.
        score_error: maximum sum of the score differences, relative to the sum of the scores.
        box_error: maximum mean of 1 - IoU.
    """

    matched: float
    bias: float
    score_error: float
    box_error: float


@dataclass(frozen=True, slots=True)
class Limits:
    """How far an export may differ from its model.

    Attributes:
        matched: minimum share of the detections of both sides that are matched.
        iou: minimum IoU of a matched pair.
        score_step: maximum score difference of a matched pair.
        score_error: maximum mean score difference of the matched pairs.
        box_error: maximum mean of 1 - IoU of the matched pairs.
        tail: maximum share of the best `TAIL_ROWS` scores of an image that differ much from the model's.
        tol_ap: maximum AP difference, 0 to 1.
        rows: of the rows on synthetic images; None where they are not compared.
    """

    matched: float
    iou: float
    score_step: float
    score_error: float
    box_error: float
    tol_ap: float = 0.002
    tail: float = 0.2
    rows: RowLimits | None = None


# Measured on three models with trained and untrained scores (`tiny`, 96 to 192 pixels), the figures `rows_*` that an
# export writes to parity.json: in float32, scores differ by 2e-6 and boxes by 1.4e-6, and every
# row is matched; in float16, scores by 1.3e-3 with a bias of 4e-4, boxes by 1.4e-3, and .977 are matched where all
# scores are nearly equal; OpenVINO's float16 weights move scores by 5e-3 and boxes by 3e-3. Scores times .995 have a
# bias of 5e-3; without a fifth of the queries, .8 are matched.
EXACT_ROWS = RowLimits(matched=0.97, bias=2e-4, score_error=2e-4, box_error=1e-3)
HALF_ROWS = RowLimits(matched=0.9, bias=3e-3, score_error=0.02, box_error=0.02)

# float32: gather instead of grid_sample, folded norms and another summation order move scores by about 1e-5; the
# margin is for the few queries whose selection depends on such a difference. float16 has 11 bits: measured errors
# are a tenth of these limits (tests/bench/bench_half_islands.py).
LIMITS = {
    "fp32": Limits(matched=0.99, iou=0.95, score_step=0.02, score_error=0.002, box_error=0.005, rows=EXACT_ROWS),
    # The graph's own resize may round a half to the other side, which moves a few samples by one gray level; the
    # synthetic images have the size of the input already.
    "resized": Limits(matched=0.98, iou=0.9, score_step=0.05, score_error=0.005, box_error=0.01, rows=EXACT_ROWS),
    "fp16": Limits(matched=0.95, iou=0.85, score_step=0.10, score_error=0.01, box_error=0.02, rows=HALF_ROWS),
    # Measured for every recipe of tests/bench/bench_int8.py that is worth a file: .958 to .993 matched, score errors of
    # .0015 to .0044, box errors of .022 to .063, no tail. The limits leave room, since the AP decides.
    "int8": Limits(matched=0.85, iou=0.7, score_step=0.20, score_error=0.02, box_error=0.08, tol_ap=0.01, tail=0.4),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a verdict: `passed` is None where it could not be checked; `findings` say why it failed."""

    passed: bool | None
    findings: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"passed": self.passed, "findings": list(self.findings), **self.figures}


def compare_graph(facts: Mapping[str, Any], stated: str, actual: GraphSpec, expected: GraphSpec) -> list[str]:
    """Return what is wrong with a graph before it runs, by its tensors, and by its types and operators.

    `facts` are those of `inspect_model`. The precision that the header has `stated` chooses the limits; an engine's
    types were checked when it was built.
    """
    findings = compare_interfaces(actual, expected)
    if (precision := graph_precision(facts)) not in (None, stated):
        findings.append(f"the header states {stated}, but the types of the graph are those of {precision}")
    return findings + compare_operators(facts.get("operators", {}))


def compare_interfaces(actual: GraphSpec, expected: GraphSpec) -> list[str]:
    """Return the differences in names, types and shapes of the tensors."""
    findings = []
    for kind in ("input", "output"):
        ours, theirs = getattr(actual, f"{kind}s"), getattr(expected, f"{kind}s")
        names, expected_names = [t.name for t in ours], [t.name for t in theirs]
        if names != expected_names:
            findings.append(f"{kind}s are {', '.join(names)}, not {', '.join(expected_names)}")
            continue
        for a, b in zip(ours, theirs, strict=True):
            if a.dtype != b.dtype:
                findings.append(f"{kind} {a.name} is {a.dtype}, not {b.dtype}")
            if a.shape != b.shape:
                shapes = ["x".join("?" if d is None else str(d) for d in t.shape) for t in (a, b)]
                findings.append(f"{kind} {a.name} has shape {shapes[0]}, not {shapes[1]}")
    return findings


def compare_headers(actual: ModelHeader, expected: ModelHeader) -> list[str]:
    """Return what an export's header states differently from its model's."""
    findings = []
    if len(actual.names) != len(expected.names):
        findings.append(
            f"the class list has {len(actual.names)} names ({', '.join(actual.names[:4])}, ...), "
            f"the model's {len(expected.names)} ({', '.join(expected.names[:4])}, ...)"
        )
    elif actual.names != expected.names:
        different = [f"{a} for {b}" for a, b in zip(actual.names, expected.names, strict=True) if a != b]
        findings.append(f"the class list differs: {', '.join(different)}")
    if actual.category_ids != expected.category_ids:
        findings.append("the category ids differ")
    settings = ("imgsz", "sampling", "rounding", "layers", "queries", "thresholds", "dedupe_gamma")
    values = {name: (getattr(actual, name), getattr(expected, name)) for name in settings}
    for key in sorted({*actual.preprocessing, *expected.preprocessing}):
        values[f"preprocessing {key}"] = actual.preprocessing.get(key), expected.preprocessing.get(key)
    findings += [f"{name} is {ours}, not {theirs}" for name, (ours, theirs) in values.items() if ours != theirs]
    return findings


@dataclass(frozen=True, slots=True)
class Match:
    """How two sets of detections agree.

    Attributes:
        rows: detections of both sides that count.
        matched: how many of them belong to a pair.
        scores: (2, pairs) of the reference and of the candidate.
        box_errors: 1 - IoU of each pair.
    """

    rows: int
    matched: int
    scores: NDArray[np.float64]
    box_errors: NDArray[np.float64]

    @property
    def share(self) -> float:
        """The share that is matched; 0 without rows."""
        return self.matched / self.rows if self.rows else 0.0

    @property
    def score_errors(self) -> NDArray[np.float64]:
        """Score difference of each pair."""
        errors: NDArray[np.float64] = np.abs(self.scores[1] - self.scores[0])
        return errors


def match_detections(reference: Detections, candidate: Detections, *, floor: float, limits: Limits) -> Match:
    """Match the detections of one image as sets, since queries with almost equal scores may swap places.

    A pair has the same label, enough overlap and almost the same score. A detection counts when its score reaches
    `floor`; its partner may be below by the score difference that is allowed.
    """
    lowest = floor - limits.score_step
    reference, candidate = reference.keep(reference.scores >= lowest), candidate.keep(candidate.scores >= lowest)
    count_reference, count_candidate = reference.scores >= floor, candidate.scores >= floor
    rows = int(count_reference.sum() + count_candidate.sum())
    ious = iou(reference.boxes_xyxy_px[:, None], candidate.boxes_xyxy_px[None])
    steps = np.abs(reference.scores[:, None].astype(np.float64) - candidate.scores[None, :])
    same_label = reference.labels[:, None] == candidate.labels[None, :]
    allowed = same_label & (ious >= limits.iou) & (steps <= limits.score_step)
    left, right = linear_sum_assignment(np.where(allowed, (1 - ious) + steps, 1e3))
    pairs = allowed[left, right]
    left, right = left[pairs], right[pairs]
    matched = int(count_reference[left].sum() + count_candidate[right].sum())
    scores = np.stack([reference.scores[left], candidate.scores[right]]).astype(np.float64)
    return Match(rows, matched, scores, 1 - ious[left, right])


def choose_score_floor(detections: Sequence[Detections]) -> float:
    """Return the score from which detections count: `SCORE_FLOOR`, or less for a model with few scores above it."""
    scores = np.sort(np.concatenate([np.zeros(0, np.float32), *(d.scores for d in detections)]))[::-1]
    wanted = min(DETECTIONS_PER_IMAGE * len(detections), len(scores))
    return float(min(SCORE_FLOOR, scores[wanted - 1])) if wanted else SCORE_FLOOR


def match_images(
    reference: Sequence[Detections], candidate: Sequence[Detections], limits: Limits, *, floor: float | None = None
) -> Match:
    """Match two sides image by image, without rows that are not finite; see `choose_score_floor` for the floor."""
    floor = choose_score_floor(reference) if floor is None else floor
    matches = [
        match_detections(finite_rows(r), finite_rows(c), floor=floor, limits=limits)
        for r, c in zip(reference, candidate, strict=True)
    ]
    return Match(
        sum(m.rows for m in matches),
        sum(m.matched for m in matches),
        np.concatenate([np.zeros((2, 0)), *(m.scores for m in matches)], axis=1),
        np.concatenate([np.zeros(0), *(m.box_errors for m in matches)]),
    )


def finite_rows(detections: Detections) -> Detections:
    """Drop detections with NaN or infinite values."""
    return detections.keep(np.isfinite(detections.scores) & np.isfinite(detections.boxes_xyxy_px).all(axis=1))


def tail_difference(reference: Sequence[Detections], candidate: Sequence[Detections]) -> float:
    """Return the share of an image's best rows whose scores differ much, rank by rank, also far below the floor."""
    different = rows = 0
    for r, c in zip(reference, candidate, strict=True):
        expected = np.sort(r.scores)[::-1][:TAIL_ROWS]
        actual = np.zeros_like(expected)
        scores = np.sort(c.scores)[::-1][: len(expected)]
        actual[: len(scores)] = scores
        different += int((~(np.abs(actual - expected) <= TAIL_STEP * expected)).sum())
        rows += len(expected)
    return different / rows if rows else 0.0


def compare_rows(
    reference: Sequence[Detections], candidate: Sequence[Detections], limits: Limits
) -> tuple[list[str], dict[str, float]]:
    """Compare all rows of synthetic images; return what differs too much, and the figures.

    Faults that hardly move a metric show here: scores that are scaled, or queries that are missing.
    """
    match = match_images(reference, candidate, limits, floor=0.0)
    total = float(match.scores[0].sum()) or 1.0
    figures = {
        "rows_matched": match.share,
        "rows_bias": abs(float(match.scores[1].sum()) - total) / total,
        "rows_score_error": float(match.score_errors.sum()) / total,
        "rows_box_error": float(match.box_errors.mean()) if len(match.box_errors) else 0.0,
    }
    allowed = limits.rows
    if allowed is None:
        return [], figures
    findings = []
    where = "of synthetic images"
    if match.share < allowed.matched:
        findings.append(f"{match.share:.3f} of all rows {where} matched (limit {allowed.matched:g})")
    for name, what, limit in (
        ("rows_bias", "the scores {} are {:.2%} too high or too low on average", allowed.bias),
        ("rows_score_error", "the scores {} differ by {:.2%}", allowed.score_error),
        ("rows_box_error", "the mean 1 - IoU of the boxes {} is {:.4f}", allowed.box_error),
    ):
        if not figures[name] <= limit:
            findings.append(f"{what.format(where, figures[name])} (limit {limit:g})")
    return findings, figures


def compare_operators(operators: Mapping[str, int]) -> list[str]:
    """Return the operators of a graph that compute something else than the model, too small to show in detections."""
    tanh = [name for name in ("Tanh", "Gelu(tanh)") if operators.get(name)]
    return [f"the graph has {name}: it approximates GELU, which is exact in the model" for name in tanh]


def compare_detections(reference: Sequence[Detections], candidate: Sequence[Detections], limits: Limits) -> Part:
    """Compare the detections of a model and its export, image by image."""
    not_finite = sum(len(finite_rows(c)) < len(c) for c in candidate)
    match = match_images(reference, candidate, limits)
    share = match.share
    best_score = float(max((d.scores.max() for d in reference if len(d)), default=0.0))
    figures: dict[str, Any] = {
        "matched": share,
        "detections": match.rows // 2,
        "score_floor": choose_score_floor(reference),
        "best_score": best_score,
    }
    for name, errors in (("score_error", match.score_errors), ("box_error", match.box_errors)):
        figures[name] = float(errors.mean()) if len(errors) else None
        figures[f"{name}_max"] = float(errors.max()) if len(errors) else None
    figures["not_finite"] = not_finite
    figures["tail"] = tail_difference(reference, candidate)

    findings = []
    if not_finite:
        findings.append(f"{not_finite} of {len(candidate)} images give NaN or infinite scores or boxes")
    if share < limits.matched:
        note = ""
        if best_score < SCORE_FLOOR:
            note = f"; the model's best score is {best_score:.3f}: it is not trained enough to be compared"
        findings.append(f"{share:.3f} matched (limit {limits.matched:g}){note}")
    if (figures["score_error"] or 0) > limits.score_error:
        findings.append(f"the mean score difference is {figures['score_error']:.4f} (limit {limits.score_error:g})")
    if (figures["box_error"] or 0) > limits.box_error:
        findings.append(f"the mean 1 - IoU of the boxes is {figures['box_error']:.4f} (limit {limits.box_error:g})")
    if figures["tail"] > limits.tail:
        findings.append(
            f"{figures['tail']:.1%} of the {TAIL_ROWS} best scores of an image differ by more than {TAIL_STEP:.0%}, "
            f"rank by rank (limit {limits.tail:.0%})"
        )
    return Part(not findings, tuple(findings), figures)

"""Rescore the duplicates of an image outside the network: for raw graphs, foreign ones, and files of detections."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rtdetr_cli.boxes import overlap_with_better, rescore_duplicates
from rtdetr_cli.errors import UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.weights.header import Dedupe

LARGEST_GAMMA = 100.0


def parse_dedupe(value: float | str | None) -> float | None:
    """Return the gamma of `--dedupe`: 0 for `off`, None where nothing was given.

    Raises:
        UsageError: it is neither `off` nor a number above 0.
    """
    if value is None:
        return None
    try:
        gamma = 0.0 if value == "off" else float(value)
    except ValueError:
        gamma = -1.0
    if not (0 < gamma <= LARGEST_GAMMA or value in ("off", 0)):
        raise UsageError(
            f"--dedupe {value} is neither off nor a number above 0", hint="--dedupe 8, or --dedupe off", code="dedupe"
        )
    return gamma


def gamma_word(gamma: float) -> str:
    """Return a gamma as `--dedupe` takes it."""
    return f"{gamma:g}" if gamma else "off"


def describe_dedupe(dedupe: Dedupe | None) -> str:
    """Return how a model rescores duplicates, and what that gained, in words."""
    if dedupe is None:
        return "not rescored, as published"
    text = f"rescored (gamma {dedupe.gamma:g})" if dedupe.gamma else "not rescored"
    if dedupe.ap is None or dedupe.ap_off is None:
        return text
    if not dedupe.gamma:
        return f"{text}: it did not raise AP on val ({dedupe.ap_off:.3f})"
    return f"{text}: AP on val {dedupe.ap:.3f}, without {dedupe.ap_off:.3f}"


def rescore(detections: Detections, gamma: float) -> Detections:
    """Return the detections of an image, sorted by score, with the scores of duplicates lowered, sorted again."""
    if not len(detections):
        return detections
    overlap = overlap_with_better(detections.boxes_xyxy_px, detections.labels)
    scores = rescore_duplicates(detections.scores, overlap, gamma).astype(np.float32)
    return replace(detections, scores=scores).keep(np.argsort(-scores, kind="stable"))

"""Choose on the val split what follows the network: the rescoring of duplicates, and the score threshold."""

from __future__ import annotations

from dataclasses import replace

from rtdetr_cli.evaluate.classes import map_classes
from rtdetr_cli.evaluate.run import Evaluation, rescore_evaluation
from rtdetr_cli.evaluate.thresholds import calibrate, in_model_order
from rtdetr_cli.weights.header import Dedupe, ModelHeader

GAMMAS = (2.0, 4.0, 8.0, 16.0)
"""Tried besides off. Measured by tests/bench/bench_dedupe.py; the differences between them are small."""


def choose_dedupe(evaluation: Evaluation) -> tuple[Dedupe, Evaluation]:
    """Choose the gamma of the highest AP, or off where none gains; return it and the evaluation with it.

    `evaluation` is one without rescoring.
    """
    overlap = evaluation.table.overlap_with_better()
    ap_off = evaluation.metrics["AP"] or 0.0
    best, ap = evaluation, ap_off
    for gamma in GAMMAS:
        rescored = rescore_evaluation(evaluation, gamma, overlap)
        if (rescored.metrics["AP"] or 0.0) > ap:
            best, ap = rescored, rescored.metrics["AP"] or 0.0
    return Dedupe(best.dedupe, ap, ap_off), best


def fit_post_processing(header: ModelHeader, evaluation: Evaluation) -> tuple[ModelHeader, Evaluation]:
    """Return the header of a trained model with rescoring, thresholds and metrics, and the evaluation with those.

    `evaluation` is that of the model on val, without rescoring.
    """
    dedupe, best = choose_dedupe(evaluation)
    thresholds, _ = calibrate(best.matches, "f1")
    used = replace(
        in_model_order(thresholds, map_classes(header.names, best.dataset).labels),
        imgsz=header.imgsz,
        layers=header.layers or None,
        queries=header.queries,
        dedupe=dedupe.gamma,
    )
    known = {name: value for name, value in best.metrics.items() if value is not None}
    return replace(header, dedupe=dedupe, thresholds=used, metrics=known), replace(best, thresholds=thresholds)

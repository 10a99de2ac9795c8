"""Comparing tensors, headers and detections of a model and its export."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rtdetr_cli.export.compare import (
    LIMITS,
    choose_score_floor,
    compare_detections,
    compare_headers,
    compare_interfaces,
    match_detections,
)
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.graph import GraphSpec, TensorSpec
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader

A, B = [10.0, 10, 50, 50], [60.0, 60, 90, 90]


def detections(rows: list[tuple[int, float, list[float]]]) -> Detections:
    return Detections(
        np.array([box for _, _, box in rows], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in rows], np.float32),
        np.array([label for label, _, _ in rows], np.int64),
        (100, 100),
    )


@pytest.mark.parametrize(
    ("candidate", "rows", "matched"),
    [
        ([(0, 0.9, A), (1, 0.5, B)], 4, 4),
        ([(1, 0.5, B), (0, 0.9, A)], 4, 4),  # the order does not matter
        ([(0, 0.9, A)], 3, 2),  # one is missing
        ([(0, 0.9, A), (1, 0.5, B), (2, 0.8, B)], 5, 4),  # one is extra
        ([(0, 0.9, A), (2, 0.5, B)], 4, 2),  # another class
        ([(0, 0.9, A), (1, 0.6, B)], 4, 2),  # another score
        ([(0, 0.9, A), (1, 0.5, [60, 60, 90, 80])], 4, 2),  # another box
        ([(0, 0.9, A), (0, 0.9, A), (1, 0.5, B)], 5, 4),  # a duplicate does not match twice
        ([], 2, 0),
    ],
)
def test_match_detections(candidate: list[tuple[int, float, list[float]]], rows: int, matched: int) -> None:
    reference = detections([(0, 0.9, A), (1, 0.5, B)])
    match = match_detections(reference, detections(candidate), floor=0.1, limits=LIMITS["fp32"])
    assert (match.rows, match.matched) == (rows, matched)


def test_a_detection_at_the_floor_matches_one_just_below_it() -> None:
    match = match_detections(
        detections([(0, 0.1005, A)]), detections([(0, 0.0995, A)]), floor=0.1, limits=LIMITS["fp32"]
    )
    assert (match.rows, match.matched) == (1, 1)


def test_a_weak_model_gets_a_lower_score_floor() -> None:
    weak = [detections([(0, 0.02 - 0.001 * i, A) for i in range(10)])]
    assert choose_score_floor([detections([(0, 0.9, A)] * 10)]) == 0.1
    assert 0.01 < choose_score_floor(weak) < 0.02
    assert choose_score_floor([]) == 0.1


def test_no_detections_on_either_side_is_a_failure() -> None:
    nothing = [detections([])]
    assert compare_detections(nothing, nothing, LIMITS["fp32"]).passed is False


def test_nan_is_a_failure() -> None:
    part = compare_detections([detections([(0, 0.9, A)])], [detections([(0, float("nan"), A)])], LIMITS["fp32"])
    assert part.passed is False
    assert "NaN" in part.findings[0]


def test_a_mismatch_of_a_weak_model_says_that_it_is_not_trained_enough() -> None:
    part = compare_detections([detections([(0, 0.012, A)])], [detections([(0, 0.012, B)])], LIMITS["fp32"])
    assert "not trained enough" in part.findings[0]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("images", "float32", (1, 3, 96, 128), "shape 1x3x96x128, not ?x3x96x128"),
        ("images", "float16", (None, 3, 96, 128), "float16, not float32"),
        ("input", "float32", (None, 3, 96, 128), "inputs are input, not images"),
    ],
)
def test_compare_interfaces(name: str, dtype: str, shape: tuple[int | None, ...], message: str) -> None:
    expected = GraphSpec(None, [TensorSpec("images", np.dtype(np.float32), (None, 3, 96, 128))], [])
    assert compare_interfaces(expected, expected) == []
    assert message in compare_interfaces(GraphSpec(None, [TensorSpec(name, np.dtype(dtype), shape)], []), expected)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("tomato", "plum", "leaf")}, "class list differs"),
        ({"names": ("tomato", "leaf")}, "class list has 2 names"),
        ({"category_ids": (0, 1, 2)}, "category ids"),
        ({"imgsz": (128, 96)}, "imgsz"),
        ({"sampling": "discrete"}, "sampling"),
        ({"thresholds": None}, "thresholds"),
        ({"preprocessing": {"colour": "BGR"}}, "preprocessing colour is BGR, not RGB"),
    ],
)
def test_compare_headers(loaded: tuple[RTDETR, ModelHeader], change: dict[str, object], message: str) -> None:
    header = loaded[1]
    assert compare_headers(header, header) == []
    assert message in compare_headers(replace(header, **change), header)[0]  # type: ignore[arg-type]

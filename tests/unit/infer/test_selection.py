"""Which rows are selected: thresholds, classes, clipping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.errors import UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.selection import parse_conf, resolve_classes, select_by, threshold_mismatch
from rtdetr_cli.weights.header import ModelHeader, Thresholds

NAMES = ("cat", "Dog", "traffic light", "salt, pepper")


def header(*, thresholds: Thresholds | None = None, names: tuple[str, ...] = NAMES) -> ModelHeader:
    return ModelHeader(names, tuple(range(1, len(names) + 1)), (640, 640), thresholds=thresholds)


def rows(*pairs: tuple[float, int], size_wh: tuple[int, int] = (100, 50)) -> Detections:
    boxes = np.array([[10, 10, 20, 20]] * len(pairs), np.float32).reshape(-1, 4)
    scores = np.array([score for score, _ in pairs], np.float32)
    return Detections(boxes, scores, np.array([label for _, label in pairs], np.int64), size_wh, NAMES, (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("conf", "thresholds", "scores"),
    [
        ("auto", None, [0.9, 0.5]),
        (0.3, None, [0.9, 0.5, 0.3]),
        ("0.91", None, []),
        (0, None, [0.9, 0.5, 0.3, 0.1]),
        ("auto", Thresholds("f1", 0.2, (0.95, 0.4, 0.3, 0.05)), [0.5, 0.3, 0.1]),
        ("auto", Thresholds("f1", 0.2, ()), [0.9, 0.5, 0.3]),
        (0.4, Thresholds("f1", 0.2, (0.95, 0.4, 0.3, 0.05)), [0.9, 0.5]),
    ],
)
def test_thresholds(conf: float | str, thresholds: Thresholds | None, scores: list[float]) -> None:
    selection = select_by(header(thresholds=thresholds), conf=conf)
    found = selection.apply(rows((0.9, 0), (0.5, 1), (0.3, 2), (0.1, 3)))
    assert found.scores.tolist() == pytest.approx(scores)
    assert selection.description


@pytest.mark.parametrize(
    ("thresholds", "description"),
    [
        (Thresholds("f1", 0.2, (0.25,) * 4), "0.250 (best F1), stored in the model"),
        (Thresholds("f1", 0.2, ()), "0.200 (best F1), stored in the model"),
        (Thresholds("precision=0.9", 0.2, (0.95, 0.4, 0.3, 0.05)), "0.050 to 0.950 by class (precision 0.9), stored"),
        (None, "0.5 (no thresholds stored in the model)"),
    ],
)
def test_the_threshold_in_use_is_described(thresholds: Thresholds | None, description: str) -> None:
    assert select_by(header(thresholds=thresholds)).description.startswith(description)
    assert select_by(header(thresholds=thresholds), conf="0.5").description == "0.5"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, None),
        ({"imgsz": (640, 640), "layers": 6, "queries": 300}, None),
        ({"imgsz": (480, 640)}, ("480x640 and are used at 640x640,", "--imgsz 640x640")),
        ({"layers": 1, "queries": 300}, ("1 layer and are used at 6 layers,", "--layers 6")),
        ({"dedupe": 0.0}, None),
        ({"dedupe": 8.0}, ("calibrated at --dedupe 8 and are used at --dedupe off,", "--dedupe off")),
        ({"imgsz": (32, 32), "queries": 1}, ("32x32, 1 query and are", "--imgsz 640x640 --queries 300")),
    ],
)
def test_threshold_mismatch(stored: dict[str, Any], expected: tuple[str, str] | None) -> None:
    """A setting that an older file does not state is not compared."""
    used = replace(header(thresholds=Thresholds("f1", 0.5, (0.5,) * 4, **stored)), layers=6, queries=300)
    found = threshold_mismatch(ModelHeader.from_json(used.to_json()), (640, 640))
    if expected is None:
        assert found is None
        return
    assert expected[0] in found[0]
    assert found[1] == expected[1]
    assert threshold_mismatch(replace(used, thresholds=None), (640, 640)) is None


def test_classes_and_maximum_number() -> None:
    found = rows((0.9, 0), (0.8, 1), (0.7, 2), (0.6, 1))
    assert select_by(header(), classes=["dog"]).apply(found).labels.tolist() == [1, 1]
    assert select_by(header(), max_det=3).apply(found).scores.tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_boxes_are_clipped_and_boxes_outside_are_dropped() -> None:
    found = Detections(
        np.array([[-5, -5, 200, 20], [101, 0, 120, 9], [5, 5, 5, 9], [0, 0, np.nan, 9], [90, 40, 100, 50]], np.float32),
        np.array([0.9, 0.9, 0.9, 0.9, np.nan], np.float32),
        np.zeros(5, np.int64),
        (100, 50),
    )
    assert select_by(header()).apply(found).boxes_xyxy_px.tolist() == [[0, 0, 100, 20]]


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["cat"], (0,)),
        (["cat,Dog"], (0, 1)),
        (["Dog", "cat", "dog"], (1, 0)),
        (["TRAFFIC LIGHT"], (2,)),
        (["salt, pepper"], (3,)),
        ([" cat , "], (0,)),
    ],
)
def test_class_names(words: list[str], labels: tuple[int, ...]) -> None:
    assert resolve_classes(words, NAMES) == labels


def test_classes_of_a_model_without_names() -> None:
    assert resolve_classes(["7", "class 3"], ()) == (7, 3)
    with pytest.raises(UsageError, match="has no class names") as raised:
        resolve_classes(["cat"], ())
    assert "--data" in raised.value.hint


@pytest.mark.parametrize(
    ("words", "expected", "hint"),
    [
        (["dgo"], "no class 'dgo'", "did you mean Dog?"),
        (["trafic light", "ca"], "'trafic light', 'ca'", "did you mean traffic light, cat?"),
        (["zebra"], "no class 'zebra'", "it has cat, Dog, traffic light"),
        ([","], "names no class", "it has"),
        (["0"], "no class '0'", "it has"),
    ],
)
def test_unknown_classes(words: list[str], expected: str, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        resolve_classes(words, NAMES)
    assert expected in raised.value.message
    assert hint in raised.value.hint


@pytest.mark.parametrize("conf", ["1.5", "-0.1", "high", "nan", "", 2.0])
def test_bad_conf(conf: float | str) -> None:
    with pytest.raises(UsageError, match="--conf"):
        parse_conf(conf)


def test_bad_max_det() -> None:
    with pytest.raises(UsageError, match="--max-det 0"):
        select_by(header(), max_det=0)

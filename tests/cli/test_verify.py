"""`rtdetr verify`: any file against any model, and what the other commands say of a file that was modified since."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rtdetr_cli.weights.binding import read_export_header, write_export_header


@pytest.fixture
def exported(shapes_onnx: Path, tmp_path: Path) -> Path:
    path = tmp_path / "shapes.onnx"
    shutil.copy(shapes_onnx, path)
    return path


def enlarge_boxes(path: Path) -> None:
    """Multiply the boxes by 1.5, as an edit after verification might."""
    model = onnx.load(path)
    last = next(node for node in model.graph.node if "boxes" in node.output)
    last.output[list(last.output).index("boxes")] = "right_boxes"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.5), "factor"))
    model.graph.node.append(helper.make_node("Mul", ["right_boxes", "factor"], ["boxes"]))
    onnx.save(model, path)


def test_write_and_modify(rtdetr: Any, exported: Path, shapes_model: Path, shapes_data: Path) -> None:
    """A recorded verdict holds until the file changes; then every command that uses the file says so."""
    words = ["verify", exported, "--against", shapes_model, "--data", shapes_data, "--device", "cpu"]
    ran = rtdetr(*words, "--write", "--json", code=0)
    assert ran.json["written"] is True
    assert ran.json["gate"]["passed"] is True
    assert ran.json["gate"]["ap_model"] > 0.8
    shown = rtdetr("info", exported)
    assert "passed, 100.0% of detections matched; unchanged since" in shown.out

    enlarge_boxes(exported)
    assert "modified after verification (graph or weights)" in rtdetr("info", exported).out
    assert rtdetr("info", exported, "--json").json["model"]["verification"] == {
        "status": "modified",
        "modified": ["graph or weights"],
    }
    image = next(shapes_data.parent.glob("*.png"))
    for command in (
        ["predict", image, "--weights", exported, "--no-save"],
        ["eval", exported, "--data", shapes_data],
        ["benchmark", exported, "--warmup", 0, "--runs", 1],
    ):
        used = rtdetr(*command, code=0)
        assert used.err.count("was modified after verification (graph or weights)") == 1, used.err

    ran = rtdetr(*words, "--write", code=6)
    assert "FAILED" in ran.out
    assert "agreement: " in ran.err
    assert "FAILED" in rtdetr("info", exported).out


def test_a_file_without_a_header(
    rtdetr: Any, foreign_onnx: Path, shapes_model: Path, shapes_data: Path, tmp_path: Path
) -> None:
    """The model's header is assumed, and written with a verdict that passed."""
    exported = Path(shutil.copy(foreign_onnx, tmp_path))
    words = ["verify", exported, "--against", shapes_model, "--data", shapes_data.parent, "--device", "cpu"]
    rtdetr(*words, "--write", code=0, err="has no header")
    header = read_export_header(exported)
    assert len(header.names) == 3
    assert header.extra["gate"]["passed"] is True


def test_two_exports(rtdetr: Any, exported: Path, shapes_onnx: Path, shapes_data: Path) -> None:
    """A header that states another precision, which has wider limits, fails the contract."""
    header = read_export_header(exported)
    write_export_header(exported, replace(header, extra={**header.extra, "precision": "fp16"}))
    ran = rtdetr("verify", exported, "--against", shapes_onnx, "--data", shapes_data, "--device", "cpu", "--json")
    assert ran.code == 6
    assert ran.json["gate"]["contract"]["findings"] == [
        "the header states fp16, but the types of the graph are those of fp32"
    ]
    assert ran.json["gate"]["agreement"]["passed"] is True


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tol-ap", "20"], 2, "0<=x<=1"),
        (["--data", "nowhere"], 3, "nowhere"),
        ([], 2, "--data DATA"),
    ],
)
def test_refusals(rtdetr: Any, exported: Path, shapes_model: Path, words: list[str], code: int, message: str) -> None:
    rtdetr("verify", exported, "--against", shapes_model, *words, code=code, err=message)


def test_a_file_against_itself(rtdetr: Any, exported: Path) -> None:
    assert rtdetr("verify", exported, "--against", exported).code == 2
    assert rtdetr("verify", exported.with_name("missing.onnx"), "--against", exported).code == 4

"""Verdicts are bound to the bytes of a file, in every format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rtdetr_cli.errors import ModelError
from rtdetr_cli.evaluate.thresholds import store_thresholds
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.weights.binding import (
    modification_warning,
    read_export_header,
    record_verdict,
    status,
    write_export_header,
)
from rtdetr_cli.weights.header import Dedupe, ModelHeader, Thresholds, read_header, rewrite_header

PASSED = {"passed": True, "matched": 1.0}


@pytest.fixture
def files(shapes_onnx: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a verified file of a format."""

    def make(suffix: str) -> Path:
        path = tmp_path / f"model{suffix}"
        header = read_export_header(shapes_onnx)
        assert header is not None
        if suffix == ".onnx":
            shutil.copy(shapes_onnx, path)
        elif suffix == ".engine":
            path.write_bytes(b"engine" * 100)
        else:
            openvino = pytest.importorskip("openvino", reason="openvino is not installed")
            openvino.save_model(openvino.Core().read_model(str(shapes_onnx)), str(path))
        record_verdict(path, header, PASSED)
        return path

    return make


def header_of(path: Path) -> ModelHeader:
    header = read_export_header(path)
    assert header is not None
    return header


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".engine"])
def test_every_part_is_bound(files: Callable[[str], Path], suffix: str) -> None:
    path = files(suffix)
    header = header_of(path)
    assert status(path, header) == ("unchanged", ())
    assert modification_warning(path) == ""
    write_export_header(path, replace(header, metrics={"AP": 0.5}))  # says nothing about how the file detects
    assert status(path, header_of(path))[0] == "unchanged"
    write_export_header(path, replace(header, names=("leaf", "tomato", "plum")))
    assert status(path, header_of(path)) == ("modified", ("settings",))
    write_export_header(path, replace(header, extra={**header.extra, "precision": "fp16"}))
    assert status(path, header_of(path)) == ("modified", ("settings",))
    write_export_header(path, replace(header, thresholds=None))
    assert status(path, header_of(path)) == ("modified", ("thresholds",))
    write_export_header(path, header)
    assert status(path, header_of(path))[0] == "unchanged"
    change = scale_weight if suffix == ".onnx" else flip_last_byte
    change(path.with_suffix(".bin") if suffix == ".xml" else path)
    assert status(path, header_of(path)) == ("modified", ("file",))
    assert "modified after verification (graph or weights)" in modification_warning(path)


def scale_weight(path: Path) -> None:
    """Change one weight and save the file with the tools of ONNX, which keep the header."""
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    onnx.save(model, path)


def test_only_the_header_changes(files: Callable[[str], Path]) -> None:
    """The runtimes read the header back, and a file that is saved again unchanged stays bound."""
    path = files(".onnx")
    assert open_backend(path, device="cpu").header == header_of(path)
    onnx.checker.check_model(onnx.load(path))
    onnx.save(onnx.load(path), path)
    assert status(path, header_of(path))[0] == "unchanged"
    quoted = replace(header_of(path), names=("a \"b\" <c> & 'd'", "tomàto", "\U0001f345"))
    xml = files(".xml")
    write_export_header(xml, quoted)
    assert header_of(xml).names == quoted.names == open_backend(xml, device="cpu").header.names
    write_export_header(path, quoted)
    assert open_backend(path, device="cpu").header.names == quoted.names


def test_the_header_of_a_foreign_graph_is_inserted(files: Callable[[str], Path], foreign_onnx: Path) -> None:
    for suffix in (".onnx", ".xml"):
        path = files(suffix)
        header = header_of(path)
        if suffix == ".onnx":
            shutil.copy(foreign_onnx, path)
        else:
            openvino = pytest.importorskip("openvino", reason="openvino is not installed")
            openvino.save_model(openvino.Core().read_model(str(files(".onnx"))), str(path))
            assert b"<rtdetr value=" in path.read_bytes()  # that of the ONNX file, among the facts about it
        assert read_export_header(path) is None
        record_verdict(path, header, PASSED)
        assert open_backend(path, device="cpu").header.names == header.names
        assert status(path, header_of(path))[0] == "unchanged"


def test_states_without_a_bound_verdict(files: Callable[[str], Path]) -> None:
    path = files(".onnx")
    header = header_of(path)
    states = {"none": {"passed": None}, "failed": {"passed": False}, "unbound": PASSED}
    for state, gate in states.items():
        assert status(path, replace(header, extra={**header.extra, "gate": gate})) == (state, ())
    assert status(path, None) == ("none", ())


def test_truncated_files(files: Callable[[str], Path]) -> None:
    path = files(".onnx")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match="truncated"):
        read_export_header(path)


def test_calibration_signs_the_thresholds_and_nothing_else(shapes_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    shutil.copy(shapes_model, path)
    record_verdict(path, read_header(path), PASSED)
    assert status(path, read_header(path))[0] == "unchanged"
    calibrated = store_thresholds(path, Thresholds("f1", 0.3, (0.1, 0.2, 0.3)), None)
    assert status(path, calibrated)[0] == "unchanged"
    rewrite_header(path, replace(calibrated, names=("leaf", "tomato", "plum")))
    renamed = store_thresholds(path, Thresholds("f1", 0.4, (0.1, 0.2, 0.3)), None)
    assert status(path, renamed) == ("modified", ("settings",))
    flip_last_byte(path)
    assert status(path, renamed) == ("modified", ("file", "settings"))


def test_the_rescoring_of_duplicates_is_bound(files: Callable[[str], Path]) -> None:
    path = files(".onnx")
    header = header_of(path)
    published = replace(header, dedupe=None)
    record_verdict(path, published, PASSED)
    bound = header_of(path).extra["gate"]["sha256"]["settings"]
    assert status(path, header_of(path).with_dedupe(8.0)) == ("modified", ("settings",))
    # What the rescoring gained is a fact about it and no setting; "off" is what files of earlier versions do.
    assert status(path, replace(header_of(path), dedupe=Dedupe(0.0, 0.5, 0.5)))[0] == "unchanged"
    record_verdict(path, header.with_dedupe(4.0), PASSED)
    assert header_of(path).dedupe == Dedupe(4.0)
    assert header_of(path).extra["gate"]["sha256"]["settings"] != bound
    assert status(path, header_of(path))[0] == "unchanged"

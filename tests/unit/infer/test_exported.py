"""`--backend auto`: only a verified and unchanged float32 export of the same model takes its place."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from rtdetr_cli.errors import UsageError
from rtdetr_cli.infer.exported import MANY_IMAGES, choose_file, verified_export
from rtdetr_cli.weights.binding import read_export_header, record_verdict
from rtdetr_cli.weights.header import read_header, rewrite_header


@pytest.fixture
def model(shapes_model: Path, shapes_onnx: Path, tmp_path: Path) -> Path:
    """A model with an export next to it that passed verification."""
    model, file = tmp_path / "best.safetensors", tmp_path / "export" / "best.onnx"
    file.parent.mkdir()
    shutil.copy(shapes_model, model)
    shutil.copy(shapes_onnx, file)
    header = read_export_header(file)
    assert header is not None
    record_verdict(file, header, {"passed": True})
    return model


def choose(model: Path, *, backend: str = "auto", images: int = MANY_IMAGES, changed: bool = False) -> tuple[Path, str]:
    return choose_file(backend, model, images=images, device="cpu", changed=changed)


def test_a_verified_export_takes_the_place_of_the_weights(model: Path) -> None:
    file = model.parent / "export" / "best.onnx"
    assert choose(model) == (file, f"backend  onnx: {file} was verified to give the same detections")
    assert choose(file) == (file, ""), "an export runs as it is"


def test_torch_is_used_unless_an_export_helps(model: Path) -> None:
    assert choose(model, backend="torch") == (model, "")
    assert choose(model, images=MANY_IMAGES - 1)[0] == model
    assert choose(model, changed=True)[0] == model
    with pytest.raises(UsageError, match="there is no backend 'onnx'"):
        choose(model, backend="onnx")


@pytest.mark.parametrize(
    "fault", ["unverified", "failed", "modified", "half", "other model", "other maker", "calibrated later", "none"]
)
def test_no_other_export_takes_its_place(model: Path, fault: str) -> None:
    file = model.parent / "export" / "best.onnx"
    header = read_export_header(file)
    if fault == "none":
        shutil.rmtree(file.parent)
    elif fault == "modified":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif fault == "half":
        record_verdict(file, replace(header, extra={**header.extra, "precision": "fp16"}), {"passed": True})
    elif fault == "other model":
        record_verdict(file, replace(header, identity="0" * 64), {"passed": True})
    elif fault == "other maker":
        save_file(load_file(model), model)  # without a header
    elif fault == "calibrated later":
        rewrite_header(model, replace(read_header(model), thresholds=None))
    else:
        record_verdict(file, header, {"passed": None if fault == "unverified" else False})
    assert verified_export(model) is None
    path, why = choose(model)
    assert path == model
    assert "has no verified float32 export" in why

"""`--device rtx`: ONNX Runtime's provider of TensorRT for RTX, as far as a machine without a GPU goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.infer import onnx_backend

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"


@pytest.fixture(autouse=True)
def register_again() -> None:
    onnx_backend.rtx_devices.cache_clear()


def test_without_the_package(
    rtdetr: Callable[..., Any], shapes_onnx: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    image = next(shapes_data.parent.glob("*.png"))
    ran = rtdetr("predict", image, "--weights", shapes_onnx, "--device", "rtx", "--no-save", code=7)
    assert "pip install 'rtdetr-cli[rtx-onnx]'" in ran.err


def test_without_a_driver(shapes_onnx: Path) -> None:
    """The real package, which loads NVIDIA's driver when it is registered."""
    pytest.importorskip(PACKAGE, reason="the extra rtx-onnx is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    with pytest.raises(EnvironmentProblem, match=r"cannot run here: .*libcuda"):
        onnx_backend.OnnxBackend(shapes_onnx, device="rtx")


def test_without_a_fitting_gpu(shapes_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = SimpleNamespace(get_ep_name=lambda: "Rtx", get_library_path=lambda: "librtx.so")
    monkeypatch.setitem(sys.modules, PACKAGE, provider)
    registered: list[tuple[str, str]] = []
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda name, path: registered.append((name, path))
    )
    with pytest.raises(EnvironmentProblem, match="finds no GPU that it supports"):
        onnx_backend.OnnxBackend(shapes_onnx, device="rtx")
    assert registered == [("Rtx", "librtx.so")]


def test_files_that_are_not_onnx(shapes_model: Path, rtdetr: Callable[..., Any]) -> None:
    ran = rtdetr("predict", shapes_model, "--weights", shapes_model, "--device", "rtx", code=2)
    assert "--device rtx is for ONNX files" in ran.err


def test_a_name_that_is_no_device(shapes_onnx: Path, rtdetr: Callable[..., Any]) -> None:
    rtdetr("predict", shapes_onnx, "--weights", shapes_onnx, "--device", "rtx9", code=2, err="'rtx9' is not a device")

"""The small trained detector, its labelled images, and its exports: made once for all tests of this folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from torch import nn

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.export.gate import Gate
from rtdetr_cli.export.graph import DeployGraph, ExportOptions
from rtdetr_cli.export.run import Artefact, export_model
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.load import load_model


@pytest.fixture(scope="session")
def dataset(shapes_data: Path) -> Dataset:
    found = load_splits(shapes_data, split_single=False).val
    assert found is not None
    return found


@pytest.fixture(scope="session")
def loaded(shapes_model: Path) -> tuple[RTDETR, ModelHeader]:
    return load_model(shapes_model)


@pytest.fixture(scope="session")
def gate(loaded: tuple[RTDETR, ModelHeader], dataset: Dataset) -> Gate:
    model, header = loaded
    return Gate(TorchBackend(model, header, device="cpu"), dataset)


@pytest.fixture(scope="session")
def exported(
    loaded: tuple[RTDETR, ModelHeader], dataset: Dataset, shapes_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artefact]:
    """All formats of a dynamic export, through the gate.

    The float32 graph has been traced for `shapes_onnx`, with the same options; tracing takes seconds, so that is kept.
    """
    pytest.importorskip("openvino", reason="openvino is not installed")
    model, header = loaded
    out = tmp_path_factory.mktemp("exported")
    formats = ("onnx", "fp16", "openvino")
    options = ExportOptions(formats=formats, dynamic=True)
    really = onnx_file.trace

    def trace(module: nn.Module, *args: Any, **facts: Any) -> onnx.ModelProto:
        if not isinstance(module, DeployGraph):
            return really(module, *args, **facts)
        traced = onnx.load(shapes_onnx)
        traced.ClearField("metadata_props")
        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "trace", trace)
        made = export_model(model, header, out, options, images=dataset, stem="shapes", device="cpu")
    return dict(zip(formats, made, strict=True))


@pytest.fixture
def edited(exported: dict[str, Artefact], tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    """Return a copy of the float32 export with something done to its graph."""

    def edit(change: Callable[[onnx.ModelProto], None]) -> Path:
        model = onnx.load(exported["onnx"].path)
        change(model)
        path = tmp_path / "edited.onnx"
        onnx.save(model, path)
        return path

    return edit


@pytest.fixture(scope="session")
def standin() -> ModuleType:
    """The module that makes strict stand-ins for TensorRT."""
    path = Path(__file__).resolve().parents[2] / "golden/tensorrt_standin.py"
    spec = importlib.util.spec_from_file_location("tensorrt_standin", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

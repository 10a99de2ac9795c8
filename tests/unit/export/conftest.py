"""The small trained detector, its labelled pictures, and its exports: made once for all tests of this folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from rtdetr_cli.data.read import load_splits
from rtdetr_cli.data.records import Dataset
from rtdetr_cli.export.gate import Gate
from rtdetr_cli.export.graph import ExportOptions
from rtdetr_cli.export.run import Artefact, export_model
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.header import ModelHeader
from rtdetr_cli.model.weights import load_model


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
    loaded: tuple[RTDETR, ModelHeader], dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artefact]:
    """All formats of a dynamic export, through the gate."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    model, header = loaded
    out = tmp_path_factory.mktemp("exported")
    formats = ("onnx", "fp16", "openvino")
    options = ExportOptions(formats=formats, dynamic=True)
    made = export_model(model, header, out, options, pictures=dataset, stem="shapes", device="cpu")
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

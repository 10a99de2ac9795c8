"""The small trained detector, its labelled images, and its exports: made once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from torch import nn

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.export import formats
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.formats import Draft, DraftEvents, ExportContext
from rtdetr_cli.export.graph import DeployGraph
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.run import export_model
from rtdetr_cli.export.verify import Reference
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.load import load_model


@pytest.fixture(scope="session")
def dataset(shapes_val: Dataset) -> Dataset:
    return shapes_val


@pytest.fixture(scope="session")
def loaded(shapes_model: Path) -> tuple[RTDETR, ModelHeader]:
    return load_model(shapes_model)


@pytest.fixture(scope="session")
def reference(loaded: tuple[RTDETR, ModelHeader], dataset: Dataset) -> Reference:
    model, header = loaded
    return Reference(TorchBackend(model, header, device="cpu"), dataset)


@pytest.fixture(scope="session")
def exported(
    loaded: tuple[RTDETR, ModelHeader], dataset: Dataset, foreign_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artefact]:
    """Export a dynamic batch in all formats, and verify each.

    The float32 graph is that of `foreign_onnx`, which has the same options, since tracing takes seconds.
    """
    pytest.importorskip("openvino", reason="openvino is not installed")
    model, header = loaded
    out = tmp_path_factory.mktemp("exported")
    names = ("onnx", "fp16", "openvino")
    options = ExportOptions(formats=names, dynamic=True)
    real_trace = onnx_file.trace

    def trace(module: nn.Module, *args: Any, **options: Any) -> onnx.ModelProto:
        if not isinstance(module, DeployGraph):
            return real_trace(module, *args, **options)
        return onnx.load(foreign_onnx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "trace", trace)
        artefacts = export_model(model, header, out, options, images=dataset, stem="shapes", device="cpu")
    return dict(zip(names, artefacts, strict=True))


@pytest.fixture
def half_graph(exported: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> Artefact:
    """Copy the float16 graph from a finished export."""
    source = exported["fp16"]

    def copy_draft(context: ExportContext, path: Path) -> DraftEvents:
        yield from ()
        path.write_bytes(source.path.read_bytes())
        return Draft(context.header_for("onnx", "fp16"), lambda path, header: None, source.operators)

    monkeypatch.setitem(formats.WRITERS, "fp16", copy_draft)
    return source


@pytest.fixture
def edited(exported: dict[str, Artefact], tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    """Return a function that writes a changed copy of the float32 export."""

    def edit(change: Callable[[onnx.ModelProto], None]) -> Path:
        model = onnx.load(exported["onnx"].path)
        change(model)
        path = tmp_path / "edited.onnx"
        onnx.save(model, path)
        return path

    return edit

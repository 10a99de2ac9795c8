"""The ONNX graph: its inputs and outputs, the operators it must not have, and its metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import ExportError
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.compare import LIMITS, compare_detections
from rtdetr_cli.export.graph import DeployGraph, count_norms, deployable, example_inputs
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.run import export_model
from rtdetr_cli.images.decode import read_image, stretch
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.graph import GraphBackend
from rtdetr_cli.infer.inspect import count_operators
from rtdetr_cli.infer.onnx_backend import OnnxBackend
from rtdetr_cli.infer.packages import has_package
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader

Loaded = tuple[RTDETR, ModelHeader]
RTX = ("fp16", "rtx-fp16") if has_package("tensorrt_rtx") else ("fp16",)
Edit = Callable[[Callable[[onnx.ModelProto], None]], Path]


@pytest.mark.parametrize("name", ["onnx", "fp16", "openvino"])
def test_inputs_and_outputs(exported: dict[str, Artefact], name: str) -> None:
    backend = open_backend(exported[name].path, device="cpu")
    assert isinstance(backend, GraphBackend)
    assert [(t.name, t.dtype, t.shape) for t in (*backend.spec.inputs, *backend.spec.outputs)] == [
        ("images", np.float32, (None, 3, 96, 128)),
        ("orig_target_sizes", np.int64, (None, 2)),
        ("labels", np.int64, (None, 120)),  # 40 queries x 3 classes
        ("boxes", np.float32, (None, 120, 4)),
        ("scores", np.float32, (None, 120)),
    ]


@pytest.mark.parametrize("name", ["onnx", "fp16"])
def test_made_for_deployment(exported: dict[str, Artefact], loaded: Loaded, name: str) -> None:
    path = exported[name].path
    model = onnx.load(path, load_external_data=False)
    counts = count_operators(model)
    assert not {"NonZero", "If", "Loop", "GridSample", "BatchNormalization"} & set(counts)
    norms = sum(isinstance(m, torch.nn.LayerNorm) for m in loaded[0].modules())
    assert counts["LayerNormalization"] == norms
    assert {o.domain: o.version for o in model.opset_import} == {"": 18}
    assert not list(path.parent.glob("*.data"))
    # Re-parameterized: every convolution has a bias.
    assert all(len(n.input) == 3 for n in model.graph.node if n.op_type == "Conv")
    assert "/" not in "".join(p.value for n in model.graph.node for p in n.metadata_props)  # no paths of this machine


def test_metadata(exported: dict[str, Artefact], loaded: Loaded, shapes_model: Path) -> None:
    _, source = loaded
    for name, precision in (("onnx", "fp32"), ("fp16", "fp16"), ("openvino", "fp16")):
        header = open_backend(exported[name].path, device="cpu").header
        assert header.names == source.names
        assert header.category_ids == source.category_ids == (3, 7, 20)
        assert header.thresholds == source.thresholds
        assert header.preprocessing == source.preprocessing
        assert (header.sampling, header.layers, header.queries, header.imgsz) == ("bilinear", 2, 40, (96, 128))
        assert header.extra["source_identity"] == source.identity != ""
        assert header.extra["precision"] == precision
        assert {"rtdetr-cli", "torch", "onnx"} <= set(header.extra["versions"])
        assert header.extra["gate"]["passed"] is True
        assert header.extra["gate"]["matched"] == 1
    islands = open_backend(exported["fp16"].path, device="cpu").header.extra["islands"]
    assert all(i["name"] and i["why"] for i in islands)
    assert len(islands) == 7


def graph_with(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(list(nodes), "g", [value], [out]))


def constant(value: NDArray[Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(value, "c"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (graph_with(helper.make_node("NonZero", ["x"], ["y"])), "1 NonZero"),
        (graph_with(helper.make_node("GridSample", ["x", "x"], ["y"])), "GridSample"),
        (graph_with(helper.make_node("ReduceMean", ["x"], ["y"])), "0 LayerNormalization where the network has 1"),
        (graph_with(helper.make_node("Gelu", ["x"], ["y"], domain="com.example")), "operators of com.example"),
        (graph_with(constant(np.array([np.inf], np.float32))), "not finite"),
        (graph_with(constant(np.array([np.nan], np.float16))), "not finite"),
    ],
)
def test_audit(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        onnx_file.audit(model, norms=1)


def test_an_invalid_graph_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not valid"):
        onnx_file.save(graph_with(helper.make_node("Nonsense", ["x"], ["y"])), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_gather_equals_grid_sample(loaded: Loaded, sampling: str) -> None:
    """Discrete sampling is a gather either way."""
    model, header = loaded
    images, sizes = example_inputs(ExportOptions(), header.imgsz, batch=2)
    one, two = deployable(model), deployable(model, gridsample=True)
    for copy in (one, two):
        copy.set_sampling(sampling)  # type: ignore[arg-type]
    with torch.no_grad():
        first, second = DeployGraph(one, raw=True)(images, sizes), DeployGraph(two, raw=True)(images, sizes)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_model_is_not_changed(loaded: Loaded) -> None:
    model, _ = loaded
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copy = deployable(model)
    assert copy is not model
    assert not model.deployed
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.decoder.decoder.layers[0].cross_attn.operator == "grid_sample"  # type: ignore[union-attr]


def test_only_norms_that_run_are_counted(loaded: Loaded) -> None:
    """Fewer decoder layers use fewer norms."""
    model, header = loaded
    inputs = example_inputs(ExportOptions(), header.imgsz, batch=1)
    early = deployable(model)
    early.set_inference(layers=1)
    assert count_norms(DeployGraph(deployable(model)), inputs) - count_norms(DeployGraph(early), inputs) == 3


@pytest.mark.parametrize(("height", "width"), [(192, 256), (77, 301), (40, 33), (96, 128)])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_resize_in_the_graph(edited: Edit, height: int, width: int, kind: str) -> None:
    """It differs from ours by at most one grey level, in few samples: where a half is rounded."""

    def only_resize(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx_file.prepend_preprocessing(model, (96, 128))
        model.graph.output.append(helper.make_tensor_value_info("images_float", TensorProto.FLOAT, None))

    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "smooth":
        image = stretch(rng.integers(0, 256, (5, 4, 3), np.uint8), (height, width))
    session = onnxruntime.InferenceSession(edited(only_resize), providers=["CPUExecutionProvider"])
    feeds = {"images": image[None], "orig_target_sizes": np.array([[width, height]])}
    resized = session.run(["images_float"], feeds)[0][0].transpose(1, 2, 0) * 255
    expected = stretch(image, (96, 128)).astype(np.float64)
    assert np.abs(resized - expected).max() < 1.01
    assert (np.abs(resized - expected) > 0.01).mean() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(formats=("onnx", *RTX), opset=17, batch=8, targets=("sm86",)),
        ExportOptions(formats=("onnx", *RTX), raw=True, dynamic=True, targets=("sm89", "sm120")),
        ExportOptions(formats=("onnx", "fp16", "openvino"), preprocess=True),
        ExportOptions(formats=("onnx", "openvino", *RTX), gridsample=True, targets=("sm86", "sm89")),
        ExportOptions(formats=("onnx",), imgsz=(128, 96), dynamic=True),
        ExportOptions(formats=RTX, batch=8, targets=("sm75",)),
    ],
    ids=["opset17-batch8", "raw", "preprocess", "gridsample", "imgsz", "turing"],
)
def test_variants_pass_verification(loaded: Loaded, dataset: Dataset, tmp_path: Path, options: ExportOptions) -> None:
    model, header = loaded
    check(export_model(model, header, tmp_path, options, images=dataset, device="cpu"))


def check(artefacts: list[Artefact]) -> None:
    """Each file passed, or is an engine of half precision, which only its own GPU can run."""
    for artefact in artefacts:
        if artefact.format == "tensorrt":
            assert artefact.operators["half"] > 2 * artefact.operators["float"] > 0
        else:
            assert artefact.verdict.passed, artefact.verdict.summary


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["published", "nearest"])
def test_discrete_export(loaded: Loaded, shapes_model: Path, dataset: Dataset, tmp_path: Path, rounding: str) -> None:
    """It has no GridSample, and its header states the rounding."""
    from rtdetr_cli.weights.load import load_model

    model, header = load_model(shapes_model, sampling="discrete")
    model.set_sampling("discrete", rounding)  # type: ignore[arg-type]
    options = ExportOptions(formats=("onnx", *RTX), targets=("sm86",))
    artefacts = export_model(model, replace(header, rounding=rounding), tmp_path, options, images=dataset, device="cpu")
    check(artefacts)
    assert "GridSample" not in artefacts[0].operators
    header = OnnxBackend(artefacts[0].path).header
    assert (header.sampling, header.rounding) == ("discrete", rounding)


def test_images_of_any_size(edited: Edit, loaded: Loaded, dataset: Dataset) -> None:
    """`--preprocess-in-graph` takes uint8 images of any size and gives boxes in their pixels."""
    backend = OnnxBackend(edited(lambda model: onnx_file.prepend_preprocessing(model, (96, 128))))
    reference = TorchBackend(*loaded, device="cpu")
    for index in range(4):
        image = read_image(dataset.path(index))
        size = np.array([[image.shape[1], image.shape[0]]])
        actual = backend.run(image[None], size)
        expected = reference.run(stretch(image, (96, 128))[None], size)
        assert compare_detections(expected, actual, LIMITS["resized"]).passed

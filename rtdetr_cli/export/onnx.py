"""One self-contained ONNX file: traced, checked, and with everything that prediction needs in its metadata."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.version_converter
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from rtdetr_cli.errors import ExportError
from rtdetr_cli.files import atomic_write
from rtdetr_cli.infer.graph import GraphSpec, first_line
from rtdetr_cli.infer.inspect import count_operators
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

MAX_BATCH = 1024
TRACED_OPSET = 18  # torch's own; 17 is converted from it
# Operators with data-dependent shapes and branches, for which runtimes fall back to the CPU or refuse the graph.
BANNED = ("NonZero", "If", "Loop", "Scan", "NonMaxSuppression", "Unique", "Compress")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
LARGEST_FILE = 2**31 - 1


def trace(module: nn.Module, inputs: Sequence[Tensor], *, spec: GraphSpec, opset: int) -> onnx.ModelProto:
    """Trace a module into an ONNX graph.

    Args:
        module: in eval mode.
        inputs: example inputs, batch first; at least two elements where the batch is dynamic, since tracing freezes a
            one.
        spec: names of the inputs and outputs; the first dimension of the inputs decides whether the batch is dynamic.
        opset: 17 or 18.

    Raises:
        ExportError: the exporter or the opset conversion failed.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(inputs),
                dynamo=True,
                opset_version=TRACED_OPSET,
                input_names=[item.name for item in spec.inputs],
                output_names=[item.name for item in spec.outputs],
                dynamic_shapes=batch_dimensions(inputs, dynamic=spec.inputs[0].shape[0] is None),
                external_data=False,
                verbose=False,
            )
            assert program is not None
            model: onnx.ModelProto = program.model_proto
    except Exception as error:
        raise ExportError(f"torch {torch.__version__} cannot export the model to ONNX: {first_line(error)}") from error
    name_by_module(model)
    strip(model)
    if opset != TRACED_OPSET:
        drop_defaults(model)
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except Exception as error:
            raise ExportError(
                f"the graph cannot be converted to opset {opset}: {first_line(error)}", hint="remove --opset"
            ) from error
    return model


def batch_dimensions(inputs: Sequence[Tensor], *, dynamic: bool) -> Any:
    """Return the `dynamic_shapes` of torch's exporters: one batch for all inputs, or None where it is fixed."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return tuple({0: batch} for _ in inputs) if dynamic else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' messages about their own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def name_by_module(model: onnx.ModelProto) -> None:
    """Put the path of the module that a node comes from before its name: `model.backbone.conv1/node_conv2d`.

    Quantization selects nodes by it, in OpenVINO too, which keeps the names.
    """
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = ast.literal_eval(scopes)[:-1]  # the last is the operator
        node.name = f"{modules[-1] if modules else ''}/{node.name}"


def strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes about its source code: paths of this machine, and a third of small files."""
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("metadata_props")
    model.ClearField("metadata_props")


def drop_defaults(model: onnx.ModelProto) -> None:
    """Remove attributes unknown to opset 17 that have its default behavior; the converter keeps them."""
    defaults = {"noop_with_empty_axes": 0, "antialias": 0, "keep_aspect_ratio_policy": b"stretch"}
    for node in model.graph.node:
        for attribute in list(node.attribute):
            if defaults.get(attribute.name) == helper.get_attribute_value(attribute):
                node.attribute.remove(attribute)


def audit(model: onnx.ModelProto, *, norms: int, gridsample: bool = False) -> None:
    """Raise ExportError with everything in a graph that runtimes are known to get wrong.

    `norms` is the number of layer norms of the network, each of which must be one operator.
    """
    counts = count_operators(model)
    banned = BANNED if gridsample else (*BANNED, "GridSample")
    problems = [f"{counts[name]} {name}" for name in banned if counts[name]]
    if counts["LayerNormalization"] != norms:
        problems.append(f"{counts['LayerNormalization']} LayerNormalization where the network has {norms}")
    foreign = sorted({node.domain for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if foreign:
        problems.append(f"operators of {', '.join(foreign)}")
    constants = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute)]
    infinite = [t.name for t in constants if t.data_type in FLOATS and not np.isfinite(numpy_helper.to_array(t)).all()]
    if infinite:
        problems.append(f"constants that are not finite ({', '.join(infinite[:3])})")
    if any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        problems.append("weights outside the file")
    if problems:
        raise ExportError(
            f"the exported graph has {'; '.join(problems)}",
            hint="please report this: the exporter of this torch version behaves differently",
            code="graph",
        )


def embed(model: onnx.ModelProto, header: ModelHeader) -> None:
    """Write the header into the graph's metadata, replacing an earlier one."""
    others = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**others, METADATA_KEY: header.to_json()})
    model.producer_name, model.producer_version = "rtdetr-cli", header.version


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph as one file, atomically; raise ExportError where it is too large or not valid."""
    size = model.ByteSize()
    if size > LARGEST_FILE:
        raise ExportError(f"the graph is {size / 2**30:.1f} GiB, more than the 2 GiB limit of an ONNX file")
    data = model.SerializeToString()
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {first_line(error)}") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


PREPROCESSING = """
preprocessing (uint8[BATCH, height, width, 3] images) => (float[BATCH, 3, HEIGHT, WIDTH] images_float)
<int64[1] preprocess_width = {WIDTH}, int64[1] preprocess_height = {HEIGHT}, float preprocess_half = {0.5},
 float preprocess_white = {255.0}>
{
    preprocess_planes = Transpose <perm = [0, 3, 1, 2]> (images)
    preprocess_float = Cast <to = 1> (preprocess_planes)
    preprocess_across_sums = Resize <axes = [3], RESIZE> (preprocess_float, , , preprocess_width)
    preprocess_across_raised = Add (preprocess_across_sums, preprocess_half)
    preprocess_across = Floor (preprocess_across_raised)
    preprocess_down_sums = Resize <axes = [2], RESIZE> (preprocess_across, , , preprocess_height)
    preprocess_down_raised = Add (preprocess_down_sums, preprocess_half)
    preprocess_down = Floor (preprocess_down_raised)
    images_float = Div (preprocess_down, preprocess_white)
}
"""
# `exclude_outside`: weights at the border sum to one, as in Pillow.
RESIZE = 'mode = "linear", antialias = 1, exclude_outside = 1, coordinate_transformation_mode = "half_pixel"'


def prepend_preprocessing(model: onnx.ModelProto, imgsz: tuple[int, int]) -> None:
    """Make the graph accept uint8 images, (1, any height, any width, RGB), instead of its float input.

    The resize is bilinear with antialiasing, first across and then down, rounded to whole gray levels in between as
    in Pillow. The two differ by one level in at most about one sample of a hundred, where a half is rounded.
    """
    graph = model.graph
    images = next(value for value in graph.input if value.name == "images")
    batch = images.type.tensor_type.shape.dim[0]
    size = {"BATCH": batch.dim_param or batch.dim_value, "HEIGHT": imgsz[0], "WIDTH": imgsz[1], "RESIZE": RESIZE}
    text = PREPROCESSING
    for name, value in size.items():
        text = text.replace(name, str(value))
    preprocessing = onnx.parser.parse_graph(text)
    images.CopyFrom(preprocessing.input[0])
    for node in graph.node:
        node.input[:] = ["images_float" if name == "images" else name for name in node.input]
    network = list(graph.node)
    del graph.node[:]
    graph.node.extend([*preprocessing.node, *network])
    graph.initializer.extend(preprocessing.initializer)

"""INT8 graphs, quantized by ONNX Runtime, or by NNCF for OpenVINO, and calibrated on images of the train split."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import spread
from rtdetr_cli.errors import DataError, ExportError
from rtdetr_cli.export.fp16 import Island, is_first_convolution, stays_float32
from rtdetr_cli.export.onnx import quiet
from rtdetr_cli.export.options import INT8_PARTS
from rtdetr_cli.infer.graph import IMAGES, SIZES, GraphSpec, first_line
from rtdetr_cli.infer.openvino_backend import without_telemetry
from rtdetr_cli.infer.packages import import_package
from rtdetr_cli.infer.prefetch import prefetch

FEW_IMAGES = 8

Feeds = dict[str, NDArray[Any]]


def _part(name: str) -> Island:
    return Island(name, "requested", lambda path, op: path.startswith(f"model.{name}"))


PARTS = tuple(map(_part, INT8_PARTS))
"""The parts that can be kept in float by name."""

FIRST_CONVOLUTION = Island(
    "first convolution",
    "quantizing it as well moves boxes further, and it is little of the work",
    is_first_convolution,
)
ONNX_FLOATS = (
    FIRST_CONVOLUTION,
    Island(
        "everything but convolutions",
        "quantizing matrix products, sums and pools as well moves boxes further, and saves little time",
        lambda path, op: op != "Conv",
    ),
)
OPENVINO_FLOATS = (FIRST_CONVOLUTION,)
"""What stays float, chosen by tests/bench/bench_int8.py."""


class Calibration:
    """Images to calibrate on, stretched to the input size, in memory."""

    def __init__(self, paths: Sequence[Path], imgsz: tuple[int, int], count: int) -> None:
        """Read up to `count` images at even distances; raise DataError where none can be read."""
        chosen = [paths[i] for i in spread(len(paths), count)]
        items = [item for item in prefetch(chosen, imgsz) if item.image is not None]
        if not items:
            raise DataError(f"none of the {len(chosen)} calibration images can be read, such as {chosen[0]}")
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def feeds(self, spec: GraphSpec) -> Iterator[Feeds]:
        """Yield batches for a float graph with the inputs of `spec`; a fixed batch is filled from the start again."""
        batch = spec.inputs[0].shape[0] or 1
        for first in range(0, len(self._items), batch):
            items = list(itertools.islice(itertools.cycle(self._items), first, first + batch))
            images = np.stack([item.image for item in items if item.image is not None])
            feeds: Feeds = {IMAGES: np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / 255}
            if len(spec.inputs) > 1:
                feeds[SIZES] = np.array([item.size_wh for item in items], np.int64)
            yield feeds


def stays_float(name: str, op: str, floats: Sequence[Island]) -> bool:
    """Return whether a node belongs to one of the parts; `export.onnx.name_by_module` put its module into its name."""
    return stays_float32(name.partition("/")[0], op, floats)


def quantize_onnx(
    model: onnx.ModelProto, calibration: Calibration, spec: GraphSpec, floats: Sequence[Island]
) -> onnx.ModelProto:
    """Return a graph with quantized convolutions: weights per channel, activations with fixed ranges.

    `model` is the float graph, without preprocessing, and is not changed; `floats` are the parts that stay float32.

    Raises:
        ExportError: ONNX Runtime cannot quantize the graph.
    """
    from onnxruntime import quantization

    batches = calibration.feeds(spec)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Feeds | None:
            return next(batches, None)

    excluded = {node.name for node in model.graph.node if stays_float(node.name, node.op_type, floats)}
    quantized = {node.op_type for node in model.graph.node if node.name not in excluded}
    with tempfile.TemporaryDirectory(prefix="rtdetr-int8-") as folder, quiet():
        path = Path(folder) / "int8.onnx"
        try:
            quantization.quantize_static(
                onnx.shape_inference.infer_shapes(model),
                path,
                Reader(),
                op_types_to_quantize=sorted(quantized),
                nodes_to_exclude=sorted(excluded),
                per_channel=True,
                # Weights of 7 bits: with 8, sums overflow on x86 processors without VNNI. The errors are the same.
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot quantize the graph: {first_line(error)}") from error
        return onnx.load(path)


def quantize_openvino(model: Any, calibration: Calibration, spec: GraphSpec, floats: Sequence[Island]) -> Any:
    """Return an OpenVINO model with quantized operators; the arguments are as of `quantize_onnx`.

    Raises:
        ExportError: NNCF cannot quantize the graph.
        EnvironmentProblem: NNCF is missing.
    """
    with without_telemetry():  # which it shares with OpenVINO
        nncf = import_package("nncf", "NNCF", extra="openvino")
    names = {node.get_friendly_name(): node.get_type_name() for node in model.get_ops()}
    ignored = [name for name, op in names.items() if stays_float(name, op, floats)]
    nncf.set_log_level(logging.ERROR)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):  # it prints progress bars
        try:
            return nncf.quantize(
                model,
                nncf.Dataset(list(calibration.feeds(spec))),
                subset_size=len(calibration),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
            )
        except Exception as error:
            raise ExportError(f"NNCF cannot quantize the graph: {first_line(error)}") from error

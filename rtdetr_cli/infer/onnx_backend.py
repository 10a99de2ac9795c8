"""ONNX Runtime. Never loads torch: starting is as quick as the graph is small."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rtdetr_cli.errors import EnvironmentProblem, ModelError, UsageError
from rtdetr_cli.infer.graph import GraphBackend, Port, first_line
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OnnxBackend(GraphBackend):
    """A graph in ONNX Runtime, on CUDA where its provider is there, else on the CPU."""

    kind = "onnx"

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        imgsz: tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        """Open a graph.

        Raises:
            ModelError: no ONNX file, a truncated one, or one that does not keep the contract.
            EnvironmentProblem: CUDA was asked for and its provider is not there.
        """
        providers = _providers(device)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its exceptions have no common base
            raise ModelError(
                f"{path} does not open in ONNX Runtime {onnxruntime.__version__}: {_reason(error)}",
                hint="the file is truncated or not an ONNX model: export it again",
                code="model-unreadable",
            ) from error
        super().__init__(
            path,
            header=read_onnx_header(self.session.get_modelmeta().custom_metadata_map, path),
            inputs=[_port(value, path) for value in self.session.get_inputs()],
            outputs=[value.name for value in self.session.get_outputs()],
            imgsz=imgsz,
        )
        self._outputs = [value.name for value in self.session.get_outputs()]

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch; return every output by name."""
        try:
            return dict(zip(self._outputs, self.session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            shape = "x".join(str(n) for n in feeds["images"].shape)
            raise ModelError(f"{self.path} fails on a batch of {shape}: {_reason(error)}", code="model-run") from error


def read_onnx_header(metadata: Mapping[str, str], path: Path) -> ModelHeader | None:
    """Return the header in a graph's metadata, or None for a foreign graph."""
    text = metadata.get(METADATA_KEY)
    return ModelHeader.from_json(text, source=str(path)) if text else None


def _port(value: Any, path: Path) -> Port:
    if value.type not in _TYPES:
        raise ModelError(f"{path}: the input {value.name} is a {value.type}, which is no image", code="model-foreign")
    shape = tuple(n if isinstance(n, int) and n > 0 else None for n in value.shape)
    return Port(value.name, np.dtype(_TYPES[value.type]), shape)


def _providers(device: str) -> list[Any]:
    there = onnxruntime.get_available_providers()
    if device == "cpu" or (device == "auto" and "CUDAExecutionProvider" not in there):
        return ["CPUExecutionProvider"]
    number = device.removeprefix("cuda").removeprefix(":") or "0"
    if device != "auto" and not number.isdigit():
        raise UsageError(f"{device!r} is not a device", hint="--device auto, cpu or 0 (the first GPU)")
    if "CUDAExecutionProvider" not in there:
        raise EnvironmentProblem(
            f"device {device} needs ONNX Runtime with CUDA; this one has {', '.join(there)}",
            hint="pip uninstall onnxruntime && pip install onnxruntime-gpu, or --device cpu",
            code="device-missing",
        )
    index = int(number) if device != "auto" else 0
    return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]


def _reason(error: BaseException) -> str:
    """Return a message of ONNX Runtime without its prefixes and source paths."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", first_line(error))
    return re.sub(r"/\S*/onnxruntime/\S+:\d+ \S+(\(.*?\))? ?", "", text)

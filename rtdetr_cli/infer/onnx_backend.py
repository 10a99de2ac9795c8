"""ONNX Runtime. It never loads torch, so that it starts quickly."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rtdetr_cli.errors import EnvironmentProblem, ModelError, UsageError
from rtdetr_cli.files import cache_folder
from rtdetr_cli.infer.backend import RTX_DEVICE
from rtdetr_cli.infer.graph import GraphBackend, GraphSpec, TensorSpec, first_line
from rtdetr_cli.infer.packages import import_package
from rtdetr_cli.text import whole_number
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class OnnxBackend(GraphBackend):
    """A graph in ONNX Runtime, on CUDA where its provider is installed, else on the CPU.

    On the device `rtx`, TensorRT for RTX compiles it for the GPU when it is opened, and keeps the result in the cache.
    """

    kind = "onnx"

    def open(self, device: Any, threads: int | None) -> GraphSpec:
        """Open the graph in a session."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and its log writes them in color
        if threads is not None:
            options.intra_op_num_threads = threads
        if device == RTX_DEVICE:
            cache = cache_folder("tensorrt-rtx")
            options.add_provider_for_devices(rtx_devices()[:1], {"nv_runtime_cache_path": str(cache)})
        providers = None if device == RTX_DEVICE else _providers(device)
        try:
            self.session = onnxruntime.InferenceSession(str(self.path), options, providers=providers)
            text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
            inputs, outputs = [
                [self._spec(value) for value in values]
                for values in (self.session.get_inputs(), self.session.get_outputs())
            ]
        except ModelError:
            raise
        except Exception as error:  # its exceptions have no common base
            raise ModelError(
                f"{self.path} does not open in ONNX Runtime {onnxruntime.__version__}: {_reason(error)}",
                hint="the file is truncated or not an ONNX model; export it again",
                code="model-unreadable",
            ) from error
        header = ModelHeader.from_json(text, source=str(self.path)) if text else None
        return GraphSpec(header, inputs, outputs)

    def _spec(self, value: Any) -> TensorSpec:
        if value.type not in _TYPES:
            raise ModelError(
                f"{self.path}: the tensor {value.name} has the unsupported type {value.type}", code="model-foreign"
            )
        shape = tuple(n if isinstance(n, int) and n > 0 else None for n in value.shape)
        return TensorSpec(value.name, np.dtype(_TYPES[value.type]), shape)

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run one batch; return every output, in the order of `spec`."""
        try:
            outputs: list[NDArray[Any]] = self.session.run(None, dict(feeds))
            return outputs
        except Exception as error:
            shape = "x".join(str(n) for n in feeds["images"].shape)
            raise ModelError(f"{self.path} fails on a batch of {shape}: {_reason(error)}", code="model-run") from error


@functools.cache
def rtx_devices() -> list[Any]:
    """Return the GPUs that the provider of TensorRT for RTX runs on; it is registered once in a process.

    Raises:
        EnvironmentProblem: its package or a driver is missing, or there is no such GPU.
    """
    plugin = import_package(
        "onnxruntime_ep_nv_tensorrt_rtx", "ONNX Runtime's provider of TensorRT for RTX", extra="rtx-onnx"
    )
    name, devices, reason = plugin.get_ep_name(), [], "it finds no GPU that it supports"
    try:
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        devices = [item for item in onnxruntime.get_ep_devices() if item.ep_name == name]
    except Exception as error:  # its exceptions have no common base
        reason = _reason(error)
    if not devices:
        raise EnvironmentProblem(
            f"TensorRT for RTX cannot run here: {reason}",
            hint="it needs a GeForce RTX 30 or later and its driver; use --device cpu, or 0 with onnxruntime-gpu",
            code="device-missing",
        )
    return devices


def _providers(device: str) -> list[Any]:
    available = onnxruntime.get_available_providers()
    if device == "cpu" or (device == "auto" and "CUDAExecutionProvider" not in available):
        return ["CPUExecutionProvider"]
    number = device.removeprefix("cuda").removeprefix(":") or "0"
    index = 0 if device == "auto" else whole_number(number, digits=4)
    if index is None:
        raise UsageError(f"{device!r} is not a device", hint="--device auto, cpu, 0 (the first GPU) or rtx")
    if "CUDAExecutionProvider" not in available:
        raise EnvironmentProblem(
            f"device {device} needs ONNX Runtime with CUDA; the installed one has {', '.join(available)}",
            hint="pip uninstall onnxruntime && pip install onnxruntime-gpu, or --device cpu",
            code="device-missing",
        )
    # TF32, its default, would compute a float32 graph with 11 bits.
    return [("CUDAExecutionProvider", {"device_id": index, "use_tf32": 0}), "CPUExecutionProvider"]


def _reason(error: BaseException) -> str:
    """Return a message of ONNX Runtime without its prefixes and source paths."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", first_line(error))
    return re.sub(r"/\S*/onnxruntime/\S+:\d+ \S+(\(.*?\))? ?", "", text)

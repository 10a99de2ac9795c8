"""TensorRT 10 and 11, and TensorRT for RTX. The buffers are torch tensors, since torch is always installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import EnvironmentProblem, ModelError
from rtdetr_cli.infer.graph import IMAGES, GraphBackend, GraphSpec, TensorSpec
from rtdetr_cli.infer.packages import import_package
from rtdetr_cli.weights.binding import read_export_header
from rtdetr_cli.weights.header import ModelHeader

RTX_PACKAGE = "tensorrt-rtx-cu13"
RTX_VERSION = "tensorrt-rtx"  # the key of its version in a header
_RTX_MAGIC = b"vtrt"  # first bytes of its engines

_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "BOOL": np.bool_,
}


class TensorrtBackend(GraphBackend):
    """An engine. It runs only on the kind of GPU and the TensorRT version that built it."""

    kind = "tensorrt"

    def open(self, device: Any, threads: int | None) -> GraphSpec:
        """Load the engine on `device`: `auto`, `0`, `cuda:1`, or a torch device for the buffers."""
        header = read_export_header(self.path)
        rtx = is_rtx_engine(self.path, header)
        tensorrt = import_tensorrt(rtx=rtx)
        import torch

        from rtdetr_cli.infer.torch_backend import choose_device

        if isinstance(device, torch.device):
            self._device = device
        else:
            self._device = choose_device(device)
            if self._device.type != "cuda":
                reason = "there is none" if device == "auto" else f"--device is {device}"
                raise EnvironmentProblem(
                    f"{self.path.name} needs a CUDA device, but {reason}",
                    hint="use the .onnx or .safetensors file on the CPU",
                    code="device-missing",
                )
        if rtx and header is not None and self._device.type == "cuda":
            check_rtx_engine(self.path, header, str(tensorrt.__version__), gpu_target(self._device))
        self._stream: Any = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # The logger and the runtime must live as long as the engine.
        self._logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        self._runtime = tensorrt.Runtime(self._logger)
        with torch.cuda.stream(self._stream):  # TensorRT loads an engine on the current device; a no-op for None
            self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
            if self._engine is None:
                raise ModelError(
                    f"{self.path} does not open in TensorRT {tensorrt.__version__}: it is truncated, or was built by "
                    "another version or for another GPU",
                    hint="build it again on this machine: rtdetr export MODEL --trt-fp16",
                    code="model-unreadable",
                )
            self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT]
        outputs = [n for n in names if n not in inputs]
        max_batch = None
        if IMAGES in inputs and self._engine.get_tensor_shape(IMAGES)[0] < 0:
            _, _, largest = self._engine.get_tensor_profile_shape(IMAGES, 0)
            max_batch = int(largest[0])
        return GraphSpec(header, list(map(self._spec, inputs)), list(map(self._spec, outputs)), max_batch)

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name)
        type_name = getattr(kind, "name", str(kind).rpartition(".")[2])
        if type_name not in _TYPES:
            message = f"{self.path}: the tensor {name} has the unsupported type {type_name}"
            raise ModelError(message, code="model-foreign")
        shape = tuple(int(n) if n >= 0 else None for n in self._engine.get_tensor_shape(name))
        return TensorSpec(name, np.dtype(_TYPES[type_name]), shape)

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run one batch; return every output, in the order of `spec`."""
        import torch

        stream = self._stream.cuda_stream if self._stream is not None else 0
        with torch.cuda.stream(self._stream):  # a no-op for None
            inputs = []  # they must live until the engine has run
            for name, array in feeds.items():
                tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
                inputs.append(tensor)
                if not self._context.set_input_shape(name, tuple(array.shape)):
                    raise ModelError(
                        f"{self.path.name} was not built for {name} of shape {'x'.join(map(str, array.shape))}",
                        hint="build it with another --batch or --imgsz, or --dynamic",
                        code="model-run",
                    )
                self._context.set_tensor_address(name, tensor.data_ptr())
            results = []
            for item in self.spec.outputs:
                shape = tuple(int(n) for n in self._context.get_tensor_shape(item.name))
                kind = torch.from_numpy(np.zeros(0, item.dtype)).dtype
                results.append(torch.empty(shape, dtype=kind, device=self._device))
                self._context.set_tensor_address(item.name, results[-1].data_ptr())
            if not self._context.execute_async_v3(stream):
                raise ModelError(f"TensorRT could not run {self.path.name}", code="model-run")
            if self._stream is not None:
                self._stream.synchronize()
            return [buffer.cpu().numpy() for buffer in results]


def import_tensorrt(*, rtx: bool = False) -> Any:
    """Import the package, or that of TensorRT for RTX, whose classes have the same names."""
    if rtx:
        return import_package("tensorrt_rtx", "TensorRT for RTX", extra="rtx")
    return import_package("tensorrt", "TensorRT")


def is_rtx_engine(path: Path, header: ModelHeader | None) -> bool:
    """Return whether an engine was built by TensorRT for RTX: by its header, or by its first bytes without one."""
    versions = header.extra.get("versions", {}) if header is not None else {}
    if "tensorrt" in versions or RTX_VERSION in versions:
        return RTX_VERSION in versions
    with path.open("rb") as file:
        return file.read(len(_RTX_MAGIC)) == _RTX_MAGIC


def gpu_target(device: Any) -> str:
    """Return the compute capability of a GPU as a target, such as `sm86`."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def check_rtx_engine(path: Path, header: ModelHeader, version: str, target: str) -> None:
    """Refuse an engine that cannot run in the installed `version` of TensorRT for RTX, or on a GPU such as `sm86`.

    Raises:
        EnvironmentProblem: it was built by another version (`tensorrt-version`), or for other GPUs (`engine-target`).
    """
    built_by = header.extra.get("versions", {}).get(RTX_VERSION, version)
    if built_by != version:
        raise EnvironmentProblem(
            f"{path.name} was built by TensorRT for RTX {built_by} and runs in no other version; "
            f"{version} is installed",
            hint=f"pip install {RTX_PACKAGE}=={built_by}, or build the engine again",
            code="tensorrt-version",
        )
    targets = header.extra.get("targets") or [target]
    if target not in targets:
        raise EnvironmentProblem(
            f"{path.name} was built for {', '.join(targets)}; this GPU is {target}",
            hint=f"rtdetr export MODEL --trt-fp16 --rtx --target {target}",
            code="engine-target",
        )

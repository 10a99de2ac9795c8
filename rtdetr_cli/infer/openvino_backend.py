"""OpenVINO, the fastest runtime on Intel and AMD processors. It never loads torch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import EnvironmentProblem, ModelError
from rtdetr_cli.infer.graph import GraphBackend, GraphSpec, TensorSpec, first_line
from rtdetr_cli.infer.packages import import_package
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader


class OpenvinoBackend(GraphBackend):
    """An OpenVINO model: an `.xml` and its `.bin`.

    It computes in float32. On processors with bfloat16 units OpenVINO would choose bfloat16 by itself, which is twice
    as fast but changes scores by about 0.01.
    """

    kind = "openvino"

    def open(self, device: Any, threads: int | None) -> GraphSpec:
        """Compile the model for `device`: `auto` and `cpu` are the CPU, others are OpenVINO's names, such as `GPU`."""
        core = openvino_core()
        name = "CPU" if device in ("auto", "cpu") else device.upper()
        if name.partition(".")[0] not in {d.partition(".")[0] for d in core.available_devices}:
            raise EnvironmentProblem(
                f"device {device} was not found: OpenVINO sees {', '.join(core.available_devices)}",
                hint="--device cpu",
                code="device-missing",
            )
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None and name == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads
        binary = self.path.with_suffix(".bin")
        if not binary.is_file():
            raise ModelError(f"the weights of {self.path} are missing: {binary}", code="model-missing")
        try:
            model = core.read_model(str(self.path))
            header = None
            if model.has_rt_info([METADATA_KEY]):
                text = str(model.get_rt_info([METADATA_KEY]).astype(str))
                header = ModelHeader.from_json(text, source=str(self.path))
            inputs, outputs = [_spec(value) for value in model.inputs], [_spec(value) for value in model.outputs]
            self._compiled = core.compile_model(model, name, settings)
        except ModelError:
            raise
        except Exception as error:  # also a name that is not UTF-8, or a type that numpy does not have
            raise ModelError(
                f"{self.path} does not open in OpenVINO: {first_line(error)}",
                hint="the file is truncated or not an OpenVINO model; export it again",
                code="model-unreadable",
            ) from error
        return GraphSpec(header, inputs, outputs)

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run one batch; return every output, in the order of `spec`."""
        try:
            results = self._compiled(dict(feeds))
        except RuntimeError as error:
            raise ModelError(f"{self.path} fails on this batch: {first_line(error)}", code="model-run") from error
        return [np.array(results[item.name]) for item in self.spec.outputs]


def openvino_core() -> Any:
    """Return the one `openvino.Core` of this process, which is never freed.

    The CPU plugin replaces the signal stack of the thread that loads it, and frees the new one with the last object
    of that core. If the garbage collector does that in another thread, the first thread is left with a freed signal
    stack, and the next signal, such as Ctrl-C, is a segmentation fault.
    """
    return _core(import_openvino())


@functools.cache
def _core(openvino: ModuleType) -> Any:
    return openvino.Core()


def import_openvino() -> Any:
    """Import the package without its telemetry."""
    with without_telemetry():
        return import_package("openvino", "OpenVINO")


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Hide openvino_telemetry from imports.

    On import, openvino reports over the network that it was imported, and so does nncf, unless openvino_telemetry
    cannot be imported; then they use stubs of their own.
    """
    telemetry = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["openvino_telemetry"]
        if telemetry is not None:
            sys.modules["openvino_telemetry"] = telemetry


def _spec(value: Any) -> TensorSpec:
    shape = tuple(n.get_length() if n.is_static else None for n in value.get_partial_shape())
    return TensorSpec(value.get_any_name(), np.dtype(value.get_element_type().to_dtype()), shape)

"""OpenVINO: the quick way on Intel and AMD processors. Never loads torch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import EnvironmentProblem, ModelError
from rtdetr_cli.infer.graph import GraphBackend, Port, first_line
from rtdetr_cli.infer.packages import import_package
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader


class OpenvinoBackend(GraphBackend):
    """An OpenVINO model (`.xml` beside its `.bin`). Computes in float32 unless told otherwise.

    On processors with bfloat16 units OpenVINO would choose that type by itself: twice as fast, but scores move by
    about 0.01, which is for the user to decide.
    """

    kind = "openvino"

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        imgsz: tuple[int, int] | None = None,
        threads: int | None = None,
        precision: str = "f32",
    ) -> None:
        """Open a model.

        Args:
            path: the `.xml`.
            device: `auto` and `cpu` are the CPU; else one of OpenVINO's own names, such as `GPU`.
            imgsz: (height, width); dynamic models only.
            threads: CPU threads.
            precision: `f32`, `bf16` or `f16`: the type to compute in.

        Raises:
            EnvironmentProblem: the package or the device is missing.
            ModelError: not an OpenVINO model, its `.bin` is missing, or it does not keep the contract.
        """
        core = openvino_core()
        name = "CPU" if device in ("auto", "cpu") else device.upper()
        if name.partition(".")[0] not in {d.partition(".")[0] for d in core.available_devices}:
            raise EnvironmentProblem(
                f"device {device} is not there: OpenVINO sees {', '.join(core.available_devices)}",
                hint="--device cpu",
                code="device-missing",
            )
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None and name == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads
        binary = path.with_suffix(".bin")
        if not binary.is_file():
            raise ModelError(
                f"{path} needs its weights beside it, and {binary.name} is not there", code="model-missing"
            )
        try:
            model = core.read_model(str(path))
            header = read_openvino_header(model, path)
            inputs = [_port(value) for value in model.inputs]
            outputs = [value.get_any_name() for value in model.outputs]
            self._compiled = core.compile_model(model, name, settings)
        except RuntimeError as error:
            raise ModelError(
                f"{path} does not open in OpenVINO: {first_line(error)}",
                hint="the file is truncated or not an OpenVINO model: export it again",
                code="model-unreadable",
            ) from error
        super().__init__(path, header=header, inputs=inputs, outputs=outputs, imgsz=imgsz)
        self._names = outputs

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch; return every output by name."""
        try:
            results = self._compiled(dict(feeds))
        except RuntimeError as error:
            raise ModelError(f"{self.path} fails on this batch: {first_line(error)}", code="model-run") from error
        return {name: np.array(results[name]) for name in self._names}


def openvino_core() -> Any:
    """Return the one `openvino.Core` of this process, which lives as long as it does.

    The CPU plugin replaces the signal stack of the thread that loads it, and frees the new one with the last object
    of that core. Where that happens in another thread, as it may whenever the collector runs there, the first thread
    is left with a freed signal stack, and the next signal, Ctrl-C included, is a segmentation fault.
    """
    return _core(import_openvino())


@functools.cache
def _core(openvino: ModuleType) -> Any:
    return openvino.Core()


def import_openvino() -> Any:
    """Import the package without its telemetry, or say how to install it.

    Importing openvino reports that it was imported, over the network and unasked, unless openvino_telemetry cannot be
    imported: it then takes its own stub. A program that has imported openvino itself has made its own choice.
    """
    if "openvino" in sys.modules:
        return import_package("openvino", "OpenVINO")
    telemetry = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_package("openvino", "OpenVINO")
    finally:
        del sys.modules["openvino_telemetry"]
        if telemetry is not None:
            sys.modules["openvino_telemetry"] = telemetry


def read_openvino_header(model: Any, path: Path) -> ModelHeader | None:
    """Return the header in a model's runtime information, or None for a foreign one."""
    if not model.has_rt_info([METADATA_KEY]):
        return None
    return ModelHeader.from_json(str(model.get_rt_info([METADATA_KEY]).astype(str)), source=str(path))


def _port(value: Any) -> Port:
    shape = tuple(n.get_length() if n.is_static else None for n in value.get_partial_shape())
    return Port(value.get_any_name(), np.dtype(value.get_element_type().to_dtype()), shape)

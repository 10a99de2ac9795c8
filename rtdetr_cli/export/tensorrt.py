"""A TensorRT engine of the typed float16 graph: strongly typed, on versions 10 and 11, with nothing left to guess.

Kept thin. The types are in the graph, so no precision flag is set (version 11 has none); what was built is read back
from the engine itself, and the gate decides whether it may be called done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdetr_cli.errors import EnvironmentProblem, ExportError
from rtdetr_cli.export.gate import Interface, TensorSpec
from rtdetr_cli.infer.tensorrt_backend import import_tensorrt

LEAST_HALF = 0.3  # of the layers that compute in floating point; a float32 engine has none at all


@dataclass(frozen=True, slots=True)
class KnownFault:
    """An operator that some versions are known to compute wrongly."""

    operator: str
    since: tuple[int, int]
    until: tuple[int, int]  # the first version without it; (99, 0) while none is known
    why: str
    hint: str


TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}


@dataclass(frozen=True, slots=True)
class Built:
    """An engine: which version built it, its layers by type, and its tensors."""

    version: str
    layers: dict[str, int]
    interface: Interface


KNOWN_FAULTS = (
    KnownFault(
        "GridSample",
        (10, 14),
        (99, 0),
        "gives wrong values in strongly typed engines since 10.14 (pytorch/TensorRT#4074)",
        "export again without --gridsample: the gather in its place gives the same values, here and on other machines",
    ),
)


def version_of(tensorrt: Any) -> tuple[int, int]:
    """Return major and minor version."""
    major, minor = [int(n) for n in (*re.findall(r"\d+", str(tensorrt.__version__)), 0, 0)][:2]
    return major, minor


def refuse_version(tensorrt: Any, operators: dict[str, int]) -> None:
    """Refuse a version that cannot build strongly typed, or that fails on an operator of this very graph.

    Raises:
        EnvironmentProblem: so it is.
    """
    version = version_of(tensorrt)
    if version < (10, 0):
        raise EnvironmentProblem(
            f"TensorRT {tensorrt.__version__} is too old: engines are built strongly typed, which needs 10 or 11",
            hint="pip install -U tensorrt",
            code="tensorrt-version",
        )
    for fault in KNOWN_FAULTS:
        if operators.get(fault.operator) and fault.since <= version < fault.until:
            raise EnvironmentProblem(
                f"TensorRT {tensorrt.__version__} cannot be trusted with this graph: {fault.operator} {fault.why}",
                hint=fault.hint,
                code="tensorrt-fault",
            )


def trtexec_command(onnx_path: Path, engine: Path, shapes: dict[str, tuple[tuple[int, ...], ...]]) -> str:
    """Return the command that builds the engine on another machine.

    Args:
        onnx_path: the typed graph.
        engine: to write.
        shapes: of every dynamic input: smallest, usual, largest.
    """
    words = ["trtexec", f"--onnx={onnx_path}", f"--saveEngine={engine}", "--stronglyTyped"]
    for position, name in enumerate(("min", "opt", "max")):
        if shapes:
            told = ",".join(f"{key}:{'x'.join(map(str, sizes[position]))}" for key, sizes in shapes.items())
            words.append(f"--{name}Shapes={told}")
    return " ".join(words)


def profile_shapes(interface: Interface, *, most: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return smallest, usual and largest shape of every input with an open batch; the usual one is the largest."""

    def filled(spec: TensorSpec, batch: int) -> tuple[int, ...]:
        return tuple(batch if d is None else d for d in spec.shape)

    return {
        spec.name: (filled(spec, 1), filled(spec, most), filled(spec, most))
        for spec in interface.inputs
        if None in spec.shape
    }


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    interface: Interface,
    operators: dict[str, int],
    most: int,
    cache_path: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Built:
    """Build an engine from a typed graph, and look at what was built.

    Args:
        onnx_path: the graph.
        engine_path: to write.
        interface: of the graph.
        operators: of the graph.
        most: the largest batch of a dynamic graph.
        cache_path: the timing cache, read if it is there and written back.
        progress: is told the phase, the steps done and all of them.

    Returns:
        What was built.

    Raises:
        EnvironmentProblem: no TensorRT, or a version that will not do.
        ExportError: TensorRT refused the graph, or built an engine that is not half precision.
    """
    tensorrt = import_tensorrt()
    refuse_version(tensorrt, operators)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    if version_of(tensorrt) >= (11, 0):  # every network is strongly typed, the flag is deprecated
        network = builder.create_network()
    else:
        network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(onnx_path.read_bytes()):
        told = "; ".join(str(parser.get_error(i).desc()) for i in range(min(3, parser.num_errors)))
        raise ExportError(f"TensorRT {tensorrt.__version__} cannot read {onnx_path.name}: {told or 'no reason given'}")

    config = builder.create_builder_config()
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # else the engine does not tell its types
    shapes = profile_shapes(interface, most=most)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT {tensorrt.__version__} refuses the range of shapes {shapes}")
    known = cache_path.read_bytes() if cache_path is not None and cache_path.is_file() else b""
    timings = config.create_timing_cache(known)
    config.set_timing_cache(timings, ignore_mismatch=False)
    monitor = progress_monitor(tensorrt, progress) if progress is not None else None
    if monitor is not None:
        config.progress_monitor = monitor

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"TensorRT {tensorrt.__version__} could not build the engine", hint="its own reason is printed above"
        )
    data = bytes(plan)
    if cache_path is not None:
        cache_path.write_bytes(bytes(timings.serialize()))
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ExportError(f"TensorRT {tensorrt.__version__} cannot open the engine that it has just built")
    inspector = engine.create_engine_inspector()
    layers = count_types(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))
    refuse_single(layers)
    engine_path.write_bytes(data)
    return Built(str(tensorrt.__version__), layers, interface_of_engine(tensorrt, engine))


def interface_of_engine(tensorrt: Any, engine: Any) -> Interface:
    """Read inputs and outputs off an engine."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def spec(name: str) -> TensorSpec:
        kind = engine.get_tensor_dtype(name)
        spelled = getattr(kind, "name", str(kind).rpartition(".")[2])
        shape = tuple(int(n) if n >= 0 else None for n in engine.get_tensor_shape(name))
        return TensorSpec(name, TYPES.get(spelled, spelled), shape)

    inputs = [n for n in names if engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT]
    return Interface(tuple(map(spec, inputs)), tuple(spec(n) for n in names if n not in inputs))


def progress_monitor(tensorrt: Any, told: Callable[[str, int, int], None]) -> Any:
    """Return an object that TensorRT reports the build's outermost phase to; it calls from several threads."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.outer[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.outer:
                told(phase_name, step + 1, self.outer[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.outer.pop(phase_name, None)

    return Monitor()


def count_types(information: str) -> dict[str, int]:
    """Count an engine's layers by the type they compute in: `half`, `float`, or `other`.

    The type is that of a layer's weights where they are told, else that of what it gives. Version 10 writes
    `"Format/Datatype": "Row major linear FP16 format"` (or just `Half`) on every tensor, version 11 `"Format"` and
    `"DataType": "Half"`; both write `"Weights": {"Type": "Half", "Count": 9408}`, the only type told of an engine with
    an open batch, whose formats are `N/A due to dynamic shapes`. A layer without weights that takes one of the two
    types and gives the other is a conversion, and counts as other, as do integers and what tells no type.

    Raises:
        ExportError: the text is not what either version writes.
    """
    try:
        layers = list(json.loads(information)["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError("the engine does not say what its layers compute in") from error
    counts = {"half": 0, "float": 0, "other": 0}
    for layer in layers:
        layer = layer if isinstance(layer, dict) else {}
        weights = layer.get("Weights")
        kind = floating_type(str(weights.get("Type", ""))) if isinstance(weights, dict) else None
        if kind is None:
            taken, kind = floating_type(tensor_types(layer, "Inputs")), floating_type(tensor_types(layer, "Outputs"))
            if taken is not None and taken != kind:
                kind = None
        counts[kind or "other"] += 1
    return counts


def tensor_types(layer: dict[str, Any], side: str) -> str:
    """Return what a layer tells of the types of its `Inputs` or `Outputs`."""
    return " ".join(str(t.get("DataType") or t.get("Format/Datatype") or "") for t in layer.get(side) or [])


def floating_type(told: str) -> str | None:
    """Return `half` where a text names float16, else `float` where it names float32, else None."""
    told = told.lower()
    if "half" in told or "fp16" in told:
        return "half"
    return "float" if "float" in told or "fp32" in told else None


def refuse_single(layers: dict[str, int]) -> None:
    """Refuse an engine that is not half precision, however it came about.

    Raises:
        ExportError: too few layers give half precision.
    """
    floating = layers["half"] + layers["float"]
    if not floating or layers["half"] < LEAST_HALF * floating:
        raise ExportError(
            f"the engine is not half precision: {layers['half']} of {floating} floating-point layers are float16",
            hint="build it from the -fp16.onnx file, strongly typed",
            code="engine-not-half",
        )

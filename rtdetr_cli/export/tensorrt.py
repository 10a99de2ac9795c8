"""A TensorRT engine of the typed float16 graph, built strongly typed by versions 10 and 11.

The types are in the graph, so no precision flag is set (version 11 has none). The precision of the layers is read
back from the finished engine, and verification decides whether the engine is good.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from rtdetr_cli.errors import EnvironmentProblem, ExportError
from rtdetr_cli.export.compare import Interface, TensorSpec
from rtdetr_cli.export.events import BuildProgress
from rtdetr_cli.infer.tensorrt_backend import import_tensorrt

if TYPE_CHECKING:
    import torch

MIN_HALF_SHARE = 0.3  # of the layers that compute in floating point; a float32 engine has none
GRIDSAMPLE_FAULT = (10, 14)  # the first version with the fault; no fixed one is known
TYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}


@dataclass(frozen=True, slots=True)
class Built:
    """A finished engine: the TensorRT version, the number of layers by type, and the tensors."""

    version: str
    layers: dict[str, int]
    interface: Interface


def engine_device() -> torch.device | None:
    """Return the device that engines are built and run on, or None without a GPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def require_tensorrt() -> None:
    """Check that this machine can build and run engines.

    Raises:
        EnvironmentProblem: TensorRT is missing or too old, or there is no CUDA device.
    """
    refuse_version(import_tensorrt(), {})
    if engine_device() is None:
        raise EnvironmentProblem("there is no CUDA device", code="device-missing")


def version_of(tensorrt: Any) -> tuple[int, int]:
    """Return the major and minor version."""
    major, minor = [int(n) for n in (*re.findall(r"\d+", str(tensorrt.__version__)), 0, 0)][:2]
    return major, minor


def refuse_version(tensorrt: Any, operators: dict[str, int]) -> None:
    """Refuse a version that cannot build strongly typed engines, or that computes an operator of the graph wrongly.

    Raises:
        EnvironmentProblem: with the code `tensorrt-version` or `tensorrt-fault`.
    """
    version = version_of(tensorrt)
    if version < (10, 0):
        raise EnvironmentProblem(
            f"TensorRT {tensorrt.__version__} is too old: strongly typed engines need version 10 or 11",
            hint="pip install -U tensorrt",
            code="tensorrt-version",
        )
    if operators.get("GridSample") and version >= GRIDSAMPLE_FAULT:
        raise EnvironmentProblem(
            f"TensorRT {tensorrt.__version__} cannot build this graph correctly: GridSample gives wrong values in "
            "strongly typed engines since 10.14 (pytorch/TensorRT#4074)",
            hint="export again without --gridsample: gather gives the same values on all versions",
            code="tensorrt-fault",
        )


def profile_shapes(interface: Interface, *, max_batch: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the minimum, optimum and maximum shape of every input with a dynamic batch; the last two are equal."""

    def with_batch(spec: TensorSpec, batch: int) -> tuple[int, ...]:
        return tuple(batch if d is None else d for d in spec.shape)

    return {
        spec.name: (with_batch(spec, 1), with_batch(spec, max_batch), with_batch(spec, max_batch))
        for spec in interface.inputs
        if None in spec.shape
    }


def trtexec_command(onnx_path: Path, engine: Path, shapes: dict[str, tuple[tuple[int, ...], ...]]) -> str:
    """Return the command that builds the engine on another machine; `shapes` are those of `profile_shapes`."""
    words = ["trtexec", f"--onnx={onnx_path}", f"--saveEngine={engine}", "--stronglyTyped"]
    for position, name in enumerate(("min", "opt", "max")):
        if shapes:
            listed = ",".join(f"{key}:{'x'.join(map(str, sizes[position]))}" for key, sizes in shapes.items())
            words.append(f"--{name}Shapes={listed}")
    return " ".join(words)


def build_in_thread(onnx_path: Path, engine_path: Path, **options: Any) -> Generator[BuildProgress, None, Built]:
    """Run `build_engine` in a thread, and yield its progress meanwhile."""
    events: SimpleQueue[BuildProgress | None] = SimpleQueue()
    stopped = threading.Event()

    def progress(step: BuildProgress) -> bool:
        events.put(step)
        return not stopped.is_set()

    with ThreadPoolExecutor(1) as pool:
        build = pool.submit(build_engine, onnx_path, engine_path, progress=progress, **options)
        build.add_done_callback(lambda _: events.put(None))
        try:
            yield from iter(events.get, None)
        finally:
            stopped.set()  # an interrupt need not wait for the whole build
        return build.result()


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    interface: Interface,
    operators: dict[str, int],
    max_batch: int,
    cache_path: Path | None = None,
    progress: Callable[[BuildProgress], bool] | None = None,
) -> Built:
    """Build an engine from a typed graph, and check the types that its layers compute in.

    Args:
        onnx_path: the graph.
        engine_path: where to write the engine.
        interface: of the graph.
        operators: of the graph.
        max_batch: the largest batch of a dynamic graph.
        cache_path: the timing cache, read if it exists and written back.
        progress: called with every step, from several threads; returns False to cancel the build.

    Raises:
        EnvironmentProblem: TensorRT is missing, or its version won't do.
        ExportError: TensorRT refused the graph, or the engine is not half precision.
    """
    tensorrt = import_tensorrt()
    refuse_version(tensorrt, operators)
    version = str(tensorrt.__version__)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    flags = 0
    if version_of(tensorrt) < (11, 0):  # later, every network is strongly typed and the flag is deprecated
        flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt.OnnxParser(network, logger)  # owns the weights, so it must outlive the build
    if not parser.parse(onnx_path.read_bytes()):
        errors = [str(parser.get_error(i).desc()) for i in range(min(3, parser.num_errors))]
        reason = "; ".join(errors) or "no reason given"
        raise ExportError(f"TensorRT {version} cannot read {onnx_path.name}: {reason}")

    config = builder.create_builder_config()
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # the engine then records its layers' types
    shapes = profile_shapes(interface, max_batch=max_batch)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, optimum, largest) in shapes.items():
            profile.set_shape(name, smallest, optimum, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT {version} refuses the range of shapes {shapes}")
    timings = config.create_timing_cache(cache_path.read_bytes() if cache_path and cache_path.is_file() else b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    if progress is not None:
        monitor = progress_monitor(tensorrt, progress)
        config.progress_monitor = monitor

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT {version} cannot build the engine", hint="TensorRT printed the reason above")
    data = bytes(plan)
    if cache_path is not None:
        cache_path.write_bytes(bytes(timings.serialize()))
    runtime = tensorrt.Runtime(logger)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ExportError(f"TensorRT {version} cannot open the engine that it has just built")
    inspector = engine.create_engine_inspector()
    layers = count_types(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))
    refuse_single(layers)
    engine_path.write_bytes(data)
    return Built(version, layers, interface_of_engine(tensorrt, engine))


def interface_of_engine(tensorrt: Any, engine: Any) -> Interface:
    """Return the inputs and outputs of an engine."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def spec(name: str) -> TensorSpec:
        dtype = engine.get_tensor_dtype(name)
        dtype_name = getattr(dtype, "name", str(dtype).rpartition(".")[2])
        shape = tuple(int(n) if n >= 0 else None for n in engine.get_tensor_shape(name))
        return TensorSpec(name, TYPES.get(dtype_name, dtype_name), shape)

    inputs = [n for n in names if engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT]
    return Interface(tuple(map(spec, inputs)), tuple(spec(n) for n in names if n not in inputs))


def progress_monitor(tensorrt: Any, progress: Callable[[BuildProgress], bool]) -> Any:
    """Return the object to which TensorRT reports its outermost build phases."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                return progress(BuildProgress(phase_name, step + 1, self.steps[phase_name]))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def count_types(information: str) -> dict[str, int]:
    """Count an engine's layers by the type they compute in: `half`, `float`, or `other`.

    The type is that of a layer's weights where they are listed, else that of its outputs. Version 10 writes
    `"Format/Datatype": "Row major linear FP16 format"` (or just `Half`) for every tensor, version 11 `"Format"` and
    `"DataType": "Half"`. Both write `"Weights": {"Type": "Half", "Count": 9408}`, which is the only type in an engine
    with a dynamic batch, whose formats are `N/A due to dynamic shapes`. A layer without weights whose input and output
    types differ is a conversion and counts as other, as do integers and layers without a type.

    Raises:
        ExportError: the text is not what either version writes.
    """
    try:
        layers = list(json.loads(information)["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError("the engine does not state the types that its layers compute in") from error
    counts = {"half": 0, "float": 0, "other": 0}
    for layer in layers:
        layer = layer if isinstance(layer, dict) else {}
        weights = layer.get("Weights")
        dtype = floating_type(str(weights.get("Type", ""))) if isinstance(weights, dict) else None
        if dtype is None:
            source = floating_type(tensor_types(layer, "Inputs"))
            dtype = floating_type(tensor_types(layer, "Outputs"))
            if source is not None and source != dtype:
                dtype = None
        counts[dtype or "other"] += 1
    return counts


def tensor_types(layer: dict[str, Any], side: str) -> str:
    """Return the types of a layer's `Inputs` or `Outputs` as TensorRT writes them."""
    return " ".join(str(t.get("DataType") or t.get("Format/Datatype") or "") for t in layer.get(side) or [])


def floating_type(text: str) -> str | None:
    """Return `half` where a text names float16, else `float` where it names float32, else None."""
    text = text.lower()
    if "half" in text or "fp16" in text:
        return "half"
    return "float" if "float" in text or "fp32" in text else None


def refuse_single(layers: dict[str, int]) -> None:
    """Refuse an engine that is not half precision.

    Raises:
        ExportError: too few layers compute in float16.
    """
    floating = layers["half"] + layers["float"]
    if not floating or layers["half"] < MIN_HALF_SHARE * floating:
        raise ExportError(
            f"the engine is not half precision: {layers['half']} of {floating} floating-point layers are float16",
            hint="build it from the -fp16.onnx file, strongly typed",
            code="engine-not-half",
        )

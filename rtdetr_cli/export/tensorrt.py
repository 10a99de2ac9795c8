"""A TensorRT engine of the typed float16 graph, built strongly typed by versions 10 and 11.

The types are in the graph, so no precision flag is set (version 11 has none). The precision of the layers is read
back from the finished engine, and verification decides whether the engine is good.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from rtdetr_cli.errors import EnvironmentProblem, ExportError
from rtdetr_cli.infer.graph import TensorSpec
from rtdetr_cli.infer.tensorrt_backend import import_tensorrt
from rtdetr_cli.infer.torch_backend import choose_device

MIN_HALF_SHARE = 0.3  # of the layers that compute in floating point; a float32 engine has none
GRIDSAMPLE_FAULT = (10, 14)  # the first version with the fault; no fixed one is known


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """TensorRT has finished a step of a build phase."""

    phase: str
    done: int
    total: int


def engine_device(device: str = "auto") -> torch.device | None:
    """Return the GPU that engines are built and run on: the chosen one, else the first; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    chosen = choose_device(device)
    return chosen if chosen.type == "cuda" else torch.device("cuda", 0)


def require_tensorrt(device: str = "auto", operators: Mapping[str, int] | None = None) -> tuple[str, torch.device]:
    """Check that this machine can build strongly typed engines of a graph; return the version and the device.

    Raises:
        EnvironmentProblem: TensorRT is missing or too old (`tensorrt-version`), computes an operator of the graph
            wrongly (`tensorrt-fault`), or there is no CUDA device (`device-missing`).
    """
    tensorrt = import_tensorrt()
    version = str(tensorrt.__version__)
    if version_of(tensorrt) < (10, 0):
        raise EnvironmentProblem(
            f"TensorRT {version} is too old: strongly typed engines need version 10 or 11",
            hint="pip install -U tensorrt",
            code="tensorrt-version",
        )
    if (operators or {}).get("GridSample") and version_of(tensorrt) >= GRIDSAMPLE_FAULT:
        raise EnvironmentProblem(
            f"TensorRT {version} cannot build this graph correctly: GridSample gives wrong values in "
            "strongly typed engines since 10.14 (pytorch/TensorRT#4074)",
            hint="export again without --gridsample: gather gives the same values on all versions",
            code="tensorrt-fault",
        )
    chosen = engine_device(device)
    if chosen is None:
        raise EnvironmentProblem("there is no CUDA device", code="device-missing")
    return version, chosen


def version_of(tensorrt: Any) -> tuple[int, int]:
    """Return the major and minor version."""
    major, minor = [int(n) for n in (*re.findall(r"\d+", str(tensorrt.__version__)), 0, 0)][:2]
    return major, minor


Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The smallest and the largest shape of every input with a dynamic batch."""


def profile_shapes(inputs: Iterable[TensorSpec], *, max_batch: int) -> Shapes:
    """Return the shapes for batches of 1 to `max_batch`."""

    def with_batch(item: TensorSpec, batch: int) -> tuple[int, ...]:
        return tuple(batch if n is None else n for n in item.shape)

    return {item.name: (with_batch(item, 1), with_batch(item, max_batch)) for item in inputs if None in item.shape}


def trtexec_command(onnx_path: Path, engine: Path, shapes: Shapes) -> str:
    """Return the command that builds the engine on another machine."""
    words = ["trtexec", f"--onnx={onnx_path}", f"--saveEngine={engine}", "--stronglyTyped"]
    for name, position in (("min", 0), ("opt", 1), ("max", 1)):
        if shapes:
            listed = ",".join(f"{key}:{'x'.join(map(str, sizes[position]))}" for key, sizes in shapes.items())
            words.append(f"--{name}Shapes={listed}")
    return " ".join(words)


def build_in_thread(
    onnx_path: Path, engine_path: Path, *, device: torch.device, **options: Any
) -> Generator[BuildProgress, None, dict[str, int]]:
    """Run `build_engine` in a thread, whose current GPU is `device`, and yield its progress meanwhile."""
    events: SimpleQueue[BuildProgress | None] = SimpleQueue()
    stopped = threading.Event()

    def progress(step: BuildProgress) -> bool:
        events.put(step)
        return not stopped.is_set()

    def build() -> dict[str, int]:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return build_engine(onnx_path, engine_path, progress=progress, **options)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(build)
        future.add_done_callback(lambda _: events.put(None))
        try:
            yield from iter(events.get, None)
        finally:
            stopped.set()  # an interrupt need not wait for the whole build
        return future.result()


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    shapes: Shapes,
    cache_path: Path | None = None,
    progress: Callable[[BuildProgress], bool] = lambda step: True,
) -> dict[str, int]:
    """Build an engine from a typed graph on the current GPU; return the number of layers by type.

    The timing cache is read if it exists and written back. `progress` is called with every step, from several threads,
    and returns False to cancel the build.

    Raises:
        ExportError: TensorRT refused the graph, or the engine is not half precision.
    """
    tensorrt = import_tensorrt()
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
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, largest) in shapes.items():
            profile.set_shape(name, smallest, largest, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT {version} refuses the range of shapes {shapes}")
    timings = config.create_timing_cache(cache_path.read_bytes() if cache_path and cache_path.is_file() else b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    monitor = progress_monitor(tensorrt, progress)  # must outlive the build
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
    return layers


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
        dtype = floating_type([{"DataType": (layer.get("Weights") or {}).get("Type")}])
        if dtype == "other":
            source, dtype = floating_type(layer.get("Inputs")), floating_type(layer.get("Outputs"))
            if source not in ("other", dtype):
                dtype = "other"
        counts[dtype] += 1
    return counts


def floating_type(tensors: list[dict[str, Any]] | None) -> str:
    """Return `half` where a type of some tensors is float16, else `float` where one is float32, else `other`."""
    text = " ".join(str(t.get("DataType") or t.get("Format/Datatype")) for t in tensors or []).lower()
    if "half" in text or "fp16" in text:
        return "half"
    return "float" if "float" in text or "fp32" in text else "other"


def refuse_single(layers: dict[str, int]) -> None:
    """Raise ExportError where too few layers compute in float16."""
    floating = layers["half"] + layers["float"]
    if not floating or layers["half"] < MIN_HALF_SHARE * floating:
        raise ExportError(
            f"the engine is not half precision: {layers['half']} of {floating} floating-point layers are float16",
            hint="build it from the -fp16.onnx file, strongly typed",
            code="engine-not-half",
        )

"""TensorRT engines of the typed float16 graph: by TensorRT 10 and 11, or by TensorRT for RTX.

The types are in the graph, so no precision flag is set (later versions have none), and TF32 is off: it would compute
the float32 islands with ten bits. The precision of the layers is read back from the finished engine, and verification
decides whether the engine is good. TensorRT for RTX builds for any GPU on any machine; the other builds for the GPU
that it runs on.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from rtdetr_cli.errors import EnvironmentProblem, ExportError, UsageError
from rtdetr_cli.infer.graph import TensorSpec, first_line
from rtdetr_cli.infer.tensorrt_backend import RTX_PACKAGE, gpu_target, import_tensorrt
from rtdetr_cli.infer.torch_backend import choose_device

MIN_HALF_SHARE = 0.3  # of the layers that compute in floating point; a float32 engine has none
GRIDSAMPLE_FAULT = (10, 14)  # the first version with the fault; no fixed one is known
OLDEST_RTX = (1, 7)  # older ones are untested
TURING = "sm75"  # has no float32 matrix products, so its engines have fewer float32 islands
GPU_NAMES = {"sm75": "RTX 20", "sm80": "A100", "sm86": "RTX 30", "sm89": "RTX 40", "sm120": "RTX 50", "sm121": "GB10"}


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


def rtx_targets(text: str | None = None, device: str = "auto") -> tuple[str, ...]:
    """Return the GPUs that an engine of TensorRT for RTX is built for, such as `sm86`.

    Args:
        text: names separated by commas; None for the GPU of this machine, and without one for all that can share an
            engine.
        device: as in `engine_device`.

    Raises:
        EnvironmentProblem: the package is missing or too old, or does not support the GPU of this machine.
        UsageError: a target is unknown, or Turing is not the only one.
    """
    tensorrt = import_tensorrt(rtx=True)
    version = str(tensorrt.__version__)
    if version_of(tensorrt) < OLDEST_RTX:
        raise EnvironmentProblem(
            f"TensorRT for RTX {version} is too old: version {'.'.join(map(str, OLDEST_RTX))} is needed",
            hint=f"pip install -U {RTX_PACKAGE}",
            code="tensorrt-version",
        )
    names = [name.lower() for name in dir(tensorrt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    supported = sorted(names, key=lambda name: int(name[2:]))
    if text is None:
        gpu = engine_device(device)
        if gpu is None:
            return tuple(name for name in supported if name != TURING)
        if gpu_target(gpu) not in supported:
            raise EnvironmentProblem(
                f"TensorRT for RTX {version} does not support the GPU of this machine ({gpu_target(gpu)})",
                hint=f"leave out --rtx, or build for other GPUs: --target {','.join(supported[-2:])}",
                code="engine-target",
            )
        return (gpu_target(gpu),)
    chosen = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    unknown = [name for name in chosen if name not in supported]
    if unknown:
        known = [f"{name} ({GPU_NAMES[name]})" if name in GPU_NAMES else name for name in supported]
        raise UsageError(
            f"--target {text}: TensorRT for RTX {version} does not know {unknown[0]!r}",
            hint=f"use one or more of {', '.join(known)}",
        )
    if TURING in chosen and len(chosen) > 1:
        others = ",".join(name for name in chosen if name != TURING)
        raise UsageError(
            f"--target {text}: {TURING} (Turing) needs an engine of its own, since its float16 graph differs",
            hint=f"export twice: --target {others}, and --target {TURING} --out DIR",
        )
    return chosen


def runs_here(targets: Sequence[str], device: str = "auto") -> torch.device | None:
    """Return the GPU of this machine that an engine for some targets runs on, or None."""
    gpu = engine_device(device)
    return gpu if gpu is not None and gpu_target(gpu) in targets else None


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
    onnx_path: Path, engine_path: Path, *, device: torch.device | None = None, **options: Any
) -> Generator[BuildProgress, None, dict[str, int]]:
    """Run `build_engine` in a thread, whose current GPU is `device`, and yield its progress meanwhile."""
    events: SimpleQueue[BuildProgress | None] = SimpleQueue()
    stopped = threading.Event()

    def progress(step: BuildProgress) -> bool:
        events.put(step)
        return not stopped.is_set()

    def build() -> dict[str, int]:
        if device is not None and device.type == "cuda":
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
    targets: Sequence[str] = (),
    cache_path: Path | None = None,
    progress: Callable[[BuildProgress], bool] = lambda step: True,
) -> dict[str, int]:
    """Build an engine from a typed graph; return the number of layers by type.

    With `targets`, TensorRT for RTX builds it for those GPUs, and needs none itself; else TensorRT builds it on the
    current GPU. The timing cache, which only TensorRT has, is read if it exists and written back. `progress` is called
    with every step, from several threads, and returns False to cancel the build.

    Raises:
        ExportError: TensorRT refused the graph, or the engine is not half precision.
    """
    tensorrt = import_tensorrt(rtx=bool(targets))
    title = f"{'TensorRT for RTX' if targets else 'TensorRT'} {tensorrt.__version__}"
    logger = message_logger(tensorrt)
    builder = tensorrt.Builder(logger)
    flags = 0
    if version_of(tensorrt) < (11, 0):  # later, every network is strongly typed and the flag is deprecated
        flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt.OnnxParser(network, logger)  # owns the weights, so it must outlive the build
    if not parser.parse(onnx_path.read_bytes()):
        errors = [str(parser.get_error(i).desc()) for i in range(min(3, parser.num_errors))]
        raise ExportError(f"{title} cannot read {onnx_path.name}: {'; '.join(errors) or logger.reason}")

    config = builder.create_builder_config()
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # the engine then records its layers' types
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, largest) in shapes.items():
            profile.set_shape(name, smallest, largest, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"{title} refuses the range of shapes {shapes}")
    timings = None
    if targets:
        config.num_compute_capabilities = len(targets)
        for position, target in enumerate(targets):
            config.set_compute_capability(getattr(tensorrt.ComputeCapability, target.upper()), position)
    else:
        timings = config.create_timing_cache(cache_path.read_bytes() if cache_path and cache_path.is_file() else b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    monitor = progress_monitor(tensorrt, progress)  # must outlive the build
    config.progress_monitor = monitor

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{title} cannot build the engine: {logger.reason}")
    data = bytes(plan)
    if cache_path is not None and timings is not None:
        cache_path.write_bytes(bytes(timings.serialize()))
    layers = count_types(parse_layers(logger.layers) if targets else inspect_layers(tensorrt, logger, data, title))
    refuse_single(layers)
    engine_path.write_bytes(data)
    return layers


def message_logger(tensorrt: Any) -> Any:
    """Return a logger that keeps the last error as `reason`, and as `layers` what the builder writes about them."""

    class Messages(tensorrt.ILogger):  # type: ignore[misc]
        reason = "no reason given"
        layers = ""

        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.reason = first_line(RuntimeError(msg))
            elif msg.startswith("Layers:"):
                self.layers = msg

    return Messages()


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


def inspect_layers(tensorrt: Any, logger: Any, data: bytes, title: str) -> list[Any]:
    """Return what an engine states about its layers; this needs the GPU that it was built on."""
    runtime = tensorrt.Runtime(logger)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ExportError(f"{title} cannot open the engine that it has just built: {logger.reason}")
    inspector = engine.create_engine_inspector()
    try:
        return list(json.loads(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError("the engine does not state the types that its layers compute in") from error


def parse_layers(text: str) -> list[Any]:
    """Return the layers of an engine as in `inspect_layers`, from what TensorRT for RTX logs at the end of a build.

    Each has a line `Name: ..., LayerType: gemm, Inputs: [ {..., Datatype: Half, ...} ], Constants: [...], Outputs:
    [...], TacticName: ...`.
    """
    layers = []
    for line in text.splitlines():
        found = re.match(r"Name: .*, Inputs: \[(.*)\], Constants: \[.*\], Outputs: \[(.*)\], TacticName: ", line)
        if found:
            inputs, outputs = (
                [{"DataType": t} for t in re.findall(r"Datatype: (\w+)", part)] for part in found.groups()
            )
            layers.append({"Inputs": inputs, "Outputs": outputs})
    return layers


def count_types(layers: Iterable[Any]) -> dict[str, int]:
    """Count an engine's layers by the type they compute in: `half`, `float`, or `other`.

    The type is that of a layer's weights where they are listed, else that of its outputs. Version 10 writes
    `"Format/Datatype": "Row major linear FP16 format"` (or just `Half`) for every tensor, version 11 `"Format"` and
    `"DataType": "Half"`. Both write `"Weights": {"Type": "Half", "Count": 9408}`, which is the only type in an engine
    with a dynamic batch, whose formats are `N/A due to dynamic shapes`. A layer without weights whose input and output
    types differ is a conversion and counts as other, as do integers and layers without a type.
    """
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

"""A strict stand-in for the TensorRT package, with the names of versions 10 and 11 and no others.

`tensorrt_names.json` lists the attributes of the real Python bindings (10.16.1 and 11.4.0). Every object here refuses
an attribute that the real one lacks, and raises `NotSimulated` for a real one that is not simulated. An engine is the
ONNX graph itself, run by ONNX Runtime in the memory that the caller provides, so that tests cover every step: parse,
profile, timing cache, build, inspect, deserialize, run.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

NAMES = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
MAGIC = b"ftrt-standin"
KINDS = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.float32),
    onnx.TensorProto.FLOAT16: ("HALF", np.float16),
    onnx.TensorProto.INT64: ("INT64", np.int64),
    onnx.TensorProto.INT32: ("INT32", np.int32),
    onnx.TensorProto.UINT8: ("UINT8", np.uint8),
}


class NotSimulated(Exception):
    """A real attribute that the stand-in does not simulate."""


def make(
    version: str, *, precision: str = "as typed", refuse: str = "", plan: bool = True, information: str | None = None
) -> ModuleType:
    """Return a module for `sys.modules["tensorrt"]`.

    Args:
        version: a key of `tensorrt_names.json`.
        precision: `as typed`, or `single` for a builder that ignores the graph's types.
        refuse: the error of the parser; empty for none.
        plan: False for a builder that fails.
        information: what the inspector says instead of the layers.
    """
    names = {key: set(value.split()) for key, value in NAMES[version].items()}
    major = int(version.partition(".")[0])
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    log: list[tuple[str, Any]] = []
    module.log = log  # type: ignore[attr-defined]  # for the tests

    class Strict:
        """Refuses attributes that the real class does not have."""

        real = ""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name in names[self.real]:
                raise NotSimulated(f"{self.real}.{name}")
            raise AttributeError(f"tensorrt {version}: {self.real} has no attribute {name}")

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_") and name not in names[self.real]:
                raise AttributeError(f"tensorrt {version}: {self.real} has no attribute {name}")
            object.__setattr__(self, name, value)

        def __init_subclass__(cls) -> None:
            own = {n for n in vars(cls) if not n.startswith("_") and n != "real"}
            assert own <= names[cls.real], f"{cls.real} of TensorRT {version} has no {own - names[cls.real]}"

    def members(real: str) -> Any:
        return enum.IntEnum(real, {n: i for i, n in enumerate(sorted(n for n in names[real] if n.isupper()))})

    DataType, TensorIOMode, BuilderFlag = members("DataType"), members("TensorIOMode"), members("BuilderFlag")
    flags, verbosity, formats = (
        members("NetworkDefinitionCreationFlag"),
        members("ProfilingVerbosity"),
        members("LayerInformationFormat"),
    )

    class Logger(Strict):
        real = "Logger"
        ERROR, WARNING, INFO = 1, 2, 3

        def __init__(self, severity: int = 2) -> None:
            pass

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

        def __init__(self) -> None:
            pass

    class Network(Strict):
        real = "INetworkDefinition"

        def __init__(self, typed: bool) -> None:
            self._typed, self._graph = typed, b""

    class Profile(Strict):
        real = "IOptimizationProfile"

        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    class Memory:
        """IHostMemory: bytes-like."""

        def __init__(self, data: bytes) -> None:
            self._data = data

        def __buffer__(self, flags: int) -> memoryview:
            return memoryview(self._data)

        def __bytes__(self) -> bytes:
            return self._data

    class TimingCache(Strict):
        real = "ITimingCache"

        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> Memory:
            return Memory(self._data + b"+1")

    class Config(Strict):
        real = "IBuilderConfig"
        profiling_verbosity: Any = None
        progress_monitor: Any = None

        def __init__(self) -> None:
            self._profiles: list[Profile] = []
            self._flags = {BuilderFlag.TF32}  # on by default, as in the real one

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        def add_optimization_profile(self, profile: Profile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
            log.append(("timing cache", bytes(serialized_timing_cache)))
            return TimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert isinstance(cache, TimingCache)
            return not ignore_mismatch

    class ParserError(Strict):
        real = "ParserError"

        def desc(self) -> str:
            return refuse

    class OnnxParser(Strict):
        real = "OnnxParser"

        def __init__(self, network: Network, logger: Any) -> None:
            self._network = network

        @property
        def num_errors(self) -> int:
            return 1 if refuse else 0

        def get_error(self, index: int) -> ParserError:
            assert index < self.num_errors
            return ParserError()

        def parse(self, model: bytes, path: str | None = None) -> bool:
            onnx.checker.check_model(bytes(model))
            self._network._graph = bytes(model)
            return not refuse

    class Builder(Strict):
        real = "Builder"

        def __init__(self, logger: Any) -> None:
            pass

        def create_network(self, flags: int = 0) -> Network:
            log.append(("network flags", flags))
            return Network(major >= 11 or bool(flags & 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)))

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> Memory | None:
            graph = onnx.load_from_string(network._graph).graph
            shapes = {k: v for p in config._profiles for k, v in p._shapes.items()}
            dynamic_inputs = {
                value.name
                for value in graph.input
                if any(not d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
            }
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("Building engine", None, 2)
                config.progress_monitor.phase_start("Timing", "Building engine", 7)
                assert config.progress_monitor.step_complete("Timing", 0)
                assert config.progress_monitor.step_complete("Building engine", 0)
                config.progress_monitor.phase_finish("Timing")
                assert config.progress_monitor.step_complete("Building engine", 1)
                config.progress_monitor.phase_finish("Building engine")
            if not plan or dynamic_inputs != set(shapes):  # like the real one, needs a profile for every dynamic input
                return None
            facts = {
                "shapes": shapes,
                "typed": network._typed and precision == "as typed",
                "tf32": BuilderFlag.TF32 in config._flags,
                "detailed": config.profiling_verbosity == verbosity.DETAILED,
            }
            log.append(("built", facts))
            return Memory(MAGIC + json.dumps(facts).encode() + b"\0" + network._graph)

    class Context(Strict):
        real = "IExecutionContext"

        def __init__(self, engine: Engine) -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: Any) -> bool:
            shape = tuple(shape)
            fixed = self._engine.get_tensor_shape(name)
            smallest, _, largest = self._engine._facts["shapes"].get(name, (fixed, fixed, fixed))
            if not all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True)):
                return False
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            batch = next(iter(self._shapes.values()))[0]
            return tuple(batch if n < 0 else n for n in self._engine.get_tensor_shape(name))

        def execute_async_v3(self, stream_handle: int) -> bool:
            engine = self._engine
            feeds = {n: self._view(n) for n in engine._inputs}
            for name, value in zip(engine._outputs, engine._session.run(engine._outputs, feeds), strict=True):
                self._view(name)[...] = value
            return True

        def _view(self, name: str) -> Any:
            kind, shape = self._engine._kinds[name][1], self.get_tensor_shape(name)
            size = math.prod(shape) * np.dtype(kind).itemsize
            raw = (ctypes.c_char * size).from_address(self._addresses[name])
            return np.frombuffer(raw, kind).reshape(shape)

    class Inspector(Strict):
        real = "EngineInspector"

        def __init__(self, engine: Engine) -> None:
            self._engine = engine

        def get_engine_information(self, format: Any) -> str:
            assert format == formats.JSON
            if information is not None:
                return information
            model = onnx.shape_inference.infer_shapes(onnx.load_from_string(self._engine._graph))
            kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
            type_names = {
                onnx.TensorProto.FLOAT: "Float",
                onnx.TensorProto.FLOAT16: "Half",
                onnx.TensorProto.INT64: "Int64",
            }
            layers: list[Any] = []
            for node in model.graph.node:
                name = node.output[0]
                if not self._engine._facts["detailed"]:
                    layers.append(node.name or name)
                    continue
                kind = type_names.get(kinds.get(name, 0), "Bool")
                kind = "Float" if kind == "Half" and not self._engine._facts["typed"] else kind
                long = {"Float": "Row major linear FP32 format", "Half": "Row major linear FP16 format"}.get(kind, kind)
                tensor = {"Format": long, "DataType": kind} if major >= 11 else {"Format/Datatype": long}
                layers.append({"Name": name, "LayerType": node.op_type, "Outputs": [{"Name": name, **tensor}]})
            bindings = [*self._engine._inputs, *self._engine._outputs]
            io = {"I/O Tensors": [{"Name": n} for n in bindings]} if major >= 11 else {"Bindings": bindings}
            return json.dumps({"Layers": layers, **io})

    class Engine(Strict):
        real = "ICudaEngine"

        def __init__(self, data: bytes) -> None:
            facts, _, graph = data[len(MAGIC) :].partition(b"\0")
            self._facts, self._graph = json.loads(facts), graph
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            proto = onnx.load_from_string(graph).graph
            self._inputs = [v.name for v in proto.input]
            self._outputs = [v.name for v in proto.output]
            self._values = {v.name: v.type.tensor_type for v in (*proto.input, *proto.output)}
            self._kinds = {n: KINDS[t.elem_type] for n, t in self._values.items()}

        @property
        def num_io_tensors(self) -> int:
            return len(self._values)

        def get_tensor_name(self, index: int) -> str:
            return list(self._values)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in self._values[name].shape.dim)

        def get_tensor_dtype(self, name: str) -> Any:
            return DataType[self._kinds[name][0]]

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            return [tuple(s) for s in self._facts["shapes"][name]]

        def create_execution_context(self) -> Context:
            return Context(self)

        def create_engine_inspector(self) -> Inspector:
            return Inspector(self)

    class Runtime(Strict):
        real = "Runtime"

        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            data = bytes(serialized_engine)
            return Engine(data) if data.startswith(MAGIC) else None

    class IProgressMonitor:
        def __init__(self) -> None:
            pass

    for name, value in {
        "Logger": Logger,
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "Runtime": Runtime,
        "IProgressMonitor": IProgressMonitor,
        "DataType": DataType,
        "TensorIOMode": TensorIOMode,
        "NetworkDefinitionCreationFlag": flags,
        "ProfilingVerbosity": verbosity,
        "LayerInformationFormat": formats,
        "BuilderFlag": BuilderFlag,
        "ILogger": ILogger,
    }.items():
        setattr(module, name, value)
    return module

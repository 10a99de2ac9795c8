"""Write a model in each format: ONNX, ONNX float16, OpenVINO, TensorRT."""

from __future__ import annotations

import copy
import functools
import platform
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from rtdetr_cli import __version__
from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.export import tensorrt
from rtdetr_cli.export.artefacts import NAME_ENDINGS, Artefact, mark_name, rename_artefact
from rtdetr_cli.export.compare import Interface
from rtdetr_cli.export.events import BuildProgress, Notice
from rtdetr_cli.export.graph import DeployGraph, ExportOptions, example_inputs, expected_interface
from rtdetr_cli.files import atomic_write
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.tensorrt_backend import header_path
from rtdetr_cli.weights.header import ModelHeader

ENGINE_BATCH = 8  # the largest batch of a dynamic engine, unless --batch is larger


@dataclass(eq=False)
class ExportContext:
    """What all formats of one export share.

    Attributes:
        header: the model's, with the layers, queries, sampling and input size that are exported.
        folder, stem: where the files go, and how their names begin.
        options: formats and shapes.
        graph: the model, ready to be traced.
        norm_count: layer norms that the graph must have.
        artefacts: the formats that are done, by name.
        renamed: old and new name of files of earlier exports.
    """

    header: ModelHeader
    folder: Path
    stem: str
    options: ExportOptions
    graph: DeployGraph
    norm_count: int
    artefacts: dict[str, Artefact] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def interface(self) -> Interface:
        """The tensors that each file must have."""
        return expected_interface(self.options, self.header)

    @functools.cached_property
    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace with; a dynamic batch needs two images, since tracing takes a one for a constant."""
        batch = max(2, self.options.batch) if self.options.dynamic else self.options.batch
        return example_inputs(self.options, self.header.imgsz, batch=batch)

    @functools.cached_property
    def float_onnx(self) -> onnx.ModelProto:
        """The float32 graph, shared by ONNX and OpenVINO; copy it before changing it."""
        return self.trace(self.graph)

    @functools.cached_property
    def half_program(self) -> torch.fx.GraphModule:
        """The float16 program, shared by the graph and its twin."""
        from rtdetr_cli.export.fp16 import half_program

        return half_program(self.graph, self.example_inputs, dynamic=self.options.dynamic)

    def trace(self, module: torch.nn.Module) -> onnx.ModelProto:
        """Trace a module to ONNX and check the graph."""
        model = onnx_file.trace(
            module,
            self.example_inputs,
            input_names=self.options.input_names,
            output_names=self.options.output_names,
            dynamic=self.options.dynamic,
            opset=self.options.opset,
        )
        onnx_file.audit(model, norms=self.norm_count, gridsample=self.options.gridsample)
        return model

    def final_path(self, name: str) -> Path:
        """Return the path of a format that passes verification."""
        return self.folder / f"{self.stem}{NAME_ENDINGS[name]}"

    def header_for(
        self, format: str, precision: str, versions: dict[str, str] | None = None, **facts: Any
    ) -> ModelHeader:
        """Return the header of an exported file."""
        extra = {
            **{key: value for key, value in self.header.extra.items() if key != "gate"},
            "format": format,
            "precision": precision,
            "opset": self.options.opset,
            "operator": "gridsample" if self.options.gridsample else "gather",
            "preprocess_in_graph": self.options.preprocess,
            "source_identity": self.header.identity,
            "versions": {
                "rtdetr-cli": __version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "python": platform.python_version(),
                **(versions or {}),
            },
            **facts,
        }
        return replace(self.header, extra=extra, version=__version__)

    def set_aside_previous(self, name: str) -> Iterator[Notice]:
        """Rename the file of an earlier export that this export does not replace, so that nobody deploys it as new."""
        path = self.final_path(name)
        if path.exists():
            previous = mark_name(path, "previous")
            rename_artefact(path, previous)
            self.renamed[path.name] = previous.name
            yield Notice(
                f"renamed {path.name} of an earlier export to {previous.name}: this export has no such file that passed"
            )


@dataclass(eq=False)
class Draft:
    """A file written under a temporary name, until verification decides its final one.

    Attributes:
        path: `<stem>.unverified.*`.
        final_path: the name after a pass.
        header: without the verdict.
        save: writes the file, or only its header where that is a file of its own.
        interface: the tensors of the written file.
        operators: number of each operator.
        half_twin: runs the same float16 graph in torch.
    """

    path: Path
    final_path: Path
    header: ModelHeader
    save: Callable[[Path, ModelHeader], None]
    interface: Interface
    operators: dict[str, int]
    half_twin: Backend | None = None

    def write(self, gate: dict[str, Any]) -> None:
        """Write the file with a verdict in its header."""
        self.save(self.path, replace(self.header, extra={**self.header.extra, "gate": gate}))


DraftEvents = Generator[Notice | BuildProgress, None, Draft]


def write_onnx(context: ExportContext) -> DraftEvents:
    """Write the float32 graph."""
    yield Notice(f"onnx  opset {context.options.opset}")
    return onnx_draft(context, "onnx", copy.deepcopy(context.float_onnx), context.header_for("onnx", "fp32"))


def write_fp16(context: ExportContext) -> DraftEvents:
    """Write the float16 graph, and prepare its twin."""
    from rtdetr_cli.export.fp16 import ISLANDS, HalfTwin

    yield Notice("onnx  float16, sensitive layers float32")
    islands = [{"name": island.name, "why": island.why} for island in ISLANDS]
    header = context.header_for("onnx", "fp16", islands=islands)
    draft = onnx_draft(context, "fp16", context.trace(context.half_program), header)
    fixed_batch = None if context.options.dynamic else context.options.batch
    draft.half_twin = HalfTwin(context.half_program, context.header, fixed_batch=fixed_batch)
    return draft


def onnx_draft(context: ExportContext, name: str, model: onnx.ModelProto, header: ModelHeader) -> Draft:
    """Write an ONNX graph."""
    if context.options.preprocess:
        onnx_file.prepend_preprocessing(model, context.header.imgsz)

    def save(path: Path, header: ModelHeader) -> None:
        onnx_file.embed(model, header)
        onnx_file.save(model, path)

    final = context.final_path(name)
    operators = dict(sorted(onnx_file.operators(model).items()))
    draft = Draft(mark_name(final, "unverified"), final, header, save, onnx_file.describe(model), operators)
    draft.write({"passed": None})
    return draft


def write_openvino(context: ExportContext) -> DraftEvents:
    """Write OpenVINO's files."""
    from rtdetr_cli.export.openvino import OpenvinoFile

    yield Notice("openvino  float16-compressed weights")
    file = OpenvinoFile(context.float_onnx, preprocess=context.options.preprocess)
    header = context.header_for("openvino", "fp16", file.versions)
    final = context.final_path("openvino")
    draft = Draft(mark_name(final, "unverified"), final, header, file.save, file.interface(), file.operators())
    draft.write({"passed": None})
    return draft


def write_engine(context: ExportContext) -> DraftEvents:
    """Build the TensorRT engine of the float16 graph that has just been verified.

    Raises:
        EnvironmentProblem: this machine cannot build it; the graph is ready, and the hint says how to go on.
    """
    graph = context.artefacts["fp16"]
    final = context.final_path("trt-fp16")
    path = mark_name(final, "unverified")
    dynamic, batch = context.options.dynamic, context.options.batch
    max_batch = max(batch, ENGINE_BATCH) if dynamic else batch
    yield Notice(f"tensorrt  strongly typed, batch {'1 to ' if dynamic else ''}{max_batch}")
    try:
        tensorrt.require_tensorrt()
        built = yield from tensorrt.build_in_thread(
            graph.path,
            path,
            interface=context.interface,
            operators=graph.operators,
            max_batch=max_batch,
            cache_path=context.folder / "tensorrt.cache",
        )
    except EnvironmentProblem as error:
        if error.code == "tensorrt-fault":  # an engine built elsewhere would be as wrong
            raise
        yield from context.set_aside_previous("trt-fp16")  # before its header is overwritten
        save_engine_header(final, context.header_for("tensorrt", "fp16", gate={"passed": None}))
        shapes = tensorrt.profile_shapes(context.interface, max_batch=max_batch)
        raise EnvironmentProblem(
            f"the engine cannot be built on this machine ({error.message}); the float16 graph {graph.path} is ready",
            hint=f"on the target machine: {tensorrt.trtexec_command(graph.path, final, shapes)}\n"
            f"copy {header_path(final)} next to the engine: it holds the class names and thresholds\n"
            f"that engine is not verified; compare its AP with the model's: rtdetr eval {final} --data DATA",
            code=error.code,
        ) from error
    header = context.header_for("tensorrt", "fp16", {"tensorrt": built.version}, layers_by_type=built.layers)
    draft = Draft(path, final, header, save_engine_header, built.interface, dict(built.layers))
    draft.write({"passed": None})
    return draft


def save_engine_header(engine: Path, header: ModelHeader) -> None:
    """Write the header of an engine to the file beside it."""
    with atomic_write(header_path(engine)) as temporary:
        temporary.write_text(header.to_json() + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[ExportContext], DraftEvents]] = {
    "onnx": write_onnx,
    "fp16": write_fp16,
    "openvino": write_openvino,
    "trt-fp16": write_engine,
}

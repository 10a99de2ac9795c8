"""Write a model in each format: ONNX, ONNX float16, OpenVINO, INT8 of both, TensorRT."""

from __future__ import annotations

import copy
import functools
import platform
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from rtdetr_cli import __version__
from rtdetr_cli.errors import EnvironmentProblem, ExportError
from rtdetr_cli.export import fp16, int8, tensorrt
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.export.artefacts import NAME_ENDINGS, Artefact, Notice, mark_name, rename_artefact
from rtdetr_cli.export.graph import DeployGraph, count_norms, deployable, example_inputs, expected_spec
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.graph import GraphSpec, first_line
from rtdetr_cli.infer.inspect import count_operators
from rtdetr_cli.infer.openvino_backend import import_openvino, openvino_core
from rtdetr_cli.infer.tensorrt_backend import RTX_VERSION, import_tensorrt
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.text import counted
from rtdetr_cli.weights.binding import header_path, write_export_header
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

ENGINE_BATCH = 8  # the largest batch of a dynamic engine, unless --batch is larger


class ExportContext:
    """What all formats of one export share.

    Attributes:
        header: the model's, with the layers, queries, sampling and input size that are exported.
        graph: the model, ready to be traced.
        spec: the tensors that each file must have.
        norm_count: layer norms that the graph must have.
        calibration: the images to calibrate INT8 on; None where no INT8 is exported.
        artefacts: the formats that are done, by name.
        renamed: old and new name of files of earlier exports.
    """

    def __init__(
        self,
        model: RTDETR,
        header: ModelHeader,
        folder: Path,
        stem: str,
        options: ExportOptions,
        device: str,
        calibration: int8.Calibration | None = None,
    ) -> None:
        sampling, rounding = model.sampling
        self.header = replace(
            header,
            imgsz=options.imgsz or header.imgsz,
            layers=model.layers,
            queries=model.queries,
            sampling=sampling,
            rounding=rounding,
        )
        self.folder, self.stem, self.options, self.device = folder, stem, options, device
        self.calibration = calibration
        folded = deployable(model, gridsample=options.gridsample)
        self.graph = DeployGraph(folded, raw=options.raw, gamma=self.header.dedupe_gamma).eval()
        self.spec: GraphSpec = expected_spec(options, self.header)
        self.norm_count = count_norms(self.graph, example_inputs(options, self.header.imgsz, batch=1))
        self.artefacts: dict[str, Artefact] = {}
        self.renamed: dict[str, str] = {}

    @functools.cached_property
    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace with; a dynamic batch needs two images, since tracing takes a one for a constant."""
        batch = max(2, self.options.batch) if self.options.dynamic else self.options.batch
        return example_inputs(self.options, self.header.imgsz, batch=batch)

    @functools.cached_property
    def float_onnx(self) -> onnx.ModelProto:
        """The float32 graph, shared by ONNX and OpenVINO; copy it before changing it."""
        return self.trace(self.graph)

    def trace(self, module: torch.nn.Module) -> onnx.ModelProto:
        """Trace a module to ONNX and check the graph."""
        model = onnx_file.trace(module, self.example_inputs, spec=self.spec, opset=self.options.opset)
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
                f"renamed {path.name} of an earlier export to {previous.name}: this export has not replaced it"
            )


@dataclass(eq=False)
class Draft:
    """An export that is to be verified.

    Attributes:
        header: without the verdict.
        save: writes the file with a header, or only the header where that is a file of its own.
        operators: number of each operator.
        half_twin: runs the same float16 graph in torch.
        pending: why this machine cannot run it, so that verification has to wait for another.
        alternatives: for INT8, what makes the same draft with one more part in float, by the name of the part.
    """

    header: ModelHeader
    save: Callable[[Path, ModelHeader], None]
    operators: dict[str, int]
    half_twin: Backend | None = None
    pending: str = ""
    alternatives: Mapping[str, Callable[[], Draft]] = field(default_factory=dict)


DraftEvents = Generator[Notice | tensorrt.BuildProgress, None, Draft]


def write_onnx(context: ExportContext, path: Path) -> DraftEvents:
    """Write the float32 graph."""
    yield Notice(f"onnx  opset {context.options.opset}")
    return onnx_draft(context, copy.deepcopy(context.float_onnx), "fp32")


def write_fp16(context: ExportContext, path: Path) -> DraftEvents:
    """Write the float16 graph, and prepare its twin."""
    yield Notice("onnx  float16, sensitive layers float32")
    program = fp16.traced_program(context.graph, context.example_inputs, dynamic=context.options.dynamic)
    islands = fp16.TURING_ISLANDS if tensorrt.TURING in context.options.targets else fp16.ISLANDS
    program = fp16.halve(program, islands)
    draft = onnx_draft(context, context.trace(program), "fp16", islands=fp16.describe(islands))
    spec = expected_spec(replace(context.options, preprocess=False), context.header)
    device = tensorrt.engine_device(context.device) or torch.device("cpu")
    draft.half_twin = fp16.HalfTwin(program, spec, device=device)
    return draft


def onnx_draft(context: ExportContext, model: onnx.ModelProto, precision: str, **facts: Any) -> Draft:
    """Return the draft of an ONNX graph."""
    if context.options.preprocess:
        onnx_file.prepend_preprocessing(model, context.header.imgsz)

    def save(path: Path, header: ModelHeader) -> None:
        onnx_file.embed(model, header)
        onnx_file.save(model, path)

    return Draft(context.header_for("onnx", precision, **facts), save, dict(sorted(count_operators(model).items())))


def write_openvino(context: ExportContext, path: Path) -> DraftEvents:
    """Write OpenVINO's `.xml` and `.bin`, weights compressed to float16, the header in the runtime information."""
    yield Notice("openvino  float16-compressed weights")
    return openvino_draft(context, read_float_openvino(context), "fp16")


def read_float_openvino(context: ExportContext) -> Any:
    """Return the float32 graph as an OpenVINO model."""
    try:
        return openvino_core().read_model(context.float_onnx.SerializeToString())
    except RuntimeError as error:
        version = import_openvino().__version__
        raise ExportError(f"OpenVINO {version} cannot read the graph: {first_line(error)}") from error


def openvino_draft(context: ExportContext, model: Any, precision: str, **facts: Any) -> Draft:
    """Return the draft of an OpenVINO model."""
    openvino = import_openvino()
    if context.options.preprocess:
        try:
            model = with_openvino_resize(openvino, model)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot add the preprocessing: {first_line(error)}") from error

    def save(path: Path, header: ModelHeader) -> None:
        model.set_rt_info(header.to_json(), [METADATA_KEY])
        try:
            openvino.save_model(model, str(path), compress_to_fp16=True)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot write {path}: {first_line(error)}") from error

    counts = Counter(node.get_type_name() for node in model.get_ops())
    operators = {k: v for k, v in sorted(counts.items()) if k not in ("Constant", "Parameter", "Result")}
    header = context.header_for("openvino", precision, {"openvino": str(openvino.__version__)}, **facts)
    return Draft(header, save, operators)


def write_int8(context: ExportContext, path: Path, *, format: str) -> DraftEvents:
    """Write the ONNX graph with INT8 convolutions, or the OpenVINO model with INT8 operators."""
    calibration = context.calibration
    assert calibration is not None
    yield Notice(f"{format}  int8, calibrated on {counted(len(calibration), 'image')}")
    floats = list(int8.ONNX_FLOATS if format == "onnx" else int8.OPENVINO_FLOATS)
    floats += [part for part in int8.PARTS if part.name in context.options.float_parts]
    for part in floats:
        yield Notice(f"{format}  int8, float32: {part.name} ({part.why})")

    def make(parts: Sequence[fp16.Island]) -> Draft:
        facts = {"float_parts": fp16.describe(parts), "calibration_images": len(calibration)}
        if format == "onnx":
            model = int8.quantize_onnx(context.float_onnx, calibration, context.spec, parts)
            return onnx_draft(context, model, "int8", **facts)
        model = int8.quantize_openvino(read_float_openvino(context), calibration, context.spec, parts)
        return openvino_draft(context, model, "int8", **facts)

    result = make(floats)
    rest = [part for part in int8.PARTS if part not in floats]
    result.alternatives = {part.name: functools.partial(make, [*floats, part]) for part in rest}
    return result


def with_openvino_resize(openvino: Any, model: Any) -> Any:
    """Accept uint8 images of any size, with OpenVINO's Pillow-like resize: it ignores ONNX's antialiasing."""
    steps = openvino.preprocess
    processor = steps.PrePostProcessor(model)
    images = processor.input("images")
    images.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    images.tensor().set_spatial_dynamic_shape()
    images.model().set_layout(openvino.Layout("NCHW"))
    images.preprocess().resize(steps.ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
    images.preprocess().convert_element_type(openvino.Type.f32).scale(255.0)
    return processor.build()


def write_engine(context: ExportContext, path: Path) -> DraftEvents:
    """Build the TensorRT engine of the float16 graph that has just been verified.

    Raises:
        EnvironmentProblem: this machine cannot build it; the graph is ready, and the hint says how to go on.
    """
    graph = context.artefacts["fp16"]
    shapes, batches = engine_shapes(context)
    yield Notice(f"tensorrt  strongly typed, {batches}")
    try:
        version, device = tensorrt.require_tensorrt(context.device, graph.operators)
        layers = yield from tensorrt.build_in_thread(
            graph.path, path, device=device, shapes=shapes, cache_path=context.folder / "tensorrt.cache"
        )
    except EnvironmentProblem as error:
        if error.code == "tensorrt-fault":  # an engine built elsewhere would be as wrong
            raise
        final = context.final_path("trt-fp16")
        yield from context.set_aside_previous("trt-fp16")  # before its header is overwritten
        write_export_header(final, context.header_for("tensorrt", "fp16", gate={"passed": None}))
        raise EnvironmentProblem(
            f"the engine cannot be built on this machine ({error.message}); the float16 graph {graph.path} is ready",
            hint=f"on the target machine: {tensorrt.trtexec_command(graph.path, final, shapes)}\n"
            f"copy {header_path(final)} next to the engine: it contains the class names and thresholds\n"
            f"that engine is not verified; compare its AP with the model's: rtdetr eval {final} --data DATA",
            code=error.code,
        ) from error
    header = context.header_for("tensorrt", "fp16", {"tensorrt": version}, layers_by_type=layers)
    return Draft(header, write_export_header, layers)


def write_rtx_engine(context: ExportContext, path: Path) -> DraftEvents:
    """Build the engine of TensorRT for RTX, for GPUs that need not be in this machine."""
    graph, targets = context.artefacts["fp16"], context.options.targets
    shapes, batches = engine_shapes(context)
    yield Notice(f"tensorrt  for RTX, strongly typed, {batches}, GPUs {', '.join(targets)}")
    if graph.operators.get("GridSample"):
        yield Notice(
            "warning: GridSample gives wrong values in engines of TensorRT since 10.14; TensorRT for RTX may too"
        )
    layers = yield from tensorrt.build_in_thread(graph.path, path, shapes=shapes, targets=targets)
    version = str(import_tensorrt(rtx=True).__version__)
    facts = {"layers_by_type": layers, "targets": list(targets)}
    draft = Draft(context.header_for("tensorrt", "fp16", {RTX_VERSION: version}, **facts), write_export_header, layers)
    if tensorrt.runs_here(targets, context.device) is None:
        draft.pending = f"this one has no GPU that it is built for ({', '.join(targets)})"
    return draft


def engine_shapes(context: ExportContext) -> tuple[tensorrt.Shapes, str]:
    """Return the range of shapes of an engine, and its batch sizes in words."""
    dynamic, batch = context.options.dynamic, context.options.batch
    largest = max(batch, ENGINE_BATCH) if dynamic else batch
    shapes = tensorrt.profile_shapes(context.spec.inputs, max_batch=largest)
    return shapes, f"batch {'1 to ' if dynamic else ''}{largest}"


WRITERS: dict[str, Callable[[ExportContext, Path], DraftEvents]] = {
    "onnx": write_onnx,
    "int8": functools.partial(write_int8, format="onnx"),
    "fp16": write_fp16,
    "openvino": write_openvino,
    "openvino-int8": functools.partial(write_int8, format="openvino"),
    "trt-fp16": write_engine,
    "rtx-fp16": write_rtx_engine,
}

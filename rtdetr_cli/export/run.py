"""From a model to verified files: write aside, hold against the model, record the verdict, and only then name."""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, RtdetrError, UsageError
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.export.gate import Gate, Interface, Verdict
from rtdetr_cli.export.graph import (
    DeployGraph,
    ExportOptions,
    count_norms,
    deployable,
    example_inputs,
    input_names,
    interface_of,
    output_names,
)
from rtdetr_cli.files import atomic_write
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend, header_path, import_tensorrt
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.version import __version__
from rtdetr_cli.weights.header import ModelHeader

PARITY_FILE = "parity.json"
SUFFIXES = {"onnx": ".onnx", "fp16": "-fp16.onnx", "openvino": ".xml", "trt-fp16": ".engine"}
ENGINE_BATCH = 8  # the largest batch of a dynamic engine, where no larger one is asked for


def gate_rounds(formats: Sequence[str]) -> int:
    """Return how often the gate's images are answered: by the model, each format, and the float16 twin."""
    return 1 + len(formats) + ("fp16" in formats)


@dataclass(frozen=True, slots=True)
class Artefact:
    """One exported model.

    Attributes:
        path: the file, under its final name; or `*.failed.*` where the gate did not pass.
        format: `onnx`, `openvino` or `tensorrt`.
        precision: `fp32` or `fp16`.
        verdict: the gate's, or None where it was left out.
        operators: of the graph, by name.
        seconds: to make and to judge it.
    """

    path: Path
    format: str
    precision: str
    verdict: Verdict | None = None
    operators: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True unless the gate failed."""
        return self.verdict is None or self.verdict.passed

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "precision": self.precision,
            "gate": None if self.verdict is None else self.verdict.to_json(),
            "bytes": size_of(self.path),
            "seconds": round(self.seconds, 2),
        }


@dataclass(eq=False)
class Work:
    """What the formats of one export share."""

    header: ModelHeader
    out: Path
    stem: str
    options: ExportOptions
    graph: DeployGraph
    imgsz: tuple[int, int]
    norms: int
    interface: Interface
    tell: Callable[[str], None]
    build_progress: Callable[[str, int, int], None] | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)  # old and new name of what earlier exports left

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace with; an open batch is traced with two, since tracing freezes a one."""
        options = self.options
        return example_inputs(options, self.imgsz, batch=max(2, options.batch) if options.dynamic else options.batch)

    def traced(self, module: torch.nn.Module, *, preprocess: bool = False) -> onnx.ModelProto:
        """Trace a module, look the graph over, and let it resize if asked."""
        options = self.options
        if module is self.graph and "traced" in self.cache:
            return self._finished(self.cache["traced"], preprocess)
        model = onnx_file.trace(
            module,
            self.inputs,
            input_names=input_names(options),
            output_names=output_names(options),
            dynamic=options.dynamic,
            opset=options.opset,
        )
        onnx_file.audit(model, norms=self.norms, gridsample=options.gridsample)
        if module is self.graph:
            self.cache["traced"] = model
        return self._finished(model, preprocess)

    def _finished(self, traced: onnx.ModelProto, preprocess: bool) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(traced)
        if preprocess:
            onnx_file.prepend_preprocessing(model, self.imgsz)
        return model

    def half(self) -> torch.fx.GraphModule:
        """Return the half-precision program, made once for the graph, the engine and the twin."""
        if "half" not in self.cache:
            from rtdetr_cli.export.fp16 import half_program

            self.cache["half"] = half_program(self.graph, self.inputs, dynamic=self.options.dynamic)
        return self.cache["half"]  # type: ignore[no-any-return]

    def final(self, name: str) -> Path:
        """Return the path that a format gets once it has passed."""
        return self.out / f"{self.stem}{SUFFIXES[name]}"

    def header_for(self, format: str, precision: str, **facts: Any) -> ModelHeader:
        """Return the header that an artefact carries."""
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
            },
            **facts,
        }
        return replace(self.header, extra=extra, version=__version__)


@dataclass(eq=False)
class Draft:
    """A file that carries a name of its own until the gate has spoken."""

    path: Path
    final: Path
    format: str
    precision: str
    record: Callable[[Path, dict[str, Any]], None]
    interface: Interface | None = None
    twin: Backend | None = None
    operators: dict[str, int] = field(default_factory=dict)


def export_model(
    model: RTDETR,
    header: ModelHeader,
    out: Path,
    options: ExportOptions | None = None,
    *,
    images: Dataset | Sequence[Path] | None = None,
    stem: str = "model",
    tol_ap: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] | None = None,
    build_progress: Callable[[str, int, int], None] | None = None,
    device: str = "auto",
    finished: Callable[[Artefact], None] = lambda artefact: None,
) -> list[Artefact]:
    """Export a model, and hold every file against it.

    A file is written as `<stem>.unverified.*`, judged, and renamed: to its final name, or to `<stem>.failed.*`. A file
    of an earlier export never keeps a name that this export could not give: it becomes `<stem>.previous.*`. The
    verdicts lie in `parity.json` beside the files and in the metadata of each.

    Args:
        model: as loaded or trained; it is not changed.
        header: of the model, with the layers, queries and sampling that are set.
        out: folder, made if needed.
        options: formats and shapes.
        images: a split with labels, or paths, for the gate; None leaves the gate out.
        stem: of the files' names.
        tol_ap: largest difference of AP, 0 to 1.
        tell: is told what is being done, one line a step.
        progress: is told how many images the gate has answered.
        build_progress: is told the phase of a TensorRT build, the steps done and all of them.
        device: of the model and of ONNX Runtime in the gate.
        finished: is given each artefact as soon as it has its name, since a later format may raise.

    Returns:
        One artefact a format, passed or not.

    Raises:
        UsageError: options that clash.
        ExportError: a graph that could not be made.
        EnvironmentProblem: a package or device that a format needs is missing; what was made before stays.
        RtdetrError: the folder cannot be written.
    """
    options = options or ExportOptions()
    options.check()
    if "trt-fp16" in options.formats and "fp16" not in options.formats[: options.formats.index("trt-fp16")]:
        raise UsageError("the format trt-fp16 is built from fp16, which must come before it")
    imgsz = options.imgsz or header.imgsz
    sampling, rounding = model.sampling
    header = replace(
        header, imgsz=imgsz, layers=model.layers, queries=model.queries, sampling=sampling, rounding=rounding
    )
    make_folder(out)
    graph = DeployGraph(deployable(model, gridsample=options.gridsample), raw=options.raw).eval()
    norms = count_norms(graph, example_inputs(options, imgsz, batch=1))
    work = Work(
        header,
        out,
        stem,
        options,
        graph,
        imgsz,
        norms,
        interface_of(options, imgsz, tokens=token_count(imgsz), queries=header.queries, classes=len(header.names)),
        tell,
        build_progress,
    )
    gate = None
    if images is not None:
        gate = Gate(TorchBackend(copy.deepcopy(model), header, device=device), images, progress=progress)
        with exact_products():
            gate.answers()
    artefacts: list[Artefact] = []
    try:
        for name in options.formats:
            start = time.perf_counter()
            if name == "trt-fp16" and not work.cache["fp16"].passed:
                tell("tensorrt  not built, since the graph that it would be built from did not pass")
                set_aside(work, work.final(name))
                continue
            artefact = judge(work, DRAFTS[name](work), gate, tol_ap=tol_ap, device=device)
            artefact = replace(artefact, seconds=time.perf_counter() - start)
            artefacts.append(artefact)
            work.cache[name] = artefact
            finished(artefact)
    except RtdetrError:
        for name in options.formats:
            if name not in work.cache:
                set_aside(work, work.final(name))
        raise
    finally:
        if artefacts or work.moved:
            write_parity(out / PARITY_FILE, work.header, artefacts, moved=work.moved)
    return artefacts


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Let a GPU multiply in float32: TF32, cuDNN's default, keeps 11 bits, and the model is the reference."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def judge(work: Work, draft: Draft, gate: Gate | None, *, tol_ap: float | None, device: str) -> Artefact:
    """Open a draft, hold it against the model, write the verdict into it, and give it its name."""
    verdict: Verdict | None = None
    try:
        if gate is not None:
            work.tell(f"gate  {draft.format} {draft.precision} against the model on {len(gate.paths)} images")
            candidate = open_draft(draft, device)
            interface = None if draft.interface is None else (draft.interface, work.interface)
            verdict = gate.judge(
                candidate,
                precision=draft.precision,
                tol_ap=tol_ap,
                interface=interface,
                dynamic=work.options.dynamic,
                any_size=work.options.preprocess,
                twin=draft.twin,
            )
            del candidate
            if verdict.weak and verdict.passed:
                work.tell(f"warning: {verdict.weak}")
        draft.record(draft.path, {"gate": {"passed": None} if verdict is None else verdict.to_json()})
    except BaseException:
        for part in files_of(draft.path):
            part.unlink(missing_ok=True)
        raise
    if verdict is not None and not verdict.passed:
        final = marked(draft.final, "failed")
        rename(draft.path, final)
        set_aside(work, draft.final)
    else:
        final = draft.final
        rename(draft.path, final)
        for mark in ("failed", "previous"):  # of earlier tries
            for part in files_of(marked(final, mark)):
                part.unlink(missing_ok=True)
    return Artefact(final, draft.format, draft.precision, verdict, draft.operators)


def open_draft(draft: Draft, device: str) -> Backend:
    """Open a draft in its runtime."""
    if draft.format == "tensorrt":
        return TensorrtBackend(draft.path, device=engine_device())
    return open_backend(draft.path, device=device if draft.format == "onnx" else "auto")


def engine_device() -> torch.device | None:
    """Return the device that an engine is built and run on, or None where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


# ----------------------------------------------------------------------------------------------------- formats


def draft_onnx(work: Work) -> Draft:
    """Write the float32 graph."""
    work.tell(f"onnx  opset {work.options.opset}")
    return onnx_draft(work, work.traced(work.graph, preprocess=work.options.preprocess), work.final("onnx"), "fp32")


def draft_fp16(work: Work) -> Draft:
    """Write the typed half-precision graph, with its twin."""
    from rtdetr_cli.export.fp16 import ISLANDS, HalfTwin

    work.tell("onnx  float16, sensitive parts float32")
    islands = [{"name": island.name, "why": island.why} for island in ISLANDS]
    draft = onnx_draft(
        work,
        work.traced(work.half(), preprocess=work.options.preprocess),
        work.final("fp16"),
        "fp16",
        islands=islands,
    )
    fixed = None if work.options.dynamic else work.options.batch
    draft.twin = HalfTwin(work.half(), work.header, imgsz=work.imgsz, fixed_batch=fixed)
    return draft


def onnx_draft(work: Work, model: onnx.ModelProto, final: Path, precision: str, **facts: Any) -> Draft:
    """Write a graph under a name that says it is not verified."""
    path = marked(final, "unverified")
    header = work.header_for("onnx", precision, **facts)

    def record(path: Path, verdict: dict[str, Any]) -> None:
        onnx_file.embed(model, replace(header, extra={**header.extra, **verdict}))
        onnx_file.save(model, path)

    record(path, {"gate": {"passed": None}})
    counts = dict(sorted(onnx_file.operators(model).items()))
    return Draft(path, final, "onnx", precision, record, onnx_file.describe(path), operators=counts)


def draft_openvino(work: Work) -> Draft:
    """Write OpenVINO's files."""
    from rtdetr_cli.export.openvino import OpenvinoFile

    work.tell("openvino  float16-compressed weights")
    made = OpenvinoFile(work.traced(work.graph), preprocess=work.options.preprocess)
    final = work.final("openvino")
    path = marked(final, "unverified")
    header = work.header_for(
        "openvino", "fp16", versions={**work.header_for("", "").extra["versions"], **made.versions}
    )

    def record(path: Path, verdict: dict[str, Any]) -> None:
        made.save(path, replace(header, extra={**header.extra, **verdict}))

    record(path, {"gate": {"passed": None}})
    return Draft(path, final, "openvino", "fp16", record, made.interface(), operators=made.operators())


def draft_engine(work: Work) -> Draft:
    """Build the TensorRT engine of the float16 graph that has just been verified.

    Raises:
        EnvironmentProblem: this machine cannot build it; the graph lies ready, and the hint says how to go on.
    """
    from rtdetr_cli.export.tensorrt import build_engine, profile_shapes, trtexec_command

    graph: Artefact = work.cache["fp16"]
    final = work.final("trt-fp16")
    path = marked(final, "unverified")
    most = max(work.options.batch, ENGINE_BATCH) if work.options.dynamic else work.options.batch
    shapes = profile_shapes(work.interface, most=most)
    work.tell(f"tensorrt  strongly typed, batch {'1 to ' if work.options.dynamic else ''}{most}")
    try:
        import_tensorrt()
        if engine_device() is None:
            raise EnvironmentProblem("there is no CUDA device", code="device-missing")
        built = build_engine(
            graph.path,
            path,
            interface=work.interface,
            operators=graph.operators,
            most=most,
            cache_path=work.out / "tensorrt.cache",
            progress=work.build_progress,
        )
    except EnvironmentProblem as error:
        if error.code == "tensorrt-fault":  # building it elsewhere would be as wrong
            raise
        set_aside(work, final)  # before its header is written for the engine to come
        header = work.header_for("tensorrt", "fp16", gate={"passed": None})
        with atomic_write(header_path(final)) as aside:
            aside.write_text(header.to_json() + "\n", encoding="utf-8")
        raise EnvironmentProblem(
            f"the engine cannot be built here ({error.message}); the typed graph {graph.path} is ready",
            hint=f"on the machine that will run it: {trtexec_command(graph.path, final, shapes)}\n"
            f"beside the engine must lie {header_path(final)}, which holds names and thresholds: copy it there\n"
            f"nothing has verified that engine yet; its AP must be the model's: rtdetr eval {final} --data DATA",
            code=error.code,
        ) from error
    versions = {**work.header_for("", "").extra["versions"], "tensorrt": built.version}
    header = work.header_for("tensorrt", "fp16", versions=versions, layers_by_type=built.layers)

    def record(path: Path, verdict: dict[str, Any]) -> None:
        text = replace(header, extra={**header.extra, **verdict}).to_json()
        header_path(path).write_text(text + "\n", encoding="utf-8")

    record(path, {"gate": {"passed": None}})
    return Draft(path, final, "tensorrt", "fp16", record, built.interface, operators=dict(built.layers))


DRAFTS: dict[str, Callable[[Work], Draft]] = {
    "onnx": draft_onnx,
    "fp16": draft_fp16,
    "openvino": draft_openvino,
    "trt-fp16": draft_engine,
}


# ------------------------------------------------------------------------------------------------------- files


def token_count(imgsz: tuple[int, int]) -> int:
    """Return how many tokens an input has: the queries that can be selected, at most."""
    return sum((imgsz[0] // stride) * (imgsz[1] // stride) for stride in (8, 16, 32))


def marked(path: Path, mark: str) -> Path:
    """Return the path with a mark before its suffix: `best.failed.onnx`."""
    return path.with_name(f"{path.stem}.{mark}{path.suffix}")


def files_of(path: Path) -> list[Path]:
    """Return all files of an artefact: OpenVINO keeps its weights beside, an engine its header."""
    beside = {".xml": path.with_suffix(".bin"), ".engine": header_path(path)}.get(path.suffix)
    return [path] if beside is None else [beside, path]


def rename(source: Path, target: Path) -> None:
    """Give an artefact its name; the file that names the others last."""
    for old, new in zip(files_of(source), files_of(target), strict=True):
        if old.exists() or old == source:
            old.replace(new)
        else:  # an engine that trtexec made may lie there without its header
            new.unlink(missing_ok=True)


def set_aside(work: Work, path: Path) -> None:
    """Take the name from a file of an earlier export, and say so: who deploys it must know that it is not this one."""
    if path.exists():
        other = marked(path, "previous")
        rename(path, other)
        work.moved[path.name] = other.name
        work.tell(f"{path.name} of an earlier export is now {other.name}: this export made no such file that passed")


def size_of(path: Path) -> int:
    """Return the bytes of an artefact."""
    return sum(part.stat().st_size for part in files_of(path) if part.exists())


def make_folder(folder: Path) -> None:
    """Make the folder, or say why not, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".rtdetr-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RtdetrError(
            f"{folder} cannot be written: {error.strerror or error}",
            hint="choose another with --out",
            code="not-writable",
        ) from error


def write_parity(
    path: Path, header: ModelHeader, artefacts: Sequence[Artefact], *, moved: Mapping[str, str] | None = None
) -> None:
    """Write the verdicts and figures of one export, and keep those of earlier ones that still hold.

    Args:
        path: of the file.
        header: of the model.
        artefacts: of this export.
        moved: old and new name of files of earlier exports.
    """
    made = [{**a.to_json(), "imgsz": list(header.imgsz), "operators": a.operators} for a in artefacts]
    kept = earlier_entries(path, header.identity, dict(moved or {}), {a.path.name for a in artefacts})
    document = {
        "schema_version": 1,
        "model": {"identity": header.identity, "preset": header.preset, "names": list(header.names)},
        "imgsz": list(header.imgsz),
        "artefacts": made + kept,
    }
    with contextlib.suppress(FileNotFoundError), atomic_write(path) as aside:
        aside.write_text(json.dumps(document, indent=1, allow_nan=False, default=float) + "\n", encoding="utf-8")


def earlier_entries(path: Path, identity: str, moved: dict[str, str], made: set[str]) -> list[dict[str, Any]]:
    """Return the entries of files that lie there still, were made of the same model, and are not made anew."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not identity or document["model"]["identity"] != identity:
            return []
        kept = []
        for entry in document["artefacts"]:
            old = Path(entry["path"])
            here = path.parent / moved.get(old.name, old.name)
            if here.exists() and here.name not in made and old.name not in moved.values():
                kept.append({"imgsz": document["imgsz"], **entry, "path": str(here)})
        return kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # none, or not one of ours

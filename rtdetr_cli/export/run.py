"""Export a model: write each format, verify it against the model, record the verdict, and only then name the file."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.export import tensorrt
from rtdetr_cli.export.artefacts import Artefact, mark_name, remove_artefact, rename_artefact, write_parity
from rtdetr_cli.export.compare import compare_interfaces
from rtdetr_cli.export.events import BuildProgress, ImageRun, Notice
from rtdetr_cli.export.formats import WRITERS, Draft, ExportContext
from rtdetr_cli.export.graph import DeployGraph, ExportOptions, count_norms, deployable, example_inputs
from rtdetr_cli.export.verify import MAX_IMAGES, Reference, Verdict, verify
from rtdetr_cli.files import ensure_writable
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader

ExportEvent = Notice | ImageRun | BuildProgress | Artefact


def export_model(
    model: RTDETR, header: ModelHeader, folder: Path, options: ExportOptions | None = None, **verification: Any
) -> list[Artefact]:
    """Export a model as `export_events` does, and return one artefact per format, passed or not."""
    events = export_events(model, header, folder, options, **verification)
    return [event for event in events if isinstance(event, Artefact)]


def export_events(
    model: RTDETR,
    header: ModelHeader,
    folder: Path,
    options: ExportOptions | None = None,
    *,
    images: Dataset | Sequence[Path] | None = None,
    stem: str = "model",
    tol_ap: float | None = None,
    device: str = "auto",
) -> Iterator[ExportEvent]:
    """Export a model and verify every file against it.

    A file is written as `<stem>.unverified.*`, verified, and renamed to its final name or to `<stem>.failed.*`. A file
    of an earlier export that is not replaced becomes `<stem>.previous.*`. The verdicts are in `parity.json` beside the
    files and in the header of each.

    Args:
        model: as loaded or trained; it is not changed.
        header: the model's.
        folder: for the files; created if needed.
        options: formats and shapes.
        images: a split with labels, or paths, to verify on; None skips verification.
        stem: of the file names.
        tol_ap: maximum AP difference, 0 to 1.
        device: of the model and of ONNX Runtime during verification.

    Yields:
        What happens; each artefact as soon as it has its name, since a later format may raise.

    Raises:
        UsageError: options that clash.
        ExportError: a graph cannot be made.
        EnvironmentProblem: a package or device that a format needs is missing; what was made before stays.
        RtdetrError: the folder cannot be written.
    """
    options = options or ExportOptions()
    options.check()
    ensure_writable(folder)
    context = prepare(model, header, folder, stem, options)
    reference = None
    if images is not None:
        backend = TorchBackend(copy.deepcopy(model), context.header, device=device)
        reference = Reference(backend, images)
        with full_float32():
            yield from reference.predictions()
    try:
        for name in options.formats:
            started = time.perf_counter()
            if name == "trt-fp16" and not context.artefacts["fp16"].passed:
                yield Notice("tensorrt  skipped: the float16 graph that the engine is built from failed verification")
                yield from context.set_aside_previous(name)
                continue
            draft = yield from WRITERS[name](context)
            artefact = yield from verify_draft(context, draft, reference, tol_ap=tol_ap, device=device)
            yield from name_artefact(context, name, draft, artefact)
            artefact = replace(artefact, seconds=time.perf_counter() - started)
            context.artefacts[name] = artefact
            yield artefact
    except RtdetrError:
        for name in options.formats:
            if name not in context.artefacts:
                yield from context.set_aside_previous(name)
        raise
    finally:
        if context.artefacts or context.renamed:
            write_parity(folder, context.header, list(context.artefacts.values()), context.renamed)


def prepare(model: RTDETR, header: ModelHeader, folder: Path, stem: str, options: ExportOptions) -> ExportContext:
    """Fold the model for deployment, and state in its header what is exported."""
    sampling, rounding = model.sampling
    header = replace(
        header,
        imgsz=options.imgsz or header.imgsz,
        layers=model.layers,
        queries=model.queries,
        sampling=sampling,
        rounding=rounding,
    )
    graph = DeployGraph(deployable(model, gridsample=options.gridsample), raw=options.raw).eval()
    norm_count = count_norms(graph, example_inputs(options, header.imgsz, batch=1))
    return ExportContext(header, folder, stem, options, graph, norm_count)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Turn off TF32 (cuDNN's default on a GPU), which has 11 bits: the model is the reference."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def verify_draft(
    context: ExportContext, draft: Draft, reference: Reference | None, *, tol_ap: float | None, device: str
) -> Generator[ExportEvent, None, Artefact]:
    """Verify a draft and write the verdict into it; a draft that cannot be verified is deleted."""
    format, precision = draft.header.extra["format"], draft.header.extra["precision"]
    verdict: Verdict | None = None
    try:
        if reference is not None:
            yield Notice(f"verify  {format} {precision} on {len(reference.paths)} images")
            problems = compare_interfaces(draft.interface, context.interface)
            candidate = open_draft(draft.path, device if format == "onnx" else "auto")
            for event in verify(candidate, reference, tol_ap=tol_ap, problems=problems, half_twin=draft.half_twin):
                if isinstance(event, Verdict):
                    verdict = event
                else:
                    yield event
            if verdict is not None and verdict.passed and verdict.weakness:
                yield Notice(f"warning: {verdict.weakness}")
            del candidate  # it may hold the file open
        draft.write({"passed": None} if verdict is None else verdict.to_json())
    except BaseException:
        remove_artefact(draft.path)
        raise
    path = draft.final_path if verdict is None or verdict.passed else mark_name(draft.final_path, "failed")
    return Artefact(path, format, precision, verdict, draft.operators)


def name_artefact(context: ExportContext, name: str, draft: Draft, artefact: Artefact) -> Iterator[Notice]:
    """Give a verified draft its name, and take it from the files of earlier exports."""
    rename_artefact(draft.path, artefact.path)
    if not artefact.passed:
        yield from context.set_aside_previous(name)
        return
    for mark in ("failed", "previous"):
        remove_artefact(mark_name(artefact.path, mark))


def open_draft(path: Path, device: str) -> Backend:
    """Open an exported file in its runtime; an engine runs on the device that it was built on."""
    if path.suffix == ".engine":
        return TensorrtBackend(path, device=tensorrt.engine_device())
    return open_backend(path, device=device)


def count_image_runs(formats: Sequence[str], images: Dataset | Sequence[Path]) -> int:
    """Return how many images verification runs: on the model, on each format, and on the float16 twin."""
    return (1 + len(formats) + ("fp16" in formats)) * min(len(images), MAX_IMAGES)

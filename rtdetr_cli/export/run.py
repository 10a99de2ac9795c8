"""Export a model: write each format, verify it against the model, record the verdict, and only then name the file."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, ExportError, ModelError, RtdetrError, UsageError
from rtdetr_cli.export import tensorrt
from rtdetr_cli.export.artefacts import (
    Artefact,
    Notice,
    PartCost,
    mark_name,
    remove_artefact,
    rename_artefact,
    write_parity,
)
from rtdetr_cli.export.compare import LIMITS, compare_graph, match_images
from rtdetr_cli.export.formats import WRITERS, Draft, ExportContext
from rtdetr_cli.export.images import CALIBRATION_HINT
from rtdetr_cli.export.int8 import FEW_IMAGES, Calibration
from rtdetr_cli.export.options import CALIBRATION_IMAGES, ENGINES, FLOAT_FORMATS, ExportOptions
from rtdetr_cli.export.verify import ImageRun, Reference, Verdict, average_precision, predict, result_of, verify
from rtdetr_cli.files import ensure_writable
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.graph import GraphBackend
from rtdetr_cli.infer.inspect import inspect_model
from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend
from rtdetr_cli.infer.timing import images_to_time, latencies
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.text import counted
from rtdetr_cli.weights.binding import bind, record_verdict
from rtdetr_cli.weights.header import ModelHeader

SOURCES = {**FLOAT_FORMATS, **dict.fromkeys(ENGINES, "fp16")}
ExportEvent = Notice | ImageRun | tensorrt.BuildProgress | Artefact


def export_model(
    model: RTDETR,
    header: ModelHeader,
    folder: Path,
    options: ExportOptions | None = None,
    *,
    notify: Callable[[str], None] = lambda text: None,
    **verification: Any,
) -> list[Artefact]:
    """Export a model as `export_events` does, and return one artefact per format, passed or not."""
    artefacts = []
    for event in export_events(model, header, folder, options, **verification):
        if isinstance(event, Notice):
            notify(event.message)
        elif isinstance(event, Artefact):
            artefacts.append(event)
    return artefacts


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
    calibration: Sequence[Path] = (),
    calibration_images: int = CALIBRATION_IMAGES,
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
        device: of the model and of ONNX Runtime during verification; a GPU is also where the engine is built.
        calibration: images of the train split, on which INT8 is calibrated.
        calibration_images: how many of them to use at most.

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
    calibrated = yield from calibrate(options, calibration, options.imgsz or header.imgsz, calibration_images)
    context = ExportContext(model, header, folder, stem, options, device, calibrated)
    if options.raw and (gamma := context.header.dedupe_gamma):
        yield Notice(
            f"raw  without post-processing, so duplicates are not rescored in the graph (gamma {gamma:g}); "
            "rtdetr predict does it after the graph"
        )
    reference = None
    if images is not None:
        reference = Reference(TorchBackend(copy.deepcopy(model), context.header, device=device), images)
        yield from reference.predictions()
    try:
        for name in options.formats:
            started = time.perf_counter()
            source = context.artefacts.get(SOURCES.get(name, ""))
            if source is not None and not source.passed:
                yield Notice(f"{name}  skipped: {source.path.name}, which it is made from, failed verification")
                yield from context.set_aside_previous(name)
                continue
            artefact = yield from export_format(context, name, reference, tol_ap)
            context.artefacts[name] = replace(artefact, seconds=time.perf_counter() - started)
            yield context.artefacts[name]
    except RtdetrError:
        for name in options.formats:
            if name not in context.artefacts:
                yield from context.set_aside_previous(name)
        raise
    finally:
        if context.artefacts or context.renamed:
            write_parity(folder, context.header, list(context.artefacts.values()), context.renamed)


def export_format(
    context: ExportContext, name: str, reference: Reference | None, tol_ap: float | None
) -> Generator[ExportEvent, None, Artefact]:
    """Write one format, verify it, and name the file by the verdict; a file that cannot be verified is deleted."""
    final = context.final_path(name)
    path = mark_name(final, "unverified")
    verdict: Verdict | None = None
    try:
        draft = yield from WRITERS[name](context, path)
        format, precision = draft.header.extra["format"], draft.header.extra["precision"]
        draft.save(path, bind(path, draft.header, {"passed": None}))
        if reference is not None and draft.pending:
            yield Notice(f"warning: {final.name} must be verified on the target machine: {draft.pending}")
        elif reference is not None:
            yield Notice(f"verify  {format} {precision} on {counted(len(reference.paths), 'image')}")
            candidate = open_draft(path, context)
            problems = compare_graph(inspect_model(path), precision, candidate.spec, context.spec)
            verdict = yield from verify(
                candidate, reference, tol_ap=tol_ap, problems=problems, half_twin=draft.half_twin
            )
            del candidate  # it may hold the file open
        elif path.suffix in (".onnx", ".xml"):
            run_once(path, context)
        times = yield from compare_latency(context, name, path)
        if verdict is not None:
            record_verdict(path, draft.header, verdict.to_json())
            if verdict.passed and verdict.weakness:
                yield Notice(f"warning: {verdict.weakness}")
    except BaseException:
        remove_artefact(path)
        raise
    if verdict is not None and not verdict.passed:
        failed = mark_name(final, "failed")
        rename_artefact(path, failed)
        yield from context.set_aside_previous(name)
        assert reference is not None
        costs = yield from measure_costs(draft.alternatives, reference, final.suffix)
        return Artefact(failed, format, precision, verdict, draft.operators, costs=costs, latencies_ms=times)
    rename_artefact(path, final)
    for mark in ("failed", "previous"):
        remove_artefact(mark_name(final, mark))
    pending = draft.pending if reference is not None else ""
    return Artefact(final, format, precision, verdict, draft.operators, pending=pending, latencies_ms=times)


def run_once(path: Path, context: ExportContext) -> None:
    """Open and run a file that is not verified; raise ExportError where it does not run."""
    try:
        backend = open_draft(path, context)
        height, width = backend.imgsz
        backend.run(np.zeros((1, height, width, 3), np.uint8), np.array([[width, height]]))
    except ModelError as error:
        raise ExportError(f"the exported file does not run: {error.message}") from error


def calibrate(
    options: ExportOptions, paths: Sequence[Path], imgsz: tuple[int, int], count: int
) -> Generator[Notice, None, Calibration | None]:
    """Read the images to calibrate INT8 on; return None where no INT8 is exported."""
    if not options.int8:
        return None
    if not paths:
        raise UsageError("INT8 needs images to calibrate on", hint=CALIBRATION_HINT, code="no-images")
    calibration = Calibration(paths, imgsz, count)
    if len(calibration) < FEW_IMAGES:
        yield Notice(
            f"warning: INT8 is calibrated on {counted(len(calibration), 'image')} only, which may not cover what it "
            f"will see; {CALIBRATION_IMAGES} are enough (--calibration, --calibration-images)"
        )
    return calibration


def compare_latency(context: ExportContext, name: str, path: Path) -> Generator[Notice, None, tuple[float, ...]]:
    """Return the milliseconds of the float file's network and of an INT8 file's; nothing for other formats."""
    source = context.artefacts.get(FLOAT_FORMATS.get(name, ""))
    if source is None:
        return ()
    yield Notice(f"measure  latency of {source.path.name} and its INT8 version")
    return tuple(latencies([open_draft(file, context) for file in (source.path, path)], images_to_time(None)))


def measure_costs(
    alternatives: Mapping[str, Callable[[], Draft]], reference: Reference, suffix: str
) -> Generator[Notice, None, tuple[PartCost, ...]]:
    """Return what each alternative would detect on the verification images, the best first.

    `suffix` is of the format's files.
    """
    costs = []
    for part, make in alternatives.items():
        yield Notice(f"verify  int8 with the {part} in float32, to find out what costs most")
        draft = make()
        with tempfile.TemporaryDirectory(prefix="rtdetr-int8-") as folder:
            path = Path(folder) / f"model{suffix}"
            draft.save(path, draft.header)
            backend = open_backend(path, device="cpu")
            expected, predictions = result_of(reference.predictions()), result_of(predict(backend, reference.paths))
            del backend
        match = match_images(list(expected.values()), list(predictions.values()), LIMITS["int8"])
        ap = None
        if reference.dataset is not None:
            with contextlib.suppress(DataError):  # labelled with other classes than the model's
                ap = average_precision(reference.dataset, predictions, draft.header)
        costs.append(PartCost(part, match.share, ap))
    return tuple(sorted(costs, key=lambda cost: (cost.ap or 0.0, cost.matched), reverse=True))


def open_draft(path: Path, context: ExportContext) -> GraphBackend:
    """Open an exported file in its runtime; an engine runs on the device that it was built on."""
    if path.suffix == ".engine":
        return TensorrtBackend(path, device=tensorrt.engine_device(context.device))
    backend = open_backend(path, device=context.device if path.suffix == ".onnx" else "auto")
    assert isinstance(backend, GraphBackend)
    return backend

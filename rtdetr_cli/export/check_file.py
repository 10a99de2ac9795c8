"""Verify a file that exists already, of any format and from any tool, against a model."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.errors import UsageError
from rtdetr_cli.export.compare import compare_graph
from rtdetr_cli.export.graph import expected_spec
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.verify import ImageRun, Reference, Verdict, full_float32, verify
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.graph import RAW, GraphBackend
from rtdetr_cli.infer.inspect import graph_precision, inspect_model
from rtdetr_cli.weights.binding import record_verdict
from rtdetr_cli.weights.header import EXPORT_SUFFIXES

RECORDABLE = (".safetensors", *EXPORT_SUFFIXES)


@dataclass(frozen=True, slots=True)
class FileCheck:
    """A file and the model that it is verified against, both open.

    Attributes:
        reference: the model with the file's own input size, layers, queries and rescoring.
        problems: violations of the contract that are known before anything runs.
        foreign: the file has no header, so the model's is assumed.
    """

    path: Path
    model: Path
    candidate: Backend
    reference: Backend
    problems: list[str]
    foreign: bool


def open_pair(path: Path, model: Path, *, device: str = "auto", write: bool = False) -> FileCheck:
    """Open a file and the model that it is verified against.

    Raises:
        UsageError: a verdict is to be written, and the format cannot carry one.
        RtdetrError: a file cannot be opened.
    """
    if write and path.suffix.lower() not in RECORDABLE:
        raise UsageError(f"--write: a {path.suffix} file has no header", hint="leave out --write")
    facts = inspect_model(path)
    if write and facts.get("weights_outside"):
        raise UsageError(
            f"--write: {path} keeps its weights in another file, which its header cannot be bound to",
            hint="save it as one file: onnx.save(onnx.load(FILE), FILE)",
        )
    candidate = open_backend(path, device=device)
    reference = open_reference(model, candidate, device)
    if not isinstance(candidate, GraphBackend):
        return FileCheck(path, model, candidate, reference, [], False)
    header, precision = candidate.header, graph_precision(facts)
    if not header.names:
        extra = {"format": candidate.kind, "precision": precision or "fp32"}
        extra["source_identity"] = reference.header.identity
        candidate.header = replace(reference.header, imgsz=candidate.imgsz, extra=extra)
        return FileCheck(path, model, candidate, reference, [], True)
    if precision == "int8":  # quantized by another tool, which leaves the header of the float file
        candidate.header = replace(header, extra={**header.extra, "precision": precision})
    options = ExportOptions(
        batch=candidate.fixed_batch or 1,
        dynamic=candidate.fixed_batch is None,
        raw=set(RAW) <= {output.name for output in candidate.spec.outputs},
        preprocess=bool(header.extra.get("preprocess_in_graph")),
    )
    stated = str(candidate.header.extra.get("precision", "fp32"))
    problems = compare_graph(facts, stated, candidate.spec, expected_spec(options, header))
    return FileCheck(path, model, candidate, reference, problems, False)


def open_reference(model: Path, candidate: Backend, device: str) -> Backend:
    """Open the model with the input size, layers, queries and rescoring of the candidate, where it can be changed."""
    if model.suffix.lower() in EXPORT_SUFFIXES:
        return open_backend(model, device=device)
    header = candidate.header
    setting: dict[str, Any] = {}
    if header.names:
        setting = {"layers": header.layers or None, "queries": header.queries, "dedupe": header.dedupe_gamma}
        if model.suffix.lower() != ".safetensors":  # a published file does not state its sampling
            setting["sampling"] = header.sampling
    reference = open_backend(model, device=device, imgsz=candidate.imgsz, **setting)
    reference.header = replace(reference.header, imgsz=reference.imgsz)
    return reference


def verify_pair(
    pair: FileCheck, reference: Reference, *, tol_ap: float | None = None
) -> Generator[ImageRun, None, Verdict]:
    """Run the whole check, and return the verdict."""
    with full_float32():
        return (yield from verify(pair.candidate, reference, tol_ap=tol_ap, problems=pair.problems))


def record(pair: FileCheck, verdict: Verdict) -> bool:
    """Write the verdict into the header of the file; return False for a failed file that has no header."""
    if pair.foreign and not verdict.passed:
        return False
    record_verdict(pair.path, pair.candidate.header, verdict.to_json())
    return True

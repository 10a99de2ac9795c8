"""Verify a file that exists already, of any format and from any tool, against a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.errors import UsageError
from rtdetr_cli.export.compare import compare_interfaces, compare_operators, compare_precision
from rtdetr_cli.export.graph import expected_spec
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.verify import ImageRun, Reference, Verdict, full_float32, verify
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.graph import RAW, GraphBackend
from rtdetr_cli.infer.inspect import graph_precision, inspect_model
from rtdetr_cli.weights.binding import record_verdict
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, ModelHeader

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
    problems: tuple[str, ...]
    notes: tuple[str, ...]
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
    header, actual = candidate.header, graph_precision(facts) if isinstance(candidate, GraphBackend) else None
    if not header.names:
        extra: dict[str, Any] = {"format": candidate.kind, "precision": actual or "fp32"}
        extra["source_identity"] = reference.header.identity
        candidate.header = replace(reference.header, imgsz=candidate.imgsz, extra=extra)
        note = f"{path.name} has no header: the classes and the preprocessing of {model.name} are assumed"
        return FileCheck(path, model, candidate, reference, (), (note,), True)
    if actual == "int8":  # quantized by another tool, which leaves the header of the float file
        candidate.header = replace(header, extra={**header.extra, "precision": actual})
    problems = compare_precision(str(candidate.header.extra.get("precision", "fp32")), actual)
    if isinstance(candidate, GraphBackend):
        problems += compare_interfaces(candidate.spec, expected_spec(options_of(candidate), header))
        problems += compare_operators(facts.get("operators", {}))
    return FileCheck(path, model, candidate, reference, tuple(problems), (), False)


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
    changed: dict[str, Any] = {"imgsz": reference.imgsz}
    changed |= {name: value for name, value in setting.items() if value and name not in ("sampling", "dedupe")}
    reference.header = replace(reference.header, **changed)
    return reference


def options_of(candidate: GraphBackend) -> ExportOptions:
    """Return the options that an exported graph was made with, as far as its inputs and outputs show them."""
    return ExportOptions(
        imgsz=candidate.imgsz,
        batch=candidate.fixed_batch or 1,
        dynamic=candidate.fixed_batch is None,
        raw=set(RAW) <= {output.name for output in candidate.spec.outputs},
        preprocess=bool(candidate.header.extra.get("preprocess_in_graph")),
    )


def verify_pair(pair: FileCheck, reference: Reference, *, tol_ap: float | None = None) -> Iterator[ImageRun | Verdict]:
    """Run the whole check; the verdict is the last event."""
    with full_float32():
        yield from verify(pair.candidate, reference, tol_ap=tol_ap, problems=pair.problems)


def record(pair: FileCheck, verdict: Verdict) -> bool:
    """Write the verdict into the header of the file; return False for a failed file that has no header."""
    if pair.foreign and not verdict.passed:
        return False
    header: ModelHeader = pair.candidate.header
    record_verdict(pair.path, header, verdict.to_json())
    return True

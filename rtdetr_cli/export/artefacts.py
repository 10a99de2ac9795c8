"""Exported files on disk: their names, the files that belong together, and `parity.json` beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rtdetr_cli.export.verify import Verdict
from rtdetr_cli.files import write_text
from rtdetr_cli.weights.binding import header_path
from rtdetr_cli.weights.header import ModelHeader

PARITY_FILE = "parity.json"
NAME_ENDINGS = {
    "onnx": ".onnx",
    "int8": "-int8.onnx",
    "fp16": "-fp16.onnx",
    "openvino": ".xml",
    "openvino-int8": "-int8.xml",
    "trt-fp16": ".engine",
    "rtx-fp16": "-rtx.engine",
}


@dataclass(frozen=True, slots=True)
class Notice:
    """A message for the user: the start of a step, or a warning."""

    message: str


@dataclass(frozen=True, slots=True)
class PartCost:
    """What an INT8 file would detect with one more part in float; `ap` is None without labels."""

    part: str
    matched: float
    ap: float | None

    @property
    def summary(self) -> str:
        """One line for people."""
        ap = "" if self.ap is None else f"AP {self.ap:.3f}, "
        return f"with the {self.part} in float32: {ap}{self.matched:.3f} matched"


@dataclass(frozen=True, slots=True)
class Artefact:
    """One exported model, in `*.failed.*` where verification failed; `verdict` is None where it was skipped.

    Attributes:
        pending: why verification has to wait for another machine.
        costs: of a failed INT8 file, what keeping each part in float would give, the best first.
        latencies_ms: of an INT8 file, the medians of the float network and of its own.
    """

    path: Path
    format: str  # onnx, openvino or tensorrt
    precision: str  # fp32, fp16 or int8
    verdict: Verdict | None = None
    operators: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    pending: str = ""
    costs: tuple[PartCost, ...] = ()
    latencies_ms: tuple[float, ...] = ()

    @property
    def passed(self) -> bool:
        """True unless verification failed."""
        return self.verdict is None or self.verdict.passed

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(part.stat().st_size for part in artefact_files(self.path) if part.exists())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "precision": self.precision,
            "gate": None if self.verdict is None else self.verdict.to_json(),
            "bytes": self.bytes,
            "seconds": round(self.seconds, 2),
            **({"pending": self.pending} if self.pending else {}),
            **({"part_costs": [asdict(cost) for cost in self.costs]} if self.costs else {}),
            **dict(zip(("float_latency_ms", "latency_ms"), self.latencies_ms, strict=False)),
        }


def mark_name(path: Path, mark: str) -> Path:
    """Return the path with a mark before its suffix, such as `best.failed.onnx`."""
    return path.with_name(f"{path.stem}.{mark}{path.suffix}")


def artefact_files(path: Path) -> list[Path]:
    """Return all files of an artefact, the named one last: OpenVINO has a file of weights, an engine its header."""
    companion = {".xml": path.with_suffix(".bin"), ".engine": header_path(path)}.get(path.suffix)
    return [path] if companion is None else [companion, path]


def rename_artefact(source: Path, target: Path) -> None:
    """Rename all files of an artefact."""
    for old, new in zip(artefact_files(source), artefact_files(target), strict=True):
        if old.exists() or old == source:
            old.replace(new)
        else:  # an engine built by trtexec may lack its header
            new.unlink(missing_ok=True)


def remove_artefact(path: Path) -> None:
    """Delete all files of an artefact that exist."""
    for part in artefact_files(path):
        part.unlink(missing_ok=True)


def write_parity(folder: Path, header: ModelHeader, artefacts: Sequence[Artefact], renamed: Mapping[str, str]) -> None:
    """Write the verdicts of an export to `parity.json`, and keep those of earlier exports that are still valid.

    `renamed` has the old and the new name of files of earlier exports.
    """
    path = folder / PARITY_FILE
    entries = [{**a.to_json(), "imgsz": list(header.imgsz), "operators": a.operators} for a in artefacts]
    document = {
        "schema_version": 1,
        "model": {"identity": header.identity, "preset": header.preset, "names": list(header.names)},
        "imgsz": list(header.imgsz),
        "artefacts": entries + earlier_entries(path, header.identity, renamed, {a.path.name for a in artefacts}),
    }
    write_text(path, json.dumps(document, indent=1, allow_nan=False, default=float) + "\n")


def earlier_entries(path: Path, identity: str, renamed: Mapping[str, str], new_names: set[str]) -> list[dict[str, Any]]:
    """Return the entries of files that still exist, come from the same model and are not replaced by this export."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not identity or document["model"]["identity"] != identity:
            return []
        entries = []
        for entry in document["artefacts"]:
            name = Path(entry["path"]).name
            current = path.parent / renamed.get(name, name)
            if current.exists() and current.name not in new_names and name not in renamed.values():
                entries.append({"imgsz": document["imgsz"], **entry, "path": str(current)})
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # there is no such file, or it is not ours

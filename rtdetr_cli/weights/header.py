"""Our model file: a safetensors file whose metadata holds a header. Nothing here needs torch or pydantic.

The header is one JSON document under the key `rtdetr`. Exports carry it too: in the ONNX metadata, in the OpenVINO
runtime information, or in a file next to a TensorRT engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rtdetr_cli import documents as doc
from rtdetr_cli.config.image_size import parse_image_size
from rtdetr_cli.config.settings import MAX_LAYERS, MAX_QUERIES
from rtdetr_cli.documents import Reader, parse_json, read_fields, require_regular, shown
from rtdetr_cli.errors import ModelError
from rtdetr_cli.files import atomic_write

METADATA_KEY = "rtdetr"
HASHES = "sha256"
"""The key of the hashes in a verdict, see `weights.binding`."""

HEADER_VERSION = 1

EXPORT_SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".engine": "tensorrt", ".plan": "tensorrt"}
"""Suffixes of exported models, with the runtime that each runs in."""

MODEL_SUFFIXES = (".safetensors", ".pth", ".pt", *EXPORT_SUFFIXES)
"""Suffixes of all files that a command takes as a model."""

PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_CHUNK = 1 << 20
TRANSFORMERS_TENSORS = "model.safetensors"
"""The file of tensors in a folder of transformers."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


PREPROCESSING = {
    "colour": "RGB",
    "resize": "stretch",
    "filter": "bilinear-antialias",
    "scale": 1 / 255,
    "mean": None,
    "std": None,
    "exif": True,
}
"""How images become inputs."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Score thresholds from `eval --calibrate`, and the settings of that evaluation, which older files lack."""

    target: str  # `f1` or `precision=0.9`
    overall: float
    per_class: tuple[float, ...]  # in label order
    imgsz: tuple[int, int] | None = None  # (height, width); None for the model's own
    layers: int | None = None
    queries: int | None = None
    dedupe: float | None = None  # gamma of `Dedupe`


@dataclass(frozen=True, slots=True)
class Dedupe:
    """How duplicates are rescored (see `boxes.rescore_duplicates`), and what that gained on the val split."""

    gamma: float = 0.0  # 0 for off
    ap: float | None = None  # on val, with this gamma
    ap_off: float | None = None  # on val, without rescoring


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """Everything that prediction needs besides the tensors. Field names are keys of the file."""

    names: tuple[str, ...]  # in label order
    category_ids: tuple[int, ...]  # the dataset's own, in label order
    imgsz: tuple[int, int]  # (height, width) of the network's input in pixels
    architecture: dict[str, Any] = field(default_factory=dict)  # the fields of `config.schema.ModelSpec`
    preset: str = ""  # empty for a model from elsewhere
    sampling: str = "bilinear"
    rounding: str = "published"
    layers: int = 0  # decoder layers used at inference
    queries: int = 300
    preprocessing: dict[str, Any] = field(default_factory=PREPROCESSING.copy)
    thresholds: Thresholds | None = None
    dedupe: Dedupe | None = None  # None for published post-processing, which does not rescore
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation that chose these weights
    dataset: dict[str, Any] = field(default_factory=dict)  # {"name", "fingerprint", ...} of the training data
    identity: str = ""  # sha256 of the tensors (names, types, shapes, bytes); empty until saved
    version: str = ""  # of rtdetr-cli that wrote the file
    extra: dict[str, Any] = field(default_factory=dict)  # what a format adds, such as the export check

    @property
    def dedupe_gamma(self) -> float:
        """The gamma that duplicates are rescored with; 0 for none."""
        return self.dedupe.gamma if self.dedupe is not None else 0.0

    def with_dedupe(self, gamma: float | None) -> ModelHeader:
        """Return the header with another gamma; None leaves it as it is."""
        return self if gamma in (None, self.dedupe_gamma) else replace(self, dedupe=Dedupe(gamma or 0.0))

    def to_json(self) -> str:
        """Return the header as one line of JSON with sorted keys."""
        return json.dumps({"header_version": HEADER_VERSION, **asdict(self)}, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, source: str = "") -> ModelHeader:
        """Parse the text of `to_json`; unknown keys are ignored.

        Raises:
            ModelError: the text is not a header.
        """
        try:
            values = read_fields(parse_json(text), _FIELDS, required=("names", "category_ids", "imgsz"))
            if len(values["names"]) != len(values["category_ids"]):
                raise ValueError("names and category_ids differ in length")
        except ValueError as error:
            message = f"the header of {source or 'the model'} cannot be read: {error}"
            raise ModelError(message, code="model-header") from error
        return cls(**values)


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)} is not a list of height and width")
    return parse_image_size(value)


def _read_architecture(value: Any) -> dict[str, Any]:
    """Read the sizes of a model; whether a model can have them is checked where it is built."""
    sizes = doc.table(doc.plain)(value)
    doc.sequence(doc.plain)(sizes.get("num_points", []))
    return sizes


def _gamma(value: Any) -> float:
    gamma = doc.number(value)
    if gamma < 0:
        raise ValueError(f"{gamma} is negative")
    return gamma


_THRESHOLDS: dict[str, Reader[Any]] = {
    "target": doc.text,
    "overall": doc.number,
    "per_class": doc.sequence(doc.number),
    "imgsz": doc.optional(_size),
    "layers": doc.optional(doc.integer(1, MAX_LAYERS)),
    "queries": doc.optional(doc.integer(1, MAX_QUERIES)),
    "dedupe": doc.optional(_gamma),
}
_NEEDED = ("target", "overall", "per_class")  # of the thresholds
_DEDUPE: dict[str, Reader[Any]] = {"gamma": _gamma, "ap": doc.optional(doc.number), "ap_off": doc.optional(doc.number)}
_VERDICT: dict[str, Reader[Any]] = {"passed": doc.optional(doc.boolean), HASHES: doc.table(doc.text)}
_EXTRA: dict[str, Reader[Any]] = {
    "gate": doc.optional(lambda value: read_fields(value, _VERDICT)),
    "versions": doc.table(doc.plain),
    "epoch": doc.integer(0, 1 << 40),
    "targets": doc.optional(doc.sequence(doc.text)),
}


def _read_extra(value: Any) -> dict[str, Any]:
    extra = doc.table(doc.plain)(value)
    read_fields(extra, _EXTRA)
    return extra


_FIELDS: dict[str, Reader[Any]] = {
    "names": doc.sequence(doc.text),
    "category_ids": doc.sequence(doc.integer(-(1 << 63), (1 << 63) - 1)),
    "imgsz": _size,
    "architecture": _read_architecture,
    "preset": doc.text,
    "sampling": doc.one_of("bilinear", "discrete"),
    "rounding": doc.one_of("published", "nearest"),
    "layers": doc.integer(0, MAX_LAYERS),
    "queries": doc.integer(0, MAX_QUERIES),
    "preprocessing": doc.table(doc.plain),
    "thresholds": lambda value: Thresholds(**read_fields(value, _THRESHOLDS, required=_NEEDED)) if value else None,
    "dedupe": lambda value: Dedupe(**read_fields(value, _DEDUPE)) if value else None,
    "metrics": doc.table(doc.optional(doc.number)),
    "dataset": doc.table(doc.plain),
    "identity": doc.text,
    "version": doc.text,
    "extra": _read_extra,
}


_count = doc.integer(0, 1 << 50)
_ENTRY: dict[str, Reader[Any]] = {
    "dtype": doc.text,
    "shape": doc.sequence(_count, longest=16),
    "data_offsets": doc.sequence(_count, longest=2),
}


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors rather than a torch checkpoint, by its content.

    A safetensors file begins with eight bytes of length, whose first byte can equal that of a pickle; the opening brace
    of its JSON follows.

    Raises:
        ModelError: the file does not exist or cannot be read.
    """
    start = first_bytes(path)
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(PICKLE_STARTS))


def first_bytes(path: Path) -> bytes:
    """Return the first 512 bytes of a model file; raises ModelError where there are none to read."""
    with _model_errors(path):
        require_regular(path)
        with path.open("rb") as file:
            return file.read(512)


@contextmanager
def _model_errors(path: Path) -> Iterator[None]:
    """Raise ModelError where a model file cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}", code="model-missing") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder, not a model file", code="model-missing") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", code="model-unreadable") from error


@dataclass(frozen=True, slots=True)
class Layout:
    """The first part of a safetensors file, which says where the tensors are."""

    tensors: dict[str, dict[str, Any]]  # name to {"dtype", "shape", "data_offsets"}
    metadata: dict[str, str]
    start: int  # offset of the first tensor byte


def read_layout(path: Path) -> Layout:
    """Read and check the first part of a safetensors file: eight bytes of length, then that many bytes of JSON.

    Raises:
        ModelError: the file is missing, truncated, or not a safetensors file.
    """
    with _model_errors(path):
        size = require_regular(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise _not_safetensors(path)
            if 8 + length > size:
                raise _truncated(path, size, 8 + length)
            text = file.read(length)
    try:
        tensors = parse_json(text)
        metadata = doc.table(doc.text)(tensors.pop("__metadata__", {}))
        tensors = {name: read_fields(entry, _ENTRY, required=tuple(_ENTRY)) for name, entry in tensors.items()}
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
    except (ValueError, AttributeError, IndexError):
        raise _not_safetensors(path) from None
    end = 8 + length + max(ends, default=0)
    if end > size:
        raise _truncated(path, size, end)
    return Layout(tensors, metadata, 8 + length)


def own_header(path: Path) -> ModelHeader | None:
    """Return the header of a model file written by rtdetr-cli; None for a file of another maker.

    Raises:
        ModelError: the file is missing or cannot be read, or is a damaged one of ours.
    """
    if not is_safetensors(path):
        return None
    text = read_layout(path).metadata.get(METADATA_KEY)
    return None if text is None else ModelHeader.from_json(text, source=str(path))


def read_header(path: Path) -> ModelHeader:
    """Read the header of a model file written by rtdetr-cli.

    Raises:
        ModelError: the file is missing, truncated, or was not written by rtdetr-cli.
    """
    layout = read_layout(path)
    if METADATA_KEY not in layout.metadata:
        raise ModelError(
            f"{path} has no rtdetr header, so it was not written by rtdetr-cli",
            hint="load a published checkpoint as the .pth file that was released",
            code="model-foreign",
        )
    return ModelHeader.from_json(layout.metadata[METADATA_KEY], source=str(path))


def rewrite_header(path: Path, header: ModelHeader) -> ModelHeader:
    """Replace the header of a model file, and return it as written; the tensors and their identity stay."""
    layout = read_layout(path)
    header = replace(header, identity=read_header(path).identity)
    metadata = {**layout.metadata, METADATA_KEY: header.to_json()}
    text = json.dumps({"__metadata__": metadata, **layout.tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors to eight bytes
    with atomic_write(path) as temporary, temporary.open("wb") as out, path.open("rb") as file:
        out.write(len(text).to_bytes(8, "little") + text)
        file.seek(layout.start)
        shutil.copyfileobj(file, out, _CHUNK)
    return header


def _not_safetensors(path: Path) -> ModelError:
    return ModelError(
        f"{path} is not a safetensors file",
        hint="a model is a .safetensors file, a published .pth, or an export: .onnx, .xml (OpenVINO), .engine",
        code="model-foreign",
    )


def _truncated(path: Path, size: int, expected: int) -> ModelError:
    return ModelError(
        f"{path} is truncated: it has {size:,} bytes, expected at least {expected:,}",
        hint="copy or download it again",
        code="model-truncated",
    )

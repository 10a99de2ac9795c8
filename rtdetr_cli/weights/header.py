"""Our model file: a safetensors file whose metadata holds a header. Nothing here needs torch or pydantic.

The header is one JSON document under the key `rtdetr`. Exports carry it too: in the ONNX metadata, in the OpenVINO
runtime information, or in a file next to a TensorRT engine.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.errors import ModelError
from rtdetr_cli.files import atomic_write

METADATA_KEY = "rtdetr"
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
            document = json.loads(text)
            values = {f.name: document[f.name] for f in fields(cls) if f.name in document}
            values["names"] = tuple(str(n) for n in values["names"])
            values["category_ids"] = tuple(int(i) for i in values["category_ids"])
            height, width = values["imgsz"]
            values["imgsz"] = (int(height), int(width))
            if values.get("thresholds"):
                stored = values["thresholds"]
                size = stored.get("imgsz")
                values["thresholds"] = Thresholds(
                    str(stored["target"]),
                    float(stored["overall"]),
                    tuple(float(t) for t in stored["per_class"]),
                    (int(size[0]), int(size[1])) if size else None,
                    int(stored["layers"]) if stored.get("layers") else None,
                    int(stored["queries"]) if stored.get("queries") else None,
                    stored.get("dedupe"),
                )
            if values.get("dedupe"):
                rescoring = Dedupe(**values["dedupe"])
                if not 0 <= rescoring.gamma < math.inf:
                    raise ValueError(f"dedupe has the gamma {rescoring.gamma}")
                values["dedupe"] = rescoring
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"the header of {source or 'the model'} cannot be read: {error}"
            raise ModelError(message, code="model-header") from error


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors rather than a torch checkpoint, by its content.

    A safetensors file begins with eight bytes of length, whose first byte can equal that of a pickle (in one file of
    32); the opening brace of its JSON follows.

    Raises:
        ModelError: the file does not exist or cannot be read.
    """
    start = first_bytes(path)
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(PICKLE_STARTS))


def first_bytes(path: Path) -> bytes:
    """Return the first 512 bytes of a model file; raises ModelError where there are none to read."""
    try:
        with path.open("rb") as file:
            return file.read(512)
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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise _not_safetensors(path)
            if 8 + length > size:
                raise _truncated(path, size, 8 + length)
            text = file.read(length)
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}", code="model-missing") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", code="model-unreadable") from error
    try:
        tensors = json.loads(text)
        metadata = {str(k): str(v) for k, v in tensors.pop("__metadata__", {}).items()}
        ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
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

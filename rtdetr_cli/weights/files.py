"""Our model file on disk: a safetensors file whose metadata holds the header. Nothing here needs torch.

The format is eight bytes of length, that many bytes of JSON, then the tensors' bytes. The identity of a model is the
hash of its tensors and not of its file, so that a new threshold makes a new header and not a new model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from rtdetr_cli.errors import ModelError
from rtdetr_cli.files import atomic_write
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

_CHUNK = 1 << 20
_LARGEST_HEADER = 100_000_000  # what the format itself allows


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a safetensors file.

    Attributes:
        tensors: name to {"dtype", "shape", "data_offsets"}.
        metadata: strings by key.
        start: first byte of the data.
        size: of the file in bytes.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int
    size: int


def read_layout(path: Path) -> Layout:
    """Read and check the first part of a safetensors file.

    Raises:
        ModelError: missing, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= _LARGEST_HEADER:
                raise _foreign(path)
            if 8 + length > size:
                raise _truncated(path, size, 8 + length)
            text = file.read(length)
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}", code="model-missing") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", code="model-unreadable") from error
    try:
        document = json.loads(text)
        metadata = {str(k): str(v) for k, v in document.pop("__metadata__", {}).items()}
        ends = [int(entry["data_offsets"][1]) for entry in document.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _foreign(path) from None
    end = 8 + length + max(ends, default=0)
    if end > size:
        raise _truncated(path, size, end)
    return Layout(document, metadata, 8 + length, size)


def read_header(path: Path) -> ModelHeader:
    """Read what a model file of ours says about itself.

    Raises:
        ModelError: missing, truncated, or not written by rtdetr-cli.
    """
    layout = read_layout(path)
    if METADATA_KEY not in layout.metadata:
        raise ModelError(
            f"{path} holds tensors but no rtdetr header, so it is not a model of ours",
            hint="a published checkpoint loads as the .pth file that it was released as",
            code="model-foreign",
        )
    return ModelHeader.from_json(layout.metadata[METADATA_KEY], source=str(path))


def identity_of(tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes]]]) -> str:
    """Return sha256 over tensors sorted by name: name, safetensors type, shape, little-endian bytes."""
    digest = hashlib.sha256()
    for name, dtype, shape, data in tensors:
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        for part in data:
            digest.update(part)
    return digest.hexdigest()


def tensors_identity(path: Path) -> str:
    """Return the identity of a file's tensors, read from its bytes."""
    layout = read_layout(path)

    def parts(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
        file.seek(layout.start + begin)
        left = end - begin
        while left > 0 and (part := file.read(min(_CHUNK, left))):
            left -= len(part)
            yield part

    with path.open("rb") as file:
        return identity_of(
            (name, str(entry["dtype"]), tuple(entry["shape"]), parts(file, *entry["data_offsets"]))
            for name, entry in sorted(layout.tensors.items())
        )


def rewrite_header(path: Path, header: ModelHeader) -> ModelHeader:
    """Give a model file another header; tensors and identity stay. Written aside and renamed.

    Returns:
        The header as written: with the file's own identity.

    Raises:
        ModelError: the file is none of ours.
        RtdetrError: the folder cannot be written.
    """
    layout = read_layout(path)
    header = replace(header, identity=read_header(path).identity)
    metadata = {**layout.metadata, METADATA_KEY: header.to_json()}
    text = json.dumps({"__metadata__": metadata, **layout.tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with atomic_write(path) as aside, aside.open("wb") as out, path.open("rb") as file:
        out.write(len(text).to_bytes(8, "little") + text)
        file.seek(layout.start)
        while part := file.read(_CHUNK):
            out.write(part)
    return header


def _foreign(path: Path) -> ModelError:
    return ModelError(
        f"{path} is not a safetensors file",
        hint="models are our .safetensors, a published .pth, .onnx, an OpenVINO .xml or a TensorRT .engine",
        code="model-foreign",
    )


def _truncated(path: Path, size: int, wanted: int) -> ModelError:
    return ModelError(
        f"{path} is cut off: it has {size} bytes of at least {wanted}",
        hint="copy or fetch it again",
        code="model-truncated",
    )

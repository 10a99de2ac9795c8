"""Bind a verdict to the bytes that it is about, in every format that carries a header.

`rtdetr export` and `rtdetr verify --write` record in the header, with the verdict, three hashes: of the file without
its header (graph and weights), of the settings in the header, and of its thresholds. A file that was changed since has
other hashes. The header is found and replaced in the bytes of the file, so nothing else in it changes and neither
torch nor a runtime is needed.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from rtdetr_cli.documents import read_bounded
from rtdetr_cli.errors import ModelError
from rtdetr_cli.files import atomic_write, write_text
from rtdetr_cli.machine import cpu_count
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, HASHES, METADATA_KEY, ModelHeader, read_layout, rewrite_header

PARTS = {"file": "graph or weights", "settings": "classes or settings", "thresholds": "thresholds"}
"""What each hash covers, in words."""

_SETTINGS = ("names", "category_ids", "imgsz", "sampling", "rounding", "layers", "queries", "preprocessing")
_SETTINGS_EXTRA = ("precision", "preprocess_in_graph")
_CHUNK = 8 << 20  # bytes hashed at once: several threads share the work

_MAX_FIELDS = 100_000  # of one message: a model has some dozens
_METADATA_FIELD = 14  # `metadata_props` of an ONNX ModelProto
_XML_HEADER = re.compile(rb"<%s value=\"([^\"]*)\"\s*/>" % METADATA_KEY.encode())


@dataclass(frozen=True, slots=True)
class HeaderSpan:
    """Where the header of a file is, or where it would be inserted, and its text."""

    start: int
    end: int
    text: str | None


def header_path(engine: Path) -> Path:
    """Return the path of an engine's header, which is a file of its own: an engine cannot hold metadata."""
    return engine.with_name(engine.name + ".json")


def find_header(path: Path) -> HeaderSpan:
    """Find the header of an exported file.

    Raises:
        ModelError: the file is truncated, or not of the format that its suffix says.
    """
    kind = EXPORT_SUFFIXES[path.suffix.lower()]
    try:
        if kind == "openvino":
            return _openvino_span(path.read_bytes())
        if kind == "onnx":
            with path.open("rb") as file:
                return _onnx_span(file, path.stat().st_size)
        beside = header_path(path)
        return HeaderSpan(0, 0, read_bounded(beside).decode() if beside.is_file() else None)
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(
            f"{path} is truncated or not a model: {error}", hint="export it again", code="model-unreadable"
        ) from error


def read_export_header(path: Path) -> ModelHeader | None:
    """Return the header of an exported file, or None where it has none."""
    text = find_header(path).text
    return ModelHeader.from_json(text, source=str(path)) if text else None


def write_export_header(path: Path, header: ModelHeader) -> None:
    """Replace or insert the header of an exported file; every other byte stays."""
    kind, text = EXPORT_SUFFIXES[path.suffix.lower()], header.to_json()
    if kind == "tensorrt":
        write_text(header_path(path), text + "\n")
        return
    span = find_header(path)
    if kind == "onnx":
        import onnx

        entry = onnx.StringStringEntryProto(key=METADATA_KEY, value=text)
        data = onnx.ModelProto(metadata_props=[entry]).SerializeToString()
    else:
        data = f'<{METADATA_KEY} value="{html.escape(text)}" />'.encode()
        if span.text is None and not path.read_bytes().startswith(b"</rt_info>", span.end):
            data = b"<rt_info>" + data + b"</rt_info>\n"
    with atomic_write(path) as temporary, temporary.open("wb") as out, path.open("rb") as file:
        out.write(file.read(span.start))
        out.write(data)
        file.seek(span.end)
        shutil.copyfileobj(file, out, 1 << 20)


def bind(path: Path, header: ModelHeader, verdict: Mapping[str, Any]) -> ModelHeader:
    """Return a header with a verdict on a file; one that passed is bound to the bytes of the file."""
    gate = {**verdict, HASHES: hashes(path, header)} if verdict.get("passed") else dict(verdict)
    return replace(header, extra={**header.extra, "gate": gate})


def record_verdict(path: Path, header: ModelHeader, verdict: Mapping[str, Any]) -> None:
    """Write a header with a verdict into a file, see `bind`."""
    bound = bind(path, header, verdict)
    if path.suffix.lower() == ".safetensors":
        rewrite_header(path, bound)
    else:
        write_export_header(path, bound)


def rebind_thresholds(header: ModelHeader) -> ModelHeader:
    """Return a header whose verdict covers its present thresholds; the hashes of everything else stay."""
    gate = header.extra.get("gate") or {}
    if HASHES not in gate:
        return header
    bound = {**gate[HASHES], "thresholds": _hash_json(_thresholds(header))}
    return replace(header, extra={**header.extra, "gate": {**gate, HASHES: bound}})


def status(path: Path, header: ModelHeader | None) -> tuple[str, tuple[str, ...]]:
    """Compare a file with the verdict in its header.

    Returns:
        `none` (no verdict), `failed`, `unbound` (a verdict without hashes, from version 0.1), `unchanged` or
        `modified`; and the names of the `PARTS` that were modified.
    """
    gate = (header.extra.get("gate") if header is not None else None) or {}
    if header is None or gate.get("passed") is None:
        return "none", ()
    if not gate["passed"]:
        return "failed", ()
    if HASHES not in gate:
        return "unbound", ()
    modified = tuple(name for name, value in hashes(path, header).items() if gate[HASHES].get(name) != value)
    return ("modified" if modified else "unchanged"), modified


def modification_warning(path: Path, header: ModelHeader | None = None) -> str:
    """Return a warning for a file that was modified after its verification, else an empty text.

    `header` is the one in the file, which is read from an export where it is not passed.
    """
    if header is None and path.suffix.lower() in EXPORT_SUFFIXES:
        header = read_export_header(path)
    state, parts = status(path, header)
    if state != "modified":
        return ""
    what = ", ".join(PARTS[name] for name in parts)
    return f"{path.name} was modified after verification ({what}): rtdetr verify {path} --against MODEL"


def hashes(path: Path, header: ModelHeader) -> dict[str, str]:
    """Return the hashes that bind a verdict to a file and its header, by the names in `PARTS`."""
    settings = {name: getattr(header, name) for name in _SETTINGS}
    settings |= {name: header.extra.get(name) for name in _SETTINGS_EXTRA}
    if header.dedupe_gamma:  # files of earlier versions were bound without it
        settings["dedupe"] = header.dedupe_gamma
    return {
        "file": _hash_file(path),
        "settings": _hash_json(settings),
        "thresholds": _hash_json(_thresholds(header)),
    }


def _thresholds(header: ModelHeader) -> dict[str, Any] | None:
    return None if header.thresholds is None else asdict(header.thresholds)


def _hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    """Hash a model without its header, and the file of weights that belongs to it; threads share the chunks."""
    ranges: list[tuple[Path, int, int]] = []
    total = hashlib.sha256()
    size = path.stat().st_size
    if path.suffix.lower() == ".safetensors":
        layout = read_layout(path)
        total.update(json.dumps(layout.tensors, sort_keys=True).encode())
        ranges.append((path, layout.start, size))
    else:
        span = find_header(path)
        ranges += [(path, 0, span.start), (path, span.end, size)]
        binary = path.with_suffix(".bin")
        if path.suffix.lower() == ".xml" and binary.is_file():
            ranges.append((binary, 0, binary.stat().st_size))
    chunks = [
        (source, start, min(start + _CHUNK, end))
        for source, first, end in ranges
        for start in range(first, end, _CHUNK)
    ]
    with ThreadPoolExecutor(min(4, cpu_count())) as pool:
        for digest in pool.map(_hash_chunk, chunks):
            total.update(digest)
    return total.hexdigest()


def _hash_chunk(chunk: tuple[Path, int, int]) -> bytes:
    path, start, end = chunk
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(end - start)).digest()


# ------------------------------------------------------------------------------------------------------ formats


def _onnx_span(file: IO[bytes], size: int) -> HeaderSpan:
    """Find our entry among the top-level fields of a ModelProto, skipping the others unread."""
    for number, start, value_start, end in _onnx_fields(file, 0, size):
        if number != _METADATA_FIELD:
            continue
        entry = {}
        for key, _, first, last in list(_onnx_fields(file, value_start, end)):
            file.seek(first)
            entry[key] = file.read(last - first).decode()
        if entry.get(1) == METADATA_KEY:
            return HeaderSpan(start, end, entry.get(2, ""))
    return HeaderSpan(size, size, None)


def _onnx_fields(file: IO[bytes], start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, start, start of the value, and end of each field of a protobuf message."""
    for _ in range(_MAX_FIELDS):
        if start >= end:
            return
        file.seek(start)
        tag = _read_varint(file)
        wire_type = tag & 7
        if wire_type == 2:
            length = _read_varint(file)
        elif wire_type == 0:
            _read_varint(file)
            length = 0
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"it has a field of the wire type {wire_type}")
        value_start = file.tell()
        if value_start + length > end:
            raise ValueError("a field extends past the end of the file")
        yield tag >> 3, start, value_start, value_start + length
        start = value_start + length
    raise ValueError("it has too many fields")


def _read_varint(file: IO[bytes]) -> int:
    value = shift = 0
    while shift < 64:
        byte = file.read(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7
    raise ValueError("it is not a protobuf file")


def _openvino_span(data: bytes) -> HeaderSpan:
    # A conversion from ONNX keeps that file's header among the facts about it, where it isn't the header of this file.
    framework = re.search(rb"<framework>.*</framework>", data, re.DOTALL)
    inside = range(*framework.span()) if framework else range(0)
    for found in _XML_HEADER.finditer(data):
        if found.start() not in inside:
            return HeaderSpan(found.start(), found.end(), html.unescape(found[1].decode()))
    end = re.search(rb"(</rt_info>\s*)?</net>\s*$", data)  # the runtime information of the model is its last element
    if end is None:
        raise ValueError("its last element </net> is missing")
    return HeaderSpan(end.start(), end.start(), None)

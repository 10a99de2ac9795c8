"""Download, check and cache the published weights.

A file is looked up in the cache first, then downloaded from the mirror or from the official release. Two files have
publicly known hashes; they must match. For any other file, the hash of the first copy that loads as such weights is
recorded in `hashes.json`, and later copies must match it. Nothing is downloaded unless a command needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rtdetr_cli.errors import ModelError, RtdetrError
from rtdetr_cli.files import HOME_VARIABLE, atomic_write, cache_folder
from rtdetr_cli.text import suggest

MIRROR_VARIABLE = "RTDETR_CLI_MIRROR"
RELEASES = "https://github.com/lyuwenyu/storage/releases/download"
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16


class Progress(Protocol):
    """A progress display."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more bytes."""


ShowProgress = Callable[[int | None, str], AbstractContextManager[Progress]]
"""Starts a progress display for a total number of bytes (None when unknown) and a description."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published file: its name and content, the release that holds it, and its hash where that is known."""

    file: str
    description: str
    release: str = "v0.1"
    sha256: str = ""

    @property
    def url(self) -> str:
        """Address of the file: on the mirror when one is set, else in the official release."""
        mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
        return f"{mirror}/{self.file}" if mirror else f"{RELEASES}/{self.release}/{self.file}"

    @property
    def is_backbone(self) -> bool:
        """Whether the file holds only a backbone."""
        return self.file.startswith("ResNet")


_FILES = (
    Published(
        "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth",
        "r18, COCO, AP 0.481",
        release="v0.2",
        sha256="2ace52184b620204004509b72752ac7bfe64aadaf7fc1d076b18df8ab5a5c77e",
    ),
    Published("rtdetrv2_r34vd_120e_coco_ema.pth", "r34, COCO, AP 0.499"),
    Published("rtdetrv2_r50vd_m_7x_coco_ema.pth", "r50m, COCO, AP 0.519"),
    Published("rtdetrv2_r50vd_6x_coco_ema.pth", "r50, COCO, AP 0.534"),
    Published("rtdetrv2_r101vd_6x_coco_from_paddle.pth", "r101, COCO, AP 0.543"),
    Published("rtdetrv2_r18vd_dsp_3x_coco.pth", "r18 discrete, COCO, AP 0.474"),
    Published("rrtdetrv2_r34vd_dsp_1x_coco.pth", "r34 discrete, COCO, AP 0.492"),
    Published("rtdetrv2_r50vd_m_dsp_3x_coco.pth", "r50m discrete, COCO, AP 0.514"),
    Published("rtdetrv2_r50vd_dsp_1x_coco.pth", "r50 discrete, COCO, AP 0.529"),
    Published("rtdetrv2_r18vd_sp1_120e_coco.pth", "r18 with 1 sampling point a scale, COCO, AP 0.473"),
    Published("rtdetrv2_r18vd_sp2_120e_coco.pth", "r18 with 2 sampling points a scale, COCO, AP 0.477"),
    Published("rtdetrv2_r18vd_sp3_120e_coco.pth", "r18 with 3 sampling points a scale, COCO, AP 0.478"),
    Published(
        "ResNet18_vd_pretrained_from_paddle.pth",
        "r18 backbone, ImageNet",
        sha256="911a745b62e173c8f4b9af513c2ea295428cf23f1bbfe9048381500f140fd720",
    ),
    Published("ResNet34_vd_pretrained_from_paddle.pth", "r34 backbone, ImageNet"),
    Published("ResNet50_vd_ssld_v2_pretrained_from_paddle.pth", "r50 and r50m backbone, ImageNet"),
    Published("ResNet101_vd_ssld_pretrained_from_paddle.pth", "r101 backbone, ImageNet"),
)

PUBLISHED: Mapping[str, Published] = {entry.file: entry for entry in _FILES}


def weights_folder() -> Path:
    """Return the folder of downloaded weights."""
    return cache_folder("weights")


def find_published(file: str) -> Published:
    """Return the catalogue entry of a file name.

    Raises:
        ModelError: no such file was published.
    """
    if file not in PUBLISHED:
        message = f"there is no published file {file}{suggest(file, PUBLISHED)}"
        raise ModelError(message, hint="rtdetr weights list", code="weights-unknown")
    return PUBLISHED[file]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_sha256(file: str) -> str:
    """Return the hash that a file must have, or "" when none is known yet."""
    entry = PUBLISHED.get(file)
    return entry.sha256 if entry and entry.sha256 else _recorded_hashes().get(file, "")


def verify(file: str, path: Path) -> str:
    """Check a file and return its hash; where no hash is known and the file loads as such weights, record it.

    Raises:
        ModelError: the hash differs, or there is none and the content is not what the name says.
    """
    hint = f"rtdetr weights fetch {file} --force"
    return _check(find_published(file), path, source=str(path), hint=hint)


def fetch(file: str, *, force: bool = False, progress: ShowProgress | None = None) -> Path:
    """Return the path of a published file; download it when it is not in the cache, and check its hash.

    A cached file is hashed again at each use. That costs a fraction of loading it, and needs no record of sizes and
    dates. With `force`, it is downloaded even when it is cached, and its hash replaces a recorded one (never a public
    one).

    Raises:
        ModelError: unknown file, no network, interrupted download, or not the published file (nothing is kept).
        RtdetrError: the cache cannot be written.
    """
    entry = find_published(file)
    path = weights_folder() / file
    if path.is_file() and not force:
        verify(file, path)
        return path
    with _write_to_cache(path) as temporary:
        _download(entry, temporary, progress)
        accept = f"rtdetr weights fetch {file} --force"
        _check(entry, temporary, source=entry.url, hint=manual_download_hint(entry), accept=accept, force=force)
    return path


def import_file(source: Path, *, force: bool = False) -> Path:
    """Check a file that was downloaded by other means, under its published name, and copy it into the cache.

    With `force`, its hash replaces a recorded one (never a public one).

    Raises:
        ModelError: it does not exist, its name is unknown, or it is not the published file.
        RtdetrError: the cache cannot be written.
    """
    if not source.is_file():
        raise ModelError(f"{source} does not exist", code="weights-missing")
    if source.name not in PUBLISHED and source.suffix.lower() not in (".pth", ".pt", ".safetensors"):
        raise ModelError(f"{source} is not a weights file (.pth)", hint="rtdetr weights list", code="weights-unknown")
    entry = find_published(source.name)
    hint, accept = f"rtdetr weights fetch {entry.file} --force", f"rtdetr weights import {source} --force"
    _check(entry, source, source=str(source), hint=hint, accept=accept, force=force)
    path = weights_folder() / entry.file
    if not (path.exists() and path.samefile(source)):
        with _write_to_cache(path) as temporary:
            shutil.copyfile(source, temporary)
    return path


def manual_download_hint(entry: Published) -> str:
    """Return what to do when a file cannot be downloaded on this machine."""
    return (
        f"download {entry.url} elsewhere and put it at {weights_folder() / entry.file}, "
        f"or: rtdetr weights import {entry.file} ({MIRROR_VARIABLE} sets a mirror)"
    )


def _check(entry: Published, path: Path, *, source: str, hint: str, accept: str = "", force: bool = False) -> str:
    """Return a file's hash if it is the expected one; where none is expected, record it if the file loads.

    With `force`, only a public hash is expected and no recorded one; `accept` is the command that does so. `source`
    says in messages where the file came from.
    """
    expected = entry.sha256 if force else expected_sha256(entry.file)
    sha256, problem, code = file_sha256(path), "", "weights-foreign"
    with path.open("rb") as file:
        is_web_page = file.read(512).lstrip()[:1] == b"<"
    if is_web_page:
        problem = f"it is a web page of {path.stat().st_size:,} bytes"
    elif not expected:
        problem = _content_problem(entry, path)
    elif sha256 != expected:
        problem = f"checksum mismatch: sha256 is {sha256[:12]}..., expected {expected[:12]}..."
        code = "weights-hash"
        if accept and not entry.sha256:
            hint = f"{accept} accepts the new file; or {hint}"
    if problem:
        raise ModelError(f"{source} is not the published {entry.file}: {problem}", hint=hint, code=code)
    if not expected:
        hashes = {**_recorded_hashes(), entry.file: sha256}
        with _write_to_cache(_hashes_file()) as temporary:
            temporary.write_text(json.dumps(hashes, indent=1, sort_keys=True), encoding="utf-8")
    return sha256


def _content_problem(entry: Published, path: Path) -> str:
    """Return why a file without a known hash cannot be the published one, or ""."""
    from rtdetr_cli.weights.published import read_published

    try:
        content = read_published(path)
    except ModelError as error:
        return error.message.replace(str(path), "it")
    if (content.spec is None) != entry.is_backbone:
        return f"it contains {'a backbone' if content.spec is None else 'a detector'}"
    return ""


def _download(entry: Published, to: Path, progress: ShowProgress | None) -> None:
    import requests

    by_hand = manual_download_hint(entry)
    try:
        # Without compression, so that the length that the server gives is that of the file.
        headers = {"Accept-Encoding": "identity"}
        with requests.get(entry.url, stream=True, timeout=TIMEOUT, headers=headers) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0))
            display = progress(total or None, f"fetching {entry.file}") if progress else nullcontext()
            with display as bar, to.open("wb") as file:
                try:
                    for part in response.iter_content(CHUNK):
                        file.write(part)
                        if bar is not None:
                            bar.advance(len(part))
                    if file.tell() < total:
                        raise requests.exceptions.ChunkedEncodingError
                except requests.exceptions.RequestException as error:
                    received = f"after {response.raw.tell():,}" + (f" of {total:,}" if total else "")
                    raise ModelError(
                        f"{entry.file} was not downloaded: the connection to {entry.url} was lost {received} bytes",
                        hint=f"try again, or {by_hand}",
                        code="weights-network",
                    ) from error
    except requests.exceptions.RequestException as error:
        message = f"{entry.file} could not be downloaded from {entry.url}: {_network_problem(error)}"
        raise ModelError(message, hint=by_hand, code="weights-network") from error


def _network_problem(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code}"
    kind = type(error).__name__
    problems = {
        "ConnectionError": "no connection",
        "ConnectTimeout": "no response",
        "ReadTimeout": "no response",
        "ProxyError": "the proxy refused the connection",
        "SSLError": "no secure connection",
        "MissingSchema": "not a valid address",
        "InvalidSchema": "not a valid address",
        "InvalidURL": "not a valid address",
    }
    return problems.get(kind, kind)


@contextmanager
def _write_to_cache(path: Path) -> Iterator[Path]:
    """Write a file atomically; when the cache is not writable, the hint says how to move it."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except RtdetrError as error:
        if error.code != "not-writable":
            raise
        hint = f"free some space, or set {HOME_VARIABLE} to another folder"
        raise RtdetrError(error.message, hint=hint, code=error.code) from error


def _recorded_hashes() -> dict[str, str]:
    path = _hashes_file()
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=f"remove {path}", code="weights-hashes") from error


def _hashes_file() -> Path:
    return weights_folder() / "hashes.json"

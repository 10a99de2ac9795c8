"""Published weights: where they come from, where they are kept, and that they are what they say.

A file is looked for in the cache first, then fetched from the mirror or the official release. The two files whose
hashes are publicly known are held to them; of any other the hash of the first copy that can be read as such weights is
recorded in `hashes.json`, and every later copy is held to that. Nothing is fetched unless a command needs it.
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
from rtdetr_cli.files import atomic_write

HOME_VARIABLE = "RTDETR_CLI_HOME"
MIRROR_VARIABLE = "RTDETR_CLI_MIRROR"
RELEASES = "https://github.com/lyuwenyu/storage/releases/download"
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16


class Told(Protocol):
    """Something that is told how many more bytes have come."""

    def advance(self, n: int = 1) -> None:
        """Say that `n` more bytes are here."""


Watch = Callable[[int | None, str], AbstractContextManager[Told]]


@dataclass(frozen=True, slots=True)
class Published:
    """One published file: what it is, the release that holds it, and its sha256 where that is known."""

    file: str
    what: str
    release: str = "v0.1"
    sha256: str = ""
    size: int = 0

    @property
    def url(self) -> str:
        """Address of the file: the mirror's when one is set, else the official release's."""
        mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
        return f"{mirror}/{self.file}" if mirror else f"{RELEASES}/{self.release}/{self.file}"

    @property
    def backbone(self) -> bool:
        """Whether it holds a backbone only."""
        return self.file.startswith("ResNet")


def _catalogue() -> dict[str, Published]:
    files = [
        Published(
            "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth",
            "r18, COCO, AP 0.481",
            release="v0.2",
            sha256="2ace52184b620204004509b72752ac7bfe64aadaf7fc1d076b18df8ab5a5c77e",
            size=81_198_974,
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
            size=44_878_642,
        ),
        Published("ResNet34_vd_pretrained_from_paddle.pth", "r34 backbone, ImageNet"),
        Published("ResNet50_vd_ssld_v2_pretrained_from_paddle.pth", "r50 and r50m backbone, ImageNet"),
        Published("ResNet101_vd_ssld_pretrained_from_paddle.pth", "r101 backbone, ImageNet"),
    ]
    return {p.file: p for p in files}


PUBLISHED: Mapping[str, Published] = _catalogue()


def weights_folder() -> Path:
    """Return the folder of the cache: `$RTDETR_CLI_HOME/weights`, or the user's cache folder."""
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home) / "weights"
    import platformdirs

    return Path(platformdirs.user_cache_dir("rtdetr-cli", appauthor=False)) / "weights"


def published(file: str) -> Published:
    """Return the catalogue's entry of one file name.

    Raises:
        ModelError: no such file was published.
    """
    if file not in PUBLISHED:
        import difflib

        close = difflib.get_close_matches(file, PUBLISHED, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ModelError(
            f"no published file is called {file}{meant}", hint="rtdetr weights list", code="weights-unknown"
        )
    return PUBLISHED[file]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_sha256(file: str) -> str:
    """Return the hash that a file is held to, or "" when none is known yet."""
    entry = PUBLISHED.get(file)
    return entry.sha256 if entry and entry.sha256 else _recorded().get(file, "")


def verify(file: str, path: Path) -> str:
    """Hold a file to its hash and return the hash; the first one seen is recorded, if it is that of such weights.

    Raises:
        ModelError: the hash is another one, or there is none and the file is not what its name says.
    """
    sha256 = _held(published(file), path, expected_sha256(file), whose=str(path))
    if not expected_sha256(file):
        _record(file, sha256)
    return sha256


def fetch(file: str, *, force: bool = False, progress: Watch | None = None) -> Path:
    """Return the path of a published file, fetched once and hash-checked.

    A file that is here already is hashed again at each use: that takes a fraction of what loading it does, sees every
    change, and needs no second record of sizes and dates that could itself be wrong.

    Args:
        file: a name of `PUBLISHED`.
        force: fetch it again although it is there, and let its hash replace a recorded one (never a pinned one).
        progress: shows how far the download has come, in bytes; called with the total, where the server says it, and
            what is done.

    Raises:
        ModelError: unknown file, no network, a connection that broke off, or not the published file (nothing is kept).
        RtdetrError: the cache cannot be written.
    """
    entry = published(file)
    path = weights_folder() / file
    if path.is_file() and not force:
        verify(file, path)
        return path
    expected = entry.sha256 if force else expected_sha256(file)
    with _written(path) as aside:
        _download(entry, aside, progress)
        sha256 = _held(entry, aside, expected, whose=entry.url)
    if not expected:
        _record(file, sha256)
    return path


def import_file(source: Path, *, force: bool = False) -> Path:
    """Copy a file that was fetched by other means into the cache, held to its hash.

    Args:
        source: has the name under which it was published.
        force: let its hash replace a recorded one (never a pinned one).

    Raises:
        ModelError: it is missing, its name is unknown, or it is not the published file.
        RtdetrError: the cache cannot be written.
    """
    if not source.is_file():
        raise ModelError(f"{source} does not exist", code="weights-missing")
    entry = published(source.name)
    expected = entry.sha256 if force else expected_sha256(entry.file)
    recorded = expected and not entry.sha256
    hint = f"rtdetr weights import {source} --force takes it in place of the recorded one" if recorded else ""
    sha256 = _held(entry, source, expected, whose=str(source), hint=hint)
    path = weights_folder() / entry.file
    if not (path.exists() and path.samefile(source)):
        with _written(path) as aside:
            shutil.copyfile(source, aside)
    if not expected:
        _record(entry.file, sha256)
    return path


def by_hand(entry: Published) -> str:
    """Return what to do where a file cannot be fetched from here."""
    return (
        f"download {entry.url} elsewhere and put it at {weights_folder() / entry.file}, "
        f"or: rtdetr weights import {entry.file} ({MIRROR_VARIABLE} names a mirror)"
    )


def refetch(entry: Published) -> str:
    """Return the command that replaces a file that is here and wrong."""
    return f"rtdetr weights fetch {entry.file} --force"


def _held(entry: Published, path: Path, expected: str, *, whose: str, hint: str = "") -> str:
    """Return a file's hash if it is what it should be: the expected one, or, where none is known, that of such weights.

    Args:
        entry: what it should be.
        path: of the file.
        expected: its hash, or "".
        whose: what a message says it came from: a path, or an address.
        hint: of the message about a path; else how to fetch the file.
    """
    size, sha256, fault = path.stat().st_size, "", ""
    with path.open("rb") as file:
        page = file.read(512).lstrip()[:1] == b"<"
    if page:
        fault = f"it is a web page of {size:,} bytes"
    elif entry.size and size != entry.size:
        fault = f"it has {size:,} bytes of {entry.size:,}"
    else:
        sha256 = file_sha256(path)
        if expected and sha256 != expected:
            fault = f"its sha256 is {sha256[:12]}..., expected {expected[:12]}..."
        elif not expected:
            fault = _unlike(entry, path)
    if not fault:
        return sha256
    code = "weights-hash" if sha256 and expected else "weights-foreign"
    if whose == entry.url:
        recorded = code == "weights-hash" and not entry.sha256
        taken = f"; rtdetr weights fetch {entry.file} --force takes it all the same" if recorded else ""
        raise ModelError(
            f"{whose} did not give the published {entry.file}: {fault}",
            hint=f"nothing was kept{taken}; else {by_hand(entry)}",
            code=code,
        )
    raise ModelError(f"{whose} is not the published {entry.file}: {fault}", hint=hint or refetch(entry), code=code)


def _unlike(entry: Published, path: Path) -> str:
    """Say why a file cannot be the published one whose hash nobody knows; empty if it can."""
    from rtdetr_cli.weights.published import read_published

    try:
        content = read_published(path)
    except ModelError as error:
        return error.message.replace(str(path), "it")
    if (content.spec is None) != entry.backbone:
        return f"it holds {'a backbone' if content.spec is None else 'a detector'}"
    return ""


def _download(entry: Published, to: Path, progress: Watch | None) -> None:
    """Write what an address gives to a file.

    Raises:
        ModelError: there is no connection, the server refuses, or the connection breaks off.
        OSError: the file cannot be written.
    """
    import requests

    response: requests.Response | None = None
    total = 0
    try:
        # As it is: a packed transfer would have another length than the file.
        response = requests.get(entry.url, stream=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        total = int(response.headers.get("Content-Length", 0))
        shown = progress(total or None, f"fetching {entry.file}") if progress else nullcontext()
        with shown as told, to.open("wb") as file:
            for part in response.iter_content(CHUNK):
                file.write(part)
                if told is not None:
                    told.advance(len(part))
        if total and to.stat().st_size < total:
            raise requests.exceptions.ChunkedEncodingError
    except requests.exceptions.RequestException as error:
        if response is not None and response.ok:
            # What has come over the wire; the last part of it never came out of the library's buffer.
            came = f"{response.raw.tell():,}" + (f" of {total:,}" if total else "")
            message = f"{entry.file} was not fetched: the connection to {entry.url} broke off after {came} bytes"
            raise ModelError(message, hint=f"try again, or {by_hand(entry)}", code="weights-network") from error
        raise ModelError(
            f"{entry.file} could not be fetched from {entry.url}: {_reason(error)}",
            hint=by_hand(entry),
            code="weights-network",
        ) from error
    finally:
        if response is not None:
            response.close()


def _reason(error: Exception) -> str:
    """Return one short clause of a network error."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code}"
    known = {
        "ConnectionError": "no connection",
        "ConnectTimeout": "no answer",
        "ReadTimeout": "no answer",
        "ProxyError": "the proxy gives no connection",
        "SSLError": "no secure connection",
        "MissingSchema": "that is no address",
        "InvalidSchema": "that is no address",
        "InvalidURL": "that is no address",
    }
    kind = type(error).__name__
    return known.get(kind, kind)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Give a path beside `path` that takes its place on success; what cannot be written names the way out."""
    try:
        with atomic_write(path) as aside:
            yield aside
    except RtdetrError as error:
        if error.code != "not-writable":
            raise
        hint = f"make room, or set {HOME_VARIABLE} to another folder"
        raise RtdetrError(error.message, hint=hint, code=error.code) from error


def _recorded() -> dict[str, str]:
    path = weights_folder() / "hashes.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(k): str(v) for k, v in values.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=f"remove {path}", code="weights-hashes") from error


def _record(file: str, sha256: str) -> None:
    known = {**_recorded(), file: sha256}
    with _written(weights_folder() / "hashes.json") as aside:
        aside.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")

"""The cache of published weights.

A file is looked up in the cache first, then downloaded from the mirror or from the official release. Two files have
publicly known hashes; they must match. For any other file, the hash of the first copy with the right architecture is
recorded in `hashes.json`, and later copies must match it. Nothing is downloaded unless a command needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rtdetr_cli import documents as doc
from rtdetr_cli.errors import ModelError, RtdetrError
from rtdetr_cli.files import HOME_VARIABLE, atomic_write, cache_folder, sync_folder
from rtdetr_cli.weights.catalogue import MIRROR_VARIABLE, Published, catalogue, find_by_file, find_published
from rtdetr_cli.weights.download import OFFLINE_VARIABLE, ShowProgress, discard, download, exclusive, offline
from rtdetr_cli.weights.header import first_bytes

if TYPE_CHECKING:
    from rtdetr_cli.weights.published import PublishedFile

STALE_DAYS = 14
"""Parts of downloads that nobody has continued for so long are removed."""

Notify = Callable[[str], None]
"""Tells a person one sentence."""


def weights_folder() -> Path:
    """Return the folder of downloaded weights."""
    return cache_folder("weights")


def cached_path(name: str) -> Path:
    """Return where a published file is in the cache, or would be."""
    return weights_folder() / find_published(name).file


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_sha256(name: str) -> str:
    """Return the hash that a file must have, or "" when none is known yet."""
    entry = find_published(name)
    return entry.sha256 or recorded_hashes().get(entry.file, "")


def hash_kind(name: str) -> str:
    """Return `pinned` for a publicly known hash, `recorded` for that of an earlier copy, or ""."""
    if find_published(name).sha256:
        return "pinned"
    return "recorded" if expected_sha256(name) else ""


def verify(name: str, *, notify: Notify | None = None) -> str:
    """Check a cached file and return its hash; where no hash is known and the architecture is right, record it.

    Raises:
        ModelError: the hash differs, or the content is not what the name says.
    """
    entry = find_published(name)
    path = weights_folder() / entry.file
    return _check(entry, path, source=str(path), hint=f"rtdetr weights fetch {entry.name} --force", notify=notify)


def fetch(
    name: str,
    *,
    force: bool = False,
    progress: ShowProgress | None = None,
    notify: Notify | None = None,
) -> Path:
    """Return the path of a published file; download it when it is not in the cache, and check it.

    A cached file is checked at each use, which needs no record of sizes and dates.

    Args:
        name: of the weights, or of the file.
        force: download it even when it is cached, and let its hash replace a recorded one (never a public one).
        progress: a display of the download.
        notify: is told when a hash is recorded.

    Raises:
        ModelError: unknown file, no network, interrupted download, or not the published file (which is not kept).
        RtdetrError: the cache cannot be written.
    """
    entry = find_published(name)
    path = weights_folder() / entry.file
    if path.is_file() and not force:
        verify(name, notify=notify)
        return path
    if offline():
        raise ModelError(
            f"{entry.file} is not in the cache, and downloads are turned off (--offline or {OFFLINE_VARIABLE})",
            hint=manual_download_hint(entry),
            code="weights-offline",
        )
    part = cache_folder("incomplete") / entry.file
    with _cache_errors(part.parent):
        part.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(part.parent)
        with exclusive(part, progress):
            if force:
                discard(part)
            elif path.is_file():  # another process has fetched it
                verify(name, notify=notify)
                return path
            by_hand = manual_download_hint(entry)
            download(entry.url, part, name=entry.file, hint=by_hand, progress=progress)
            try:
                accept = f"rtdetr weights fetch {entry.name} --force"
                _check(entry, part, source=entry.url, hint=by_hand, accept=accept, force=force, notify=notify)
            except BaseException:
                discard(part)
                raise
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
    return path


def import_file(source: Path, *, name: str = "", force: bool = False, notify: Notify | None = None) -> Path:
    """Check a file that was downloaded by other means, and copy it into the cache under its published name.

    Args:
        source: the file. It may have any name, as long as its tensors say which one it is.
        name: which weights it holds, where tensors and file name leave several.
        force: let its hash replace a recorded one (never a public one).
        notify: is told what the file is, and when a hash is recorded.

    Raises:
        ModelError: it does not exist, or is not a published file, or could be several.
        RtdetrError: the cache cannot be written.
    """
    if not source.is_file():
        raise ModelError(f"{source} does not exist", code="weights-missing")
    entry = find_published(name) if name else find_by_file(_original_name(source)) or _recognize(source)
    if source.name != entry.file and notify:
        notify(f"{source} holds {entry.name}: {entry.description}")
    hint, accept = f"rtdetr weights fetch {entry.name} --force", f"rtdetr weights import {source} --force"
    _check(entry, source, source=str(source), hint=hint, accept=accept, force=force, notify=notify)
    path = weights_folder() / entry.file
    if not (path.exists() and path.samefile(source)):
        with _cache_errors(path.parent), atomic_write(path) as temporary:
            shutil.copyfile(source, temporary)
    return path


def _remove_stale(folder: Path) -> None:
    for file in folder.iterdir():
        if time.time() - file.stat().st_mtime > STALE_DAYS * 86400:
            file.unlink(missing_ok=True)


def manual_download_hint(entry: Published) -> str:
    """Return what to do when a file cannot be downloaded on this machine."""
    return (
        f"download {entry.url} elsewhere and put it at {weights_folder() / entry.file}, "
        f"or: rtdetr weights import {entry.file} ({MIRROR_VARIABLE} sets a mirror)"
    )


def _original_name(path: Path) -> str:
    """Return a file's name without what a browser adds to a second copy: `weights (1).pth`."""
    return re.sub(r" ?\(\d+\)(?=\.\w+$)", "", path.name)


def _recognize(source: Path) -> Published:
    """Return the catalogue entry of a file by its hash or its tensors.

    Raises:
        ModelError: it is none of them, or could be several.
    """
    if (known := known_file(source)) is not None:
        return known
    from rtdetr_cli.weights.published import read_published

    content = read_published(source)
    fitting = [e for e in catalogue().values() if not e.sha256 and not content_problem(e, content)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ModelError(
            f"the tensors of {source} fit several published files: {', '.join(e.name for e in fitting)}",
            hint=f"rtdetr weights import {source} --as {fitting[0].name}",
            code="weights-ambiguous",
        )
    raise ModelError(
        f"{source} is none of the published files",
        hint="rtdetr weights list shows them; other models need no import: --weights FILE",
        code="weights-unknown",
    )


def known_file(path: Path) -> Published | None:
    """Return the catalogue entry of a file by its hash, pinned or recorded; by its name where no hash is known."""
    recorded = recorded_hashes()
    by_name = find_by_file(path.name)
    if by_name is not None and not by_name.sha256 and by_name.file not in recorded:
        return by_name
    if not recorded and path.stat().st_size not in {entry.bytes for entry in catalogue().values()}:
        return None
    sha256 = file_sha256(path)
    return next((e for e in catalogue().values() if sha256 in (e.sha256, recorded.get(e.file))), None)


def content_problem(entry: Published, content: PublishedFile) -> str:
    """Return why the content of a file cannot be what the catalogue says, or ""."""
    from rtdetr_cli.weights.architecture import has_backbone, matching_preset, size_differences

    spec = content.spec
    if (spec is None) != entry.is_backbone:
        return f"it contains {'a backbone' if spec is None else 'a detector'}"
    if spec is None:
        return "" if has_backbone(entry.spec, content.state) else f"it is not the backbone of {entry.preset}"
    if differences := size_differences(entry.spec, spec):
        found = matching_preset(spec)
        key, (wanted, got) = next(iter(differences.items()))
        return f"it has the architecture of {found}" if found else f"its {key} is {got}, not {wanted}"
    if spec.num_points != entry.spec.num_points:
        return f"it has {spec.num_points} sampling points, not {entry.spec.num_points}"
    if content.num_classes not in entry.classes:
        return f"it has {content.num_classes} classes"
    if content.is_v1 != (entry.version == "v1"):
        return f"it is a file of RT-DETR{' v1' if content.is_v1 else 'v2'}"
    return ""


def _check(
    entry: Published,
    path: Path,
    *,
    source: str,
    hint: str,
    accept: str = "",
    force: bool = False,
    notify: Notify | None = None,
) -> str:
    """Return a file's hash if the file is the published one; where no hash is known, record it.

    With `force`, only a public hash is expected and no recorded one; `accept` is the command that does so. `source`
    says in messages where the file came from.
    """
    expected = entry.sha256 if force else expected_sha256(entry.file)
    sha256, code = file_sha256(path), "weights-foreign"
    size = path.stat().st_size
    if first_bytes(path).lstrip()[:1] == b"<":
        problem = f"it is a web page of {size:,} bytes"
    elif entry.bytes and size != entry.bytes:
        problem = f"it has {size:,} bytes, not {entry.bytes:,}"
    elif expected and sha256 != expected:
        problem = f"checksum mismatch: sha256 is {sha256[:12]}..., expected {expected[:12]}..."
        code = "weights-hash"
        if accept and not entry.sha256:
            hint = f"{accept} accepts the new file; or {hint}"
    else:
        problem = "" if entry.sha256 else _architecture_problem(entry, path)
    if problem:
        raise ModelError(f"{source} is not the published {entry.file}: {problem}", hint=hint, code=code)
    if not expected:
        _record_hash(entry.file, sha256)
        if notify:
            notify(f"no hash of {entry.file} is publicly known: recorded that of this copy, {sha256[:12]}...")
    return sha256


def _architecture_problem(entry: Published, path: Path) -> str:
    from rtdetr_cli.weights.published import read_published

    try:
        return content_problem(entry, read_published(path))
    except ModelError as error:
        return error.message.replace(str(path), "it")


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """When the cache is not writable, say how to move it."""
    hint = f"free some space, or set {HOME_VARIABLE} to another folder"
    try:
        yield
    except OSError as error:
        message = f"{folder} cannot be written: {error.strerror or error}"
        raise RtdetrError(message, hint=hint, code="not-writable") from error
    except RtdetrError as error:
        if error.code == "not-writable":
            error.hint = hint
        raise


def _record_hash(file: str, sha256: str) -> None:
    path = _hashes_file()
    with _cache_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = cache_folder("incomplete") / path.name
        lock.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock), atomic_write(path) as temporary:
            hashes = {**recorded_hashes(), file: sha256}
            temporary.write_text(json.dumps(hashes, indent=1, sort_keys=True), encoding="utf-8")


def recorded_hashes() -> dict[str, str]:
    """Return the hash of every file that was recorded on this machine, by file name."""
    path = _hashes_file()
    try:
        return doc.table(doc.text)(doc.parse_json(doc.read_bounded(path)))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=f"remove {path}", code="weights-hashes") from error


def _hashes_file() -> Path:
    return weights_folder() / "hashes.json"

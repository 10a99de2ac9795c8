"""Unpack a zip file with a dataset, once, into a cache that is cleaned."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath

from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.files import cache_folder
from rtdetr_cli.machine import free_bytes

_MAX_FILES = 5_000_000
_MAX_RATIO = 100
_RATIO_BYTES = 1 << 30
"""More than that many unpacked bytes may not be more than `_MAX_RATIO` times the zip file; images hardly compress."""

_SPARE_BYTES = 1 << 30
_UNUSED_DAYS = 30
_LINK = 0o120000
_BESIDE = re.compile(r"\..+\.[0-9a-f]{12}")
"""The hidden folder beside a zip file."""
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTEMPTY)
"""Error numbers that are not the fault of the zip file."""


def unpack(source: Path) -> Path:
    """Unpack a zip file into the cache, or into a hidden folder beside it if the cache has too little space.

    The folder is named after what the zip file contains, so that the same file is not unpacked again, wherever it is.
    Folders in the cache that were not used for `_UNUSED_DAYS` are removed when another file is unpacked.

    Raises:
        DataError: it is damaged or encrypted, or could overwrite other files or fill the disk.
        RtdetrError: no folder can be written.
    """
    cache = cache_folder("datasets")
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            contents = "\n".join(f"{e.filename} {e.CRC} {e.file_size} {e.compress_size}" for e in entries)
            key = hashlib.sha256(contents.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            targets = [
                cache / f"{source.stem}-{key}" / source.stem,
                source.resolve().parent / f".{source.name}.{key}" / source.stem,
            ]
            for target in targets:
                if target.is_dir():
                    with suppress(OSError):  # of another user
                        os.utime(target.parent)
                    return target
            size = _check(source, entries)
            _remove_unused(cache)
            return _extract(archive, targets, size, source)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{source} cannot be unpacked: {error}", hint="download or pack it again", code="zip-damaged"
        ) from error
    except OSError as error:
        raise DataError(
            f"{source} cannot be read: {error.strerror or error}", hint="check its permissions", code="zip-damaged"
        ) from error


def is_unpacked(folder: Path) -> bool:
    """Return whether a folder comes from a zip file, whose paths and links must not lead out of it."""
    real = folder.resolve()
    return real.is_relative_to(cache_folder("datasets").resolve()) or any(map(_BESIDE.fullmatch, real.parts))


def _remove_unused(cache: Path) -> None:
    with suppress(OSError):
        for folder in cache.iterdir():
            if folder.stat().st_mtime < time.time() - _UNUSED_DAYS * 86_400:
                shutil.rmtree(folder, ignore_errors=True)


def _check(source: Path, entries: list[zipfile.ZipInfo]) -> int:
    """Refuse entries that would leave the folder or fill the disk; return the number of unpacked bytes."""
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", str(path)):
            problem = f"contains {entry.filename!r}, which would be written outside of its folder"
        elif entry.external_attr >> 16 & 0o170000 == _LINK:
            problem = f"contains the link {entry.filename!r}"
        elif entry.flag_bits & 1:
            problem = f"is encrypted ({entry.filename!r})"
        else:
            continue
        raise DataError(f"{source} {problem}", hint="unpack it yourself and pass the folder", code="zip-unsafe")
    size = sum(entry.file_size for entry in entries)
    if len(entries) > _MAX_FILES or (size > _RATIO_BYTES and size > _MAX_RATIO * source.stat().st_size):
        raise DataError(
            f"{source} declares {len(entries):,} files with {size / 2**30:,.1f} GiB, far more than "
            "a dataset of its size",
            hint="unpack it yourself and pass the folder",
            code="zip-unsafe",
        )
    return size


def _extract(archive: zipfile.ZipFile, targets: list[Path], size: int, source: Path) -> Path:
    problem = ""
    for target in targets:
        try:
            target.parent.parent.mkdir(parents=True, exist_ok=True)
            free = free_bytes(target.parent.parent)
            if size + _SPARE_BYTES > free:
                problem = f"needs {size / 2**30:,.1f} GiB, and {target.parent.parent} has {free / 2**30:,.1f} GiB free"
                continue
            aside = Path(tempfile.mkdtemp(prefix=f"{target.parent.name}.", dir=target.parent.parent))
        except OSError as error:
            problem = problem or f"cannot be unpacked: {error.strerror or error}"
            continue
        try:
            aside.chmod(0o755)  # a temporary folder is private; the dataset need not be
            archive.extractall(aside / target.name)
            (aside / target.name).mkdir(exist_ok=True)
            os.replace(aside, target.parent)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise ValueError(error.strerror or error) from error
            if not target.is_dir():  # another process may have been faster
                raise RtdetrError(
                    f"{source} cannot be unpacked into {target}: {error.strerror or error}", code="not-writable"
                ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target
    raise RtdetrError(f"{source} {problem}", hint="free some space, or unpack it elsewhere", code="not-writable")

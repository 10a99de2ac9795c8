"""Files that are written whole or not at all, and where they are cached."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rtdetr_cli.errors import RtdetrError

HOME_VARIABLE = "RTDETR_CLI_HOME"
PARTIAL = ".rtdetr-partial"
"""The folder that `whole_folder` writes to."""


def cache_folder(name: str) -> Path:
    """Return a folder of the cache, which need not exist: `$RTDETR_CLI_HOME/NAME`, or one in the user's cache."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home) / name
    import platformdirs

    return Path(platformdirs.user_cache_dir("rtdetr-cli", appauthor=False)) / name


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is flushed to the disk and takes `path`'s place.

    A reader, or a machine that loses its power, sees the old file or the new one and never a part of one.

    Raises:
        RtdetrError: the folder cannot be written, or is full.
    """
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name may be as long as the file system allows already.
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
        os.close(handle)
        aside = Path(name)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)  # a temporary file is private; the model need not be
        aside.replace(path)
        aside = None
        sync_folder(path.parent)
    except OSError as error:
        raise RtdetrError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="free some space, or choose another folder" if is_full(error) else "choose another folder",
            code="not-writable",
        ) from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden folder in `folder`, which is new or empty; on success its files and folders take their places.

    A process that is killed leaves nothing half-written under a final name, and nothing that the next one has to keep.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in sorted(partial.iterdir(), key=Path.is_file):  # files last: they name what the folders hold
            entry.replace(folder / entry.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def ensure_writable(folder: Path, *, hint: str = "choose another folder with --out") -> None:
    """Create a folder and check that files can be written to it.

    Raises:
        RtdetrError: the folder cannot be created or written to (code `not-writable`).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rtdetr-"):
            pass
    except OSError as error:
        raise RtdetrError(
            f"{folder} cannot be written: {error.strerror or error}", hint=hint, code="not-writable"
        ) from error


def missing_path_hint(path: Path) -> str:
    """Return a hint for a path that does not exist: close names in its folder, or whether there is such a folder."""
    folder = "the current folder" if path.parent == Path() else f"the folder {path.parent}"
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f"{folder} cannot be read" if path.parent.is_dir() else f"{folder} does not exist either"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)
    if close:
        return f"did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    return f"{folder} has no such file"

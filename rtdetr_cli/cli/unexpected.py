"""What happens to an exception that nobody foresaw: one sentence for the user, the traceback in a file."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.files import cache_folder
from rtdetr_cli.text import printable
from rtdetr_cli.version import __version__

TRACEBACK_VARIABLE = "RTDETR_CLI_TRACEBACK"
"""When it is set, unexpected exceptions are raised, as in the tests."""

_run_folders: list[Path] = []


def remember_run(folder: Path | None) -> None:
    """Remember the folder of the run that this process trains: a traceback is written there."""
    _run_folders[:] = [folder] if folder is not None else []


def unexpected_error(error: Exception, argv: Sequence[str]) -> RtdetrError:
    """Write the traceback of an exception to a file, and return an error that names the file.

    Raises:
        Exception: the same exception, if `RTDETR_CLI_TRACEBACK` is set.
    """
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    try:
        reason = printable(" ".join(str(error).split()))[:200]
    except Exception:
        reason = ""
    kind = type(error).__name__
    path = _write(error, argv)
    where = f"; the traceback is in {path}" if path is not None else ""
    hint = f"this is a bug in rtdetr-cli: report it{' with that file' if path is not None else ''}"
    return RtdetrError(f"unexpected {kind}{f': {reason}' if reason else ''}{where}", hint=hint, code="unexpected")


def _write(error: Exception, argv: Sequence[str]) -> Path | None:
    """Write the traceback into the run's folder, the cache folder, or the system's temporary folder."""
    text = "".join(traceback.format_exception(error))
    text = f"rtdetr-cli {__version__}, Python {sys.version.split()[0]}\nrtdetr {' '.join(argv)}\n\n{text}"
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (*_run_folders, cache_folder("tracebacks"), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return folder / name
    return None

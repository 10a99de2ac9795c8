"""Read label files as text, with limits on their size."""

from __future__ import annotations

import codecs
import errno
import re
from dataclasses import dataclass, field
from pathlib import Path

from rtdetr_cli.datasets.findings import Findings
from rtdetr_cli.documents import NotRegularError, read_bounded

MAX_BYTES = 4 << 30
"""Larger label files are refused; the largest public one (Objects365) has less than 4 GB."""

MAX_SMALL_BYTES = 64 << 20
"""The limit for the label file of one image, a list of images or a `data.yaml`."""

CLASS_LISTS = (
    *("obj.names", "_darknet.labels", "classes.txt", "labels.txt", "class_names.txt"),
    "predefined_classes.txt",
)
"""Files with one class name per line."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")

TRUNCATED_HINT = "copy, download or export the file again"


@dataclass(slots=True)
class Oddities:
    """Label files with a byte order mark or Windows line endings, which are reported once for all files."""

    bom: list[str] = field(default_factory=list)
    crlf: list[str] = field(default_factory=list)

    def report(self, findings: Findings) -> None:
        """Add one finding per kind."""
        for code, what, files in (
            ("file-bom", "with a byte order mark", self.bom),
            ("file-crlf", "with Windows line endings", self.crlf),
        ):
            if files:
                subject = f"and {len(files) - 1:,} more are label files" if len(files) > 1 else "is a label file"
                findings.add(code, f"{subject} {what}", file=files[0], line=1)


def read_text(path: Path, shown: str, findings: Findings, oddities: Oddities, *, limit: int) -> str | None:
    """Return the text of a file without its byte order mark; None, and a finding, if it cannot be read."""
    try:
        data = read_bounded(path, limit=limit)
    except OSError as error:
        code, message = "file-missing", f"cannot be read: {error.strerror or error}"
        if isinstance(error, FileNotFoundError):
            message = "does not exist"
        elif isinstance(error, IsADirectoryError | NotRegularError):
            message = "is not a regular file"
        elif error.errno == errno.EFBIG:
            code, message = "file-bounds", f"is larger than {limit >> 20:,} MiB"
        findings.add(code, message, file=shown)
        return None
    if data.startswith(codecs.BOM_UTF8):
        oddities.bom.append(shown)
        data = data[3:]
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        findings.add("file-malformed", "is encoded in UTF-16", file=shown, line=1, hint="save it as UTF-8")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if error.reason == "unexpected end of data":
            message, hint = "ends in the middle of a character: the file is truncated", TRUNCATED_HINT
        else:
            message, hint = f"is not UTF-8: byte 0x{data[error.start]:02x}", ""
        findings.add("file-malformed", message, file=shown, line=line, hint=hint)
        return None
    if b"\r\n" in data:
        oddities.crlf.append(shown)
    return text


def is_valid_name(name: str) -> bool:
    """Return whether a file or a class can have this name: not empty, no NUL, no character that cannot be encoded."""
    return bool(name) and not _NO_NAME.search(name)


def is_utf8(name: str) -> bool:
    """Return whether a name can be written as UTF-8: that of a file may have bytes that cannot be decoded."""
    return not _SURROGATE.search(name)

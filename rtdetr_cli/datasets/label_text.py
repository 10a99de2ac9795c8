"""Read label files as text, with limits on their size."""

from __future__ import annotations

import codecs
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from rtdetr_cli.datasets.findings import Findings

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
            if len(files) == 1:
                findings.add(code, f"is a label file {what}", file=files[0], line=1)
            elif files:
                more = f"and {len(files) - 1:,} more are label files {what}"
                findings.add(code, more, file=files[0], line=1)


def read_text(
    path: Path, shown: str, findings: Findings, oddities: Oddities, *, limit: int = MAX_SMALL_BYTES
) -> str | None:
    """Return the text of a file without its byte order mark; None, and a finding, if it cannot be read."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would block forever
            findings.add("file-missing", "is not a regular file", file=shown)
            return None
        with open(path, "rb") as file:
            data = file.read(min(found.st_size, limit) + 1)  # which is allocated at once
    except FileNotFoundError:
        findings.add("file-missing", "does not exist", file=shown)
        return None
    except (OSError, ValueError) as error:
        findings.add("file-missing", f"cannot be read: {getattr(error, 'strerror', None) or error}", file=shown)
        return None
    if len(data) > limit:
        findings.add("file-bounds", f"is larger than {limit >> 20:,} MiB", file=shown)
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


def is_valid_class(name: str) -> bool:
    """Return whether a class can have this name: as a file can, and it can be written as UTF-8."""
    return is_valid_name(name) and (name.isascii() or not _SURROGATE.search(name))


def is_valid_name(name: str) -> bool:
    """Return whether a file or a class can have this name: not empty, no NUL, no character that cannot be encoded."""
    if not name or "\0" in name:
        return False
    if name.isascii():
        return True
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True

"""Read a label file as text, within bounds, and remember what is odd about it."""

from __future__ import annotations

import codecs
import stat
from dataclasses import dataclass, field
from pathlib import Path

from rtdetr_cli.datasets.findings import Findings

MAX_BYTES = 4 << 30
"""Label files are refused above this size; the largest public one (Objects365) has under 4 GB."""

MAX_SMALL_BYTES = 64 << 20
"""The same for a file of one image, a list of images or a `data.yaml`."""

CUT_OFF_HINT = "copy, download or export the file again"


@dataclass(slots=True)
class Oddities:
    """Label files with a byte order mark or Windows line ends: said once for all of them."""

    bom: list[str] = field(default_factory=list)
    crlf: list[str] = field(default_factory=list)

    def report(self, findings: Findings) -> None:
        """Add one finding for each kind."""
        for code, what, files in (
            ("file-bom", "with a byte order mark", self.bom),
            ("file-crlf", "with Windows line ends", self.crlf),
        ):
            if len(files) == 1:
                findings.add(code, f"is a label file {what}", file=files[0], line=1)
            elif files:
                more = f"and {len(files) - 1:,} more are label files {what}"
                findings.add(code, more, file=files[0], line=1)


def read_text(
    path: Path, shown: str, findings: Findings, oddities: Oddities, *, limit: int = MAX_SMALL_BYTES
) -> str | None:
    """Return a file's text without its byte order mark, or None with a finding that says why not."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            findings.add("file-missing", "is no file", file=shown)
            return None
        with open(path, "rb") as file:
            data = file.read(limit + 1)
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
        findings.add("file-malformed", "is written in UTF-16", file=shown, line=1, hint="save it as UTF-8")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if error.reason == "unexpected end of data":
            said, hint = "breaks off in the middle of a character: the file is cut off", CUT_OFF_HINT
        else:
            said, hint = f"is not UTF-8: byte 0x{data[error.start]:02x}", ""
        findings.add("file-malformed", said, file=shown, line=line, hint=hint)
        return None
    if b"\r\n" in data:
        oddities.crlf.append(shown)
    return text

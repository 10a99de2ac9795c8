"""Walk JSON text entry by entry.

`json.loads` would need ten times the memory for a large COCO file, and does not tell on which line an entry starts.
Walking with the standard library's scanner is as fast.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.findings import Findings
from rtdetr_cli.datasets.label_text import TRUNCATED_HINT

_BLANK = re.compile(r"[ \t\n\r]*").match
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


class JSONFault(ValueError):
    """The text is not valid JSON, or not what is expected at `position`."""

    def __init__(self, message: str, position: int, code: str = "file-malformed") -> None:
        super().__init__(message)
        self.message, self.position, self.code = message, position, code


def scan_value(text: str, position: int) -> tuple[Any, int]:
    """Parse one JSON value and return it with the position after it.

    Raises:
        JSONFault: there is none, or it is nested too deeply.
    """
    try:
        return _scan(text, position)
    except StopIteration as stop:
        raise JSONFault("a value is missing", stop.value) from None
    except json.JSONDecodeError as error:
        raise JSONFault(error.msg[:1].lower() + error.msg[1:], error.pos) from None
    except RecursionError:
        raise JSONFault("is nested too deeply", position, "file-bounds") from None
    except ValueError:  # a number of thousands of digits
        raise JSONFault("a number has too many digits", position) from None


def walk_object(text: str, lists: Mapping[str, tuple[Callable[[Any], None], array[int]]]) -> set[str]:
    """Walk the members of the document's object: those of `lists` element by element, others as a whole.

    Args:
        text: the document.
        lists: key -> a function called with every element of its list, and an array that gets their positions.

    Returns:
        Every key of the object.

    Raises:
        JSONFault: the document is not an object, is broken, or has a key twice.
    """
    position = _skip_blank(text, 0)
    if not text.startswith("{", position):
        actual = "a list" if text.startswith("[", position) else "something else"
        raise JSONFault(
            f"a COCO file is an object with images, annotations and categories, but this is {actual}", position
        )
    keys: set[str] = set()

    def member(position: int) -> int:
        if not text.startswith('"', position):
            raise JSONFault("a key is expected", position)
        key, after_key = scan_value(text, position)
        if key in keys:
            raise JSONFault(f"the key {key!r} appears twice", position, "file-repeated-key")
        keys.add(key)
        position = _skip_blank(text, after_key)
        if not text.startswith(":", position):
            raise JSONFault("a colon is missing", position)
        position = _skip_blank(text, position + 1)
        if key not in lists:
            return scan_value(text, position)[1]
        if not text.startswith("[", position):
            raise JSONFault(f"{key} must be a list", position)
        visit, starts = lists[key]

        def element(position: int) -> int:
            starts.append(position)
            value, position = scan_value(text, position)
            visit(value)
            return position

        return _walk(text, position, "]", "list", element)

    position = _skip_blank(text, _walk(text, position, "}", "object", member))
    if position != len(text):
        raise JSONFault("there is more text after the end of the document", position)
    return keys


def _walk(text: str, position: int, closing: str, what: str, element: Callable[[int], int]) -> int:
    """Call `element`, which returns the end of one, at each element after an opening bracket; return the end of all."""
    position = _skip_blank(text, position + 1)
    if text.startswith(closing, position):
        return position + 1
    while True:
        position = element(position)
        if text.startswith(", {", position):  # how Python writes it: a shortcut for the long lists of one-line files
            position += 2
            continue
        position = _skip_blank(text, position)
        if text.startswith(closing, position):
            return position + 1
        if not text.startswith(",", position):
            raise JSONFault(f"a comma or the end of the {what} is missing", position)
        position = _skip_blank(text, position + 1)


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK(text, position)
    assert match is not None  # the pattern matches the empty text
    return match.end()


def line_of(text: str, position: int) -> int:
    """Return the line of a position, from 1."""
    return text.count("\n", 0, position) + 1


def lines_of(text: str, positions: array[int]) -> NDArray[np.int32]:
    """Return the lines of many ascending positions, from 1."""
    where = np.frombuffer(positions, np.int64) if len(positions) else np.zeros(0, np.int64)
    if "\n" not in text:
        return np.ones(len(where), np.int32)
    if text.isascii():
        ends = np.flatnonzero(np.frombuffer(text.encode("ascii"), np.uint8) == 10)
    else:
        ends = np.fromiter((m.start() for m in re.finditer("\n", text)), np.int64)
    return (np.searchsorted(ends, where) + 1).astype(np.int32)


def report_fault(findings: Findings, text: str, fault: JSONFault, file: str) -> None:
    """Add a finding for a fault in a file.

    Where a file is truncated, the parser complains about whatever it expected there, which doesn't help anybody.
    """
    end = len(text.rstrip())
    message, position, hint = f"{fault.message} (column {_column(text, fault.position)})", fault.position, ""
    rest = text[fault.position : end]
    # What is left is the start of a value, of an escape, or nothing; for an open string the parser names its start.
    short = len(rest) < len(r"\u00e4") and not set(rest) & set("]}")
    open_string = fault.message.startswith("unterminated string") and not rest.endswith("}")
    if not end:
        message, position, hint = "is empty", 0, TRUNCATED_HINT
    elif fault.code == "file-malformed" and (short or open_string or any(word.startswith(rest) for word in _WORDS)):
        message = f"ends at line {line_of(text, end)}, column {_column(text, end)}: the file is truncated"
        position, hint = end, TRUNCATED_HINT
    findings.add(fault.code, message, file=file, line=line_of(text, position), hint=hint)


def _column(text: str, position: int) -> int:
    return position - text.rfind("\n", 0, position)

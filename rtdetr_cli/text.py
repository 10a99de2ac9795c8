"""Text for people: counts with their nouns, shortened lists, and strings that are safe to print."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def counted(count: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: `1 box`, `2,000 boxes`."""
    if count == 1:
        return f"1 {singular}"
    return f"{count:,} {plural or singular + ('es' if singular[-1] in 'sx' else 's')}"


def tally(counts: Mapping[str, int]) -> str:
    """Return the number of findings of each severity: `0 errors, 1 warning, 88 notes`."""
    return ", ".join(counted(counts[s], "note" if s == "info" else s) for s in ("error", "warning", "info"))


def whole_number(text: str, *, digits: int = 18) -> int | None:
    """Return the number that ASCII digits write, or None for other text and for more than `digits` of them."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def abbreviate(names: Sequence[str], limit: int = 8) -> str:
    """Return the first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def printable(text: str) -> str:
    """Return `text` with everything escaped that a terminal or a UTF-8 file cannot show."""
    if text.isprintable():
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable_lines(text: str) -> str:
    """Return `text` with line breaks and tabs as they are, and what would control a terminal escaped."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


def json_text(value: Any) -> str:
    """Return JSON on one line, in which what would control a terminal is escaped as JSON does.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    # In JSON, such characters can only be inside of strings.
    return _CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` if a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""

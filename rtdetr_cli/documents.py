"""Read small files and documents from outside, within bounds on their size, depth and numbers.

What a file says is checked here once, where it comes in, so that nothing further inward has to expect a list where a
number should be. It takes functions and not pydantic, which would add a fifth to the time of a prediction.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

MAX_BYTES = 64 << 20
MAX_DEPTH = 32

T = TypeVar("T")
Reader = Callable[[Any], T]
"""Returns a checked value; raises ValueError with the reason in words."""


class NotRegularError(OSError):
    """The path is that of a pipe, a device or a socket."""


def require_regular(path: Path) -> int:
    """Return the size in bytes of a regular file: opening a pipe would block, and a device has no end.

    Raises:
        OSError: it is missing; NotRegularError: it is not a file.
    """
    try:
        found = os.stat(path)
    except ValueError:  # a NUL, or a character that a file name cannot have
        raise OSError(errno.EINVAL, "the path is not valid", str(path)) from None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise NotRegularError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return found.st_size


def read_bounded(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a small regular file.

    Raises:
        OSError: it is missing, not a regular file, unreadable, or larger than `limit` bytes.
    """
    size = require_regular(path)
    with open(path, "rb") as file:
        data = file.read(min(size, limit) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB", str(path))
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that is at most `MAX_DEPTH` deep.

    Raises:
        ValueError: it is not valid, too deep, or has a number of thousands of digits.
    """
    try:
        document = json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [document], 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return document


def shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def string(value: Any) -> str:
    """Read text; that of a file name can stand for bytes that are not UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not text")
    return value


def text(value: Any) -> str:
    """Read text that a UTF-8 file can hold."""
    try:
        string(value).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(value)} has characters that no text can have") from None
    return str(value)


def boolean(value: Any) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value


def integer(lowest: int, highest: int) -> Reader[int]:
    """Return a reader of integers from `lowest` to `highest`."""

    def read(value: Any) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            raise ValueError(f"{shown(value)} is not an integer from {lowest} to {highest}")
        return value

    return read


def number(value: Any) -> float:
    """Read a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e300:
        raise ValueError(f"{shown(value)} is not a finite number")
    return float(value)


def one_of(*words: str) -> Reader[str]:
    """Return a reader of one of a few words."""

    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(f"{shown(value)} is none of {', '.join(words)}")
        return str(value)

    return read


def optional(read: Reader[T]) -> Reader[T | None]:
    """Return a reader that also takes null."""
    return lambda value: None if value is None else read(value)


def sequence(read: Reader[T], *, longest: int = 100_000) -> Reader[tuple[T, ...]]:
    """Return a reader of lists."""

    def read_all(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > longest:
            raise ValueError(f"{shown(value)} is not a list of at most {longest:,} entries")
        return tuple(read(item) for item in value)

    return read_all


def table(read: Reader[T]) -> Reader[dict[str, T]]:
    """Return a reader of objects whose values are all alike."""

    def read_all(value: Any) -> dict[str, T]:
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)} is not an object")
        return {string(key): _named(key, read, item) for key, item in value.items()}

    return read_all


def plain(value: Any) -> Any:
    """Read any JSON value whose text can be written again."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return table(plain)(value)
    if value is not None and not isinstance(value, bool | int | float):
        raise ValueError(f"{shown(value)} is no JSON value")
    return value


def read_fields(document: Any, readers: Mapping[str, Reader[Any]], *, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the checked fields of an object; unknown ones are dropped.

    Raises:
        ValueError: a field has a wrong value, or a required one is missing.
    """
    if not isinstance(document, dict):
        raise ValueError("it is not an object")
    for name in required:
        if name not in document:
            raise ValueError(f"{name} is missing")
    return {name: _named(name, read, document[name]) for name, read in readers.items() if name in document}


def _named(name: str, read: Reader[T], value: Any) -> T:
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None

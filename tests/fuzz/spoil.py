"""Damage bytes, documents and names at random; every choice comes from the given generator."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

ODD_TEXTS = ("", "\0", "\ud800", "../../x", "/", ".", "a" * 5000, "<script>", "NaN", "1e999", "-0", "9" * 5000,
"ä\n\x1b[2J",
             "\x9b31m", "[/red]", "{{x}}", "%s", "\r", "true", "-1", "http://[", "\u202e")  # fmt: skip
ODD_NUMBERS = (0, -1, 1, 2, 10**9, 10**30, 2**31, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e300, 1e-300, float("inf"),
float("-inf"),
               float("nan"))  # fmt: skip
ODD_BYTES = (b"", b"\0", b"{", b"]", b'"', b"<", b"&a;", b"-", b"\xff", b"\r\n", b"nan", b"null", b": ", b"1e999",
b"9" * 5000,
             b"[" * 3000, b"\x1b[2J", b"\xed\xa0\x80")  # fmt: skip


def odd_value(random: Random, depth: int = 2) -> Any:
    """Return a value that nobody expects there."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: random.random() < 0.5,
        lambda: random.choice(ODD_NUMBERS),
        lambda: random.choice(ODD_TEXTS),
        lambda: random.randint(-9, 9),
        lambda: random.uniform(-2, 2),
        lambda: _nested(random.choice((3, 200, 5000))),
    ]
    if depth:
        kinds += [
            lambda: [odd_value(random, depth - 1) for _ in range(random.randint(0, 4))],
            lambda: {random.choice(("id", "name", "x")): odd_value(random,
            depth - 1) for _ in range(random.randint(0, 3))},
        ]  # fmt: skip
    return random.choice(kinds)()


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def spoil_document(random: Random, document: Any) -> Any:
    """Return a JSON document with a few values replaced, removed, added or doubled anywhere in it."""
    root = {"root": document}
    for _ in range(random.randint(1, 3)):
        container: Any = root
        key: Any = "root"
        while (
            isinstance(container[key], dict | list) and container[key] and (container is root or random.random() < 0.7)
        ):
            container = container[key]
            key = random.choice(list(container) if isinstance(container, dict) else range(len(container)))
        action = random.randint(0, 5)
        if action == 0 and container is not root:
            del container[key]
        elif action == 1 and isinstance(container, list):
            container.insert(key, odd_value(random))
        elif action == 2 and isinstance(container, dict):
            container[random.choice(ODD_TEXTS)] = container[key]
        else:
            container[key] = odd_value(random)
        if "root" not in root:
            root["root"] = None
    return root["root"]


def dump(document: Any) -> bytes:
    """Return a document as JSON, with surrogates and numbers that JSON does not have."""
    pieces: list[str] = []
    _write(document, pieces)
    return "".join(pieces).encode("utf-8", "surrogatepass")


def _write(value: Any, pieces: list[str]) -> None:
    """Write JSON of any depth: the encoder of the standard library recurses."""
    stack: list[Any] = [value]
    marks = object()
    while stack:
        item = stack.pop()
        if isinstance(item, tuple) and item and item[0] is marks:
            pieces.append(item[1])
        elif isinstance(item, dict):
            parts: list[Any] = []
            for number, (key, inner) in enumerate(item.items()):
                parts += [(marks, f"{', ' if number else ''}{json.dumps(str(key))}: "), inner]
            stack += [(marks, "}"), *reversed(parts), (marks, "{")]
        elif isinstance(item, list | tuple):
            parts = []
            for number, inner in enumerate(item):
                parts += [*([(marks, ", ")] if number else []), inner]
            stack += [(marks, "]"), *reversed(parts), (marks, "[")]
        else:
            pieces.append(json.dumps(item))


def spoil_bytes(random: Random, data: bytes) -> bytes:
    """Return the bytes with a few spans cut, doubled, flipped or replaced."""
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(data))
        length = random.randint(0, 40)
        new = random.choice([b"", data[at : at + length] * 2, random.randbytes(random.randint(0, 12)), *ODD_BYTES])
        data = data[:at] + new + data[at + length :]
    if random.random() < 0.1:
        data = data[: random.randint(0, len(data))]
    return data


def odd_name(random: Random, suffix: str = "") -> str:
    """Return a file name that is hard to print, to quote or to encode."""
    stems = ("a b", "-", "-rf", "ä", "\udcff\udcfe", "a\x7f", "a\nb", "\x1b[2J", "\x9b", "*", "[a]", "classes",
    "x" * 200, ".hidden",
             "a'b\"c", "{0}", "%d", "#", "\u202e", "predictions", "labels", "con")  # fmt: skip
    return random.choice(stems) + suffix

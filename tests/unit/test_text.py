"""Counts with their nouns, and strings that are safe to print."""

from __future__ import annotations

import pytest

from rtdetr_cli.text import counted, printable, tally, whole_number


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "box"), "1 box"),
        ((2000, "box"), "2,000 boxes"),
        ((0, "class"), "0 classes"),
        ((3, "image"), "3 images"),
        ((2, "query", "queries"), "2 queries"),
    ],
)
def test_counted(arguments: tuple[int, str], text: str) -> None:
    assert counted(*arguments) == text


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("0640", 640), ("9" * 19, None), ("9" * 5000, None), ("-1", None), ("²", None), ("", None)],
)
def test_whole_number(text: str, number: int | None) -> None:
    assert whole_number(text) == number


def test_tally_calls_infos_notes() -> None:
    assert tally({"error": 0, "warning": 1, "info": 88}) == "0 errors, 1 warning, 88 notes"


@pytest.mark.parametrize(
    ("text", "shown"), [("Käse 7", "Käse 7"), ("a\x1b[2J\n", r"a\x1b[2J\n"), ("\udce4", r"\udce4")]
)
def test_printable_escapes_control_characters_and_lone_surrogates(text: str, shown: str) -> None:
    assert printable(text) == shown

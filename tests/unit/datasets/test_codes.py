"""The catalog of findings."""

from __future__ import annotations

import pytest

from rtdetr_cli.datasets.codes import CODES, find_code


@pytest.mark.parametrize("name", ["image-leak", "picture-leak"])
def test_codes_are_found_by_their_names_of_now_and_of_0_1(name: str) -> None:
    assert find_code(name) is CODES["image-leak"]


def test_an_unknown_code_is_not_found() -> None:
    assert find_code("image-nothing") is None


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_documented(code: str) -> None:
    entry = CODES[code]
    assert code == code.lower()
    assert entry.severity in ("error", "warning", "info")
    assert len(entry.title) > 10
    assert len(entry.explanation) > 30
    assert entry.hint
    assert entry.explanation.endswith(".")
    assert entry.explanation.count(". ") <= 3
    for text in (entry.title, entry.hint, entry.repair):
        assert not text.endswith(".") or text.endswith("...")

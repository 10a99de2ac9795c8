"""Damaged datasets of every layout end in a report or in one sentence, never in a traceback or a hang."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fuzz.files import Datasets

CASES = 40


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    datasets = Datasets()
    datasets.prepare(tmp_path_factory.mktemp("good"))
    return datasets


@pytest.mark.filterwarnings("ignore")  # outside of pytest, `images` filters Pillow's remarks itself
@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 100))])
def test_a_damaged_dataset(
    part: Datasets,
    seed: int,
    rtdetr: Callable[..., Any],
    limit_seconds: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(CASES):
        work = tmp_path / str(number)
        work.mkdir()
        monkeypatch.chdir(work)
        words = part.case(Random(f"{seed}/{number}"), work).argv
        with limit_seconds(30):
            ran = rtdetr(*words)
        assert ran.code in (0, 3), (number, words, ran.err)
        if words[0] == "validate" and "--json" in words and "error" not in ran.json:
            counts = ran.json["counts"] if "fix" not in ran.json else ran.json["fix"]["counts"]
            assert (ran.code == 3) == bool(counts["error"]), (number, words)

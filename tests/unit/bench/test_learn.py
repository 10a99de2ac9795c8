"""The bench that compares ways to train: its ledger and its paired differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[2] / "bench" / "learn.py"


@pytest.fixture(scope="module")
def learn(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(PATH)


def row(learn: ModuleType, arm: str, seed: int, ap: float, **more: Any) -> Any:
    facts = {"settings": "", "preset": "tiny", "imgsz": 192, "set": "bccd", "steps": 260, "split": "val", "commit": "a"}
    figures = {"AP_raw": 0.4, "AP50": 0.8, "APs": None, "duplicates": 1.0, "false_positives": 4.5}
    figures["seconds_per_step"] = 0.8
    return learn.Row(**{"arm": arm, "seed": seed, "AP": ap, **facts, **figures, **more})


def test_the_ledger_keeps_every_row(learn: ModuleType, tmp_path: Path) -> None:
    rows = [row(learn, "default", 0, 0.5), row(learn, "mal", 0, 0.25, APs=0.125)]
    for one in rows:
        learn.append_row(tmp_path / "ledger.csv", one)
    assert learn.read_ledger(tmp_path / "ledger.csv") == rows


def test_differences_are_paired_by_seed(learn: ModuleType) -> None:
    """Of 0.01, 0.02 and 0.03 the mean is 0.02, and t(0.975, 2) * 0.01 / sqrt(3) is 0.0248."""
    rows = [row(learn, "default", seed, 0.5 + seed / 10) for seed in (0, 1, 2, 3)]
    rows += [row(learn, "mal", seed, 0.5 + seed / 10 + 0.01 * (seed + 1)) for seed in (0, 1, 2)]
    line = next(line for line in learn.summarize(rows, "default") if " mal " in line)
    assert line.endswith("+0.020 [-0.005, +0.045]  by seed +0.010 +0.020 +0.030")


def test_other_sets_and_steps_are_not_mixed(learn: ModuleType) -> None:
    rows = [row(learn, "default", 0, 0.5), row(learn, "mal", 0, 0.6)]
    cards = [learn.Row(**{**vars(one), "set": "cards", "AP": 0.1}) for one in rows]
    lines = [line for line in learn.summarize([*rows, *cards], "default") if " mal " in line]
    assert [line[-6:] for line in lines] == ["+0.100", "+0.000"]


def test_a_run_counts_as_finished_for_its_commit_and_settings_only(learn: ModuleType) -> None:
    rows = [
        row(learn, "lr", 0, 0.5),
        row(learn, "lr", 0, 0.6, commit="b"),
        row(learn, "lr", 0, 0.7, settings="lr=2e-3"),
    ]
    jobs = [learn.job_of(one) for one in rows]
    assert jobs[0] == jobs[1] != jobs[2]
    assert learn.finished(rows, {"a"}) == {jobs[0]: rows[0], jobs[2]: rows[2]}
    assert learn.finished(rows, {"a", "b"})[jobs[0]] == rows[1]


@pytest.mark.parametrize(("text", "expected"), [("3", [3]), ("0-2,7", [0, 1, 2, 7])])
def test_ranges_of_seeds(learn: ModuleType, text: str, expected: list[int]) -> None:
    assert learn.numbers(text) == expected

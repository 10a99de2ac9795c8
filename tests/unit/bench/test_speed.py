"""The harness for speed: turns alternate, ratios are those of single rounds, and every comparison can be listed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from tests.bench.speed.harness import Comparison, Settings, Turn, Used, compare, document, table

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = Settings(threads=1)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tests/bench/speed").glob("[!_]*.py")))
def test_the_scripts_fit_the_package(name: str) -> None:
    """Those that need a GPU are not run elsewhere, but what they import must exist."""
    import_module(f"tests.bench.speed.{name}")


@pytest.mark.parametrize(("at_most", "ratio", "reached"), [(False, 2.0, False), (True, 0.5, True)])
def test_ratios_are_medians_of_rounds_taken_in_turn(at_most: bool, ratio: float, reached: bool) -> None:
    order: list[str] = []

    @contextmanager
    def sides(_: Settings) -> Iterator[tuple[Turn, Turn]]:
        slow_rounds = iter([9.0, 1.0, 2.0, 4.0])  # the first warms up; other work on the machine hurts both alike

        def ours() -> Used:
            order.append("ours")
            return Used(wall[0], 1.0, memory=100)

        def peer() -> Used:
            order.append("peer")
            return Used(2 * wall[0], 4.0, memory=400)

        wall = [0.0]

        def advance(turn: Turn) -> Turn:
            def inner() -> Used | None:
                if len(order) % 2 == 0:
                    wall[0] = next(slow_rounds)
                return turn()

            return inner

        yield advance(ours), advance(peer)

    comparison = Comparison(
        name="work", title="work", peer="a peer", aim=2.5 if not at_most else 0.6, at_most=at_most, sides=sides
    )
    result = compare(comparison, SETTINGS, rounds=3)
    assert len(order) == 8
    assert all(set(order[i : i + 2]) == {"ours", "peer"} for i in range(0, 8, 2)), "in turn"
    assert {tuple(order[i : i + 2]) for i in range(0, 8, 2)} == {("ours", "peer"), ("peer", "ours")}
    assert (result.ratio, result.lowest, result.highest) == (ratio, ratio, ratio)
    assert result.cpu_ratio == (0.25 if at_most else 4.0)
    assert (result.ours_s, result.peer_s, result.memory_share) == (2.0, 4.0, 0.25)
    assert result.reached is reached
    text = table([result], {"other": "x is not installed"}, SETTINGS)
    assert "| work | a peer | 2 s | 4 s |" in text
    assert ("missed" in text) is not reached
    assert "skipped other: x is not installed" in text
    facts = document([result], {}, SETTINGS)
    assert facts["results"][0]["ratio"] == ratio
    assert facts["machine"]["packages"]["torch"]


def test_every_comparison_is_listed() -> None:
    command = [sys.executable, "-m", "tests.bench.speed", "--list"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in ran.stdout.splitlines()]
    assert {"step", "epoch", "evaluate", "predict-onnx", "backend-auto", "help"} <= set(names)
    assert len(set(names)) == len(names)

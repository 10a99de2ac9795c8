"""Settings of a sweep, rows of the table, the Pareto front and AP differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rtdetr_cli.infer import timing
from rtdetr_cli.infer.timing import PARTS, Spread
from rtdetr_cli.workflows.benchmark import benchmark, plan_benchmark
from rtdetr_cli.workflows.benchmark_report import Row, drop_constant_columns, mark_front, table_rows
from rtdetr_cli.workflows.sweep import Setting, parse_sweep, sweep_settings


def row(milliseconds: float, ap: float | None) -> Row:
    times = {part: Spread(milliseconds, milliseconds) for part in PARTS}
    return Row("m", "torch", "fp32", "cpu", (640, 640), 3, 300, 1, times, ap)


def test_the_pareto_front() -> None:
    rows = [row(10, 0.5), row(8, 0.5), row(8, 0.4), row(5, 0.3), row(4, 0.35), row(4, 0.35), row(1, None)]
    assert [r.front for r in mark_front(rows)] == [False, True, False, False, True, True, False]


def test_the_first_setting_is_the_models_own() -> None:
    own = {"layers": 3, "queries": 300, "imgsz": (640, 480)}
    settings = sweep_settings(parse_sweep("layers,queries,imgsz"), **own)
    assert settings[0] == Setting(3, 300, (640, 480))
    assert len(settings) == len(set(settings)) == 3 * 4 * 3
    assert {s.imgsz for s in settings} == {(640, 480), (480, 352), (320, 256)}
    assert {s.queries for s in settings} == {300, 200, 100, 50}
    settings = sweep_settings(parse_sweep("imgsz=320x640/256"), **own)
    assert [s.imgsz for s in settings] == [(640, 480), (320, 640), (256, 256)]
    assert {(s.layers, s.queries) for s in settings} == {(3, 300)}


@pytest.mark.parametrize(("height", "width", "size"), [(640, 640, "640"), (480, 640, "480x640")])
def test_table_rows(height: int, width: int, size: str) -> None:
    times = {part: Spread(n + 2, n + 3.25) for n, part in enumerate(PARTS)}
    one = replace(row(2, 0.25), imgsz=(height, width), front=True, times=times)
    cells = table_rows([one])[0]
    assert (cells["size"], cells["best"]) == (size, "*")
    spreads = {name.split()[0]: value for name, value in cells.items() if name.endswith("\nmedian / p90")}
    assert spreads == {"pre": "2.0 / 3.2", "network": "3.0 / 4.2", "post": "4.0 / 5.2", "total": "5.0 / 6.2 ~"}
    assert "model" not in cells
    assert "model" in table_rows([one, replace(one, model="other")])[0]


def test_unstable_runs_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, slow_end = Spread.of(np.full(10, 5.0)), Spread.of(np.repeat([5.0, 5.0, 7.0, 7.0], 5))
    assert (steady.drift, steady.unstable) == (0, False)
    assert (slow_end.drift, slow_end.unstable) == (pytest.approx(1 / 3), True)
    assert Spread.of(np.array([5.0] * 8 + [7.0] * 2)).unstable, "the 90th percentile is 40% above the median"
    assert not Spread.of(np.array([5.0])).unstable
    for results, chosen, calls in (
        ([steady], steady, 1),
        ([slow_end, steady], steady, 2),
        ([slow_end, slow_end], slow_end, 2),
    ):
        left = [{"total": spread} for spread in results]
        monkeypatch.setattr(timing, "measure", lambda *args, left=left, **options: left.pop(0))
        assert timing.measure_steadily(None, [], batch=1, warmup=0, runs=1) == {"total": chosen}
        assert len(results) - len(left) == calls


def test_settings_equal_in_all_rows_are_no_columns() -> None:
    one = row(2, 0.25)
    table, text = drop_constant_columns(table_rows([one, replace(one, layers=1)]))
    assert text == "type fp32, size 640, queries 300"
    assert [list(cells.items())[:2] for cells in table] == [
        [("backend", "torch"), ("layers", 3)],
        [("backend", "torch"), ("layers", 1)],
    ]
    foreign = [replace(one, layers=None, queries=None), replace(one, layers=None, queries=None, precision="fp16")]
    table, text = drop_constant_columns(table_rows(foreign))
    assert text == "size 640"
    assert list(table[0])[:2] == ["backend", "type"]
    assert "layers" not in table[0]


def test_differences_are_to_the_first_row(shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    """Also those of another model, on the same images."""
    from rtdetr_cli.checks.load import load_splits
    from rtdetr_cli.weights.load import load_model, save_model

    worse = tmp_path / "worse.safetensors"
    model, header = load_model(shapes_model, queries=3)
    save_model(worse, model.state_dict(), replace(header, queries=3))
    dataset = load_splits(shapes_data).val
    assert dataset is not None
    plan = plan_benchmark([shapes_model, worse], backends=["torch"], warmup=0, runs=1, device="cpu")
    first, second = benchmark(plan, dataset, resamples=20)
    assert first.difference is None
    assert first.ap is not None
    assert second.ap is not None
    assert second.difference.value == pytest.approx(second.ap - first.ap)
    assert second.ap < first.ap

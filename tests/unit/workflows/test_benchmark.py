from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rtdetr_cli.workflows.benchmark import (
    Row,
    Setting,
    Spread,
    benchmark,
    mark_front,
    narrowed,
    parse_sweep,
    plan,
    sweep_settings,
    table_rows,
)


def row(milliseconds: float, ap: float | None) -> Row:
    times = {part: Spread(milliseconds, milliseconds) for part in ("preprocess", "network", "postprocess", "total")}
    return Row("m", "torch", "fp32", "cpu", (640, 640), 3, 300, 1, times, ap)


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row(10, 0.5), row(8, 0.5), row(8, 0.4), row(5, 0.3), row(4, 0.35), row(4, 0.35), row(1, None)]
    assert [r.front for r in mark_front(rows)] == [False, True, False, False, True, True, False]


def test_settings_begin_with_the_models_own() -> None:
    own = {"layers": 3, "queries": 300, "imgsz": (640, 480)}
    found = sweep_settings(parse_sweep("layers,queries,imgsz"), **own)
    assert found[0] == Setting(3, 300, (640, 480))
    assert len(found) == len(set(found)) == 3 * 4 * 3
    assert {s.imgsz for s in found} == {(640, 480), (480, 352), (320, 256)}
    assert {s.queries for s in found} == {300, 200, 100, 50}
    found = sweep_settings(parse_sweep("imgsz=320x640/256"), **own)
    assert [s.imgsz for s in found] == [(640, 480), (320, 640), (256, 256)]
    assert {(s.layers, s.queries) for s in found} == {(3, 300)}


@pytest.mark.parametrize(("height", "width", "shown"), [(640, 640, "640"), (480, 640, "480x640")])
def test_cells(height: int, width: int, shown: str) -> None:
    one = replace(row(2, 0.25), imgsz=(height, width), front=True)
    columns, cells = table_rows([one, replace(row(4, None), batch=1)])
    assert cells[0][columns.index("size")] == shown
    assert cells[0][columns.index("best")] == "*"
    assert "model" not in columns
    parts = [c for c in columns if c.endswith("\nmedian / p90")]
    assert [c.split()[0] for c in parts] == ["pre", "network", "post", "total"]
    shown = replace(one, times={part: Spread(n + 2, n + 3.25) for n, part in enumerate(one.times)})
    cells = table_rows([shown])[1][0]
    assert [cells[columns.index(c)] for c in parts] == ["2.0 / 3.2", "3.0 / 4.2", "4.0 / 5.2", "5.0 / 6.2"]
    assert "model" in table_rows([one, replace(one, model="other")])[0]


def test_settings_that_are_the_same_in_all_rows_are_said_once() -> None:
    one = row(2, 0.25)
    columns, cells, said = narrowed(*table_rows([one, replace(one, layers=1)]))
    assert said == "type fp32, size 640, queries 300"
    assert columns[:3] == ["backend", "layers", "pre ms\nmedian / p90"]
    assert [cell[:2] for cell in cells] == [["torch", 3], ["torch", 1]]
    foreign = [replace(one, layers=None, queries=None), replace(one, layers=None, queries=None, precision="fp16")]
    columns, _, said = narrowed(*table_rows(foreign))
    assert said == "size 640"
    assert columns[:2] == ["backend", "type"]
    assert "layers" not in columns


def test_every_difference_is_to_the_first_row(shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    """Of another model too, on the same images; another model's own first row is no base."""
    from rtdetr_cli.checks.load import load_splits
    from rtdetr_cli.weights.load import load_model, save_model

    worse = tmp_path / "worse.safetensors"
    model, header = load_model(shapes_model, queries=3)
    save_model(worse, model.state_dict(), replace(header, queries=3))
    dataset = load_splits(shapes_data).val
    assert dataset is not None
    what = plan([shapes_model, worse], backends=["torch"], warmup=0, runs=1, device="cpu")
    first, second = benchmark(what, dataset, resamples=20)
    assert first.difference is None
    assert second.difference is not None
    assert first.ap is not None
    assert second.ap is not None
    assert second.difference.value == pytest.approx(second.ap - first.ap)
    assert second.ap < first.ap

"""The report of a run: complete, self-contained, safe with any name, and correct in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.datasets.records import Category
from rtdetr_cli.evaluate.run import evaluate_table
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.page import figure_svg
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train import plots
from rtdetr_cli.train.explain import explain_plan
from rtdetr_cli.train.plan import make_plan
from rtdetr_cli.train.report import val_loss_note, write_report

EVIL = '<script>alert("x")</script> $\\frac$'
ROWS: list[dict[str, float | None]] = [
    {"epoch": n, "loss": 20 / n, "loss_vfl": 1.0, "lr": 1e-3, "AP": 0.1 * n, "AP50": 0.2 * n} for n in (1, 2, 3)
]


@pytest.fixture(scope="module")
def facts(bccd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = RunFolder.create(tmp_path_factory.mktemp("runs"), name="tiny-bccd-01", stem="")
    for row in ROWS:
        folder.add_metrics(row)
    splits = load_splits(bccd)
    val = splits.val.subset(range(12))
    val = replace(val, categories=(Category(1, EVIL), *val.categories[1:]))
    image = np.repeat(np.arange(len(val)), np.diff(val.offsets))
    table = DetectionTable(image, val.labels, np.linspace(0.4, 0.9, len(image)), val.boxes_xyxy_px + 1)
    config = resolve_run({"data": str(bccd), "preset": "tiny", "epochs": 3}, sets=["optim.clip_norm=0.2"])
    plan = make_plan(config, images=len(splits.train))
    images = plots.predictions_image(val, table, threshold=0.5, side=160)
    return {
        "folder": folder,
        "config": config,
        "epochs": plan.epochs,
        "choices": explain_plan(config, plan, images=len(splits.train)),
        "best_epoch": 3,
        "evaluation": evaluate_table(val, table),
        "data": {"name": "bccd", "training images": "205"},
        "start": "random weights, seed 0",
        "machine": {"device": "cpu", "peak memory": "1.4 GB"},
        "warnings": ["39 steps are too few"],
        "labels": plots.labels_figure(splits.train, config.imgsz),
        "batch": images,
        "predictions": images,
    }


@pytest.fixture(scope="module")
def text(facts: dict[str, Any]) -> str:
    path = write_report(**facts)
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def test_everything_is_on_the_page(text: str, facts: dict[str, Any]) -> None:
    for choice in facts["choices"]:
        assert choice.reason.replace("'", "&#39;") in text
    assert f"AP {facts['evaluation'].metrics['AP']:.3f}" in text
    assert "at epoch 3 of 3" in text
    for expected in (
        *("39 steps are too few", "random weights, seed 0", "1.4 GB", "--epochs", "optim.clip_norm", "--set"),
    ):
        assert expected in text, expected
    assert text.count("data:image/jpeg;base64,") == 2
    assert text.count("<svg") == 2


def test_given_settings_are_listed_apart(text: str) -> None:
    apart = text[text.index("<h2>Settings") : text.index("<details>")]
    rows = re.findall(r'<tr><td><code>(.*?)</code></td><td>.*?</td><td class="quiet">(.*?)</td>', apart)
    assert sorted(rows) == [
        ("data", "--data"),
        ("epochs", "--epochs"),
        ("optim.clip_norm", "--set"),
        ("optimizer", "random weights: Muon for the matrices of hidden layers (docs/learning.md)"),
        ("preset", "--preset"),
        ("weights", "preset tiny has no published weights"),
    ]


def test_the_page_is_self_contained(text: str) -> None:
    assert "<script" not in text
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,40})', text)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert "&lt;script&gt;" in text


def test_a_run_without_evaluation_has_a_report(facts: dict[str, Any], tmp_path: Path) -> None:
    bare = {**facts, "folder": RunFolder(tmp_path), "evaluation": None, "best_epoch": 0}
    text = write_report(**bare).read_text(encoding="utf-8")
    assert "<h2>Classes</h2>" not in text
    assert "AP –" in text


def test_figures_suit_a_dark_page() -> None:
    svg = figure_svg(plots.curves_figure(ROWS, best_epoch=3), "curves", ink=plots.INK)
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert plots.INK not in svg
    # Neither the figure nor the axes have a background.
    assert not re.search(r'id="patch_\d+">\s*<path[^>]*style="fill: #ffffff"', svg)
    assert svg == figure_svg(plots.curves_figure(ROWS, best_epoch=3), "curves", ink=plots.INK)


def test_a_browser_renders_it(text: str, tmp_path: Path, browse: Callable[..., str]) -> None:
    """Every image is decoded, and nothing but what is meant to scroll is wider than a phone."""
    probe = """
    <script>
      addEventListener("load", () => {
        document.querySelector("details").open = true;
        const wide = document.documentElement.clientWidth;
        const out = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll"));
        document.title = JSON.stringify([
          [...document.images].filter((i) => i.naturalWidth > 0).length,
          out.filter((e) => e.getBoundingClientRect().right > wide + 1).length,
          [...document.querySelectorAll(".run-plot svg")].filter((s) => s.getBoundingClientRect().height > 150).length,
        ]);
      });
    </script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(text.replace("</body>", probe), encoding="utf-8")
    dom = browse(page, "--dump-dom", "--window-size=500,900")
    found = re.search(r"<title>(\[[\d,]+\])</title>", dom)
    assert found, dom[:300]
    assert json.loads(found[1]) == [2, 0, 2]


def sampled(train: list[float], val: list[float]) -> list[dict[str, float | None]]:
    rows: list[dict[str, float | None]] = [{"epoch": 1, "loss": 9.0}]  # an epoch without an evaluation
    values = zip(train, val, strict=True)
    return rows + [{"epoch": 2 * i + 2, "train_loss": t, "val_loss": v} for i, (t, v) in enumerate(values)]


@pytest.mark.parametrize(
    ("train", "val", "note"),
    [
        ([3, 2, 1, 0.5], [3, 2.5, 2.2, 2.9], "stopped improving at epoch 6 (2.20, and 2.90 at the end), while that of"),
        ([3, 2, 1, 0.5], [3, 2.5, 2.2, 2.22], "Val loss did not rise until the end (2.22; training images 0.50)"),
        ([3, 1, 2], [3, 1, 2], "stopped improving at epoch 4 (1.00, and 2.00 at the end), and so did that of"),
    ],
)
def test_the_report_says_where_the_val_loss_stopped_improving(train: list[float], val: list[float], note: str) -> None:
    assert note in val_loss_note(sampled(train, val))


def test_two_evaluations_are_no_trend() -> None:
    assert val_loss_note(sampled([3, 2], [3, 4])) == ""
    assert val_loss_note(ROWS) == ""
    assert val_loss_note(sampled([3, float("nan"), 2], [3, 4, 5])) == "", "a diverged model has no loss"

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.evaluate.bootstrap import resample
from rtdetr_cli.evaluate.errors_analysis import ErrorAnalysis, analyse
from rtdetr_cli.evaluate.report import _Mark, choose_images, page_context, place_texts, write_page
from rtdetr_cli.evaluate.run import metrics_from
from rtdetr_cli.weights.header import Thresholds

NAMES = ("<script>alert(1)</script>", "$\\frac$ & \"quoted\" 'too'", "_дом 犬")


@pytest.fixture
def analysis(make: Any, tmp_path: Path) -> ErrorAnalysis:
    """Ten images with every kind of error, under names that a page must not take at their word."""
    box, other, far = [40, 40, 60, 60], [160, 40, 60, 60], [10, 150, 40, 40]
    dataset = make.dataset(
        images=10,
        names=NAMES,
        image_index=[i for i in range(9) for _ in range(2)],
        labels=[0, 1] * 9,
        boxes_xywh=[box, other] * 9,
        size_wh=(240, 200),
    )
    dataset = replace(dataset, root=tmp_path)
    for index in range(len(dataset)):
        Image.new("RGB", (240, 200), (20 * index, 90, 120)).save(dataset.path(index))
    rows = [
        *[(i, 0, box, 0.9) for i in range(8)],
        *[(i, 1, other, 0.8) for i in range(6)],
        (6, 0, other, 0.95),  # classification
        (7, 1, [160, 75, 60, 60], 0.85),  # location
        (8, 2, [40, 75, 60, 60], 0.9),  # both
        (1, 0, [41, 40, 60, 60], 0.7),  # duplicate
        (9, 0, far, 0.99),  # background, on an image without objects
    ]
    table = make.table(*(list(column) for column in zip(*sorted(rows, key=lambda r: (r[0], -r[3])), strict=True)))
    return analyse(metrics_from(dataset, table), [0.5] * 3)


@pytest.fixture
def page(analysis: ErrorAnalysis, tmp_path: Path) -> Path:
    evaluation = analysis.evaluation
    stored = replace(evaluation, thresholds=Thresholds("f1", 0.5, (0.5, 0.6, 0.7)))
    interval = resample(evaluation.dataset, evaluation.table, resamples=50).interval(evaluation.metrics["AP"])
    path = tmp_path / "deep" / "page.html"
    write_page(path, stored, replace(analysis, evaluation=stored), model="a <b>model</b>", interval=interval)
    return path


class Reader(HTMLParser):
    """Collect tags, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert all(a.startswith(("data:", "#")) for a in reader.addresses), {a[:40] for a in reader.addresses}
    assert "link" not in reader.tags
    assert not re.search(r"url\((?!['\"]?(#|data:))", text)
    assert "@import" not in text


def test_names_are_text_and_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert "<script>alert(1)" not in text
    assert "<b>model</b>" not in text
    for name in NAMES:
        assert name in reader.text


def test_every_kind_of_error_has_its_images(analysis: ErrorAnalysis) -> None:
    context = page_context(analysis.evaluation, analysis, model="m")
    assert context["filter_kinds"] == ["classification", "location", "both", "duplicate", "background", "missed"]
    by_name = {p["name"]: p for p in context["images"]}
    assert by_name["0006.jpg"]["pairs"].split() == ["classification:0"]
    near = [m for m in by_name["0006.jpg"]["truth_marks"] if m["outcome"] == "near"]
    assert [m["errors"] for m in near] == ["classification:0"]  # filtered together with the error that is on it
    assert by_name["0009.jpg"]["kinds"] == ["background"]
    assert "0000.jpg" not in by_name
    assert context["empty"] == {"pictures": 1, "with_false_positives": 1, "false_positives": 1}
    assert {s["kind"] for s in context["suspects"]} == {"no-box", "other-class", "never-found"}
    assert choose_images(analysis)[:2] == [8, 9]  # the most errors, then the fewest finds


def test_the_page_says_which_classes_cast_no_doubt(analysis: ErrorAnalysis, page: Path) -> None:
    assert analysis.unjudged == ()
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert "cast no doubt" not in reader.text
    weak = replace(analysis.evaluation, table=analysis.evaluation.table.rows(np.arange(4)))
    judged = analyse(metrics_from(weak.dataset, weak.table), [0.5] * 3)
    write_page(page, judged.evaluation, judged, model="m")
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert f"cast no doubt on annotations ({NAMES[0]}, {NAMES[1]})" in reader.text


def test_texts_do_not_lie_on_one_another() -> None:
    """Of 60 boxes in a heap; the surest, drawn last, has its text above the box, and what has no room waits."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 180, (60, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 60, (60, 2))], axis=1)
    boxes[-1] = (60, 60, 120, 120)
    marks = [_Mark("background", 0, "background:0", "cell 0.50", "", box) for box in boxes]
    shown = place_texts(marks, (240, 240), 10.0)
    assert [m["x"] for m in shown] == [round(float(b[0]), 1) for b in boxes]
    assert shown[-1]["label"]
    assert (shown[-1]["text_x"], shown[-1]["anchor"]) == (62.0, "start")
    assert shown[-1]["text_y"] < 60
    assert 5 < sum(m["label"] for m in shown) < 60
    lines = []
    for mark in shown:
        if mark["label"]:
            left = mark["text_x"] - (5.5 * 9 if mark["anchor"] == "end" else 0)
            lines.append((left, mark["text_y"] - 9, left + 5.5 * 9, mark["text_y"]))
    for i, a in enumerate(lines):
        assert a[0] >= 0
        assert a[2] <= 240
        for b in lines[:i]:
            assert a[0] >= b[2] or a[2] <= b[0] or a[1] >= b[3] or a[3] <= b[1]
    right = [replace(mark, outcome="right") for mark in marks]
    assert not any(m["label"] for m in place_texts(right, (240, 240), 10.0))
    assert place_texts([], (240, 240), 10.0) == []


def test_the_legend_lies_outside_the_plots(analysis: ErrorAnalysis) -> None:
    svg = page_context(analysis.evaluation, analysis, model="m")["curves"]
    plots, legend = svg.split('id="legend_1"')
    assert 'id="axes_2"' in plots
    assert "precision" in plots
    assert "all classes" in legend
    assert "axis" not in legend


def test_images_that_are_gone_leave_the_figures(analysis: ErrorAnalysis) -> None:
    for index in range(10):
        analysis.evaluation.dataset.path(index).unlink()
    context = page_context(analysis.evaluation, analysis, model="m")
    assert context["images"] == []
    assert context["images_lost"] == len(choose_images(analysis))
    assert context["suspects"] == []


def test_nothing_to_show(make: Any, tmp_path: Path) -> None:
    evaluation = metrics_from(make.dataset(images=2, names=("a",)), make.table([], [], [], []))
    write_page(tmp_path / "p.html", evaluation, analyse(evaluation), model="m")
    assert "AP –" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_many_classes_and_many_detections_stay_readable(make: Any, tmp_path: Path) -> None:
    dataset, table = make.random(seed=1, images=60, classes=45, detections=300)
    evaluation = metrics_from(dataset, table, "pycocotools")
    context = page_context(evaluation, analyse(evaluation), model="m")
    assert context["confusion"] is None
    assert not context["gains_known"]
    assert len(context["curves"]) < 1_500_000
    assert context["curves"].count("<text") < 60


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_filters_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Press buttons in headless Chromium and read what is left; a script error would leave the title as it was."""
    probe = """
    <script>
      const seen = () => [...document.querySelectorAll(".ev-image")].filter((p) => !p.hidden).length;
      const press = (row, value) => document.querySelector(`[data-filter=${row}] [data-value="${value}"]`).click();
      const told = [seen()];
      press("kind", "classification"); told.push(seen());
      told.push(document.querySelectorAll(".ev-image:not([hidden]) .ev-mark:not(.dim)").length);
      press("class", "1"); told.push(seen());
      press("kind", ""); told.push(seen());
      press("class", ""); told.push(seen());
      told.push(document.querySelectorAll("script").length, document.querySelectorAll("svg image").length);
      document.title = JSON.stringify(told);
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    ran = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>\[([\d,]+)\]</title>", ran.stdout)
    assert found, ran.stdout[:300]
    every, classified, marks, both, second_class, again, scripts, images = map(int, found[1].split(","))
    shown = text.count('<section class="ev-image"')
    assert every == again == shown
    assert classified == 1
    assert marks == 2  # the wrong detection, and the box that it is on
    assert both == 0
    assert 0 < second_class < shown
    assert scripts == text.count("<script>") + 1
    assert images >= shown
    assert np.all(np.array([every, classified]) > 0)

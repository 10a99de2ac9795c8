from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.evaluate.bootstrap import resample
from rtdetr_cli.evaluate.error_analysis import ErrorAnalysis, analyze_errors
from rtdetr_cli.evaluate.report import SUSPECT_TITLES, Mark, choose_images, page_context, place_texts, write_page
from rtdetr_cli.evaluate.run import evaluate_table
from rtdetr_cli.weights.header import Thresholds
from tests.pages import PageReader

NAMES = ("<script>alert(1)</script>", "$\\frac$ & \"quoted\" 'too'", "_дом 犬")


@pytest.fixture
def analysis(make: Any, tmp_path: Path) -> ErrorAnalysis:
    """Ten images with every kind of error, and class names that a page must escape."""
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
    return analyze_errors(evaluate_table(dataset, table), [0.5] * 3)


@pytest.fixture
def page(analysis: ErrorAnalysis, tmp_path: Path) -> Path:
    evaluation = analysis.evaluation
    stored = replace(evaluation, thresholds=Thresholds("f1", 0.5, (0.5, 0.6, 0.7)))
    interval = resample(evaluation.dataset, evaluation.table, resamples=50).interval(evaluation.metrics["AP"])
    path = tmp_path / "deep" / "page.html"
    write_page(path, replace(analysis, evaluation=stored), model="a <b>model</b>", interval=interval)
    return path


def test_the_page_is_one_file_without_external_resources_and_with_escaped_names(page: Path) -> None:
    read = PageReader(page)
    assert all(a.startswith(("data:", "#")) for a in read.links), {a[:40] for a in read.links}
    assert "link" not in read.tags
    assert not re.search(r"url\((?!['\"]?(#|data:))", read.source)
    for markup in ("@import", "<script>alert(1)", "<b>model</b>"):
        assert markup not in read.source
    for name in NAMES:
        assert name in read.text


def test_every_kind_of_error_has_its_images(analysis: ErrorAnalysis) -> None:
    context = page_context(analysis, model="m")
    assert context["filter_kinds"] == ["classification", "location", "both", "duplicate", "background", "missed"]
    by_name = {p["name"]: p for p in context["images"]}
    assert by_name["0006.jpg"]["errors"].split() == ["classification:0"]
    misdetected = [m["mark"] for m in by_name["0006.jpg"]["truth_marks"] if m["mark"].outcome == "misdetected"]
    assert [m.errors for m in misdetected] == ["classification:0"]  # filtered together with the error that is on it
    assert by_name["0009.jpg"]["kinds"] == ["background"]
    assert "0000.jpg" not in by_name
    assert analysis.empty == {"pictures": 1, "with_false_positives": 1, "false_positives": 1}
    assert {s["title"] for s in context["suspects"]} == set(SUSPECT_TITLES.values())
    assert choose_images(analysis)[:2] == [8, 9]  # lowest F1, then the most errors


def test_the_page_names_the_classes_whose_annotations_are_not_questioned(analysis: ErrorAnalysis, page: Path) -> None:
    assert analysis.unreliable_classes == []
    assert "not questioned" not in PageReader(page).text
    weak = evaluate_table(analysis.evaluation.dataset, analysis.evaluation.table.rows(np.arange(4)))
    write_page(page, analyze_errors(weak, [0.5] * 3), model="m")
    assert f"are not questioned ({NAMES[0]}, {NAMES[1]})" in PageReader(page).text


def test_texts_do_not_overlap() -> None:
    """60 overlapping boxes: the last has its text above the box, and texts without room are hidden."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 180, (60, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 60, (60, 2))], axis=1)
    boxes[-1] = (60, 60, 120, 120)
    marks = [Mark("background", 0, "background:0", "cell 0.50", "", box) for box in boxes]
    placed = place_texts(marks, (240, 240), 10.0)
    assert [m["x"] for m in placed] == [round(float(b[0]), 1) for b in boxes]
    assert placed[-1]["visible"]
    assert (placed[-1]["text_x"], placed[-1]["anchor"]) == (62.0, "start")
    assert placed[-1]["text_y"] < 60
    assert 5 < sum(m["visible"] for m in placed) < 60
    lines = []
    for mark in placed:
        if mark["visible"]:
            left = mark["text_x"] - (5.5 * 9 if mark["anchor"] == "end" else 0)
            lines.append((left, mark["text_y"] - 9, left + 5.5 * 9, mark["text_y"]))
    for i, a in enumerate(lines):
        assert a[0] >= 0
        assert a[2] <= 240
        for b in lines[:i]:
            assert a[0] >= b[2] or a[2] <= b[0] or a[1] >= b[3] or a[3] <= b[1]
    correct = [replace(mark, outcome="correct") for mark in marks]
    assert not any(m["visible"] for m in place_texts(correct, (240, 240), 10.0))
    assert place_texts([], (240, 240), 10.0) == []


def test_the_legend_is_outside_the_plots(analysis: ErrorAnalysis) -> None:
    svg = page_context(analysis, model="m")["curves"]
    plots, legend = svg.split('id="legend_1"')
    assert 'id="axes_2"' in plots
    assert "precision" in plots
    assert "all classes" in legend
    assert "axis" not in legend


def test_missing_images_leave_the_metrics(analysis: ErrorAnalysis) -> None:
    for index in range(10):
        analysis.evaluation.dataset.path(index).unlink()
    context = page_context(analysis, model="m")
    assert context["images"] == []
    assert context["images_unreadable"] == len(choose_images(analysis))
    assert context["suspects"] == []


def test_a_page_without_boxes_and_detections(make: Any, tmp_path: Path) -> None:
    evaluation = evaluate_table(make.dataset(images=2, names=("a",)), make.table([], [], [], []))
    write_page(tmp_path / "p.html", analyze_errors(evaluation), model="m")
    assert "AP –" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_many_classes_and_many_detections_stay_readable(make: Any, tmp_path: Path) -> None:
    dataset, table = make.random(seed=1, images=60, classes=45, detections=300)
    evaluation = evaluate_table(dataset, table, "pycocotools")
    context = page_context(analyze_errors(evaluation), model="m")
    assert context["confusion"] is None
    assert len(context["curves"]) < 1_500_000
    assert context["curves"].count("<text") < 60


def test_filters_in_a_browser(page: Path, tmp_path: Path, browse: Callable[..., str]) -> None:
    """Press buttons in headless Chromium and count images; a script error would leave the title as it was."""
    probe = """
    <script>
      const visible = () => [...document.querySelectorAll(".ev-image")].filter((p) => !p.hidden).length;
      const press = (row, value) => document.querySelector(`[data-filter=${row}] [data-value="${value}"]`).click();
      const counts = [visible()];
      press("kind", "classification"); counts.push(visible());
      counts.push(document.querySelectorAll(".ev-image:not([hidden]) .ev-mark:not(.dim)").length);
      press("class", "1"); counts.push(visible());
      press("kind", ""); counts.push(visible());
      press("class", ""); counts.push(visible());
      counts.push(document.querySelectorAll("script").length, document.querySelectorAll("svg image").length);
      document.title = JSON.stringify(counts);
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    dom = browse(tmp_path / "probe.html", "--dump-dom")
    title = re.search(r"<title>\[([\d,]+)\]</title>", dom)
    assert title, dom[:300]
    all_images, classified, marks, both, second_class, again, scripts, images = map(int, title[1].split(","))
    shown = text.count('<section class="ev-image"')
    assert all_images == again == shown
    assert classified == 1
    assert marks == 2  # the false positive, and the box that it is on
    assert both == 0
    assert 0 < second_class < shown
    assert scripts == text.count("<script>") + 1
    assert images >= shown

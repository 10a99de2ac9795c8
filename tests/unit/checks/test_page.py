"""The dataset page: complete, self-contained, safe against names with markup, and working in a browser."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rtdetr_cli.checks import page as pages
from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.page import page_context, write_page
from tests.pages import PageReader

EVIL = "<script>document.title='owned'</script>"


def spoiled(coco: Any) -> Path:
    annotations = coco.train["annotations"]
    annotations[1]["bbox"] = [20, 20, 0, 10]
    annotations[2]["bbox"] = [90, 20, 20, 10]
    annotations[3]["bbox"] = [300, 20, 20, 10]
    annotations[4]["bbox"] = [float("nan"), 20, 20, 10]
    (coco.folder / "images/train_3.jpg").write_bytes(b"")
    shutil.copy(coco.image, coco.folder / "images/val_0.jpg")
    for document in coco.documents.values():
        document["categories"][0]["name"] = EVIL
    folder: Path = coco.write()
    return folder


def test_every_finding_is_shown_with_its_box(coco: Any, tmp_path: Path) -> None:
    report = examine(spoiled(coco))
    context = page_context(report)
    assert len(context["findings"]) == len(report.findings)
    assert context["findings_left_out"] == 0
    by_code = {f["code"]: f for f in context["findings"]}
    zero = by_code["box-zero-size"]
    assert zero["view"]
    assert (zero["box"]["x"], zero["box"]["y"], zero["box"]["h"]) == (20, 20, 10)
    assert zero["box"]["ring"] == 0
    outside = by_code["box-outside"]
    assert outside["view"]["w"] > 96
    assert by_code["box-not-finite"]["box"] is None
    assert by_code["image-leak"]["other"]
    assert by_code["image-empty"]["missing"]
    path = tmp_path / "deep/er/page.html"
    write_page(report, path)
    text = path.read_text("utf-8")
    for finding in report.findings:
        assert finding.code in text
    assert text.count("<svg") > 10


def test_nothing_is_loaded_and_names_are_escaped(coco: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(examine(spoiled(coco)), path)
    text = path.read_text("utf-8")
    page = PageReader(path)
    assert page.tags.count("script") == 1
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in page.links)
    assert "default-src 'none'" in html.unescape(text)
    assert EVIL not in text
    assert html.escape(EVIL, quote=False).replace("'", "&#39;") in text
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))


def test_too_many_findings_are_left_out_and_counted(coco: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_FINDINGS", 5)
    for annotation in coco.train["annotations"][:12]:
        annotation["bbox"] = [20, 20, 0, 10]
    coco.val["annotations"][0]["iscrowd"] = 1
    context = page_context(examine(coco.write()))
    assert len(context["findings"]) == 5
    assert context["findings_left_out"] > 0
    assert "box-crowd" in {f["code"] for f in context["findings"]}


def test_repeated_notes_are_folded_into_one_card(coco: Any) -> None:
    coco.train["annotations"] = [{**a, "iscrowd": int(a["image_id"] > 1)} for a in coco.train["annotations"]]
    findings = page_context(examine(coco.write()))["findings"]
    crowds = [f for f in findings if f["code"] == "box-crowd"]
    assert (crowds[0]["more"], [f["folded"] for f in crowds]) == (17, [False] + [True] * 17)


def test_box_far_outside_keeps_its_extent_on_the_page(coco: Any) -> None:
    for box, place in (([900, 20, 20, 10], "right"), ([-900, 20, 20, 10], "left")):
        coco.box["bbox"] = box
        finding = next(f for f in page_context(examine(coco.write()))["findings"] if f["code"] == "box-outside")
        drawn, view = finding["box"], finding["view"]
        assert (drawn["w"], drawn["h"]) == (20, 10), place
        assert view["x"] < drawn["x"]
        assert drawn["x"] + drawn["w"] < view["x"] + view["w"]


def test_findings_without_an_image_say_why(coco: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_IMAGES", 1)
    monkeypatch.setattr(pages, "SAMPLES", 1)
    for annotation in coco.train["annotations"]:
        annotation["bbox"] = [20, 20, 0, 10]
    (coco.folder / "images/train_3.jpg").write_bytes(b"")
    missing = {f["missing"] for f in page_context(examine(coco.write()))["findings"]}
    assert missing >= {"not shown: the page is limited to 1 image", "no image to show"}


def test_page_of_a_dataset_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": [')
    report = examine(tmp_path / "a.json")
    write_page(report, tmp_path / "page.html")
    assert "file-malformed" in (tmp_path / "page.html").read_text("utf-8")


def test_in_a_browser(coco: Any, tmp_path: Path, browse: Callable[..., str]) -> None:
    path = tmp_path / "page.html"
    write_page(examine(spoiled(coco)), path)
    # The page's own script works: choosing a code hides the other tiles. The policy lets no second script in, so the
    # click is made by a copy of the page.
    click = "<script>document.querySelector('#filters [data-code=\"box-zero-size\"]').click()</script></body>"
    copy = tmp_path / "clicked.html"
    copy.write_text(path.read_text("utf-8").replace("</body>", click), "utf-8")
    dom = browse(copy, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title.group(1) == "nuts: dataset report"
    tiles = re.findall(r'<figure class="tile" data-code="([a-z0-9-]+)"(?: data-folded="")?( hidden="")?', dom)
    assert {code for code, hidden in tiles if not hidden} == {"box-zero-size"}
    assert len({code for code, hidden in tiles if hidden}) > 4
    assert 'data-code="box-zero-size" aria-pressed="true"' in dom


def test_readable_on_a_phone(coco: Any, tmp_path: Path, browse: Callable[..., str]) -> None:
    path = tmp_path / "page.html"
    write_page(examine(spoiled(coco)), path)
    # The widest element tells whether a narrow screen has to be scrolled sideways.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe id=f src='{path.as_uri()}' width=360 height=800></iframe><script>"
        "const tell = () => { document.title = 'width ' + f.contentDocument.documentElement.scrollWidth };"
        "f.onload = () => setTimeout(tell, 300)</script>",
        "utf-8",
    )
    dom = browse(frame, "--allow-file-access-from-files", "--dump-dom")
    width = re.search(r"<title>width (\d+)</title>", dom)
    assert width is not None, dom[:500]
    assert int(width.group(1)) <= 360


def test_screenshot_shows_images_and_boxes(coco: Any, tmp_path: Path, browse: Callable[..., str]) -> None:
    path = tmp_path / "page.html"
    write_page(examine(spoiled(coco)), path)
    shot = tmp_path / "shot.png"
    browse(path, f"--screenshot={shot}", "--window-size=1000,2400")
    with Image.open(shot) as image:
        colors = image.convert("RGB").quantize(64).getcolors() or []
    assert len(colors) > 40

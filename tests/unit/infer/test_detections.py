"""Detections show themselves: as text, as an annotated image, as a table."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.errors import UsageError
from rtdetr_cli.images.decode import read_image
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.selection import overlaps

FOUND = Detections(
    np.array([[10, 20, 110, 70], [0, 0, 200, 100]], np.float32),
    np.array([0.9, 0.25], np.float32),
    np.array([1, 0], np.int64),
    (200, 100),
    ("cat", "<dog>"),
)
EMPTY = FOUND.keep(np.zeros(2, bool))
GREY = np.full((100, 200, 3), 128, np.uint8)


def test_text() -> None:
    assert repr(FOUND) == "<Detections 1 <dog>, 1 cat, 100x200 px>"
    assert repr(EMPTY) == "<Detections no detections, 100x200 px>"


def test_plot_and_save(tmp_path: Path) -> None:
    drawn = FOUND.plot(GREY)
    assert drawn.shape == GREY.shape
    assert (drawn[20, 10:110] != 128).any()
    assert (GREY == 128).all()
    assert np.array_equal(replace(FOUND, image=GREY).plot(), drawn)
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    assert np.array_equal(FOUND.plot(tmp_path / "grey.png"), drawn)
    assert np.array_equal(read_image(FOUND.save(tmp_path / "new" / "a.png", GREY)), drawn)
    with pytest.raises(UsageError, match="image of these detections is not known"):
        FOUND.plot()
    with pytest.raises(UsageError, match="the image is 50x50 px, but these detections are of one of 100x200 px"):
        FOUND.plot(GREY[:50, :50])
    with pytest.raises(UsageError, match=r"must end in \.jpg"):
        FOUND.save(tmp_path / "a.bmp", GREY)


def test_in_a_notebook(tmp_path: Path) -> None:
    """The annotated image if it is known, else a table."""
    table = FOUND._repr_html_()
    assert table is not None
    assert "&lt;dog&gt;</td><td>0.900</td><td>10.0, 20.0, 110.0, 70.0" in table
    assert FOUND._repr_png_() is None
    assert EMPTY._repr_html_() == "<p>no detections</p>"
    large = replace(FOUND, image=np.zeros((2000, 4000, 3), np.uint8), size_wh=(4000, 2000))
    png = large._repr_png_()
    assert png is not None
    assert large._repr_html_() is None
    assert Image.open(io.BytesIO(png)).size == (1024, 512)
    assert replace(FOUND, image=tmp_path / "gone.png")._repr_png_() is None


def test_overlaps_count_boxes_on_a_better_one() -> None:
    boxes = np.array([[0, 0, 100, 100], [5, 0, 100, 100], [0, 5, 100, 100], [200, 0, 260, 50]], np.float32)
    found = Detections(boxes, np.linspace(0.9, 0.6, 4, dtype=np.float32), np.zeros(4, np.int64), (300, 100))
    assert overlaps(found) == 2
    assert overlaps(found.keep(np.array([0, 3]))) == overlaps(EMPTY) == 0

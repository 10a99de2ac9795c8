"""Annotated images: boxes and labels on images of all sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ImageFont

from rtdetr_cli.boxes import intersection
from rtdetr_cli.images import draw
from rtdetr_cli.images.draw import class_color, draw_boxes

NAMES = ("person", "car", "traffic light")


def ground(width: int = 640, height: int = 480, level: int = 128) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level, np.uint8)


def changed(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Return the rectangle (x1, y1, x2, y2) outside which nothing was drawn."""
    rows, columns = np.nonzero((before != after).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def luminance(rgb: tuple[int, int, int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_are_stable_distinct_and_legible() -> None:
    first = [class_color(label) for label in range(100)]
    assert first == [class_color(label) for label in range(100)]
    assert class_color(0) == (255, 101, 87)  # stable between versions
    assert all(0 <= channel <= 255 for rgb in first for channel in rgb)
    for a, b in itertools.combinations(first[:10], 2):
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 60
    for rgb in first:
        ink = luminance(draw.text_color(rgb))
        bright, dark = max(ink, luminance(rgb)), min(ink, luminance(rgb))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA for text


def test_box_is_drawn_in_its_color_inside_its_edge() -> None:
    image = ground()
    drawn = draw_boxes(image, [[100, 200, 300, 400]], [1], NAMES)
    assert (image == 128).all()  # the input is not changed
    for x, y in ((100, 300), (299, 300), (200, 399), (250, 200)):
        assert tuple(drawn[y, x]) == class_color(1)
    assert tuple(drawn[300, 200]) == (128, 128, 128)  # the inside stays
    x1, y1, x2, y2 = changed(image, drawn)
    assert (x1, x2, y2) == (100, 300, 400)
    assert y1 < 200  # the label lies on top


@pytest.mark.parametrize("size", [(64, 48), (32, 200), (640, 480), (4000, 3000), (1, 1), (7, 3)])
@pytest.mark.parametrize("box", [[0, 0, 1, 1], [0.9, 0, 1, 0.05], [-0.5, -0.5, 0.2, 0.2], [0.4, 0.97, 0.6, 1.4]])
def test_boxes_in_every_corner_of_images_of_all_sizes(size: tuple[int, int], box: list[float]) -> None:
    width, height = size
    image = ground(width, height)
    pixels = [[box[0] * width, box[1] * height, box[2] * width, box[3] * height]]
    drawn = draw_boxes(image, pixels, [0], ("a class with quite a long name",), scores=[0.987])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (drawn != image).any()


def test_line_and_text_follow_the_size_of_the_image() -> None:
    small, middle, large = (draw.line_and_text_px(w, h, 1) for w, h in ((64, 64), (640, 480), (4000, 3000)))
    assert small[0] == 1
    assert small < middle < large
    # A 12 MP photo displayed 1000 pixels wide looks like a small image.
    assert 1.5 < large[0] / 4 < 4
    assert 12 < large[1] / 4 < 24
    assert draw.line_and_text_px(640, 480, 200) < middle  # finer if there are many boxes


def test_labels_avoid_each_other() -> None:
    boxes = np.array([[100, 100, 300, 300], [110, 100, 310, 300], [100, 104, 300, 304]], np.float64)
    placed: list[draw.Rectangle] = []
    for box in boxes:
        placed.append(draw.position_label(box, (80, 20), (640, 480), 2, placed))
    for a, b in itertools.combinations(placed, 2):
        assert intersection(a, b) == 0
    for x1, y1, x2, y2 in placed:
        assert 0 <= x1 < x2 <= 640
        assert 0 <= y1 < y2 <= 480


def test_many_labels_do_not_hide_the_image() -> None:
    random = np.random.default_rng(0)
    corners = random.uniform(0, 300, (300, 2))
    boxes = np.concatenate([corners, corners + random.uniform(20, 150, (300, 2))], axis=1)
    image = ground()
    few = draw_boxes(image, boxes[:1], [0], NAMES, scores=[0.9])
    many = draw_boxes(image, boxes, random.integers(0, 3, 300), NAMES, scores=random.uniform(0, 1, 300))
    assert (many != few).any()
    # Pixels at the level of the background show how much of the image is still visible.
    assert (many == 128).all(axis=2).mean() > 0.3


def test_best_score_is_drawn_on_top() -> None:
    boxes = [[100, 100, 300, 300], [100, 100, 300, 300]]
    for scores in ([0.9, 0.2], [0.2, 0.9]):
        drawn = draw_boxes(ground(), boxes, [0, 1], NAMES, scores=scores)
        assert tuple(drawn[300 - 1, 200]) == class_color(int(np.argmax(scores)))


def test_no_boxes_and_an_unknown_label() -> None:
    image = ground()
    empty = draw_boxes(image, np.zeros((0, 4)), [], NAMES, scores=[])
    assert (empty == image).all()
    assert empty is not image
    assert (draw_boxes(image, [[5, 5, 50, 50]], [7], ()) != image).any()


def test_box_outside_the_image_leaves_no_line() -> None:
    image = ground()
    drawn = draw_boxes(image, [[700, 100, 800, 300]], [0], NAMES)
    assert not (drawn[150:, 600:] == np.array(class_color(0))).all(axis=2).any()


@pytest.mark.parametrize("name", ["Käse", "Лось", "Ελαία", "a\tb", "", "x" * 500, "100 % & <b>"])
def test_unusual_class_names_are_drawn(name: str) -> None:
    drawn = draw_boxes(ground(), [[100, 100, 300, 300]], [0], (name,), scores=[0.5])
    assert (drawn != ground()).any()


def test_letters_that_the_default_font_lacks_use_a_fallback_font() -> None:
    pytest.importorskip("matplotlib", reason="its font is the fallback")
    default = ImageFont.load_default(20)
    assert not draw.has_letters(default, "Лось")  # type: ignore[arg-type]
    assert draw.has_letters(draw.font_for(20, "Лось"), "Лось")
    assert draw.font_for(20, "moose").getname() == default.getname()  # type: ignore[union-attr]

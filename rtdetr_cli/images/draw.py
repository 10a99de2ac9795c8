"""Draw boxes on images: for `predict`, the reports and the plots of a run.

Line width and text size follow the size of the image, so that a 64 px crop and a 12 MP photo look alike on a page.
All boxes are drawn before all labels, the best score last and on top. A label looks for a free position around its
box and never leaves the image. Text is Pillow's own scalable font; names with letters that it lacks use a fallback
font that is commonly installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rtdetr_cli.boxes import intersection

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# Lightness and chroma (OKLCH) of successive rounds of hues, so that similar hues differ in lightness.
_ROUNDS = ((0.70, 0.19), (0.52, 0.18), (0.84, 0.13), (0.62, 0.12), (0.92, 0.08))
# OKLab to the cone responses whose cubes are LMS, and LMS to linear sRGB, from B. Ottosson's definition.
_OKLAB_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
_GOLDEN_ANGLE = 137.50776
_FIRST_HUE = 28.0
_ELLIPSIS = "…"
_MAX_LABEL_AREA = 0.3  # fraction of the image
_FALLBACK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "PingFang.ttc",
)


@cache
def class_color(label: int) -> Color:
    """Return the color (red, green, blue; 0 to 255) of a class, always the same for the same label.

    Hues step by the golden angle, so that the first n classes are spread over the color wheel for any n; lightness is
    perceptually uniform (OKLCH), so that no class stands out.
    """
    lightness, chroma = _ROUNDS[(label // 8) % len(_ROUNDS)]
    hue = math.radians(_FIRST_HUE + _GOLDEN_ANGLE * label)
    while True:
        lab = (lightness, chroma * math.cos(hue), chroma * math.sin(hue))
        linear = _LMS_TO_RGB @ (_OKLAB_TO_LMS @ lab) ** 3
        if (linear.min() >= -1e-3 and linear.max() <= 1.001) or chroma < 0.01:
            break
        chroma *= 0.96  # outside sRGB: move towards gray, with the same hue and lightness
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = np.rint(255 * srgb).astype(int).tolist()
    return red, green, blue


def css_color(label: int) -> str:
    """Return the color of a class for a style sheet: `#ff6557`."""
    red, green, blue = class_color(label)
    return f"#{red:02x}{green:02x}{blue:02x}"


def draw_boxes(
    image: NDArray[np.uint8],
    boxes_xyxy_px: NDArray[np.floating] | Sequence[Sequence[float]],
    labels: NDArray[np.integer] | Sequence[int],
    names: Sequence[str],
    *,
    scores: NDArray[np.floating] | Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """Return a copy of an image with boxes and their class names drawn on it.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes_xyxy_px: (N, 4) pixels; parts outside the image are not drawn.
        labels: (N,) contiguous labels, which decide name and color.
        names: class names in label order; a label beyond them is called `class 7`.
        scores: (N,) 0 to 1, shown after the name as percentages; None shows names only (ground truth).
    """
    canvas = Image.fromarray(np.ascontiguousarray(image))
    boxes = np.asarray(boxes_xyxy_px, np.float64).reshape(-1, 4)
    classes = [int(label) for label in labels]
    if not len(boxes):
        return np.array(canvas)
    if scores is None:
        # Small boxes last: the label of a small object must not be hidden by that of a large one.
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        order = np.argsort(-areas, kind="stable")
    else:
        order = np.argsort(np.asarray(scores, np.float64), kind="stable")

    pen = ImageDraw.Draw(canvas)
    line, text_px = line_and_text_px(canvas.width, canvas.height, len(boxes))
    for index in order:
        _draw_outline(pen, boxes[index], class_color(classes[index]), line, canvas.size)

    placed: list[Rectangle] = []
    plates: list[tuple[Rectangle, str, ImageFont.FreeTypeFont, Color]] = []
    room = _MAX_LABEL_AREA * canvas.width * canvas.height
    for index in reversed(order):  # the best scores choose their positions first
        label = classes[index]
        name = names[label] if 0 <= label < len(names) else f"class {label}"
        score = "" if scores is None else f" {min(max(float(scores[index]), 0.0), 1.0):.0%}"
        font = font_for(text_px, name)
        text = _shorten(name, score, font, canvas.width - 2 * _padding(text_px))
        size = (font.getlength(text) + 2 * _padding(text_px), sum(_line_metrics(font)) + _padding(text_px))
        room -= size[0] * size[1]
        if room < 0 and placed:
            break  # the remaining boxes go without labels, which would hide the image
        where = position_label(boxes[index], size, canvas.size, line, placed)
        placed.append(where)
        plates.append((where, text, font, class_color(label)))
    for where, text, font, fill in reversed(plates):
        _draw_plate(pen, where, text, font, fill, text_px)
    return np.array(canvas)


def line_and_text_px(width: int, height: int, count: int) -> tuple[int, int]:
    """Return line width and text size in pixels for an image; both are smaller if there are many boxes."""
    side = math.sqrt(width * height)
    crowd = 1.0 if count <= 25 else max(0.7, (25 / count) ** 0.25)
    return max(1, round(side / 260 * crowd)), max(9, round((4 + side / 46) * crowd))


def _padding(text_px: int) -> int:
    return max(1, round(text_px / 4))


def _draw_outline(
    pen: ImageDraw.ImageDraw, box: NDArray[np.float64], fill: Color, line: int, size: tuple[int, int]
) -> None:
    """Draw one box, with the line inside its edges and inside the image, and a thin dark inner line for contrast."""
    if (box[2:] <= 0).any() or (box[:2] >= size).any():
        return
    x1, y1, x2, y2 = np.clip(np.rint(box - (0, 0, 1, 1)), 0, np.tile(size, 2) - 1).astype(int).tolist()
    corners = (x1, y1, max(x1, x2), max(y1, y2))
    inner = (corners[0] + line, corners[1] + line, corners[2] - line, corners[3] - line)
    if line > 2 and inner[2] > inner[0] and inner[3] > inner[1]:
        pen.rectangle(inner, outline=tuple(channel // 2 for channel in fill), width=max(1, line // 4))
    pen.rectangle(corners, outline=fill, width=line)


def _draw_plate(
    pen: ImageDraw.ImageDraw, where: Rectangle, text: str, font: ImageFont.FreeTypeFont, fill: Color, text_px: int
) -> None:
    """Draw a label: a plate in the color of the class, with black or white text, whichever has more contrast."""
    x1, y1, x2, y2 = (round(v) for v in where)
    pen.rounded_rectangle((x1, y1, x2 - 1, y2 - 1), radius=text_px / 5 if text_px >= 14 else 0, fill=fill)
    baseline = y1 + _padding(text_px) / 2 + _line_metrics(font)[0]
    pen.text((x1 + _padding(text_px), baseline), text, font=font, fill=text_color(fill), anchor="ls")


def position_label(
    box: NDArray[np.float64], label_size: tuple[float, float], size: tuple[int, int], line: int, placed: list[Rectangle]
) -> Rectangle:
    """Return the label's rectangle: the first candidate that is free, else the least covered one."""
    width, height = label_size
    x1, y1, x2, y2 = (float(v) for v in box)
    candidates = (
        (x1, y1 - height),  # above the box
        (x1, y1),  # inside, top left
        (x2 - width, y1 - height),
        (x1, y2),  # below
        (x2 - width, y1),
        (x1, y2 - height),
        (x2 - width, y2 - height),
        (x2, y1),  # to the right
        (x1 - width, y1),
    )
    best: Rectangle | None = None
    least = math.inf
    for rank, (left, top) in enumerate(candidates):
        inside_x = min(max(left, 0.0), max(0.0, size[0] - width))
        inside_y = min(max(top, 0.0), max(0.0, size[1] - height))
        moved = abs(inside_x - left) + abs(inside_y - top)
        where = (inside_x, inside_y, inside_x + width, inside_y + height)
        covered = float(intersection(where, np.reshape(placed, (-1, 4))).sum()) / (width * height)
        cost = covered + (0.15 if moved > line else 0.0) + 0.01 * rank
        if cost < least:
            best, least = where, cost
        if covered == 0 and moved <= line:
            break
    assert best is not None
    return best


def _shorten(name: str, score: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return name and score, with the name shortened so that both fit the image."""
    if font.getlength(name + score) <= width:
        return name + score
    for length in range(len(name) - 1, 0, -1):
        text = name[:length].rstrip() + _ELLIPSIS + score
        if font.getlength(text) <= width:
            return text
    return score.strip() or name[:1]


@lru_cache(maxsize=256)
def font_for(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Return a font of that size in pixels that has the letters of a text, preferably Pillow's own."""
    default = ImageFont.load_default(size)
    assert isinstance(default, ImageFont.FreeTypeFont)
    if text.isascii() or has_letters(default, text):
        return default
    for candidate in _fallback_paths():
        try:
            font = ImageFont.truetype(candidate, size)
        except OSError:
            continue
        if has_letters(font, text):
            return font
    return default


@cache
def _fallback_paths() -> tuple[str, ...]:
    """Return fonts to try, starting with the large one in matplotlib (which is located, not imported)."""
    spec = find_spec("matplotlib")
    bundled = [str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")] if spec and spec.origin else []
    return (*bundled, *_FALLBACK_FONTS)


def has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Return whether a font has all letters of a text."""
    missing = bytes(font.getmask("\U0010ffff"))  # never assigned, so the font draws its symbol for missing letters
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if not letter.isspace())


@lru_cache(maxsize=64)
def _line_metrics(font: ImageFont.FreeTypeFont) -> tuple[float, float]:
    """Return the real heights of capitals above the baseline and of descenders below it."""
    _, top, _, bottom = font.getbbox("Ag%|", anchor="ls")
    return float(-top), float(bottom)


def text_color(background: Color) -> Color:
    """Return black or white, whichever has more contrast to a background (WCAG relative luminance)."""
    channels = np.array(background) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return (0, 0, 0) if (linear @ (0.2126, 0.7152, 0.0722) + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)

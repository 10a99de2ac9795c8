"""Generate a detection dataset for demos and tests: shapes of five classes on textured backgrounds, as COCO JSON.

Only the shape decides the class: color, pattern, size, rotation and position are independent of it, so a detector
that scores well has learned outlines. Objects cast soft shadows, overlap by up to a third and may be cut by the
border; one image in ten has none. The same seed gives the same dataset.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.boxes import intersection

NAMES = ("disc", "ring", "square", "triangle", "cross")
SMALLEST_PX = 16
"""Longer side of the smallest object; the largest one fills half of the image's shorter side."""

_EMPTY_FRACTION = 0.1
_MAX_OBJECTS = 7
_MAX_OVERLAP = 0.35  # fraction of the smaller of two boxes
_MAX_CUT = 0.25  # fraction of an object's side that may lie outside the image
_SUPERSAMPLING = 4  # masks are drawn this many times larger and then averaged, for soft edges
_RING_HOLE = 0.55

Color = NDArray[np.float32]


def generate_dataset(
    folder: Path, *, train: int = 800, val: int = 100, imgsz: int | tuple[int, int] = 192, seed: int = 0
) -> Path:
    """Write `train.json`, `val.json` and their images under `images/`; return `folder`, ready for `--data`.

    Args:
        folder: created if it doesn't exist.
        train: number of training images.
        val: number of validation images.
        imgsz: height and width of every image, at least 64 pixels.
        seed: equal seeds give equal datasets; train and val never share an image.

    Raises:
        ValueError: the images are too small for objects from 16 px to half their side.
        OSError: the folder cannot be written.
    """
    hw = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    if min(hw) < 4 * SMALLEST_PX:
        raise ValueError(
            f"images of {hw[0]}x{hw[1]} are too small: each side must have at least {4 * SMALLEST_PX} pixels"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        if count:
            _write_split(folder, split, count, hw, np.random.SeedSequence(seed, spawn_key=(number,)))
    return folder


def generate_image(
    rng: Generator, hw: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
    """Paint one image: (H, W, 3) uint8 RGB, (N, 4) boxes in xyxy pixels, (N,) labels into `NAMES`."""
    canvas = _background(rng, hw)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    wanted = 0 if rng.random() < _EMPTY_FRACTION else int(rng.integers(1, _MAX_OBJECTS + 1))
    largest = min(hw) / 2
    for _ in range(wanted * 6):
        if len(boxes) == wanted:
            break
        label = int(rng.integers(len(NAMES)))
        side = SMALLEST_PX * (largest / SMALLEST_PX) ** rng.random()  # uniform in the logarithm
        outline = _outline(rng, label, side)
        low, high = outline.min(0), outline.max(0)
        extent = high - low
        slack = _MAX_CUT * extent * (rng.random() < 0.2)
        shift = rng.uniform(-slack, np.array(hw[::-1]) - extent + slack) - low
        box = _box(outline + shift, hw)
        if max(box[2] - box[0], box[3] - box[1]) < SMALLEST_PX or any(_covered(box, b) > _MAX_OVERLAP for b in boxes):
            continue
        _paint(rng, canvas, outline + shift, hole=label == 1)
        boxes.append(box)
        labels.append(label)
    canvas += rng.normal(0, rng.uniform(1, 5), (*hw, 1)).astype(np.float32)  # sensor noise
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return image, np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)


def _write_split(folder: Path, split: str, count: int, hw: tuple[int, int], seeds: np.random.SeedSequence) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, one in enumerate(seeds.spawn(count)):
        image, boxes, labels = generate_image(np.random.default_rng(one), hw)
        name = f"images/{split}-{index:05d}.jpg"
        Image.fromarray(image).save(folder / name, quality=90)
        images.append({"id": index + 1, "file_name": name, "width": hw[1], "height": hw[0]})
        for (x0, y0, x1, y1), label in zip(np.round(boxes, 2).tolist(), labels.tolist(), strict=True):
            width, height = round(x1 - x0, 2), round(y1 - y0, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x0, y0, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                }
            )
    document = {
        "info": {"description": "Shapes, generated by rtdetr-cli"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(NAMES)],
    }
    (folder / f"{split}.json").write_text(json.dumps(document), encoding="utf-8")


def _covered(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Return the intersection of two boxes as a fraction of the smaller one."""
    return float(intersection(a, b)) / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _box(outline: NDArray[np.float64], hw: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the tight box of the part inside the image: for a cut triangle it is smaller than the clipped box."""
    corners = [(float(x), float(y)) for x, y in outline]
    for axis, bound, sign in ((0, 0, 1), (1, 0, 1), (0, hw[1], -1), (1, hw[0], -1)):
        depths = [(corner[axis] - bound) * sign for corner in corners]  # distance inside one border of the image
        clipped: list[tuple[float, float]] = []
        for (x0, y0), (x1, y1), depth, following in zip(
            corners, corners[1:] + corners[:1], depths, depths[1:] + depths[:1], strict=True
        ):
            if depth >= 0:
                clipped.append((x0, y0))
            if (depth >= 0) != (following >= 0):
                fraction = depth / (depth - following)
                crossing = (x0 + fraction * (x1 - x0), y0 + fraction * (y1 - y0))
                clipped.append((float(bound), crossing[1]) if axis == 0 else (crossing[0], float(bound)))
        corners = clipped
    (x0, y0), (x1, y1) = np.min(corners, axis=0).tolist(), np.max(corners, axis=0).tolist()
    return x0, y0, x1, y1


def _outline(rng: Generator, label: int, side: float) -> NDArray[np.float64]:
    """Return the corners (N, 2) of a shape about the origin whose longer side is `side` pixels."""
    aspect = rng.uniform(0.75, 1)
    if NAMES[label] in ("disc", "ring"):
        angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        corners = np.stack([np.cos(angles), np.sin(angles)], 1)
    elif NAMES[label] == "square":
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
    elif NAMES[label] == "triangle":
        corners = np.array([[0, -1], [1, 0.8], [-1, 0.8]], np.float64)
    else:
        arm = 0.36
        quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
        rotations = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        corners = np.concatenate([quarter @ rotation.T for rotation in rotations])
    corners = corners * ((aspect, 1) if rng.random() < 0.5 else (1, aspect))
    angle = rng.uniform(-0.35, 0.35)
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = corners @ np.array([[cosine, sine], [-sine, cosine]])
    scaled: NDArray[np.float64] = corners * (side / np.ptp(corners, axis=0).max())
    return scaled


def _noise(rng: Generator, hw: tuple[int, int], coarse_px: float) -> NDArray[np.float32]:
    """Return smooth noise (H, W), 0 to 1, with structures about `coarse_px` wide."""
    cells = (max(2, round(hw[0] / coarse_px)), max(2, round(hw[1] / coarse_px)))
    grid = rng.random(cells, np.float32)
    return np.asarray(cv2.resize(grid, (hw[1], hw[0]), interpolation=cv2.INTER_CUBIC), np.float32)


def _pattern(rng: Generator, hw: tuple[int, int], period_px: float) -> NDArray[np.float32]:
    """Return one of five patterns (H, W), about 0 to 1."""
    kind = int(rng.integers(5))
    if kind == 0:
        return _noise(rng, hw, period_px)
    if kind == 1:
        return np.asarray(0.6 * _noise(rng, hw, period_px * 2) + 0.4 * _noise(rng, hw, period_px / 3), np.float32)
    y, x = np.mgrid[: hw[0], : hw[1]].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period_px)
    if kind == 2:  # stripes
        return np.asarray(0.5 + 0.5 * np.sin(along), np.float32)
    across = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period_px)
    if kind == 3:  # woven cloth
        return np.asarray(0.5 + 0.25 * (np.sin(along) + np.sin(across)), np.float32)
    wobble = 4 * _noise(rng, hw, period_px * 3)  # wood
    return np.asarray(0.5 + 0.5 * np.sin(along * 0.7 + wobble * 2), np.float32)


def _color(rng: Generator, *, low: float = 30, high: float = 235) -> Color:
    return rng.uniform(low, high, 3).astype(np.float32)


def _background(rng: Generator, hw: tuple[int, int]) -> NDArray[np.float32]:
    """Return a background (H, W, 3), 0 to 255: two similar colors mixed by a pattern, clutter, uneven light."""
    first = _color(rng, low=50, high=205)
    first += rng.uniform(0.3, 0.8) * (first.mean() - first)  # less saturated than the objects
    second = np.clip(first + rng.uniform(-60, 30) + rng.uniform(-25, 25, 3), 20, 235).astype(np.float32)
    mix = np.clip(_pattern(rng, hw, rng.uniform(0.04, 0.35) * min(hw)), 0, 1)[..., None]
    canvas = first + (second - first) * mix
    for _ in range(int(rng.integers(0, 5))):  # scratches and lines as distractors
        points = (rng.uniform(-0.1, 1.1, (4, 2)) * hw[::-1]).astype(np.int32)
        color = np.clip(first + rng.uniform(-60, 60, 3), 0, 255).tolist()
        cv2.polylines(canvas, [points], False, color, int(rng.integers(1, 3)), cv2.LINE_AA)
    light = 1 + rng.uniform(0.05, 0.3) * (_noise(rng, hw, max(hw)) - 0.5)
    return np.asarray(canvas * light[..., None], np.float32)


def _paint(rng: Generator, canvas: NDArray[np.float32], outline: NDArray[np.float64], *, hole: bool) -> None:
    """Paint one object and its shadow into `canvas`, in place."""
    height, width = canvas.shape[:2]
    side = float(np.ptp(outline, axis=0).max())
    margin = int(side * 0.15) + 3
    x0, y0 = (np.floor(outline.min(0)).astype(int) - margin).tolist()
    x1, y1 = (np.ceil(outline.max(0)).astype(int) + margin).tolist()
    hw = (y1 - y0, x1 - x0)

    fine = np.zeros((hw[0] * _SUPERSAMPLING, hw[1] * _SUPERSAMPLING), np.uint8)
    corners = (outline - (x0, y0)) * _SUPERSAMPLING
    cv2.fillPoly(fine, [np.round(corners).astype(np.int32)], 255)
    if hole:
        center = (corners.min(0) + corners.max(0)) / 2
        cv2.fillPoly(fine, [np.round(center + (corners - center) * _RING_HOLE).astype(np.int32)], 0)
    mask = np.asarray(cv2.resize(fine, (hw[1], hw[0]), interpolation=cv2.INTER_AREA), np.float32) / 255

    inside = (slice(max(y0, 0), min(y1, height)), slice(max(x0, 0), min(x1, width)))
    local = (slice(inside[0].start - y0, inside[0].stop - y0), slice(inside[1].start - x0, inside[1].stop - x0))
    under = canvas[inside]

    depth = max(1.0, side * 0.06)
    shadow = np.asarray(cv2.GaussianBlur(mask, (0, 0), depth), np.float32)
    shadow = np.roll(shadow, (round(depth), round(depth)), (0, 1))
    under *= 1 - 0.45 * shadow[local][..., None]

    background = under.mean((0, 1))
    choices = [_color(rng) for _ in range(4)]
    base = max(choices, key=lambda color: float(np.abs(color - background).sum()))
    second = np.clip(base + rng.uniform(-50, 50, 3), 0, 255)
    mix = np.clip(_pattern(rng, hw, max(4.0, side * rng.uniform(0.15, 0.6))), 0, 1)[..., None]
    surface = base + (second - base) * mix
    y, x = np.mgrid[: hw[0], : hw[1]].astype(np.float32)
    surface *= (1.12 - 0.24 * (x / hw[1] + y / hw[0]) / 2)[..., None]  # light from the upper left
    rim = np.clip(
        mask - np.asarray(cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=max(1, round(side / 48)))), 0, 1
    )
    surface *= 1 - 0.4 * rim[..., None]
    alpha = mask[local][..., None]
    under += alpha * (surface[local] - under)

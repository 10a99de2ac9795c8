"""Augment an image and its boxes for training.

The recipe (published configuration, see `RECIPE`) is photometric distortion, zoom-out, IoU crop, flip and stretch, with
the random draws of torchvision's v2 transforms of these names. The geometry comes first and only chooses a window in
the image's coordinates, which is black beyond the image; a JPEG is decoded no larger than the window needs, and
stretched once. The photometric operations come last, on the few pixels of the input: they act on each pixel alone and
so nearly commute with a resize. Contrast stays relative to the whole image's mean; black surroundings stay black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.boxes import intersection
from rtdetr_cli.errors import UsageError
from rtdetr_cli.images.custom import load_pipeline, run_pipeline
from rtdetr_cli.images.decode import stretch

Boxes = NDArray[np.float64]
Labels = NDArray[np.int64]
Range = tuple[float, float]

SMALLEST_BOX_PX = 1.0
"""Boxes with a side or an area below this are dropped after each geometric step."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_IOU_OPTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # the last one means: no crop
_CROP_TRIALS = 40
_CROP_SCALE = (0.3, 1.0)
_CROP_ASPECT = (0.5, 2.0)
_THUMBNAIL = (128, 128)


class Source(Protocol):
    """An image that can be decoded once, at full size or reduced: an `ImageFile`, or one from the cache."""

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of the upright image in pixels."""

    def divisor(self, hw: tuple[int, int]) -> int:
        """Return the largest of 8, 4, 2, 1 by which the sides can be divided and still cover `hw`."""

    def decode(self, divisor: int = 1) -> Image.Image:
        """Return the upright RGB image with its sides divided by `divisor`."""


@dataclass(frozen=True, slots=True)
class Photometric:
    """Ranges of factors, each applied with probability `p`, as in torchvision's RandomPhotometricDistort."""

    brightness: Range = (0.875, 1.125)
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    hue: Range = (-0.05, 0.05)  # shift, as a fraction of the full circle
    permute: bool = True  # the channels, too
    p: float = 0.5


@dataclass(frozen=True, slots=True)
class Augmentation:
    """A resolved `--aug`: probabilities and ranges, or a user's own transforms."""

    name: str  # `none`, `light`, `recipe`, or the user's file
    flip: float = 0.0
    zoom_out: float = 0.0
    iou_crop: float = 0.0
    zoom_side: Range = (1.0, 4.0)
    rescale: Range | None = None  # prototype: a window of this share of the image's sides, at a random place
    photometric: Photometric | None = None
    custom: str = ""  # a user's transforms from `load_pipeline`, which replace all others

    def without_strong(self) -> Augmentation:
        """Return what remains when the strong operations are switched off at the end of training.

        The recipe and `light` keep the flip. A user's file is switched off as a whole: it doesn't say which of its
        operations are strong, and training should end on images like those seen in prediction.
        """
        return Augmentation(self.name, flip=self.flip)


NONE = Augmentation("none")
LIGHT = Augmentation(
    "light",
    flip=0.5,
    photometric=Photometric((0.9, 1.1), (0.8, 1.2), (0.8, 1.2), (-0.02, 0.02), permute=False),
)
RECIPE = Augmentation("recipe", flip=0.5, zoom_out=0.5, iou_crop=0.8, photometric=Photometric())
_SOFT = LIGHT.photometric
_STRONG = Photometric(permute=False)
_LAB = (
    Augmentation("color", flip=0.5, photometric=_STRONG),
    Augmentation("crop", flip=0.5, iou_crop=0.5, photometric=_SOFT),
    Augmentation("zoom", flip=0.5, zoom_out=0.5, zoom_side=(1.0, 2.0), photometric=_SOFT),
    Augmentation("medium", flip=0.5, zoom_out=0.5, iou_crop=0.5, zoom_side=(1.0, 2.0), photometric=_STRONG),
    Augmentation("rescale", flip=0.5, rescale=(0.7, 1.3), photometric=_SOFT),
)
_BUILT_IN = {a.name: a for a in (NONE, LIGHT, RECIPE, *_LAB)}


def load_augmentation(name_or_path: str) -> Augmentation:
    """Resolve `none`, `light`, `recipe` or an Albumentations file.

    Raises:
        UsageError: there is no such name or file, or the file's transforms do not work on images with boxes.
    """
    if name_or_path in _BUILT_IN:
        return _BUILT_IN[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"{name_or_path!r} is neither an augmentation ({', '.join(_BUILT_IN)}) nor a file",
            hint="write a file with Albumentations' A.save(transform, path), as JSON or YAML",
        )
    return Augmentation(name_or_path, custom=load_pipeline(path))


class Window(NamedTuple):
    """The visible part, in pixels of the upright image; it is black where it reaches beyond the image."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def wh(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top


class Geometry(NamedTuple):
    """The geometric draws of one image, and the remaining boxes (N, 4) in pixels of the network's input."""

    window: Window
    flip: bool
    boxes_xyxy: Boxes
    labels: Labels


class Distortion(NamedTuple):
    """The photometric draws of one image; None where an operation was not drawn."""

    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: float | None
    contrast_first: bool
    permutation: tuple[int, ...] | None


def augment(
    source: Source,
    boxes_xyxy_px: Boxes,
    labels: Labels,
    augmentation: Augmentation,
    rng: Generator,
    out: NDArray[np.uint8],
) -> tuple[NDArray[np.float32], Labels]:
    """Augment one image with boxes (N, 4), write it into `out` (3, H, W), and return its boxes.

    All randomness comes from `rng`.

    Returns:
        Boxes (M, 4) cxcywh from 0 to 1, and labels (M,), M <= N.

    Raises:
        ImageError: the pixels do not decode.
    """
    hw = (out.shape[1], out.shape[2])
    if augmentation.custom:
        boxes, labels = _apply_custom(source, boxes_xyxy_px, labels, augmentation, rng, out)
    else:
        geometry = draw_geometry(source.size_wh, boxes_xyxy_px, labels, hw, augmentation, rng)
        distortion = draw_distortion(augmentation.photometric, rng)
        render(source, geometry.window, out, flip=geometry.flip, distortion=distortion)
        boxes, labels = geometry.boxes_xyxy, geometry.labels
    cxcywh = np.concatenate([boxes[:, :2] + boxes[:, 2:], 2 * (boxes[:, 2:] - boxes[:, :2])], 1) / 2
    return (cxcywh / (hw[1], hw[0], hw[1], hw[0])).astype(np.float32), labels


def _apply_custom(
    source: Source,
    boxes_xyxy_px: Boxes,
    labels: Labels,
    augmentation: Augmentation,
    rng: Generator,
    out: NDArray[np.uint8],
) -> tuple[Boxes, Labels]:
    """Run a user's transforms on the whole image, stretch it into `out`, and return its boxes."""
    height, width = out.shape[1:]
    boxes, labels = sanitize(boxes_xyxy_px, labels, source.size_wh)
    pixels = np.array(source.decode(), np.uint8)
    seed = int(rng.integers(2**31))
    image, boxes, labels = run_pipeline(augmentation.custom, pixels, boxes, labels, seed=seed, name=augmentation.name)
    image_wh = (image.shape[1], image.shape[0])
    boxes, labels = sanitize(boxes, labels, image_wh)
    boxes, labels = sanitize(boxes * np.tile((width / image_wh[0], height / image_wh[1]), 2), labels, (width, height))
    out[:] = stretch(np.ascontiguousarray(image), (height, width)).transpose(2, 0, 1)
    return boxes, labels


def draw_geometry(
    size_wh: tuple[int, int],
    boxes_xyxy_px: Boxes,
    labels: Labels,
    hw: tuple[int, int],
    augmentation: Augmentation,
    rng: Generator,
) -> Geometry:
    """Draw zoom-out, IoU crop and flip, and transform the boxes to the network's input size `hw`."""
    window = Window(0, 0, *size_wh)
    boxes = boxes_xyxy_px
    if augmentation.zoom_out and rng.random() < augmentation.zoom_out:
        window = _zoom_out(window, augmentation.zoom_side, rng)
        boxes = boxes - np.tile((window.left, window.top), 2)
    if augmentation.iou_crop and rng.random() < augmentation.iou_crop and len(boxes):
        crop = _iou_crop(window.wh, boxes, rng)
        if crop is not None:
            centers = (boxes[:, :2] + boxes[:, 2:]) / 2
            keep = ((centers > (crop.left, crop.top)) & (centers < (crop.right, crop.bottom))).all(1)
            boxes, labels = sanitize(boxes[keep] - np.tile((crop.left, crop.top), 2), labels[keep], crop.wh)
            left, top = window.left, window.top
            window = Window(left + crop.left, top + crop.top, left + crop.right, top + crop.bottom)
    if augmentation.rescale:
        share = rng.uniform(*augmentation.rescale)
        w, h = (max(1, int(side * share)) for side in window.wh)
        left, top = (int((side - s) * rng.random()) for side, s in zip(window.wh, (w, h), strict=True))
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        keep = ((centers > (left, top)) & (centers < (left + w, top + h))).all(1)
        boxes, labels = boxes[keep] - np.tile((left, top), 2), labels[keep]
        window = Window(left, top, left + w, top + h)
    width, height = window.wh
    boxes, labels = sanitize(boxes, labels, (width, height))
    flip = bool(augmentation.flip) and bool(rng.random() < augmentation.flip)
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    boxes = boxes * (hw[1] / width, hw[0] / height, hw[1] / width, hw[0] / height)
    return Geometry(window, flip, *sanitize(boxes, labels, (hw[1], hw[0])))


def sanitize(boxes_xyxy: Boxes, labels: Labels, size_wh: tuple[float, float]) -> tuple[Boxes, Labels]:
    """Clip boxes to the canvas, and drop those left with less than a pixel of side or area.

    This departs from torchvision's SanitizeBoundingBoxes, which never clips: after its resize, rounding leaves some
    boxes on the right or lower border slightly outside, and it drops them (for 18 of 441 image widths at 640).
    """
    width, height = size_wh
    boxes = np.clip(boxes_xyxy, 0, (width, height, width, height))
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = (sides >= SMALLEST_BOX_PX).all(1) & (sides.prod(1) >= SMALLEST_BOX_PX)
    return boxes[keep], labels[keep]


def _zoom_out(window: Window, sides: Range, rng: Generator) -> Window:
    """Place the image at random on a canvas of one to four times its sides."""
    width, height = window.wh
    side = rng.uniform(*sides)
    canvas = (int(width * side), int(height * side))
    left = int((canvas[0] - width) * rng.random())
    top = int((canvas[1] - height) * rng.random())
    return Window(-left, -top, canvas[0] - left, canvas[1] - top)


def _iou_crop(size_wh: tuple[int, int], boxes: Boxes, rng: Generator) -> Window | None:
    """Draw a crop whose best IoU with a box it contains reaches a random minimum; None for no crop.

    Forty crops are drawn at once and the first good one is used, which equals trying one after the other.
    """
    width, height = size_wh
    while True:
        wanted = _IOU_OPTIONS[rng.integers(len(_IOU_OPTIONS))]
        if wanted >= 1:
            return None
        draws = rng.random((_CROP_TRIALS, 4))
        sides = np.floor((_CROP_SCALE[0] + (_CROP_SCALE[1] - _CROP_SCALE[0]) * draws[:, :2]) * (width, height))
        aspect = sides[:, 0] / np.maximum(sides[:, 1], 1)
        fits = (aspect >= _CROP_ASPECT[0]) & (aspect <= _CROP_ASPECT[1]) & (sides > 0).all(1)
        draws, sides = draws[fits], sides[fits]
        low = np.floor(((width, height) - sides) * draws[:, 2:])
        high = low + sides
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((low[:, None] < centers) & (centers < high[:, None])).all(2)  # (crops, boxes)
        common = intersection(np.concatenate([low, high], 1)[:, None], boxes)
        union = sides.prod(1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(1) - common
        good = (inside & (common >= wanted * union)).any(1)
        if good.any():
            first = int(good.argmax())
            return Window(*(int(v) for v in (*low[first], *high[first])))


def render(
    source: Source,
    window: Window,
    out: NDArray[np.uint8],
    *,
    flip: bool = False,
    distortion: Distortion | None = None,
) -> None:
    """Write the window of an image into `out` (3, H, W): decode it reduced, stretch once, distort, flip."""
    height, width = out.shape[1:]
    image_w, image_h = source.size_wh
    shown_w, shown_h = window.wh
    divisor = source.divisor((math.ceil(height * image_h / shown_h), math.ceil(width * image_w / shown_w)))
    image = source.decode(divisor)

    across = _stretch_plan(window.left, window.right, image_w, width, divisor, image.width)
    down = _stretch_plan(window.top, window.bottom, image_h, height, divisor, image.height)
    part = (across.source[0], down.source[0], across.source[1], down.source[1])
    region = image if part == (0, 0, *image.size) else image.crop(part)
    box = (across.box[0], down.box[0], across.box[1], down.box[1])
    size = (across.target[1] - across.target[0], down.target[1] - down.target[0])
    enlarged = shown_w <= width and shown_h <= height and min(window) >= 0
    if enlarged and region is not image and window.right <= image_w and window.bottom <= image_h:
        # Nothing shrinks, so antialiasing has no effect, and OpenCV's bilinear is the same within one gray level in a
        # fifth of the time. A whole image is always stretched exactly as in prediction.
        pixels = np.asarray(cv2.resize(np.asarray(region), size, interpolation=cv2.INTER_LINEAR), np.uint8)
    else:
        pixels = np.array(region.resize(size, Image.Resampling.BILINEAR, box=box), np.uint8)

    if distortion is not None and any(factor is not None for factor in distortion[:4]):
        _fade(pixels, across, down, up=True)
        pixels = _distort(pixels, distortion, image)
        _fade(pixels, across, down, up=False)
    left = across.target[0]
    if flip:
        pixels = np.asarray(cv2.flip(pixels, 1), np.uint8)
        left = width - across.target[1]
    if size != (width, height):
        out[:] = 0
    planes = cv2.split(pixels)
    for channel, plane in enumerate(distortion.permutation if distortion and distortion.permutation else (0, 1, 2)):
        out[channel, down.target[0] : down.target[1], left : left + size[0]] = planes[plane]


class _StretchPlan(NamedTuple):
    """How one axis of the window is resized."""

    source: tuple[int, int]  # decoded pixels to crop to; beyond the image they are black
    box: tuple[float, float]  # the part of that crop to stretch, in its pixels
    target: tuple[int, int]  # pixels of the network's input that it fills
    weights: NDArray[np.float32] | None  # (target,) fraction that is image, not black surroundings; None if all is


def _stretch_plan(low: int, high: int, length: int, target: int, divisor: int, decoded: int) -> _StretchPlan:
    """Plan one axis: the window `low:high` of an image `length` long onto `target` pixels.

    The image was decoded to `decoded` pixels, that is, divided by `divisor`. If the window reaches beyond the image,
    only the pixels that the image influences are computed, exactly as if the black surroundings were there: the crop
    includes the filter's support on both sides.
    """
    start, stop = low / divisor, high / divisor
    scale = (stop - start) / target  # decoded pixels in one of the network's
    first, last = math.floor(start), math.ceil(stop)
    if low >= 0 and high <= length:
        last = min(last, decoded)
        return _StretchPlan((first, last), (start - first, min(stop, decoded) - first), (0, target), None)
    support = max(scale, 1.0)
    edge = length / divisor
    begin = max(0, math.floor((-support - start) / scale))
    end = min(target, math.ceil((edge + support - start) / scale))
    left, right = start + begin * scale, start + end * scale
    first, last = max(first, math.floor(left - support)), min(last, math.ceil(right + support))
    box = (max(0.0, left - first), min(right, last) - first)
    mask = np.zeros((1, last - first), np.uint8)
    mask[0, max(0, -first) : max(0, decoded - first)] = 255
    coverage = Image.fromarray(mask).resize((end - begin, 1), Image.Resampling.BILINEAR, box=(box[0], 0, box[1], 1))
    weights = np.asarray(coverage, np.float32)[0] / 255
    return _StretchPlan((first, last), box, (begin, end), weights)


def _fade(pixels: NDArray[np.uint8], across: _StretchPlan, down: _StretchPlan, *, up: bool) -> None:
    """Divide the soft edge of the image by its weights (`up`), or multiply it back, in place.

    In between, the edge has the image's own colors, so that a distortion doesn't turn the black mixed into it into a
    gray frame.
    """
    for plan, axis in ((across, 1), (down, 0)):
        if plan.weights is None:
            continue
        partial = np.flatnonzero(plan.weights < 1)
        if not len(partial):
            continue
        at: tuple[Any, ...] = (slice(None), partial) if axis == 1 else (partial,)
        weight = plan.weights[partial][(None, slice(None), None) if axis == 1 else (slice(None), None, None)]
        factor = 1 / np.maximum(weight, 1 / 255) if up else weight
        pixels[at] = np.clip(np.rint(pixels[at] * factor), 0, 255)


def draw_distortion(ranges: Photometric | None, rng: Generator) -> Distortion | None:
    """Draw the photometric operations; None if there are none."""
    if ranges is None:
        return None
    brightness, contrast, saturation, hue = (
        rng.uniform(*bounds) if rng.random() < ranges.p else None
        for bounds in (ranges.brightness, ranges.contrast, ranges.saturation, ranges.hue)
    )
    first = bool(rng.random() < 0.5)
    permuted = ranges.permute and rng.random() < ranges.p
    permutation = tuple(rng.permutation(3).tolist()) if permuted else None
    return Distortion(brightness, contrast, saturation, hue, first, permutation)


def _distort(pixels: NDArray[np.uint8], distortion: Distortion, image: Image.Image) -> NDArray[np.uint8]:
    """Apply the drawn operations, except the permutation, to (H, W, 3); `image` is the whole image."""
    brightness, contrast, saturation, hue, contrast_first, _ = distortion
    # Contrast is relative to the mean of the whole image at that step; a thumbnail goes through the same steps.
    both = [pixels]
    if contrast is not None:
        both.append(np.array(image.resize(_THUMBNAIL, Image.Resampling.NEAREST), np.uint8))
    if brightness is not None:
        both = [_affine(p, np.eye(3, dtype=np.float32) * brightness) for p in both]
    if contrast is not None and contrast_first:
        both = [_contrast(both[0], contrast, both[1])]
    if saturation is not None:
        mix = np.eye(3, dtype=np.float32) * saturation + (1 - saturation) * _LUMA
        both = [_affine(p, mix) for p in both]
    if hue is not None:
        both = [_shift_hue(p, hue) for p in both]
    if contrast is not None and not contrast_first:
        both = [_contrast(both[0], contrast, both[1])]
    return both[0]


def _affine(pixels: NDArray[np.uint8], mix: NDArray[np.float32], offset: float = 0.0) -> NDArray[np.uint8]:
    """Mix the channels, clip and round down like Pillow's blend (`cv2.transform` rounds to nearest)."""
    matrix = np.concatenate([mix, np.full((3, 1), offset - 0.49, np.float32)], 1)
    return np.asarray(cv2.transform(pixels, matrix), np.uint8)


def _contrast(pixels: NDArray[np.uint8], factor: float, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pivot = int(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    return _affine(pixels, np.eye(3, dtype=np.float32) * factor, (1 - factor) * pivot)


def _shift_hue(pixels: NDArray[np.uint8], shift: float) -> NDArray[np.uint8]:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # hue is circular
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), np.uint8)

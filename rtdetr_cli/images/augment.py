"""Augment an image and its boxes while training; the only file that knows Albumentations.

The recipe (published configuration, see `RECIPE`): photometric distortion, zoom-out, IoU crop, flip, stretch. Each
draw follows torchvision's v2 transform of that name; the work is arranged differently.

1. *Geometry first.* Zoom-out, crop and flip move boxes and choose a window; nothing touches pixels. All of it is
   one window in the image's own coordinates, which may reach beyond the image, where it is black.
2. *Decode for the window.* A JPEG is decoded at the smallest of 1/8, 1/4, 1/2, 1 at which the window still covers
   the network's size. At 1 the result equals torchvision's pad, crop and resize, bit for bit or within one grey level.
3. *One stretch*, of the visible part only. A zoomed-out canvas has up to sixteen times the pixels; none is made.
4. *Photometric last*, at the network's size. These operations act on each pixel alone, so they nearly commute with
   a resize (both average; only clipping and rounding do not), and a photograph has ten to forty times the pixels of
   the network's input. What does not commute is kept: contrast turns about the mean of the whole image, not of
   the window, and black surroundings stay black.

Randomness comes from the one generator passed in, and from nothing else.

This module imports neither torch nor Albumentations until a user's file asks for the latter.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.errors import UsageError
from rtdetr_cli.images.decode import stretch

Boxes = NDArray[np.float64]
Labels = NDArray[np.int64]
Range = tuple[float, float]

SMALLEST_BOX_PX = 1.0
"""Boxes below this side or this area are dropped after each geometric step."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_IOU_OPTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # the last means: leave as it is
_CROP_TRIALS = 40
_CROP_SCALE = (0.3, 1.0)
_CROP_ASPECT = (0.5, 2.0)
_ZOOM_SIDE = (1.0, 4.0)
_THUMBNAIL = (128, 128)


class Source(Protocol):
    """An image that can be decoded once, at full size or a fraction: `ImageFile`, or one from the cache."""

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of the upright image in pixels."""

    def divisor(self, hw: tuple[int, int]) -> int:
        """Return the most (8, 4, 2 or 1) that the sides can be divided by and still cover `hw`."""

    def decode(self, divisor: int = 1) -> Image.Image:
        """Return the upright RGB image with its sides divided."""


@dataclass(frozen=True, slots=True)
class Photometric:
    """Ranges of factors, each drawn with probability `p`, as torchvision's RandomPhotometricDistort.

    Attributes:
        hue: of a full turn.
        permute: whether the channels may also be permuted.
    """

    brightness: Range = (0.875, 1.125)
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    hue: Range = (-0.05, 0.05)
    permute: bool = True
    p: float = 0.5


@dataclass(frozen=True, slots=True)
class Augmentation:
    """A resolved `--aug`: probabilities and ranges, or a user's own transforms.

    Attributes:
        name: `none`, `light`, `recipe`, or the user's file.
        flip, zoom_out, iou_crop: probabilities.
        photometric: ranges, or None for none.
        custom: a user's transforms as JSON of Albumentations' `to_dict`; the others then do nothing.
    """

    name: str
    flip: float = 0.0
    zoom_out: float = 0.0
    iou_crop: float = 0.0
    photometric: Photometric | None = None
    custom: str = ""

    def without_strong(self) -> Augmentation:
        """Return what is left when the strong operations are switched off at the end of training.

        The recipe and `light` keep the flip. A user's file is switched off as a whole: its operations do not say
        which of them are strong, and the point is to end on images as they will be predicted.
        """
        return Augmentation(self.name, flip=self.flip)


NONE = Augmentation("none")
LIGHT = Augmentation(
    "light",
    flip=0.5,
    photometric=Photometric((0.9, 1.1), (0.8, 1.2), (0.8, 1.2), (-0.02, 0.02), permute=False),
)
RECIPE = Augmentation("recipe", flip=0.5, zoom_out=0.5, iou_crop=0.8, photometric=Photometric())
_BUILT_IN = {a.name: a for a in (NONE, LIGHT, RECIPE)}


def load_augmentation(name_or_path: str) -> Augmentation:
    """Resolve `none`, `light`, `recipe` or an Albumentations file (JSON or YAML of `to_dict`), and try the file out.

    Raises:
        UsageError: no such name or file, or a file that does not hold transforms that work on images with boxes.
    """
    if name_or_path in _BUILT_IN:
        return _BUILT_IN[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"{name_or_path!r} is neither an augmentation ({', '.join(_BUILT_IN)}) nor a file",
            hint="a file is what Albumentations' A.save(transform, path) writes, as JSON or YAML",
        )
    augmentation = Augmentation(name_or_path, custom=json.dumps(_read_custom(path)))
    _try_custom(augmentation, path)
    return augmentation


class Window(NamedTuple):
    """What of an image is shown, in pixels of the upright image; beyond the image it is black."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def wh(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top


class Geometry(NamedTuple):
    """The geometric draws of one image and where its boxes went.

    Attributes:
        window: the part shown.
        flip: whether it is then mirrored left to right.
        boxes_xyxy: (N, 4) pixels of the network's input, those that are left.
        labels: (N,).
    """

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
    """Draw, decode and render one image into `out`; return its boxes.

    Args:
        source: the image.
        boxes_xyxy_px: (N, 4) in its pixels.
        labels: (N,).
        augmentation: what to draw from.
        rng: the only randomness.
        out: (3, H, W) at the network's size, written in place.

    Returns:
        boxes (M, 4) cxcywh as shares of the sides, and labels (M,), M <= N.

    Raises:
        ImageError: the pixels do not decode.
    """
    hw = (out.shape[1], out.shape[2])
    if augmentation.custom:
        boxes, labels = _custom(source, boxes_xyxy_px, labels, augmentation, rng, out)
    else:
        geometry = draw_geometry(source.size_wh, boxes_xyxy_px, labels, hw, augmentation, rng)
        distortion = draw_distortion(augmentation.photometric, rng)
        render(source, geometry.window, out, flip=geometry.flip, distortion=distortion)
        boxes, labels = geometry.boxes_xyxy, geometry.labels
    centred = np.concatenate([boxes[:, :2] + boxes[:, 2:], 2 * (boxes[:, 2:] - boxes[:, :2])], 1) / 2
    return (centred / (hw[1], hw[0], hw[1], hw[0])).astype(np.float32), labels


# ---------------------------------------------------------------------------------------------------- geometry


def draw_geometry(
    size_wh: tuple[int, int],
    boxes_xyxy_px: Boxes,
    labels: Labels,
    hw: tuple[int, int],
    augmentation: Augmentation,
    rng: Generator,
) -> Geometry:
    """Draw zoom-out, IoU crop and flip, and carry the boxes through them to the network's size `hw`."""
    window = Window(0, 0, *size_wh)
    boxes = boxes_xyxy_px
    if augmentation.zoom_out and rng.random() < augmentation.zoom_out:
        window = _zoom_out(window, rng)
        boxes = boxes - np.tile((window.left, window.top), 2)
    if augmentation.iou_crop and rng.random() < augmentation.iou_crop and len(boxes):
        crop = _iou_crop(window.wh, boxes, rng)
        if crop is not None:
            boxes, labels = _inside(boxes, labels, crop)
            left, top = window.left, window.top
            window = Window(left + crop.left, top + crop.top, left + crop.right, top + crop.bottom)
    width, height = window.wh
    boxes, labels = sanitize(boxes, labels, (width, height))
    flip = bool(augmentation.flip) and bool(rng.random() < augmentation.flip)
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    boxes = boxes * (hw[1] / width, hw[0] / height, hw[1] / width, hw[0] / height)
    return Geometry(window, flip, *sanitize(boxes, labels, (hw[1], hw[0])))


def sanitize(boxes_xyxy: Boxes, labels: Labels, size_wh: tuple[float, float]) -> tuple[Boxes, Labels]:
    """Clip boxes to the canvas and drop those that are left with less than a pixel of side or area.

    One step departs from torchvision's SanitizeBoundingBoxes, which never clips: after its resize, rounding leaves
    some boxes on the right or lower border a hair outside, and it drops them (those of 18 widths of 441 at 640).
    """
    width, height = size_wh
    boxes = np.clip(boxes_xyxy, 0, (width, height, width, height))
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = (sides >= SMALLEST_BOX_PX).all(1) & (sides.prod(1) >= SMALLEST_BOX_PX)
    return boxes[keep], labels[keep]


def _zoom_out(window: Window, rng: Generator) -> Window:
    """Put the image somewhere on a canvas of one to four times its sides."""
    width, height = window.wh
    side = rng.uniform(*_ZOOM_SIDE)
    canvas = (int(width * side), int(height * side))
    left = int((canvas[0] - width) * rng.random())
    top = int((canvas[1] - height) * rng.random())
    return Window(-left, -top, canvas[0] - left, canvas[1] - top)


def _iou_crop(size_wh: tuple[int, int], boxes: Boxes, rng: Generator) -> Window | None:
    """Draw a crop whose best IoU with a box it contains reaches a random minimum; None to leave as it is.

    Forty crops are drawn at once and the first good one is taken, which is the same as trying one after the other.
    """
    width, height = size_wh
    while True:
        wanted = _IOU_OPTIONS[rng.integers(len(_IOU_OPTIONS))]
        if wanted >= 1:
            return None
        draws = rng.random((_CROP_TRIALS, 4))
        sides = (_CROP_SCALE[0] + (_CROP_SCALE[1] - _CROP_SCALE[0]) * draws[:, :2]) * (width, height)
        sides = np.floor(sides)
        aspect = sides[:, 0] / np.maximum(sides[:, 1], 1)
        fits = (aspect >= _CROP_ASPECT[0]) & (aspect <= _CROP_ASPECT[1]) & (sides > 0).all(1)
        draws, sides = draws[fits], sides[fits]
        low = np.floor(((width, height) - sides) * draws[:, 2:])
        high = low + sides
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((low[:, None] < centres) & (centres < high[:, None])).all(2)  # (crops, boxes)
        overlap = np.minimum(high[:, None], boxes[:, 2:]) - np.maximum(low[:, None], boxes[:, :2])
        common = np.clip(overlap, 0, None).prod(2)
        union = sides.prod(1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(1) - common
        good = (inside & (common >= wanted * union)).any(1)
        if good.any():
            first = int(good.argmax())
            return Window(*(int(v) for v in (*low[first], *high[first])))


def _inside(boxes: Boxes, labels: Labels, crop: Window) -> tuple[Boxes, Labels]:
    """Keep the boxes whose centre lies in the crop, in its coordinates and clipped to it."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    keep = ((centres > (crop.left, crop.top)) & (centres < (crop.right, crop.bottom))).all(1)
    return sanitize(boxes[keep] - np.tile((crop.left, crop.top), 2), labels[keep], crop.wh)


# ---------------------------------------------------------------------------------------------------- pixels


def render(
    source: Source,
    window: Window,
    out: NDArray[np.uint8],
    *,
    flip: bool = False,
    distortion: Distortion | None = None,
) -> None:
    """Write the window of an image into `out` (3, H, W): decoded small, stretched once, flipped, distorted."""
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
        # Nothing is shrunk, so antialiasing has nothing to do, and OpenCV's bilinear is the same within one grey
        # level in a fifth of the time. The whole image always takes the stretch that prediction uses.
        pixels = np.asarray(cv2.resize(np.asarray(region), size, interpolation=cv2.INTER_LINEAR), np.uint8)
    else:
        pixels = np.array(region.resize(size, Image.Resampling.BILINEAR, box=box), np.uint8)

    if distortion is not None and distortion[:4] != (None, None, None, None):
        _fade(pixels, across, down, up=True)
        pixels = _distort(pixels, distortion, image)
        _fade(pixels, across, down, up=False)
    left = across.target[0]
    if flip:
        pixels = np.asarray(cv2.flip(pixels, 1), np.uint8)
        left = width - across.target[1]
    whole = size == (width, height)
    if not whole:
        out[:] = 0
    planes = cv2.split(pixels)
    for channel, plane in enumerate(distortion.permutation if distortion and distortion.permutation else (0, 1, 2)):
        out[channel, down.target[0] : down.target[1], left : left + size[0]] = planes[plane]


class _StretchPlan(NamedTuple):
    """How one axis of the window is resized.

    Attributes:
        source: first and last decoded pixel to crop to; what lies beyond the image is black.
        box: what of that crop is stretched, in its pixels.
        target: which pixels of the network's input it fills.
        weights: (target,) how much of each pixel is image and not black surroundings; None when all is.
    """

    source: tuple[int, int]
    box: tuple[float, float]
    target: tuple[int, int]
    weights: NDArray[np.float32] | None


def _stretch_plan(low: int, high: int, length: int, target: int, divisor: int, decoded: int) -> _StretchPlan:
    """Plan one axis: the window `low:high` of an image `length` long onto `target` pixels.

    The image was decoded to `decoded` pixels, that is divided by `divisor`. Where the window reaches beyond the
    image, only the pixels that the image reaches are computed, and exactly as if the black were there: the
    filter's support is left on both sides.
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
    shares = Image.fromarray(mask).resize((end - begin, 1), Image.Resampling.BILINEAR, box=(box[0], 0, box[1], 1))
    weights = np.asarray(shares, np.float32)[0] / 255
    return _StretchPlan((first, last), box, (begin, end), weights)


def _fade(pixels: NDArray[np.uint8], across: _StretchPlan, down: _StretchPlan, *, up: bool) -> None:
    """Divide the image's soft edge by its share of image (up), or multiply it back, in place.

    In between the edge has the image's own colours, so a distortion does not turn the black it was mixed with
    into a grey frame.
    """
    for plan, axis in ((across, 1), (down, 0)):
        if plan.weights is None:
            continue
        partial = np.flatnonzero(plan.weights < 1)
        if not len(partial):
            continue
        at: tuple[Any, ...] = (slice(None), partial) if axis == 1 else (partial,)
        share = plan.weights[partial][(None, slice(None), None) if axis == 1 else (slice(None), None, None)]
        factor = 1 / np.maximum(share, 1 / 255) if up else share
        pixels[at] = np.clip(np.rint(pixels[at] * factor), 0, 255)


def draw_distortion(ranges: Photometric | None, rng: Generator) -> Distortion | None:
    """Draw the photometric operations; None when there is nothing to draw from."""
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
    """Apply the drawn operations, without the permutation, to (H, W, 3); `image` is the whole image."""
    brightness, contrast, saturation, hue, contrast_first, _ = distortion
    # Contrast turns about the mean of the whole image as it is by then; a thumbnail goes through the same steps.
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
        both = [_turn_hue(p, hue) for p in both]
    if contrast is not None and not contrast_first:
        both = [_contrast(both[0], contrast, both[1])]
    return both[0]


def _affine(pixels: NDArray[np.uint8], mix: NDArray[np.float32], offset: float = 0.0) -> NDArray[np.uint8]:
    """Mix the channels, clip and round down, as Pillow's blend does: `cv2.transform` rounds to nearest."""
    matrix = np.concatenate([mix, np.full((3, 1), offset - 0.49, np.float32)], 1)
    return np.asarray(cv2.transform(pixels, matrix), np.uint8)


def _contrast(pixels: NDArray[np.uint8], factor: float, whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pivot = int(cv2.cvtColor(whole, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    return _affine(pixels, np.eye(3, dtype=np.float32) * factor, (1 - factor) * pivot)


def _turn_hue(pixels: NDArray[np.uint8], turn: float) -> NDArray[np.uint8]:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)  # wraps, as a hue does
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), np.uint8)


# ---------------------------------------------------------------------------------------------------- Albumentations


def _custom(
    source: Source,
    boxes_xyxy_px: Boxes,
    labels: Labels,
    augmentation: Augmentation,
    rng: Generator,
    out: NDArray[np.uint8],
) -> tuple[Boxes, Labels]:
    """Run a user's transforms on the whole image, then stretch."""
    height, width = out.shape[1:]
    transform = _compose(augmentation.custom)
    transform.set_random_seed(int(rng.integers(2**31)))
    boxes, labels = sanitize(boxes_xyxy_px, labels, source.size_wh)
    result = transform(image=np.array(source.decode(), np.uint8), bboxes=boxes, labels=labels)
    image = result["image"]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
        raise UsageError(
            f"{augmentation.name}: the transforms must leave an (H, W, 3) uint8 image, and left {kind}",
            hint="take Normalize and ToTensorV2 out: scaling to 0..1 is done on the device",
        )
    boxes = np.asarray(result["bboxes"], np.float64).reshape(-1, 4)
    labels = np.asarray(result["labels"]).astype(np.int64).reshape(-1)
    sides = (image.shape[1], image.shape[0])
    boxes, labels = sanitize(boxes, labels, sides)
    boxes, labels = sanitize(boxes * np.tile((width / sides[0], height / sides[1]), 2), labels, (width, height))
    for channel, plane in enumerate(cv2.split(stretch(np.ascontiguousarray(image), (height, width)))):
        out[channel] = plane
    return boxes, labels


def _import_albumentations() -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for a newer version of itself otherwise
    import albumentations

    return albumentations


@lru_cache(maxsize=2)
def _compose(document: str) -> Any:
    """Build a user's transforms from JSON, with our box format in place of theirs; once in each process."""
    albumentations = _import_albumentations()
    built = albumentations.from_dict(json.loads(document))
    transforms = built.transforms if isinstance(built, albumentations.Compose) else [built]
    share = built.p if isinstance(built, albumentations.Compose) else 1.0
    boxes = albumentations.BboxParams(format="pascal_voc", label_fields=["labels"], min_width=1, min_height=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that transforms of colours alone do nothing to the boxes
        return albumentations.Compose(transforms, bbox_params=boxes, p=share, seed=0)


def _read_custom(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            document = yaml.safe_load(text)
        else:
            document = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    except Exception as error:  # YAML has a tree of its own, which is only importable with it
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not isinstance(document.get("transform"), dict):
        raise UsageError(
            f"{path} has no `transform` entry, so it is not an Albumentations file",
            hint="write one with A.save(A.Compose([...]), path), data_format='json' or 'yaml'",
        )
    return document


class _Blank:
    """A plain image to try transforms on."""

    size_wh = (128, 96)

    def divisor(self, hw: tuple[int, int]) -> int:
        return 1

    def decode(self, divisor: int = 1) -> Image.Image:
        return Image.effect_noise(self.size_wh, 40).convert("RGB")


def _try_custom(augmentation: Augmentation, path: Path) -> None:
    """Build the transforms and run them a few times, so that a bad file fails before the run and not in it."""
    boxes = np.array([[8.0, 8, 60, 50], [40, 30, 120, 90]])
    out = np.empty((3, 64, 64), np.uint8)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for seed in range(4):
                rng = np.random.default_rng(seed)
                augment(_Blank(), boxes, np.array([0, 1]), augmentation, rng, out)
        # Albumentations only warns about an argument that it does not know, and goes on without.
        unknown = [str(w.message) for w in said if "not valid for transform" in str(w.message)]
        if unknown:
            raise ValueError("; ".join(unknown))
    except UsageError:
        raise
    except Exception as error:  # whatever a user's transforms raise
        what = " ".join(str(error).split())
        raise UsageError(
            f"{path} does not work on an image with boxes: {what[:300]}",
            hint="every transform must be known to Albumentations 2.0 and must carry boxes along",
        ) from None

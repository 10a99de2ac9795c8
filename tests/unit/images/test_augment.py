"""Augmentation: torchvision's distributions and pixels, and boxes that stay on their objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from rtdetr_cli.images.augment import (
    LIGHT,
    RECIPE,
    Augmentation,
    Distortion,
    Photometric,
    Window,
    augment,
    draw_distortion,
    draw_geometry,
    render,
    sanitize,
)
from rtdetr_cli.images.decode import divisor, opened

GEOMETRY = Augmentation("geometry", flip=0.5, zoom_out=0.5, iou_crop=0.8)


class Drawn:
    """An image in memory, decoded like a JPEG, or only at full size."""

    def __init__(self, pixels: NDArray[np.uint8], *, scalable: bool = False) -> None:
        self.image = Image.fromarray(pixels)
        self.size_wh = self.image.size
        self.scalable = scalable
        self.asked = 0

    def divisor(self, hw: tuple[int, int]) -> int:
        return divisor(self.size_wh, hw) if self.scalable else 1

    def decode(self, divisor: int = 1) -> Image.Image:
        self.asked = divisor
        return self.image if divisor == 1 else self.image.reduce(divisor)


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth and colorful, so that both resampling and hue matter."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def show(source: Any, window: Window, hw: tuple[int, int], **how: Any) -> NDArray[np.uint8]:
    out = np.full((3, *hw), 77, np.uint8)
    render(source, window, out, **how)
    return out.transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("window", "hw"),
    [
        (Window(0, 0, 200, 150), (96, 128)),
        (Window(0, 0, 200, 150), (150, 200)),
        (Window(0, 0, 200, 150), (320, 320)),
        (Window(31, 17, 122, 149), (64, 64)),
        (Window(31, 17, 62, 60), (160, 96)),
        (Window(-100, -50, 300, 250), (96, 96)),  # zoomed out
        (Window(-400, -300, 400, 300), (64, 96)),
        (Window(-33, 10, 120, 180), (128, 64)),  # zoomed out, then cropped across two borders
        (Window(-3, -2, 60, 40), (224, 224)),  # enlarged, so that the soft edge is wide
        (Window(150, 100, 400, 300), (96, 96)),
        (Window(-50, 40, 250, 90), (96, 96)),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_window_equals_pad_crop_flip_resize(window: Window, hw: tuple[int, int], flip: bool) -> None:
    image = texture(150, 200)
    expected = F.pad(
        Image.fromarray(image), [max(0, -window.left), max(0, -window.top), 900, 900], fill=0
    )  # larger than any window
    expected = F.crop(expected, max(0, window.top), max(0, window.left), window.wh[1], window.wh[0])
    if flip:
        expected = F.horizontal_flip(expected)
    expected = np.array(F.resize(expected, list(hw), antialias=True), np.int16)
    got = show(Drawn(image), window, hw, flip=flip).astype(np.int16)
    difference = np.abs(got - expected)
    inside = min(window) >= 0 and window.right <= 200 and window.bottom <= 150
    whole = window == (0, 0, 200, 150)
    enlarged = inside and not whole and window.wh[0] <= hw[1] and window.wh[1] <= hw[0]  # OpenCV's part
    # Mirrored weights, and weights counted from another origin, may round the other way in the last bit.
    assert difference.max() <= (0 if inside and not flip and not enlarged else 1)
    assert (difference > 0).mean() < (0.3 if enlarged else 0.01)


@pytest.mark.parametrize(
    "op",
    [
        ("brightness", 0.875), ("brightness", 1.125),
        ("contrast", 0.5), ("contrast", 1.5),
        ("saturation", 0.5), ("saturation", 1.5),
        ("hue", -0.05), ("hue", 0.05),
    ],
)  # fmt: skip
def test_each_distortion_equals_torchvisions(op: tuple[str, float]) -> None:
    name, factor = op
    image = texture(128, 128)
    drawn = Distortion(None, None, None, None, True, None)._replace(**{name: factor})
    got = show(Drawn(image), Window(0, 0, 128, 128), (128, 128), distortion=drawn).astype(np.int16)
    expected = np.array(getattr(F, f"adjust_{name}")(Image.fromarray(image), factor), np.int16)
    difference = np.abs(got - expected)
    # Hue goes through HSV in eight bits, which OpenCV and Pillow round in other places.
    assert difference.max() <= (16 if name == "hue" else 1)
    assert difference.mean() <= (1.5 if name == "hue" else 0.5)
    assert np.abs(image.astype(np.int16) - got).mean() > 1, "something must have happened"


@pytest.mark.parametrize("contrast_first", [False, True])
def test_distortions_are_applied_in_torchvisions_order(contrast_first: bool) -> None:
    image = texture(96, 96, seed=2)
    drawn = Distortion(1.1, 1.4, 0.6, 0.04, contrast_first, (2, 0, 1))
    got = show(Drawn(image), Window(0, 0, 96, 96), (96, 96), distortion=drawn).astype(np.int16)
    expected_image = Image.fromarray(image)
    expected = v2.RandomPhotometricDistort().transform(
        expected_image,
        {
            "brightness_factor": 1.1,
            "contrast_factor": 1.4,
            "saturation_factor": 0.6,
            "hue_factor": 0.04,
            "contrast_before": contrast_first,
            "channel_permutation": torch.tensor([2, 0, 1]),
        },
    )
    assert np.abs(got - np.array(expected, np.int16)).mean() < 2


def test_contrast_is_relative_to_the_mean_of_the_whole_image() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :100] = 40
    image[:, 100:] = 200
    drawn = Distortion(None, 0.5, None, None, True, None)
    got = show(Drawn(image), Window(0, 0, 80, 80), (64, 64), distortion=drawn)
    assert abs(int(got[30, 30, 0]) - (40 + 120) // 2) <= 1, "the window alone has the mean 40, and would stay as it is"


@pytest.mark.parametrize("hw", [(96, 96), (512, 512)], ids=["shrunk", "enlarged"])
def test_black_surroundings_stay_black_when_contrast_is_lowered(hw: tuple[int, int]) -> None:
    image = np.full((120, 120, 3), 220, np.uint8)
    window = Window(-90, -60, 300, 240)
    plain = show(Drawn(image), window, hw).astype(int)
    drawn = Distortion(0.9, 0.5, 0.5, 0.03, True, None)
    got = show(Drawn(image), window, hw, distortion=drawn).astype(int)
    assert (got[plain.max(2) == 0] == 0).all()
    inside = got[plain.min(2) == 220].mean()
    expected = plain[..., 0] / 220 * inside
    assert np.abs(got[..., 0] - expected).max() <= 2, "the soft edge fades as it did"


def test_a_jpeg_is_decoded_at_the_smallest_sufficient_scale(tmp_path: Path) -> None:
    source = Drawn(texture(800, 1200), scalable=True)
    for window, hw, wanted in [
        (Window(0, 0, 1200, 800), (100, 150), 8),
        (Window(0, 0, 1200, 800), (101, 150), 4),
        (Window(0, 0, 1200, 800), (640, 640), 1),
        (Window(100, 100, 500, 500), (100, 100), 4),
        (Window(100, 100, 500, 500), (200, 100), 2),
        (Window(-1200, -800, 2400, 1600), (640, 640), 2),
    ]:
        show(source, window, hw)
        assert source.asked == wanted, (window, hw)


@pytest.mark.parametrize(
    "window", [Window(0, 0, 1200, 900), Window(203, 104, 900, 801), Window(-500, -300, 1400, 1000)]
)
def test_a_reduced_decode_looks_like_the_full_one(tmp_path: Path, window: Window) -> None:
    file = tmp_path / "a.jpg"
    Image.fromarray(texture(900, 1200)).save(file, quality=95)
    hw = (120, 120)
    with opened(file) as reduced:
        assert reduced.divisor((360, 480)) == 2
        small = show(reduced, window, hw).astype(int)
    with opened(file) as full:
        whole = Drawn(np.array(full.decode()))
    difference = np.abs(small - show(whole, window, hw).astype(int))
    assert difference.mean() < 2.5


@pytest.mark.parametrize("scalable", [False, True], ids=["full", "reduced"])
def test_boxes_stay_on_their_objects(scalable: bool) -> None:
    """A white object on grey, for many geometric draws: the returned box is its visible extent."""
    image = np.full((600, 800, 3), 60, np.uint8)
    box = np.array([[320.0, 160.0, 520.0, 400.0]])
    image[160:400, 320:520] = 255
    out = np.empty((3, 160, 192), np.uint8)
    kinds = set()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        source = Drawn(image, scalable=scalable)
        boxes, labels = augment(source, box, np.array([4]), GEOMETRY, rng, out)
        kinds.add(source.asked)
        if not len(boxes):
            continue
        assert labels.tolist() == [4]
        rows, columns = np.nonzero(out[0] > 158)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        cx, cy, w, h = (boxes[0] * (192, 160, 192, 160)).tolist()
        assert np.abs(seen - (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)).max() <= 1.5
    assert kinds == ({1, 2, 4, 8} if scalable else {1})


def test_boxes_are_clipped_and_those_below_a_pixel_dropped() -> None:
    boxes = np.array([[10, 10, 10.5, 40], [-5, -5, 20, 20], [90, 90, 120, 120], [50, 50, 51, 51], [50, 50, 51, 50.9]])
    kept, labels = sanitize(boxes, np.arange(5), (100, 100))
    assert labels.tolist() == [1, 2, 3]
    assert kept.tolist() == [[0, 0, 20, 20], [90, 90, 100, 100], [50, 50, 51, 51]]


@pytest.mark.parametrize("size", [(1, 1), (2, 400), (400, 2), (3, 3)])
@pytest.mark.parametrize("boxes", [0, 1])
def test_the_smallest_images_with_and_without_boxes(size: tuple[int, int], boxes: int) -> None:
    height, width = size
    image, out = texture(height, width), np.empty((3, 64, 96), np.uint8)
    given = np.array([[0.0, 0.0, width, height]])[:boxes]
    for seed in range(60):
        source, rng = Drawn(image, scalable=True), np.random.default_rng(seed)
        left, labels = augment(source, given, np.zeros(boxes, np.int64), RECIPE, rng, out)
        assert (left.shape, left.dtype) == ((len(labels), 4), np.float32)


SIZE_WH = (210, 160)
BOXES = np.array([[20.0, 30, 90, 120], [120, 10, 160, 60], [5, 100, 25, 112], [60, 60, 200, 150]])
HW = (64, 96)


def torchvision_recipe(n: int) -> NDArray[np.float64]:
    """Return (n, boxes, 4) final boxes, NaN where dropped."""
    pipeline = v2.Compose(
        [
            v2.RandomZoomOut(fill=0, p=0.5),
            v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.RandomHorizontalFlip(0.5),
            v2.Resize(list(HW), antialias=True),
            # Without this the next step drops boxes on the right or lower border whenever rounding in Resize puts
            # them a hair outside: by chance of the crop's width, 4 % of them at 640 (see `sanitize`).
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )
    image = Image.new("L", SIZE_WH)
    boxes = np.full((n, len(BOXES), 4), np.nan)
    for i in range(n):
        given = tv_tensors.BoundingBoxes(torch.from_numpy(BOXES), format="XYXY", canvas_size=SIZE_WH[::-1])
        _, target = pipeline(image, {"boxes": given, "labels": torch.arange(len(BOXES))})
        boxes[i, target["labels"].numpy()] = target["boxes"].numpy()
    return boxes


def our_recipe(n: int) -> NDArray[np.float64]:
    boxes = np.full((n, len(BOXES), 4), np.nan)
    for i in range(n):
        drawn = draw_geometry(SIZE_WH, BOXES, np.arange(len(BOXES)), HW, RECIPE, np.random.default_rng((9, i)))
        boxes[i, drawn.labels] = drawn.boxes_xyxy
    return boxes


def alike(ours: NDArray[np.float64], theirs: NDArray[np.float64], what: str) -> None:
    """Check that two samples have one distribution, with one false alarm in ten thousand tests."""
    # Rounded, since a value that both take often, such as that of an untouched box, differs in its last bits.
    p = stats.ks_2samp(ours.round(3), theirs.round(3)).pvalue
    assert p > 1e-4, f"{what}: p {p:.2g}, means {ours.mean():.3f} and {theirs.mean():.3f}"


@pytest.mark.parametrize("n", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_the_recipes_boxes_are_distributed_as_torchvisions(n: int) -> None:
    torch.manual_seed(0)
    theirs, ours = torchvision_recipe(n), our_recipe(4 * n)
    for label in range(len(BOXES)):
        kept = [~np.isnan(b[:, label, 0]) for b in (ours, theirs)]
        table = np.array([[k.sum(), (~k).sum()] for k in kept])
        assert stats.chi2_contingency(table).pvalue > 1e-4, f"box {label} is kept {[k.mean() for k in kept]}"
        a, b = (x[k, label] for x, k in zip((ours, theirs), kept, strict=True))
        for coordinate, name in enumerate(("left", "top", "right", "bottom")):
            alike(a[:, coordinate], b[:, coordinate], f"{name} of box {label}")
        alike((a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]), (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]), f"area {label}")
    counts = [(~np.isnan(b[..., 0])).sum(1) for b in (ours, theirs)]
    alike(*(c.astype(np.float64) for c in counts), "boxes in an image")


def test_photometric_draws_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(2)
    transform = v2.RandomPhotometricDistort(p=0.5)
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    theirs = [transform.make_params([image]) for _ in range(4000)]
    rng = np.random.default_rng(2)
    ours = [d for d in (draw_distortion(Photometric(), rng) for _ in range(4000)) if d is not None]
    assert len(ours) == 4000
    for name in ("brightness", "contrast", "saturation", "hue"):
        a = np.array([v for d in ours if (v := getattr(d, name)) is not None])
        b = np.array([v for p in theirs if (v := p[f"{name}_factor"]) is not None])
        assert abs(len(a) - len(b)) < 200, f"{name} is drawn {len(a)} and {len(b)} times"
        alike(a, b, name)
    first = [np.mean([d.contrast_first for d in ours]), np.mean([p["contrast_before"] for p in theirs])]
    assert abs(first[0] - first[1]) < 0.05
    permuted = [
        [d.permutation for d in ours],
        [None if (q := p["channel_permutation"]) is None else tuple(q.tolist()) for p in theirs],
    ]
    kinds = sorted(set(permuted[0]), key=str)
    assert kinds == sorted(set(permuted[1]), key=str)
    table = np.array([[side.count(kind) for kind in kinds] for side in permuted])
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_without_strong_only_the_flip_remains() -> None:
    weak = RECIPE.without_strong()
    seen = set()
    for seed in range(20):
        drawn = draw_geometry(SIZE_WH, BOXES, np.arange(4), HW, weak, np.random.default_rng(seed))
        assert drawn.window == Window(0, 0, *SIZE_WH)
        assert len(drawn.labels) == 4
        seen.add(drawn.flip)
    assert seen == {False, True}
    assert draw_distortion(weak.photometric, np.random.default_rng(0)) is None


def test_light_keeps_every_box_and_changes_colors_slightly() -> None:
    image = texture(64, 64)
    out = np.empty((3, 64, 64), np.uint8)
    changes = []
    for seed in range(40):
        box, rng = np.array([[8.0, 8, 32, 48]]), np.random.default_rng(seed)
        boxes, _ = augment(Drawn(image), box, np.array([0]), LIGHT, rng, out)
        assert len(boxes) == 1
        straight, mirrored = (np.abs(out.transpose(1, 2, 0).astype(int) - p).mean() for p in (image, image[:, ::-1]))
        changes.append(min(straight, mirrored))
    assert 0.5 < np.mean(changes) < 15

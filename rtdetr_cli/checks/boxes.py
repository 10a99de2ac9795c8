"""Check the boxes of a dataset: where they lie, how large they are, and which of them are duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.boxes import iou
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.text import counted

EDGE_PX = 0.5
"""A box that extends beyond the image by less than this is not reported: it is a rounding error."""

SMALLEST_PX = 1e-3
"""Sides below this count as zero."""

DUPLICATE_IOU = 0.9
EXTREME_ASPECT = 20.0
WHOLE_IMAGE = 0.99
MAX_NEIGHBORS = 64
"""Boxes that each box is compared with at most, so that an image of 100,000 equal boxes takes bounded time."""


def check_boxes(dataset: RawDataset, *, imgsz: tuple[int, int] = (640, 640), queries: int = 300) -> None:
    """Check every box; clip or drop what can be clipped or dropped safely.

    Afterwards every remaining box is finite, has an area and lies inside its image, whatever was reported.

    Args:
        dataset: gets the findings; its boxes are replaced.
        imgsz: height and width of the network's input, which decide what is tiny.
        queries: objects that the model can detect in one image.
    """
    for split in dataset.splits.values():
        split.denormalize_boxes()
        _clip_boxes(dataset, split)
        _check_sizes(dataset, split, imgsz)
        _check_duplicates(dataset, split)
        _check_counts(dataset, split, queries)


def _report(
    dataset: RawDataset,
    split: RawSplit,
    code: str,
    boxes: NDArray[np.bool_] | Iterable[int],
    describe: Callable[[int], str],
) -> None:
    """Add one finding per box; `boxes` is a mask or a list of indices."""
    for box in np.flatnonzero(boxes).tolist() if isinstance(boxes, np.ndarray) else boxes:
        image = int(split.box_images[box])
        dataset.findings.add(
            code,
            f"{_box_name(dataset, split, box)} {describe(box)}",
            file=split.label_file(image),
            line=int(split.box_lines[box]),
            image_id=int(split.image_ids[image]),
            annotation_id=int(split.annotation_ids[box]),
            spot=split.box_spot(box),
        )


def _box_name(dataset: RawDataset, split: RawSplit, box: int) -> str:
    """Return how messages refer to a box: by its id where the format has ids."""
    name = dataset.categories[int(split.labels[box])].name
    if dataset.format in ("coco", "roboflow"):
        return f"annotation {int(split.annotation_ids[box])} ({name})"
    return f"the box of {name}"


def _clip_boxes(dataset: RawDataset, split: RawSplit) -> None:
    """Check the corners of each box; clip boxes to their images and drop those without an area."""
    boxes = split.boxes_xyxy_px
    sizes = split.sizes_wh[split.box_images].astype(np.float64)
    limit = np.where(sizes > 0, sizes, np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
        finite = np.all(np.isfinite(boxes), axis=1) & np.all(np.isfinite(sides), axis=1)
        inverted = finite & np.any(sides < -SMALLEST_PX, axis=1)
        zero = finite & ~inverted & np.any(sides < SMALLEST_PX, axis=1)
        valid = finite & ~inverted & ~zero
        low = np.minimum(np.maximum(boxes[:, :2], 0.0), limit)
        high = np.maximum(np.minimum(boxes[:, 2:], limit), 0.0)
        outside = valid & np.any(high - low < SMALLEST_PX, axis=1)
        excess = np.maximum((low - boxes[:, :2]).max(axis=1), (boxes[:, 2:] - high).max(axis=1))
        partly = valid & ~outside & (excess > EDGE_PX) & ~split.reported_outside

    def corners(box: int) -> str:
        return f"({', '.join(f'{v:.6g}' for v in boxes[box].tolist())})"

    def image(box: int) -> str:
        return f"its {int(sizes[box, 0])}x{int(sizes[box, 1])} image"

    for code, mask, describe in (
        ("box-not-finite", ~finite, lambda box: f"has the corners {corners(box)}"),
        ("box-inverted", inverted, lambda box: _size_text(sides[box])),
        ("box-zero-size", zero, lambda box: _size_text(sides[box])),
        ("box-outside", outside, lambda box: f"at {corners(box)} is completely outside {image(box)}"),
        ("box-partly-outside", partly, lambda box: f"at {corners(box)} extends beyond {image(box)}"),
    ):
        _report(dataset, split, code, mask, describe)
    split.boxes_xyxy_px = np.concatenate([low, high], axis=1)
    split.take_boxes(valid & ~outside)


def _size_text(sides: NDArray[np.float64]) -> str:
    return f"is {sides[0]:.6g} px wide and {sides[1]:.6g} px high"


def _check_sizes(dataset: RawDataset, split: RawSplit, imgsz: tuple[int, int]) -> None:
    """Report valid boxes of unusual size or shape."""
    boxes = split.boxes_xyxy_px
    sides = boxes[:, 2:] - boxes[:, :2]
    sizes = split.sizes_wh[split.box_images].astype(np.float64)
    known = sizes[:, 0] > 0
    objects = ~split.crowd
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(known[:, None], sides / np.maximum(sizes, 1) * np.asarray([imgsz[1], imgsz[0]]), np.inf)
    smallest = scaled.min(axis=1)
    whole = known & objects & np.all(sides >= WHOLE_IMAGE * sizes, axis=1)
    aspect = sides.max(axis=1) / sides.min(axis=1)

    def describe_scaled(box: int) -> str:
        return f"is {scaled[box, 0]:.1f} px wide and {scaled[box, 1]:.1f} px high at {imgsz[0]}x{imgsz[1]}"

    _report(dataset, split, "box-below-2px", objects & (smallest < 2), describe_scaled)
    _report(dataset, split, "box-below-8px", objects & (smallest >= 2) & (smallest < 8), describe_scaled)
    _report(dataset, split, "box-whole-image", whole, lambda box: "covers its whole image")
    _report(dataset, split, "box-aspect", objects & (aspect > EXTREME_ASPECT), lambda box: _size_text(sides[box]))
    _report(dataset, split, "box-crowd", split.crowd, lambda box: "is a crowd")


def _check_counts(dataset: RawDataset, split: RawSplit, queries: int) -> None:
    """Report missing areas, and images with more boxes than the model has queries."""
    if dataset.format in ("coco", "roboflow"):
        missing = np.flatnonzero(np.isnan(split.areas)).tolist()
        subject = f"and {len(missing) - 1:,} more have" if len(missing) > 1 else "has"
        _report(dataset, split, "box-no-area", missing[:1], lambda box: f"{subject} no area")
    per_image = np.bincount(split.box_images[~split.crowd], minlength=len(split))
    for image in np.flatnonzero(per_image > queries).tolist():
        boxes = counted(int(per_image[image]), "box")
        message = f"{split.file_names[image]} has {boxes}, but the model has {counted(queries, 'query', 'queries')}"
        dataset.report_image(split, image, "box-over-queries", message)


def _check_duplicates(dataset: RawDataset, split: RawSplit) -> None:
    """Report pairs of boxes in an image that are nearly the same."""
    earlier, later = _duplicate_pairs(split)
    same_class = split.labels[earlier] == split.labels[later]
    for code, mask, problem in (
        ("box-duplicate", same_class, "is annotated twice"),
        ("box-two-classes", ~same_class, "is annotated with two classes"),
    ):
        partner: dict[int, int] = {}
        for first, second in sorted(zip(earlier[mask].tolist(), later[mask].tolist(), strict=True)):
            partner.setdefault(second, first)

        def describe(box: int, partner: dict[int, int] = partner, problem: str = problem) -> str:
            other = partner[box]
            overlap = float(iou(split.boxes_xyxy_px[box], split.boxes_xyxy_px[other]))
            line = int(split.box_lines[other])
            location = f" in line {line}" if line else ""
            return f"{problem}: {_box_name(dataset, split, other)}{location} overlaps it with IoU {overlap:.2f}"

        _report(dataset, split, code, sorted(partner), describe)


def _duplicate_pairs(split: RawSplit) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of boxes in one image with an IoU above `DUPLICATE_IOU`, the lower index first.

    Boxes are sorted by their left edges. An IoU above 0.9 needs left edges closer than a tenth of the width, so each
    box is compared only with the few that follow it closely.
    """
    boxes, images = split.boxes_xyxy_px, split.box_images
    objects = np.flatnonzero(~split.crowd)
    order = objects[np.lexsort((boxes[objects, 0], images[objects]))]
    first = np.arange(len(order))
    lows, highs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for step in range(1, MAX_NEIGHBORS + 1):
        first = first[first + step < len(order)]
        a, b = order[first], order[first + step]
        slack = (1 - DUPLICATE_IOU) * (boxes[a, 2] - boxes[a, 0])
        near = (images[a] == images[b]) & (boxes[b, 0] - boxes[a, 0] <= slack)
        first, a, b = first[near], a[near], b[near]
        if not len(first):
            break
        same = iou(boxes[a], boxes[b]) > DUPLICATE_IOU
        lows.append(np.minimum(a[same], b[same]))
        highs.append(np.maximum(a[same], b[same]))
    return np.concatenate(lows), np.concatenate(highs)

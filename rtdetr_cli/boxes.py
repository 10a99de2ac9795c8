"""Overlap of boxes, and the rescoring of duplicates. The differentiable IoU is in `train/matcher.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMALLEST_AREA = 1e-12
"""Keeps the IoU of boxes without an area at 0; far below that of one pixel, also in boxes from 0 to 1."""


def intersection(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> NDArray[np.float64]:
    """Return the common area of boxes (..., 4), given by their corners; the leading axes broadcast."""
    a, b = np.asarray(a_xyxy, np.float64), np.asarray(b_xyxy, np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.asarray(np.prod(np.maximum(sides, 0), axis=-1))


def iou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> NDArray[np.float64]:
    """Return the intersection over union of boxes (..., 4), given by their corners; the leading axes broadcast.

    Two equal boxes without an area have an IoU of 1, other pairs without an area of 0.
    """
    a, b = np.asarray(a_xyxy, np.float64), np.asarray(b_xyxy, np.float64)
    common = intersection(a, b)
    union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - common
    equal = (a == b).all(axis=-1).astype(np.float64)
    return np.asarray(np.where(union > 0, common / np.where(union > 0, union, 1), equal))


def overlap_with_better(boxes_xyxy: Any, labels: Any, xp: Any = np) -> Any:
    """Return the highest IoU of each box with an earlier box of its class, 0 for none.

    Args:
        boxes_xyxy: (..., N, 4), those of an image best first.
        labels: (..., N), of any type that can be compared.
        xp: `numpy` or `torch`, whichever the arrays belong to. Only operators that all runtimes have are used, since
            exported graphs contain this function.

    Returns:
        (..., N), from 0 to 1.
    """
    left, top, right, bottom = (boxes_xyxy[..., side] for side in range(4))
    common = 1.0
    for low, high in ((left, right), (top, bottom)):
        shared = xp.minimum(high[..., :, None], high[..., None, :]) - xp.maximum(low[..., :, None], low[..., None, :])
        common = common * xp.clip(shared, 0, None)
    areas = (right - left) * (bottom - top)
    union = areas[..., :, None] + areas[..., None, :] - common
    overlap = common / xp.clip(union, SMALLEST_AREA, None)
    same_class = labels[..., :, None] == labels[..., None, :]
    return xp.amax(xp.triu(xp.where(same_class, overlap, 0.0), 1), -2)


def rescore_duplicates(scores: Any, overlap: Any, gamma: float) -> Any:
    """Return scores lowered by `overlap_with_better`: a copy of a better detection loses its score, a neighbour keeps
    its own.

    The higher `gamma`, the closer two boxes of a class must be before the weaker one loses much.
    """
    return scores * (1 - overlap**gamma)

"""Boxes as numpy arrays: overlap. The detector's own, differentiable IoU is in `train/matcher.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


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

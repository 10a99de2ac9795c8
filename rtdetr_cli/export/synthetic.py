"""Synthetic images that exports are verified on, besides those of the dataset: every size is different, none square."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

SIZES_HW = ((480, 640), (500, 300), (720, 1280), (1000, 417), (333, 250), (256, 410), (600, 800), (540, 960))
OBJECTS = (3, 9)  # fewest and most in an image


def synthetic_image(number: int) -> NDArray[np.uint8]:
    """Return an image with colored ellipses and rectangles on a soft ground, the same for the same number.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    rng = np.random.default_rng(number)
    height, width = SIZES_HW[number % len(SIZES_HW)]
    ground = rng.integers(40, 216, (4, 5, 3), dtype=np.uint8)
    image = cv2.resize(ground, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(*OBJECTS, endpoint=True))):
        center = (int(rng.integers(width)), int(rng.integers(height)))
        half = [int(n) for n in rng.uniform(0.03, 0.25, 2) * min(height, width)]
        color = [int(n) for n in rng.integers(0, 256, 3)]
        if rng.random() < 0.5:
            cv2.ellipse(image, center, half, float(rng.uniform(0, 180)), 0, 360, color, thickness=-1)
        else:
            corner, opposite = (center[0] - half[0], center[1] - half[1]), (center[0] + half[0], center[1] + half[1])
            cv2.rectangle(image, corner, opposite, color, thickness=-1)
    noisy = image.astype(np.int16) + rng.integers(-12, 13, image.shape, dtype=np.int16)
    return noisy.clip(0, 255).astype(np.uint8)

"""The one value between whatever produces detections and whatever consumes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The detections of one picture, best first.

    Attributes:
        boxes_xyxy_px: (N, 4) float32, pixels of the upright original picture.
        scores: (N,) float32, 0 to 1.
        labels: (N,) int64, contiguous.
        size_wh: width and height of the upright original picture in pixels.
        names: class names in label order, shared by all pictures of a model.
        category_ids: the dataset's own ids in label order.
    """

    boxes_xyxy_px: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    size_wh: tuple[int, int]
    names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def keep(self, mask: NDArray[Any]) -> Detections:
        """Return the rows chosen by a boolean mask or by indices."""
        return Detections(
            self.boxes_xyxy_px[mask],
            self.scores[mask],
            self.labels[mask],
            self.size_wh,
            self.names,
            self.category_ids,
        )

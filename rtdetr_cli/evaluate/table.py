"""Detections of a whole split as flat arrays: small, quick to join, without images or raw outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.infer.detections import Detections


@dataclass(frozen=True, slots=True, eq=False)
class DetectionTable:
    """The detections of many images, one row each, in the labels of the dataset.

    Attributes:
        image_index: (D,) int64, position of the image in its `Dataset`.
        labels: (D,) int64, contiguous labels of the dataset.
        scores: (D,) float64, 0 to 1.
        boxes_xyxy_px: (D, 4) float64, pixels of the upright image.
    """

    image_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    boxes_xyxy_px: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> DetectionTable:
        """Return a table without rows."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4)))

    @classmethod
    def join(cls, parts: Sequence[DetectionTable]) -> DetectionTable:
        """Return the rows of all parts, by image and best first, independent of the order of the parts.

        Each image must be in one part only.
        """
        if not parts:
            return cls.empty()
        joined = cls(
            np.concatenate([p.image_index for p in parts]),
            np.concatenate([p.labels for p in parts]),
            np.concatenate([p.scores for p in parts]),
            np.concatenate([p.boxes_xyxy_px for p in parts]),
        )
        return joined.rows(np.lexsort((-joined.scores, joined.image_index)))

    def rows(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> DetectionTable:
        """Return the rows selected by a mask or by positions."""
        return DetectionTable(self.image_index[keep], self.labels[keep], self.scores[keep], self.boxes_xyxy_px[keep])

    def of_images(self, images: NDArray[np.int64]) -> DetectionTable:
        """Return the rows of some images (ascending positions), renumbered by their position in `images`."""
        selected = self.rows(np.isin(self.image_index, images))
        index = np.searchsorted(images, selected.image_index).astype(np.int64)
        return DetectionTable(index, selected.labels, selected.scores, selected.boxes_xyxy_px)


class TableBuilder:
    """Collect the detections of images one by one.

    Args:
        label_map: (model classes,) the dataset's label for each of the model's, -1 for none; None keeps them.
    """

    def __init__(self, label_map: NDArray[np.int64] | None = None) -> None:
        self._label_map = label_map
        self._parts: list[DetectionTable] = []
        self.not_finite = 0  # rows dropped because a score or box was NaN or infinite
        self.unknown_labels = 0  # rows dropped because the label map has no entry for their label

    def add(self, image_index: int, detections: Detections) -> None:
        """Add one image's detections as small copies, so that the arrays of a batch can be freed."""
        labels = np.asarray(detections.labels, np.int64)
        boxes = np.asarray(detections.boxes_xyxy_px, np.float64).reshape(-1, 4)
        scores = np.asarray(detections.scores, np.float64)
        finite = np.isfinite(scores) & np.isfinite(boxes).all(axis=1)
        self.not_finite += int(np.count_nonzero(~finite))
        if self._label_map is not None:
            known = (labels >= 0) & (labels < len(self._label_map))
            self.unknown_labels += int(np.count_nonzero(~known))
            labels = np.where(known, self._label_map[np.where(known, labels, 0)], -1)
        keep = finite & (labels >= 0)
        index = np.full(np.count_nonzero(keep), image_index, np.int64)
        self._parts.append(DetectionTable(index, labels[keep], scores[keep], boxes[keep]))

    def build(self) -> DetectionTable:
        """Return everything added, by image and best first."""
        return DetectionTable.join(self._parts)

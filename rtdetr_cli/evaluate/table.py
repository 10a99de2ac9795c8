"""Detections of a whole split as flat arrays: small, quick to join, without images or raw outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli import boxes
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
    def of_image(cls, image_index: int, detections: Detections) -> DetectionTable:
        """Return the detections of one image as copies, so that the arrays of a batch can be freed."""
        return cls(
            np.full(len(detections), image_index, np.int64),
            np.array(detections.labels, np.int64),
            np.array(detections.scores, np.float64),
            np.array(detections.boxes_xyxy_px, np.float64).reshape(-1, 4),
        )

    @classmethod
    def join(cls, parts: Sequence[DetectionTable]) -> DetectionTable:
        """Return the rows of all parts, by image and best first; each image must be in one part only."""
        parts = [cls.empty(), *parts]
        table = cls(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(cls)))
        return table.rows(np.lexsort((-table.scores, table.image_index)))

    def rows(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> DetectionTable:
        """Return the rows selected by a mask or by positions."""
        return DetectionTable(self.image_index[keep], self.labels[keep], self.scores[keep], self.boxes_xyxy_px[keep])

    def overlap_with_better(self) -> NDArray[np.float64]:
        """Return (D,) the highest IoU of each row with a better one of its image and class; rows as from `join`."""
        starts = np.flatnonzero(np.diff(self.image_index, prepend=-1))
        overlap = np.zeros(len(self))
        for start, end in zip(starts, [*starts[1:], len(self)], strict=False):  # without rows there is no start
            overlap[start:end] = boxes.overlap_with_better(self.boxes_xyxy_px[start:end], self.labels[start:end])
        return overlap

    def rescored(self, gamma: float, overlap: NDArray[np.float64]) -> DetectionTable:
        """Return the rows with the scores of duplicates lowered, see `boxes.rescore_duplicates`."""
        return self.join([replace(self, scores=boxes.rescore_duplicates(self.scores, overlap, gamma))])

    def in_dataset_labels(self, label_map: NDArray[np.int64] | None) -> tuple[DetectionTable, int, int]:
        """Return a model's finite detections of the dataset's classes, in the dataset's labels.

        The numbers count the rows dropped for a NaN or infinite value, and those whose label `label_map` (see
        `classes.ClassMap.labels`) does not have.
        """
        finite = np.isfinite(self.scores) & np.isfinite(self.boxes_xyxy_px).all(axis=1)
        labels, unknown = self.labels, 0
        if label_map is not None:
            known = (labels >= 0) & (labels < len(label_map))
            unknown = int(np.count_nonzero(~known))
            labels = np.where(known, label_map[np.where(known, labels, 0)], -1)
        table = replace(self, labels=labels).rows(finite & (labels >= 0))
        return table, int(np.count_nonzero(~finite)), unknown

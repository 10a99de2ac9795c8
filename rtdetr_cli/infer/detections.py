"""The detections of one image, as every backend returns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.infer.packages import import_package


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The detections of one image, best first.

    Attributes:
        boxes_xyxy_px: (N, 4) float32, pixels of the upright original image.
        scores: (N,) float32, 0 to 1.
        labels: (N,) int64, contiguous.
        size_wh: width and height of the upright original image in pixels.
        names: class names in label order, shared by all images of a model.
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

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class name of every row."""
        return tuple(class_name(self.names, label) for label in self.labels.tolist())

    def to_supervision(self) -> Any:
        """Return the rows as `supervision.Detections`, class names under `data["class_name"]`.

        Raises:
            EnvironmentProblem: the package supervision is not installed.
        """
        supervision = import_package("supervision", "supervision")
        return supervision.Detections(
            xyxy=self.boxes_xyxy_px.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def keep(self, mask: NDArray[Any]) -> Detections:
        """Return the rows that a boolean mask or indices select."""
        return Detections(
            self.boxes_xyxy_px[mask],
            self.scores[mask],
            self.labels[mask],
            self.size_wh,
            self.names,
            self.category_ids,
        )


def class_name(names: Sequence[str], label: int) -> str:
    """Return the name of a label; `class 7` for a foreign graph without names."""
    return names[label] if 0 <= label < len(names) else f"class {label}"


def category_id(category_ids: Sequence[int], label: int) -> int:
    """Return the dataset's id of a label; the label itself for a foreign graph without ids."""
    return category_ids[label] if 0 <= label < len(category_ids) else label

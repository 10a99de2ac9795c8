"""The detections of one image, as every backend returns them."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import UsageError
from rtdetr_cli.files import atomic_write
from rtdetr_cli.images.decode import ImageError
from rtdetr_cli.infer.packages import import_package
from rtdetr_cli.infer.prefetch import ImageSource, read_source
from rtdetr_cli.infer.sources import is_url

NOTEBOOK_SIDE = 1024
"""Longest side in pixels of an image that a notebook shows."""

# JPEG's usual chroma subsampling blurs thin colored lines and small letters.
_JPEG = {"format": "JPEG", "quality": 92, "subsampling": 0}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "quality": 90},
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Detections:
    """The detections of one image, best first.

    Attributes:
        boxes_xyxy_px: (N, 4) float32, pixels of the upright original image.
        scores: (N,) float32, 0 to 1.
        labels: (N,) int64, contiguous.
        size_wh: width and height of the upright original image in pixels.
        names: class names in label order, shared by all images of a model.
        category_ids: the dataset's own ids in label order.
        image: the image, if it is known: a file, a web address (a string), or (H, W, 3) uint8 RGB.
    """

    boxes_xyxy_px: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    size_wh: tuple[int, int]
    names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    image: ImageSource | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        width, height = self.size_wh
        return f"<Detections {self.summary()}, {height}x{width} px>"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class name of every row."""
        return tuple(class_name(self.names, label) for label in self.labels.tolist())

    def summary(self) -> str:
        """Return the number of objects of each class, most frequent first: `3 person, 1 car`."""
        return count_classes(Counter(self.class_names)) or "no detections"

    def keep(self, mask: NDArray[Any]) -> Detections:
        """Return the rows that a boolean mask or indices select."""
        boxes, scores, labels = self.boxes_xyxy_px[mask], self.scores[mask], self.labels[mask]
        return replace(self, boxes_xyxy_px=boxes, scores=scores, labels=labels)

    def plot(self, image: str | os.PathLike[str] | NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the image with the boxes drawn on it, (H, W, 3) uint8 RGB.

        Args:
            image: file, web address or RGB array; not needed if it is known.

        Raises:
            ImageError: the image cannot be read.
            UsageError: the image is not known, or has another size.
        """
        from rtdetr_cli.images.draw import draw_boxes

        source = self.image if image is None else as_image(image)
        if source is None:
            raise UsageError("the image of these detections is not known", hint="pass it: plot(image)", code="no-image")
        pixels = read_source(source)
        if pixels.shape[1::-1] != self.size_wh:
            height, width = pixels.shape[:2]
            expected = f"{self.size_wh[1]}x{self.size_wh[0]}"
            raise UsageError(f"the image is {height}x{width} px, but these detections are of one of {expected} px")
        return draw_boxes(pixels, self.boxes_xyxy_px, self.labels, self.names, scores=self.scores)

    def save(
        self, path: str | os.PathLike[str], image: str | os.PathLike[str] | NDArray[np.uint8] | None = None
    ) -> Path:
        """Write the annotated image as `.jpg`, `.png` or `.webp`, and return its path; see `plot`."""
        save_image(self.plot(image), Path(path))
        return Path(path)

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

    def _repr_png_(self) -> bytes | None:
        """Return the annotated image for a notebook; None if the image is not known or is gone."""
        if self.image is None:
            return None
        from PIL import Image

        try:
            drawn = Image.fromarray(self.plot())
        except (ImageError, UsageError):
            return None
        drawn.thumbnail((NOTEBOOK_SIDE, NOTEBOOK_SIDE))
        stream = io.BytesIO()
        drawn.save(stream, format="PNG")
        return stream.getvalue()

    def _repr_html_(self) -> str | None:
        """Return a table for a notebook; None if the image is known, which a notebook would not show beside it."""
        if self.image is not None:
            return None
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{score:.3f}</td><td>{', '.join(f'{side:.1f}' for side in box)}</td></tr>"
            for name, score, box in zip(
                self.class_names, self.scores.tolist(), self.boxes_xyxy_px.tolist(), strict=True
            )
        )
        head = "<tr><th>class</th><th>score</th><th>x1, y1, x2, y2</th></tr>"
        return f"<table>{head}{rows}</table>" if rows else "<p>no detections</p>"


def class_name(names: Sequence[str], label: int) -> str:
    """Return the name of a label; `class 7` for a foreign graph without names."""
    return names[label] if 0 <= label < len(names) else f"class {label}"


def count_classes(counts: Counter[str]) -> str:
    """Return the number of objects of each class, most frequent first: `3 person, 1 car`."""
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def category_id(category_ids: Sequence[int], label: int) -> int:
    """Return the dataset's id of a label; the label itself for a foreign graph without ids."""
    return category_ids[label] if 0 <= label < len(category_ids) else label


def as_image(source: Any) -> ImageSource:
    """Return a path, a web address, or an upright (H, W, 3) uint8 RGB array of a Pillow image or another array.

    Raises:
        UsageError: it is no image.
    """
    if isinstance(source, (str, os.PathLike)):
        return source if isinstance(source, str) and is_url(source) else Path(source)
    if not isinstance(source, np.ndarray) and hasattr(source, "getexif"):
        from PIL import ImageOps

        return np.asarray(ImageOps.exif_transpose(source).convert("RGB"))
    array = np.asarray(source)
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise UsageError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image",
            hint="pass (height, width, 3) uint8 in RGB order; OpenCV's frames are BGR: frame[:, :, ::-1]",
            code="array",
        )
    return np.ascontiguousarray(array)


def save_image(image: NDArray[np.uint8], path: Path) -> None:
    """Write an annotated image.

    Raises:
        UsageError: the suffix is none of `.jpg`, `.png` and `.webp`.
    """
    from PIL import Image

    options = _SAVE_OPTIONS.get(path.suffix.lower())
    if options is None:
        raise UsageError(f"{path} cannot be written: its name must end in {', '.join(_SAVE_OPTIONS)}", code="suffix")
    with atomic_write(path) as temporary:
        Image.fromarray(image).save(temporary, **options)

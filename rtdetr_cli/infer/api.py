"""The Python API: `load` a model file, `predict` on images, get frozen `Detections`.

    from rtdetr_cli import load

    detector = load("best.safetensors")
    detections = detector.predict("street.jpg")
    print(detections.class_names, detections.scores, detections.boxes_xyxy_px)

A runtime is imported when it is needed; an ONNX file never needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.image_size import parse_image_size
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.selection import select_by
from rtdetr_cli.infer.stream import detect_images
from rtdetr_cli.runs import BEST
from rtdetr_cli.weights.header import ModelHeader

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = str | os.PathLike[str] | NDArray[np.uint8] | Image.Image

__all__ = ["Detector", "load"]


class Detector:
    """A model that is ready to predict."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def header(self) -> ModelHeader:
        """What the model file says about itself."""
        return self.backend.header

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in label order; empty for a foreign graph."""
        return self.backend.header.names

    @property
    def imgsz(self) -> tuple[int, int]:
        """Height and width that images are stretched to."""
        return self.backend.imgsz

    def __repr__(self) -> str:
        height, width = self.imgsz
        return f"<Detector {self.backend.kind} {height}x{width}, {len(self.names)} classes>"

    @overload
    def predict(  # type: ignore[overload-overlap]  # a string is a sequence of strings, but it is a path here
        self,
        source: ImageSource,
        *,
        conf: float | str = ...,
        classes: Sequence[str] | None = ...,
        max_det: int = ...,
        batch: int = ...,
    ) -> Detections: ...
    @overload
    def predict(
        self,
        source: Sequence[ImageSource],
        *,
        conf: float | str = ...,
        classes: Sequence[str] | None = ...,
        max_det: int = ...,
        batch: int = ...,
    ) -> list[Detections]: ...

    def predict(
        self,
        source: ImageSource | Sequence[ImageSource],
        *,
        conf: float | str = "auto",
        classes: Sequence[str] | None = None,
        max_det: int = 100,
        batch: int = 8,
    ) -> Detections | list[Detections]:
        """Detect objects in one image or in several.

        Args:
            source: a path, a Pillow image, or an array (H, W, 3) uint8 RGB (H, W for grey); or a sequence of them.
            conf: minimum score, or `auto`: the thresholds stored in the model for each class, else 0.5.
            classes: names of the classes to return; None for all.
            max_det: maximum detections per image.
            batch: images per forward pass.

        Returns:
            `Detections` for one image, a list in the same order for several; boxes in pixels of the upright
            image, best first.

        Raises:
            ImageError: an image cannot be read.
            UsageError: an unknown class, a value out of range, or an array of another type or shape.
        """
        if batch < 1:
            raise UsageError(f"batch {batch} must be at least 1")
        single = isinstance(source, (str, os.PathLike, np.ndarray)) or not isinstance(source, Iterable)
        sources: Sequence[Any] = [source] if single else list(source)  # type: ignore[arg-type]
        selection = select_by(self.header, conf=conf, classes=classes, max_det=max_det)
        detections = []
        for result in detect_images(self.backend, [as_image(s) for s in sources], batch=batch):
            if isinstance(result, tuple):
                raise result[1]
            detections.append(selection.apply(result.detections))
        return detections[0] if single else detections


def load(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    imgsz: int | tuple[int, int] | None = None,
    layers: int | None = None,
    queries: int | None = None,
    sampling: str | None = None,
    threads: int | None = None,
) -> Detector:
    """Open a model file: `.safetensors`, a published `.pth`, `.onnx`, OpenVINO `.xml`, TensorRT `.engine`, or a run.

    Args:
        model: the file, or a run folder for its best.safetensors.
        device: `auto`, `cpu`, or a GPU such as `0`.
        imgsz: input size instead of the model's own: one number or (height, width), multiples of 32.
        layers: number of decoder layers to use; only for weights, not for exports, as `queries` and `sampling`.
        queries: number of queries to use.
        sampling: `bilinear` or `discrete`, for a published file, which does not say.
        threads: CPU threads of the runtime.

    Raises:
        ModelError: the file is missing, truncated or not a model.
        UsageError: an option does not apply to this kind of file.
        EnvironmentProblem: the runtime's package or the device is missing.
    """
    path = Path(model)
    if path.is_dir():
        best = path / BEST
        if not best.is_file():
            raise ModelError(f"the folder {path} holds no {BEST}", code="model-missing")
        path = best
    try:
        size = None if imgsz is None else parse_image_size(imgsz)
    except ValueError as error:
        raise UsageError(f"imgsz: {error}", code="size") from None
    return Detector(
        open_backend(
            path, device=device, imgsz=size, layers=layers, queries=queries, sampling=sampling, threads=threads
        )
    )


def as_image(source: Any) -> Path | NDArray[np.uint8]:
    """Return a path, or an upright (H, W, 3) uint8 RGB array.

    Raises:
        UsageError: neither a path nor an image.
    """
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
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

"""The Python API: `load` a model file, `predict` on images, get frozen `Detections`.

    from rtdetr_cli import load

    detector = load("best.safetensors")
    found = detector.predict("street.jpg")
    print(found.class_names, found.scores, found.boxes_xyxy_px)

Nothing is loaded before it is needed, and an ONNX file never needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.images.decode import ImageError
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.selection import Selection, select_by
from rtdetr_cli.infer.stream import detect_images
from rtdetr_cli.weights.header import ModelHeader

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = str | os.PathLike[str] | NDArray[np.uint8] | Image.Image

__all__ = ["Detector", "load"]


class Detector:
    """A model ready to predict, whatever file it came from."""

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
            conf: least score, or `auto`: the thresholds stored in the model for each class, else 0.5.
            classes: names of the classes wanted; all by default.
            max_det: most detections in an image.
            batch: images in one run of the network.

        Returns:
            `Detections` for one image, a list in the same order for several; boxes in pixels of the upright
            image, best first.

        Raises:
            ImageError: an image cannot be read.
            UsageError: a class that the model does not have, a score out of range, an array of another kind.
        """
        several = isinstance(source, (list, tuple)) or (
            isinstance(source, Iterable) and not isinstance(source, (str, os.PathLike, np.ndarray))
        )
        sources: Sequence[Any] = list(source) if several else [source]  # type: ignore[arg-type]
        selection = select_by(self.header, conf=conf, classes=classes, max_det=max_det)
        found = list(self._run([as_image(s) for s in sources], selection, batch))
        return found if several else found[0]

    def _run(
        self, images: Sequence[Path | NDArray[np.uint8]], selection: Selection, batch: int
    ) -> Iterator[Detections]:
        if batch < 1:
            raise UsageError(f"batch {batch} must be at least 1")
        for seen in detect_images(self.backend, images, batch=batch):
            if seen.found is None:
                raise seen.error or ImageError("an image cannot be read")
            yield selection.apply(seen.found)


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
        model: the file, or a run folder (its best.safetensors).
        device: `auto`, `cpu`, or a GPU such as `0`.
        imgsz: another input size than the model's own: one number, or (height, width), multiples of 32.
        layers: use only this many decoder layers (weights, not graphs).
        queries: use only this many queries (weights, not graphs).
        sampling: `bilinear` or `discrete`, for a published file that cannot say.
        threads: CPU threads of the runtime.

    Raises:
        ModelError: the file is missing, truncated or not a model.
        UsageError: an option that this kind of file cannot take.
        EnvironmentProblem: the runtime's package or the device is missing.
    """
    path = Path(model)
    if path.is_dir():
        best = path / "best.safetensors"
        if not best.is_file():
            raise ModelError(f"the folder {path} holds no best.safetensors", code="model-missing")
        path = best
    size = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    if size is not None and (size[0] % 32 or size[1] % 32 or min(size) < 32):
        raise UsageError(f"imgsz {size[0]}x{size[1]} is not a multiple of 32 on both sides", code="size")
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
            f"an array of shape {array.shape} and type {array.dtype} is no image",
            hint="give (height, width, 3) uint8 in RGB order; OpenCV's frames are BGR: frame[:, :, ::-1]",
            code="array",
        )
    return np.ascontiguousarray(array)

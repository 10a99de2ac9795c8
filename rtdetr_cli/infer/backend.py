"""One interface for every runtime: stretched images in, detections in original pixels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, MODEL_SUFFIXES, ModelHeader

READABLE_SUFFIXES = (*MODEL_SUFFIXES, ".ckpt")  # some tools give a published checkpoint this suffix


class Backend(Protocol):
    """A model ready to run.

    Attributes:
        header: what the model says about itself; `names` is empty for a foreign graph.
        kind: `torch`, `onnx`, `openvino` or `tensorrt`.
        imgsz: (height, width) that images must be stretched to.
        fixed_batch: the batch a graph was exported for, or None when any will do. `run` takes any number of
            images either way: it cuts and fills up by itself.
    """

    header: ModelHeader
    kind: str
    imgsz: tuple[int, int]
    fixed_batch: int | None

    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        """Detect objects in a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB, stretched to `imgsz`.
            sizes_wh: (B, 2) width and height of the originals in pixels.

        Returns:
            For each image all rows that the model gives (usually 300), best first, unfiltered and unclipped.
        """
        ...


def open_backend(
    path: Path,
    *,
    device: str = "auto",
    imgsz: tuple[int, int] | None = None,
    layers: int | None = None,
    queries: int | None = None,
    sampling: str | None = None,
    threads: int | None = None,
) -> Backend:
    """Open any model file by its suffix; torch is not loaded for a graph.

    Args:
        path: `.safetensors`, `.pth`, `.onnx`, `.xml` (OpenVINO) or `.engine` (TensorRT).
        device: `auto`, `cpu`, or a CUDA device such as `0` or `cuda:0`.
        imgsz: another input size (height, width) than the model's own; weights and dynamic graphs only.
        layers: use only this many decoder layers; weights only, as `queries` and `sampling`.
        queries: use only this many queries.
        sampling: `bilinear` or `discrete`, for a published file that cannot say.
        threads: CPU threads of the runtime; None leaves it to the runtime.

    Raises:
        ModelError: the file is missing, truncated or not a model of this kind.
        UsageError: an option that this kind of file cannot take.
        EnvironmentProblem: the runtime's package or the device is missing.
    """
    check_model_path(path)
    kind = EXPORT_SUFFIXES.get(path.suffix.lower())
    if kind is None:
        from rtdetr_cli.infer.torch_backend import open_torch

        return open_torch(
            path, device=device, imgsz=imgsz, layers=layers, queries=queries, sampling=sampling, threads=threads
        )
    refused = {"layers": layers, "queries": queries, "sampling": sampling}
    for option, value in refused.items():
        if value is not None:
            raise UsageError(
                f"--{option} {value} cannot change {path.name}: it is fixed when a graph is exported",
                hint=f"rtdetr export MODEL --{option} {value}"
                if option != "sampling"
                else "use the .safetensors or .pth file",
            )
    if kind == "onnx":
        from rtdetr_cli.infer.onnx_backend import OnnxBackend

        return OnnxBackend(path, device=device, imgsz=imgsz, threads=threads)
    if kind == "openvino":
        from rtdetr_cli.infer.openvino_backend import OpenvinoBackend

        return OpenvinoBackend(path, device=device, imgsz=imgsz, threads=threads)
    from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend

    return TensorrtBackend(path, device=device, imgsz=imgsz)


def check_model_path(path: Path) -> None:
    """Refuse a path that cannot be a model, before anything heavy is loaded."""
    if path.suffix.lower() not in READABLE_SUFFIXES:
        known = ", ".join(READABLE_SUFFIXES)
        raise ModelError(f"{path} is not a model file: its name should end in one of {known}", code="model-kind")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a model file", code="model-missing")
    if not path.exists():
        raise ModelError(f"{path} does not exist", hint=neighbours(path), code="model-missing")
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty", code="model-truncated")


def name_classes(backend: Backend, names: Sequence[str], category_ids: Sequence[int]) -> None:
    """Give the classes of a foreign graph, which carries no names, those of a dataset."""
    backend.header = replace(backend.header, names=tuple(names), category_ids=tuple(category_ids))


def neighbours(path: Path) -> str:
    """Return a hint that lists the model files beside a missing one."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    found = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in READABLE_SUFFIXES)
    return f"in {path.parent} there is {', '.join(found[:5])}" if found else ""

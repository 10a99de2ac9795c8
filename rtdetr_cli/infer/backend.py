"""One interface for every runtime: stretched images in, detections in original pixels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.documents import require_regular
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, MODEL_SUFFIXES, ModelHeader

RTX_DEVICE = "rtx"  # of ONNX files: TensorRT for RTX, by its provider for ONNX Runtime
CAUTIONS = {RTX_DEVICE: "--device rtx is experimental: it has not been tested on a GPU; compare it with --device cpu"}
"""What to warn of before a device is used."""

READABLE_SUFFIXES = (*MODEL_SUFFIXES, ".ckpt")  # some tools give a published checkpoint this suffix


class Backend(Protocol):
    """A model ready to run.

    Attributes:
        header: what the model says about itself; `names` is empty for a foreign graph.
        kind: `torch`, `onnx`, `openvino` or `tensorrt`.
        imgsz: (height, width) that images must be stretched to.
        fixed_batch: the batch size of a graph that was exported for one, or None. `run` takes any number of images
            either way: it splits and pads them.
        dedupe: the gamma that duplicates are rescored with, 0 for none; can be changed unless `dedupe_in_graph`.
        dedupe_in_graph: an exported graph rescores by itself.
    """

    header: ModelHeader
    kind: str
    imgsz: tuple[int, int]
    fixed_batch: int | None
    dedupe: float
    dedupe_in_graph: bool

    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        """Detect objects in a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB, stretched to `imgsz`.
            sizes_wh: (B, 2) width and height of the originals in pixels.

        Returns:
            For each image all rows of the model (usually 300), best first, neither filtered nor clipped.
        """
        ...


def run_checked(backend: Backend, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
    """Detect objects as `Backend.run` does, and refuse labels that are no class of the model.

    Raises:
        ModelError: a row with a score has such a label.
    """
    found = backend.run(images, sizes_wh)
    count = len(backend.header.names)
    for detections in found:
        labels = detections.labels[detections.scores > 0]  # rows without a score are padding
        wrong = labels[(labels < 0) | ((labels >= count) & (count > 0))]
        if len(wrong):
            classes = f"{counted(count, 'class')}: 0-{count - 1}" if count else "labels start at 0"
            raise ModelError(
                f"the model gives the label {wrong[0]}, which is out of range ({classes})",
                hint="export it again, and check it with rtdetr verify",
                code="model-run",
            )
    return found


def open_backend(
    path: Path,
    *,
    device: str = "auto",
    imgsz: tuple[int, int] | None = None,
    layers: int | None = None,
    queries: int | None = None,
    sampling: str | None = None,
    threads: int | None = None,
    dedupe: float | None = None,
) -> Backend:
    """Open any model file by its suffix; torch is not loaded for a graph.

    The options are those of `api.load`, except that `imgsz` is (height, width), for weights and dynamic graphs, and
    `dedupe` a gamma, 0 for off.

    Raises:
        ModelError: the file is missing, truncated or not a model of this kind.
        UsageError: an option does not apply to this kind of file.
        EnvironmentProblem: the runtime's package or the device is missing.
    """
    check_model_path(path)
    kind = EXPORT_SUFFIXES.get(path.suffix.lower())
    if device == RTX_DEVICE and kind != "onnx":
        raise UsageError(
            f"--device {device} is for ONNX files, and {path.name} is none", hint="rtdetr export MODEL --onnx"
        )
    if kind is None:
        import torch

        from rtdetr_cli.infer.torch_backend import TorchBackend, check_sampling, choose_device
        from rtdetr_cli.weights.load import load_model

        check_sampling(path, sampling)
        torch_device = choose_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        model, header = load_model(path, sampling=sampling, layers=layers, queries=queries)
        return TorchBackend(model.eval().fuse(), header.with_dedupe(dedupe), device=torch_device, imgsz=imgsz)
    for option, value in {"layers": layers, "queries": queries, "sampling": sampling}.items():
        if value is not None:
            export_again = f"rtdetr export MODEL --{option} {value}"
            raise UsageError(
                f"--{option} {value} does not apply to {path.name}: it is fixed when a model is exported",
                hint="use the .safetensors or .pth file" if option == "sampling" else export_again,
            )
    if kind == "onnx":
        from rtdetr_cli.infer.onnx_backend import OnnxBackend

        return OnnxBackend(path, device=device, imgsz=imgsz, threads=threads, dedupe=dedupe)
    if kind == "openvino":
        from rtdetr_cli.infer.openvino_backend import OpenvinoBackend

        return OpenvinoBackend(path, device=device, imgsz=imgsz, threads=threads, dedupe=dedupe)
    if threads is not None:
        raise UsageError(
            f"--threads {threads} has no effect on {path.name}: TensorRT runs on the GPU", hint="remove --threads"
        )
    from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend

    return TensorrtBackend(path, device=device, imgsz=imgsz, dedupe=dedupe)


def check_model_path(path: Path) -> None:
    """Refuse a path that cannot be a model, before anything heavy is loaded.

    Raises:
        ModelError: the suffix is unknown, or the file is missing or empty.
    """
    if path.suffix.lower() not in READABLE_SUFFIXES:
        raise ModelError(
            f"{path} is not a model file: its name must end in {', '.join(READABLE_SUFFIXES)}", code="model-kind"
        )
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a model file", code="model-missing")
    if not path.exists():
        raise ModelError(f"{path} does not exist", hint=neighbours(path), code="model-missing")
    try:
        size = require_regular(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", code="model-unreadable") from error
    if size == 0:
        raise ModelError(f"{path} is empty", code="model-truncated")


def name_classes(backend: Backend, names: Sequence[str], category_ids: Sequence[int]) -> None:
    """Give a foreign graph, which has no class names, those of a dataset."""
    backend.header = replace(backend.header, names=tuple(names), category_ids=tuple(category_ids))


def default_batch(backend: Backend) -> int:
    """Return the graph's own batch, or one that keeps the device busy: 16 on a GPU, 4 on a CPU or for any graph."""
    device = getattr(backend, "device", None)  # of torch
    return backend.fixed_batch or (16 if device is not None and device.type == "cuda" else 4)


def neighbours(path: Path) -> str:
    """Return a hint that lists the model files in the folder of a missing one."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    files = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in READABLE_SUFFIXES)
    return f"{path.parent} contains {', '.join(files[:5])}" if files else ""

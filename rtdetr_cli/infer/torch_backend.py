"""PyTorch: our model files and published checkpoints, and the model in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rtdetr_cli.errors import EnvironmentProblem, UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.postprocess import select_detections
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import ModelHeader, own_header


class TorchBackend:
    """A detector in memory. Each run switches it to eval mode and restores the mode that it had."""

    kind = "torch"
    fixed_batch: int | None = None
    dedupe_in_graph = False

    def __init__(
        self,
        model: RTDETR,
        header: ModelHeader,
        *,
        device: str | torch.device = "auto",
        imgsz: tuple[int, int] | None = None,
    ) -> None:
        """Move a model, which may be in half precision, to a device; `imgsz` replaces the header's (height, width)."""
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        # On a CPU channels last, as in training.
        self.memory_format = torch.channels_last if self.device.type == "cpu" else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.header = header
        self.imgsz = imgsz or header.imgsz
        self.dedupe = header.dedupe_gamma

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        """Detect objects; see `Backend.run`."""
        weight = next(self.model.parameters())
        inputs = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)  # B H W 3
        inputs = inputs.permute(0, 3, 1, 2).to(weight.dtype, memory_format=self.memory_format) / 255  # B 3 H W
        training = [m for m in self.model.modules() if m.training]  # without frozen parts, which stay in eval mode
        self.model.eval()
        try:
            main = self.model(inputs).main
        finally:
            for module in training:
                module.training = True
        sizes = torch.from_numpy(np.asarray(sizes_wh, np.int64)).to(self.device)
        labels, boxes, scores = select_detections(
            main.logits.float(), main.boxes_cxcywh.float(), sizes, gamma=self.dedupe
        )
        return [
            Detections(box, score, label, (int(width), int(height)), self.header.names, self.header.category_ids)
            for label, box, score, (width, height) in zip(
                labels.cpu().numpy().astype(np.int64, copy=False),
                boxes.cpu().numpy(),
                scores.cpu().numpy(),
                sizes_wh,
                strict=True,
            )
        ]


def check_sampling(path: Path, sampling: str | None) -> None:
    """Refuse `--sampling` for our own model file, whose weights were trained for the sampling that it states.

    Raises:
        UsageError: the sampling differs.
        ModelError: the file is missing or damaged.
    """
    if sampling not in ("bilinear", "discrete") or (header := own_header(path)) is None:
        return
    trained = header.sampling
    if trained != sampling:
        raise UsageError(
            f"{path} was trained with {trained} sampling; --sampling {sampling} is for published files only",
            hint=f"rtdetr finetune-discrete {path}"
            if sampling == "discrete"
            else "omit --sampling, or use the model that it was finetuned from",
            code="sampling",
        )


def choose_device(device: str) -> torch.device:
    """Return the torch device for `auto`, `cpu`, `0`, `cuda`, `cuda:1` or `mps`.

    Raises:
        UsageError: not the name of a device.
        EnvironmentProblem: this machine does not have the device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{device}" if device.isdigit() else device
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{device!r} is not a device", hint="--device auto, cpu or 0 (the first GPU)") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            devices = counted(count, "CUDA device") if count else "no CUDA device"
            message = f"device {device} was not found: torch sees {devices}"
            raise EnvironmentProblem(message, hint="--device cpu, or rtdetr doctor")
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentProblem("device mps was not found", hint="--device cpu")
    return chosen

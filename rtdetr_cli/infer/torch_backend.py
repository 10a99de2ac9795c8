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
from rtdetr_cli.weights.header import ModelHeader


class TorchBackend:
    """A detector in memory. The model is put into eval mode for each run and given back in the mode it had."""

    kind = "torch"
    fixed_batch: int | None = None

    def __init__(
        self,
        model: RTDETR,
        header: ModelHeader,
        *,
        device: str | torch.device = "auto",
        imgsz: tuple[int, int] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Take a model.

        Args:
            model: moved to `device`; its parameters may be half precision.
            header: names, ids and input size.
            device: `auto`, `cpu`, `0`, `cuda:1` or a torch device.
            imgsz: (height, width) in place of the header's.
            autocast: run the network in this type; post-processing stays float32.
        """
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.model = model.to(self.device)
        self.header = header
        self.imgsz = imgsz or header.imgsz
        self.autocast = autocast

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        """Detect objects; see `Backend.run`."""
        weight = next(self.model.parameters())
        inputs = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)  # B H W 3
        inputs = inputs.permute(0, 3, 1, 2).to(weight.dtype).contiguous() / 255  # B 3 H W
        training = [module for module in self.model.modules() if module.training]  # frozen parts are not among them
        self.model.eval()
        try:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                main = self.model(inputs).main
        finally:
            for module in training:
                module.training = True
        sizes = torch.from_numpy(np.asarray(sizes_wh, np.int64)).to(self.device)
        labels, boxes, scores = select_detections(main.logits.float(), main.boxes_cxcywh.float(), sizes)
        return [
            Detections(
                boxes_xyxy_px=box,
                scores=score,
                labels=label,
                size_wh=(int(width), int(height)),
                names=self.header.names,
                category_ids=self.header.category_ids,
            )
            for label, box, score, (width, height) in zip(
                labels.cpu().numpy().astype(np.int64, copy=False),
                boxes.cpu().numpy(),
                scores.cpu().numpy(),
                sizes_wh,
                strict=True,
            )
        ]


def open_torch(
    path: Path,
    *,
    device: str = "auto",
    imgsz: tuple[int, int] | None = None,
    layers: int | None = None,
    queries: int | None = None,
    sampling: str | None = None,
    threads: int | None = None,
) -> TorchBackend:
    """Load weights for inference, with norms folded; see `open_backend`."""
    from rtdetr_cli.weights.load import load_model

    refuse_other_sampling(path, sampling)
    chosen = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if imgsz is not None and (imgsz[0] % 32 or imgsz[1] % 32):
        raise UsageError(f"--imgsz {imgsz[0]}x{imgsz[1]}: height and width must be multiples of 32")
    model, header = load_model(path, sampling=sampling, layers=layers, queries=queries)
    return TorchBackend(model.eval().fuse(), header, device=chosen, imgsz=imgsz)


def refuse_other_sampling(path: Path, sampling: str | None) -> None:
    """Refuse `--sampling` that contradicts what a file of ours says: its weights were trained for the one it has.

    Raises:
        UsageError: it does.
        ModelError: the file is missing or damaged.
    """
    from rtdetr_cli.weights.header import read_header
    from rtdetr_cli.weights.published import is_safetensors

    if sampling not in ("bilinear", "discrete") or not is_safetensors(path):
        return
    own = read_header(path).sampling
    if own != sampling:
        raise UsageError(
            f"{path} samples {own}, as it was trained: --sampling {sampling} is for published files, which cannot say",
            hint=f"rtdetr finetune-discrete {path}"
            if sampling == "discrete"
            else "leave --sampling out, or name the model that it was finetuned from",
            code="sampling",
        )


def choose_device(device: str) -> torch.device:
    """Turn `auto`, `cpu`, `0`, `cuda`, `cuda:1` or `mps` into a torch device that is there.

    Raises:
        UsageError: not the name of a device.
        EnvironmentProblem: the device is not there.
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
            seen = (
                f"torch sees {count} CUDA device{'s' if count != 1 else ''}" if count else "torch sees no CUDA device"
            )
            raise EnvironmentProblem(f"device {device} is not there: {seen}", hint="--device cpu, or rtdetr doctor")
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentProblem("device mps is not there", hint="--device cpu")
    return chosen

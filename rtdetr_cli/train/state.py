"""What learns and where a run stands: all that has to be kept for a killed run to go on bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train.losses import Criterion
from rtdetr_cli.train.optim import FusedAdamW, MovingAverage, NormStatistics
from rtdetr_cli.train.processes import SINGLE_PROCESS, ProcessGroup
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train.sync_norm import NormSync


@dataclass(slots=True)
class Progress:
    """Where a run stands; saved whole.

    Attributes:
        epoch: the current one; batch: the next of it; step: updates made or skipped so far.
        micro_batch: images on the device at once, as found by trial.
        rate_scale: lowered each time the run went back.
        best_score, best_epoch: of the evaluation; -1 for none.
        waited: evaluated epochs since then.
        loss_sums, loss_steps: of the current epoch.
    """

    micro_batch: int
    epoch: int = 0
    batch: int = 0
    step: int = 0
    rate_scale: float = 1.0
    went_back: int = 0
    skipped: int = 0
    in_a_row: int = 0
    best_score: float = -1.0
    best_epoch: int = -1
    waited: int = 0
    finished: str = ""
    loss_sums: dict[str, float] = field(default_factory=dict)
    loss_steps: int = 0

    def take(self, saved: Mapping[str, Any]) -> None:
        """Become what was saved."""
        for key, value in saved.items():
            setattr(self, key, dict(value) if isinstance(value, dict) else value)


@dataclass(slots=True)
class Learner:
    """Everything that learns, on its device.

    Attributes:
        model: in training mode but for what is frozen.
        average: its moving average, which is evaluated and deployed.
        optimizer: AdamW with clipping, loss scale and the skipping of non-finite steps.
        criterion: the losses.
        spec: for the denoising group.
        device: where it lies.
        autocast: type of the network's arithmetic, or None for float32.
        norms: running statistics, to take a forward pass back.
        processes: the processes that make the same steps.
        norm_sync: the norms that average over all of them, or None.
    """

    model: RTDETR
    average: MovingAverage
    optimizer: FusedAdamW
    criterion: Criterion
    spec: ModelSpec
    device: torch.device
    autocast: torch.dtype | None
    norms: NormStatistics
    processes: ProcessGroup = SINGLE_PROCESS
    norm_sync: NormSync | None = None

    def train_mode(self) -> None:
        """Switch to training; norms whose parameters are all frozen keep their statistics."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
                module.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return all tensors."""
        return {
            "model": dict(self.model.state_dict()),
            "average": dict(self.average.module.state_dict()),
            "stepper": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, in place."""
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["stepper"])


# ---- saving and going back --------------------------------------------------------------------------------------


def snapshot(learner: Learner, progress: Progress, identity: Mapping[str, Any], metrics_offset: int) -> dict[str, Any]:
    """Gather everything that a run needs to go on."""
    return {
        "identity": dict(identity),
        "place": asdict(progress),
        "learner": learner.state_dict(),
        "generators": _generators(),
        "metrics_offset": metrics_offset,
    }


def restore(learner: Learner, progress: Progress, state: Mapping[str, Any], folder: RunFolder | None) -> None:
    """Become what `snapshot` gathered; rows of `metrics.csv` written since are taken back, where there is a folder."""
    learner.load_state_dict(state["learner"])
    progress.take(state["place"])
    _set_generators(state["generators"])
    if folder is not None:
        folder.truncate_metrics(state["metrics_offset"])


def _generators() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def _set_generators(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    name, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))
    version, state, gauss_next = saved["python"]
    random.setstate((version, tuple(state), gauss_next))

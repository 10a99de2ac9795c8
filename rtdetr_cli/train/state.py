"""What learns and where a run stands: all that a checkpoint holds for a killed run to continue bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train.events import StepDone, StepSkipped
from rtdetr_cli.train.losses import Criterion
from rtdetr_cli.train.optim import FusedAdamW, MovingAverage, NormStatistics
from rtdetr_cli.train.processes import SINGLE_PROCESS, ProcessGroup
from rtdetr_cli.train.sync_norm import NormSync, synchronize_norms


@dataclass(slots=True)
class Progress:
    """Where a run stands. The names of the fields are keys of the checkpoint.

    Attributes:
        micro_batch: images per forward pass; lowered when memory runs out.
        epoch: the current one, from 0.
        batch: the next one of the epoch.
        step: steps done or skipped so far.
        rate_scale: factor of the learning rate, halved whenever the run goes back to a checkpoint.
        went_back: how often it did.
        skipped: steps skipped so far.
        in_a_row: steps skipped since the last one that was done.
        best_score, best_epoch: of the evaluations; -1 for none.
        waited: evaluated epochs since then.
        finished: why the run is over, or "".
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

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over the fields of a checkpoint."""
        for key, value in saved.items():
            setattr(self, key, dict(value) if isinstance(value, dict) else value)

    def record_step(self, result: StepDone | StepSkipped) -> None:
        """Add the losses of a step to the epoch's; a skipped step adds the names of its terms only."""
        done = isinstance(result, StepDone)
        for name, value in result.terms.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + (value if done else 0.0)
        if done:
            self.loss_steps += 1
        else:
            self.skipped += 1

    def record_score(self, score: float) -> bool:
        """Record the score of the current epoch, -1 for none; return whether its model is the best so far."""
        better = score > self.best_score
        # If no epoch has a score, the newest model is the best, because it has learned longest.
        improved = better or score == self.best_score == -1.0
        self.waited = 0 if better else self.waited + 1
        if improved:
            self.best_score, self.best_epoch = score, self.epoch
        return improved

    def mean_terms(self) -> dict[str, float]:
        """Return the mean of each loss term over the epoch's steps; NaN if all were skipped.

        The terms are named even then, so that `metrics.csv` has the same columns in every epoch.
        """
        steps = self.loss_steps or float("nan")
        return {name: total / steps for name, total in self.loss_sums.items()}

    def start_next_epoch(self) -> None:
        """Move on to the first batch of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sums, self.loss_steps = {}, 0


@dataclass(frozen=True, slots=True)
class Learner:
    """Everything that learns, on its device.

    Attributes:
        model: in training mode except for its frozen norms.
        average: the moving average, which is evaluated and deployed.
        optimizer: AdamW with clipping, loss scale and the skipping of non-finite steps.
        criterion: the losses.
        spec: for the denoising group.
        device: where all of it lies.
        autocast: type of the network's arithmetic, or None for float32.
        norms: running statistics, to undo a forward pass.
        processes: those that make the same steps.
        norm_sync: the norms that average over all processes, or None.
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

    def with_synchronized_norms(self) -> Learner:
        """Return a learner whose norms average over all processes; the model is changed in place.

        Finding the micro-batch that fits comes before, since each process does that on its own.
        """
        return replace(self, norm_sync=synchronize_norms(self.model, self.processes))

    def train_mode(self) -> None:
        """Switch to training; norms whose parameters are all frozen keep their statistics."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                parameters = list(module.parameters(recurse=False))
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return all tensors, under the keys of the checkpoint."""
        return {
            "model": dict(self.model.state_dict()),
            "average": dict(self.average.module.state_dict()),
            "stepper": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, in place."""
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["stepper"])


# ---- checkpoints ------------------------------------------------------------------------------------------------


def snapshot(learner: Learner, progress: Progress, identity: Mapping[str, Any], metrics_offset: int) -> dict[str, Any]:
    """Return the content of a checkpoint."""
    return {
        "identity": dict(identity),
        "place": asdict(progress),
        "learner": learner.state_dict(),
        "generators": _generator_states(),
        "metrics_offset": metrics_offset,
    }


def restore(learner: Learner, progress: Progress, state: Mapping[str, Any], folder: RunFolder | None) -> None:
    """Load a checkpoint, and remove the rows of `metrics.csv` written since, if a folder is given."""
    learner.load_state_dict(state["learner"])
    progress.load(state["place"])
    _set_generator_states(state["generators"])
    if folder is not None:
        folder.truncate_metrics(state["metrics_offset"])


def _generator_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def _set_generator_states(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    name, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))
    version, state, gauss_next = saved["python"]
    random.setstate((version, tuple(state), gauss_next))

"""What learns and where a run stands: all that a checkpoint holds for a killed run to continue bit for bit."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rtdetr_cli import documents as doc
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.config.settings import MAX_BATCH
from rtdetr_cli.errors import ModelError, RtdetrError
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train.checkpoint import load_checkpoint, save_checkpoint
from rtdetr_cli.train.events import CheckpointSaved, RolledBack, StepDone, StepSkipped
from rtdetr_cli.train.guard import EVIDENCE_FOLDER
from rtdetr_cli.train.optim import FusedOptimizer, MovingAverage, NormStatistics
from rtdetr_cli.train.processes import SINGLE_PROCESS, ProcessGroup
from rtdetr_cli.train.sync_norm import NormSync

MAX_ROLLBACKS = 3


_count = doc.integer(0, 1 << 50)
_COUNT, _NUMBER = {"read": _count}, {"read": doc.number}


@dataclass(slots=True)
class Progress:
    """Where a run stands. The fields are those of a checkpoint; `read` checks what one says."""

    micro_batch: int = field(default=1, metadata={"read": doc.integer(1, MAX_BATCH)})  # lowered when memory runs out
    epoch: int = field(default=0, metadata=_COUNT)
    batch: int = field(default=0, metadata=_COUNT)  # the next one of the epoch
    step: int = field(default=0, metadata=_COUNT)  # steps done or skipped so far
    rate_scale: float = field(default=1.0, metadata=_NUMBER)  # of the learning rate, halved at each rollback
    went_back: int = field(default=0, metadata=_COUNT)  # rollbacks so far
    skipped: int = field(default=0, metadata=_COUNT)  # steps skipped so far
    in_a_row: int = field(default=0, metadata=_COUNT)  # steps skipped since the last one that was done
    best_score: float = field(default=-1.0, metadata=_NUMBER)
    best_epoch: int = field(default=-1, metadata={"read": doc.integer(-1, 1 << 50)})
    waited: int = field(default=0, metadata=_COUNT)  # evaluated epochs since the best one
    finished: str = field(default="", metadata={"read": doc.string})  # why the run is over
    loss_sums: dict[str, float] = field(default_factory=dict, metadata={"read": doc.table(doc.number)})  # of the epoch
    loss_steps: int = field(default=0, metadata=_COUNT)

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
    """Everything that learns, on its device."""

    model: RTDETR
    average: MovingAverage  # evaluated and deployed
    optimizer: FusedOptimizer
    spec: ModelSpec
    device: torch.device
    autocast: torch.dtype | None  # None for float32
    norms: NormStatistics
    processes: ProcessGroup = SINGLE_PROCESS
    norm_sync: NormSync | None = None  # of the norms that average over all processes

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


@dataclass
class Checkpoints:
    """Saves the state of a run, and takes the run back to it; only the main process writes.

    `identity` holds settings and dataset that a resumed run must match. `began` is when the run began, in the seconds
    of `time.monotonic`; for a resumed run, when it would have begun without the pause.
    """

    learner: Learner
    progress: Progress
    folder: RunFolder
    identity: Mapping[str, Any]
    began: float

    def __post_init__(self) -> None:
        self.saved_at = time.monotonic()
        # A checkpoint written after a skipped step is no state to go back to: the next save replaces it.
        self._saved_after_skipped_step = self.progress.in_a_row > 0

    def save(self, reason: str) -> CheckpointSaved:
        """Write `last.ckpt`, and keep the checkpoint before it.

        Raises:
            RtdetrError: the disk is full or the folder cannot be written.
        """
        progress = self.progress
        if self.learner.processes.is_main:
            state = {
                "identity": dict(self.identity),
                "place": asdict(progress),
                "learner": self.learner.state_dict(),
                "generators": _generator_states(),
                "metrics_offset": self.folder.metrics_offset(),
                "seconds": time.monotonic() - self.began,
            }
            save_checkpoint(self.folder.path, state, keep_previous=self._saved_after_skipped_step)
        self._saved_after_skipped_step = progress.in_a_row > 0
        self.saved_at = time.monotonic()
        return CheckpointSaved(self.folder.checkpoint, reason, progress.epoch, progress.step)

    def roll_back(self, skipped_in_a_row: int) -> RolledBack:
        """Go back to the last checkpoint whose steps were finite, with half the learning rate.

        Raises:
            RtdetrError: the run has gone back too often: it diverges.
        """
        progress, processes = self.progress, self.learner.processes
        before = replace(progress)
        if before.went_back >= MAX_ROLLBACKS:
            raise RtdetrError(
                f"training diverged: {skipped_in_a_row} steps in a row were not finite, after {MAX_ROLLBACKS} returns "
                f"to a checkpoint and with the learning rate at {before.rate_scale:.3g} of the planned one",
                hint=f"use a lower --lr or --precision fp32; the batches are in {self.folder.path / EVIDENCE_FOLDER}",
                code="diverged",
            )
        state = load_checkpoint(self.folder.path, after_finite_step=True)[0] if processes.is_main else None
        restore(self.learner, progress, processes.broadcast_state(state), self.folder if processes.is_main else None)
        progress.rate_scale = before.rate_scale / 2
        progress.went_back = before.went_back + 1
        progress.in_a_row = 0
        progress.best_score, progress.best_epoch = max(
            (before.best_score, before.best_epoch), (progress.best_score, progress.best_epoch)
        )
        return RolledBack(before.step, progress.step, progress.rate_scale)


def restore(learner: Learner, progress: Progress, state: Mapping[str, Any], folder: RunFolder | None) -> float:
    """Load a checkpoint, and remove the rows of `metrics.csv` written since, if a folder is given.

    Returns:
        The seconds that the run had taken; earlier versions did not write them.

    Raises:
        ModelError: it is not the state of such a run.
    """
    try:
        learner.load_state_dict(state["learner"])
        readers = {f.name: f.metadata["read"] for f in fields(Progress)}
        for key, value in doc.read_fields(state["place"], readers, required=tuple(readers)).items():
            setattr(progress, key, value)
        _set_generators(state["generators"])
        offset = _count(state["metrics_offset"])
        seconds = doc.number(state.get("seconds", 0.0))
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        where = f"the checkpoint in {folder.path}" if folder is not None else "the checkpoint"
        again = "rtdetr train --weights RUN --data DATA starts a new run from its best model"
        raise ModelError(
            f"{where} does not hold the state of this run: {' '.join(str(error).split())[:200]}",
            hint=again.replace("RUN", str(folder.path)) if folder is not None else "",
            code="checkpoint-foreign",
        ) from error
    if folder is not None:
        folder.truncate_metrics(offset)
    return seconds


def _set_generators(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    version, words, gauss_next = saved["python"]
    random.setstate((version, tuple(words), gauss_next))


def _generator_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }

"""Measuring a model while it trains, on one process or several."""

from __future__ import annotations

import math
import time

import numpy as np
from torch import nn

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.classes import ClassMap, map_classes
from rtdetr_cli.evaluate.run import Detected, Evaluation, conclude, detect
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train import memory
from rtdetr_cli.train.state import Progress
from rtdetr_cli.train.stop import EvaluationStopped, StopFlag
from rtdetr_cli.workflows.prepare import Prepared

MOST_AT_ONCE = 16


class Evaluator:
    """Measures a model on the val split, in float32: the figures that `rtdetr eval` gives for the same weights.

    Each process looks at its share of the images; the first judges all that was found, once.
    """

    def __init__(self, prepared: Prepared, progress: Progress, stop: StopFlag) -> None:
        self.prepared = prepared
        self.progress = progress
        self.most = MOST_AT_ONCE
        self.stop = stop
        self.last: Evaluation | None = None  # the first process's

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        """Return the twelve numbers.

        Raises:
            EvaluationStopped: a signal came, to whichever process.
        """
        assert isinstance(model, RTDETR)
        prepared, processes = self.prepared, self.prepared.processes
        began = time.monotonic()
        classes = map_classes(prepared.header.names, prepared.val_set)
        mine = np.arange(processes.rank, len(prepared.val_set), processes.size)
        backend = TorchBackend(model, prepared.header, device=prepared.learner.device)
        found = self._detect(backend, prepared.val_set.subset(mine), classes)
        if processes.any(found is None):
            raise EvaluationStopped
        parts = processes.gather((mine, found))
        metrics: dict[str, float | None] = {}
        if processes.is_main:
            took = time.monotonic() - began
            self.last = conclude(prepared.val_set, Detected.join(parts), classes, seconds=took)
            metrics = dict(self.last.metrics)
        told: dict[str, float | None] = processes.broadcast(metrics)
        return told

    def _detect(self, backend: TorchBackend, share: Dataset, classes: ClassMap) -> Detected | None:
        """Return what is found in a share; None when a signal came."""
        while True:
            # Of the run's own place, not of this process: how many there are at once may change the last bits.
            batch = max(1, min(self.most, self.progress.micro_batch))
            try:
                return detect(backend, share, batch=batch, progress=self._watch, label_map=classes.labels)
            except EvaluationStopped:
                return None
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
            memory.release(self.prepared.learner.device)
            self.most = memory.halve(batch, where=str(self.prepared.learner.device))

    def _watch(self, done: int) -> None:
        if self.stop:
            raise EvaluationStopped


def explain_overfit(prepared: Prepared, score: float) -> str:
    """Say why a model could not learn a few images by heart; empty if it could."""
    if score > 0.9:
        return ""
    boxes = prepared.val_set.boxes_xyxy_px
    reasons = []
    counts = np.diff(prepared.val_set.offsets)
    queries = prepared.config.preset.model.queries
    if len(counts) and counts.max() > queries:
        reasons.append(f"an image has {counts.max()} boxes and the model {queries} queries")
    height, width = prepared.config.imgsz
    if len(boxes):
        images = np.repeat(np.arange(len(counts)), counts)
        scale = np.array([width, height]) / prepared.val_set.sizes_wh[images]
        sides = ((boxes[:, 2:] - boxes[:, :2]) * scale).min(1)
        small = float((sides < 8).mean())
        if small > 0.1:
            reasons.append(f"{small:.0%} of the boxes are under 8 pixels at {height}x{width}: a larger --imgsz")
        keys = np.concatenate([images[:, None], boxes.round(1)], 1)
        unique = len(np.unique(keys, axis=0))
        if unique < len(boxes):
            reasons.append(f"{len(boxes) - unique} boxes lie exactly on another one")
    steps = prepared.plan.total_steps
    if steps < 1000:
        reasons.append(
            f"{steps} steps are few to learn by heart: --epochs {math.ceil(1000 / prepared.plan.steps_per_epoch)}"
        )
    if prepared.config.settings.freeze in ("backbone", "encoder"):
        reasons.append(f"--freeze {prepared.config.settings.freeze} leaves little that can learn")
    return "; ".join(reasons) or "the rate may not suit these images: try --lr twice as high or half"

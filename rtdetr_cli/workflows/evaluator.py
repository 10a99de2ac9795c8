"""Evaluating a model while it trains, in one process or several."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import nn

from rtdetr_cli.batches.examples import ExampleLoader
from rtdetr_cli.batches.loader import Batch, TrainLoader
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.classes import map_classes
from rtdetr_cli.evaluate.run import Evaluation, SplitDetections, detect, evaluate_detections
from rtdetr_cli.images.augment import NONE
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.text import counted
from rtdetr_cli.train import memory
from rtdetr_cli.train.events import SAMPLE_LOSSES
from rtdetr_cli.train.losses import compute_losses
from rtdetr_cli.train.state import Progress
from rtdetr_cli.train.step import move_targets, to_input
from rtdetr_cli.train.stop import EvaluationStopped, StopFlag
from rtdetr_cli.workflows.prepare import Prepared

MAX_BATCH = 16
OVERFIT_AP = 0.9
FEW_STEPS = 1000
SMALL_PX = 8
# Images of the fixed samples: enough to see a trend, and a small share of an epoch's, so that they cost little time.
MIN_SAMPLE, MAX_SAMPLE, SAMPLE_SHARE = 8, 32, 0.1


class Evaluator:
    """Evaluates a model on the val split in float32, as `rtdetr eval` does for the same weights.

    Each process runs the network on its share of the images; the main process computes the metrics of all.
    """

    def __init__(self, prepared: Prepared, progress: Progress, stop: StopFlag) -> None:
        self.prepared = prepared
        self.progress = progress
        self.max_batch = MAX_BATCH
        self.stop = stop
        self._samples: tuple[Batch, ...] = ()

    def __call__(self, model: nn.Module) -> tuple[dict[str, float | None], Evaluation | None]:
        """Return the COCO metrics and, in the main process, the evaluation behind them.

        Raises:
            EvaluationStopped: one of the processes received a signal.
        """
        assert isinstance(model, RTDETR)
        prepared, processes = self.prepared, self.prepared.processes
        began = time.monotonic()
        classes = map_classes(prepared.header.names, prepared.val_set)
        share = np.arange(processes.rank, len(prepared.val_set), processes.size)
        backend = TorchBackend(model, prepared.header, device=prepared.learner.device)
        detected = self._detect(backend, prepared.val_set.subset(share))
        if any(processes.all_gather(detected is None)):
            raise EvaluationStopped
        parts = processes.all_gather((share, detected))
        evaluation: Evaluation | None = None
        metrics: dict[str, float | None] = {}
        if processes.is_main:
            seconds = time.monotonic() - began
            evaluation = evaluate_detections(prepared.val_set, SplitDetections.join(parts), classes, seconds=seconds)
            metrics = evaluation.metrics | self._sample_losses(model)
        metrics = processes.broadcast(metrics)
        return metrics, evaluation

    def _detect(self, backend: TorchBackend, share: Dataset) -> SplitDetections | None:
        """Return the detections in a share of the images; None if a signal came."""
        device = self.prepared.learner.device
        while True:
            batch = self._batch
            try:
                return detect(backend, share, batch=batch, progress=self._check_stop)
            except EvaluationStopped:
                return None
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
            torch.cuda.empty_cache()  # does nothing without CUDA
            self.max_batch = memory.halve(batch, where=str(device))

    @property
    def _batch(self) -> int:
        """Images per forward pass. It may change the last bits: it comes from the run's progress, not this process."""
        return max(1, min(self.max_batch, self.progress.micro_batch))

    @torch.inference_mode()
    def _sample_losses(self, model: RTDETR) -> dict[str, float | None]:
        """Return the loss of the last layer on a fixed sample of the training and of the val images.

        Without augmentation, so the two can be compared. None with `--overfit`, where both would be the same images.
        """
        prepared = self.prepared
        if prepared.config.settings.overfit:
            return dict.fromkeys(SAMPLE_LOSSES)
        if not self._samples:
            self._samples = tuple(self._sample(dataset) for dataset in (prepared.train_set, prepared.val_set))
        model.eval()
        losses: list[float | None] = []
        for batch in self._samples:
            boxes, labels = move_targets(prepared.learner.device, batch)
            count, total = sum(len(one) for one in labels), 0.0
            for part in memory.micro_batches(len(labels), self._batch):
                images = batch.images[part].to(prepared.learner.device)
                outputs = model(to_input(images, prepared.config.imgsz))
                total += float(sum(compute_losses(outputs, boxes[part], labels[part], num_boxes=count).values()))
            losses.append(total)
        return dict(zip(SAMPLE_LOSSES, losses, strict=True))

    def _sample(self, dataset: Dataset) -> Batch:
        """Load images that are spread evenly over a dataset, as the network sees them at inference."""
        share = math.ceil(SAMPLE_SHARE * len(self.prepared.train_set))
        count = min(len(dataset), MAX_SAMPLE, max(MIN_SAMPLE, share))
        chosen = dataset.subset(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
        imgsz = self.prepared.config.imgsz
        examples = ExampleLoader(dataset=chosen, imgsz=imgsz, batch_size=count, seed=0, augmentation=NONE)
        with TrainLoader(examples, workers=0) as loader:
            return next(iter(loader.epoch(0)))

    def _check_stop(self, done: int) -> None:
        if self.stop:
            raise EvaluationStopped


def explain_overfit(prepared: Prepared, ap: float) -> str:
    """Return why a model could not overfit a few images; empty if it could."""
    if ap > OVERFIT_AP:
        return ""
    config, plan, val_set = prepared.config, prepared.plan, prepared.val_set
    reasons = []
    counts, queries = np.diff(val_set.offsets), config.preset.model.queries
    if len(counts) and counts.max() > queries:
        reasons.append(f"an image has {counts.max()} boxes, but the model has only {queries} queries")
    height, width = config.imgsz
    boxes = val_set.boxes_xyxy_px
    if len(boxes):
        images = np.repeat(np.arange(len(counts)), counts)
        scale = np.array([width, height]) / val_set.sizes_wh[images]
        small = float((((boxes[:, 2:] - boxes[:, :2]) * scale).min(1) < SMALL_PX).mean())
        if small > 0.1:
            reasons.append(
                f"{small:.0%} of the boxes are smaller than {SMALL_PX} pixels at {height}x{width} "
                "(a larger --imgsz helps)"
            )
        distinct = len(np.unique(np.concatenate([images[:, None], boxes.round(1)], 1), axis=0))
        if distinct < len(boxes):
            reasons.append(f"the annotations contain {counted(len(boxes) - distinct, 'duplicate box')}")
    if plan.total_steps < FEW_STEPS:
        epochs = math.ceil(FEW_STEPS / plan.steps_per_epoch)
        reasons.append(f"{counted(plan.total_steps, 'step')}: too few to overfit (try --epochs {epochs})")
    if config.settings.freeze in ("backbone", "encoder"):
        reasons.append(f"--freeze {config.settings.freeze} leaves few parameters to train")
    return "; ".join(reasons) or "the learning rate may not suit these images (try --lr twice as high, or half)"

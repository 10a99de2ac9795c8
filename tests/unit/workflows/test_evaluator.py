"""Evaluation during training: shares of the images give the same metrics, and running out of memory is handled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.classes import map_classes
from rtdetr_cli.evaluate.run import SplitDetections, detect, evaluate, evaluate_detections
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train.processes import SINGLE_PROCESS
from rtdetr_cli.train.state import Progress
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows import evaluator as module
from rtdetr_cli.workflows.evaluator import Evaluator


@pytest.fixture(scope="module")
def val(shapes_val: Dataset) -> Dataset:
    return shapes_val


@pytest.fixture(scope="module")
def loaded(shapes_model: Path) -> tuple[RTDETR, ModelHeader]:
    model, header = load_model(shapes_model)
    return model, header.with_dedupe(0.0)  # AP during training is without rescoring


@pytest.mark.parametrize("size", [2, 3, 100])
def test_shares_of_the_images_give_equal_metrics(val: Dataset, loaded: tuple[RTDETR, ModelHeader], size: int) -> None:
    """Also where some processes have no image at all."""
    model, header = loaded
    classes = map_classes(header.names, val)
    backend = TorchBackend(model, header, device=torch.device("cpu"))
    parts = []
    for rank in range(size):
        mine = np.arange(rank, len(val), size)
        parts.append((mine, detect(backend, val.subset(mine), batch=1)))
    joined = evaluate_detections(val, SplitDetections.join(parts), classes, seconds=1.0)
    whole = evaluate(backend, val, batch=1)
    assert whole.metrics["AP"] is not None
    assert whole.metrics["AP"] > 0.3, "figures of nothing would all be equal"
    assert joined.metrics == whole.metrics
    assert joined.per_class == whole.per_class


def test_out_of_memory_halves_the_evaluation_batch(
    val: Dataset, loaded: tuple[RTDETR, ModelHeader], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, header = loaded
    learner = SimpleNamespace(device=torch.device("cpu"))
    config = SimpleNamespace(settings=SimpleNamespace(overfit=0), imgsz=header.imgsz)
    prepared: Any = SimpleNamespace(
        processes=SINGLE_PROCESS, header=header, train_set=val, val_set=val, learner=learner, config=config
    )
    expected, evaluation = Evaluator(prepared, Progress(micro_batch=2), StopFlag())(model)
    seen: list[int] = []

    def full(*words: Any, batch: int, **others: Any) -> SplitDetections:
        seen.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return detect(*words, batch=batch, **others)

    monkeypatch.setattr(module, "detect", full)
    measure = Evaluator(prepared, Progress(micro_batch=8), StopFlag())
    assert expected == evaluation.metrics | {name: expected[name] for name in ("train_loss", "val_loss")}
    assert expected["train_loss"] == expected["val_loss"] > 0, "here both are the same images"
    assert measure(model)[0] == pytest.approx(expected)
    assert seen == [8, 4, 2]
    measure(model)
    assert seen == [8, 4, 2, 2], "the batch that fits is remembered"

"""Before training every image is checked, if that is cheap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.workflows import image_check


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return generate_dataset(tmp_path / "data", train=6, val=2, imgsz=64)


@pytest.fixture
def check(data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Any]:
    def run(decoding: float, forward: float) -> Any:
        costs = [decoding, forward]
        monkeypatch.setattr(image_check, "timeit", lambda work, number: costs.pop(0))
        train = load_splits(data).train
        assert train is not None
        config = resolve_run({"data": str(data), "preset": "tiny", "imgsz": 64})
        model = build_detector(config.preset.model, num_classes=5)
        return image_check.check_images_if_cheap(config, train, model, torch.device("cpu"))

    return run


def truncate(data: Path) -> None:
    image = sorted((data / "images").rglob("train*"))[0]
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])


def test_a_truncated_image_is_refused_before_training(data: Path, check: Any) -> None:
    truncate(data)
    with pytest.raises(DataError, match="train"):
        check(0.0, 1.0)


def test_an_expensive_check_is_skipped(data: Path, check: Any) -> None:
    truncate(data)
    assert check(0.31, 1.0) is None


def test_the_limit_is_a_tenth_of_an_epoch(check: Any) -> None:
    found = check(0.29, 1.0)
    assert found is not None
    assert all(f.severity != "error" for f in found)


def test_train_refuses_a_truncated_image(data: Path, rtdetr: Any, tmp_path: Path) -> None:
    truncate(data)
    ran = rtdetr("train", "--preset", "tiny", "--data", data, "--out", tmp_path / "runs", "--imgsz", 320, code=3)
    assert "rtdetr validate" in ran.err
    assert not (tmp_path / "runs").exists()

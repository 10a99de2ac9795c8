"""A very small dataset and a very small detector, so that whole runs take a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    "model.width=8",
    "model.hidden_dim=16",
    "model.encoder_ffn=16",
    "model.heads=2",
    "model.decoder_dim=16",
    "model.decoder_ffn=16",
    "model.decoder_layers=2",
    "model.eval_layers=2",
    "model.num_points=[1,1,1]",
    "model.queries=12",
    "model.denoising=8",
)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty training images and four held out, 64 pixels wide."""
    from rtdetr_cli.datasets.generate import generate_dataset

    return generate_dataset(tmp_path_factory.mktemp("small") / "shapes", train=20, val=4, imgsz=64)


@pytest.fixture
def small_run(small_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that resolves the settings of a small run; keywords are flags, words are `--set`."""
    from rtdetr_cli.config.run import RunConfig, resolve_run

    def make(*sets: str, **flags: Any) -> RunConfig:
        small: dict[str, Any] = {
            "preset": "tiny",
            "data": str(small_data),
            "imgsz": (64, 64),
            "effective_batch": 8,
            "batch": 8,
            "epochs": 2,
            "workers": 0,
            "device": "cpu",
            "precision": "fp32",
            "out": str(tmp_path / "runs"),
        }
        return resolve_run(small | flags, sets=[*SMALL, "plots=false", *sets])

    return make

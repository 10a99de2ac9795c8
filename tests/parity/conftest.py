from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def deterministic(parity: Path, load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The script that generates the reference weights and image."""
    return load_module(parity / "deterministic.py")


@pytest.fixture(scope="session")
def checkpoint(
    parity: Path, deterministic: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Make a deterministic checkpoint in the published layout, once."""
    folder = tmp_path_factory.mktemp("published")

    def make(name: str) -> Path:
        path: Path = folder / f"{name}.pth"
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # the script does not close its file
                state = deterministic.state_dict(parity / "keys" / f"{name}.txt")
            torch.save({"date": "2024", "last_epoch": 0, "ema": {"module": state, "updates": 1}}, path)
        return path

    return make


@pytest.fixture(scope="session")
def stretched(deterministic: ModuleType) -> Callable[[int, int, int], torch.Tensor]:
    """Return columns [begin, end) of the reference image as (3, side, side) float64 in 0 to 1."""

    def make(begin: int, end: int, side: int) -> torch.Tensor:
        image = Image.fromarray(deterministic.make_image()[:, begin:end])
        small = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
        return torch.from_numpy(small).permute(2, 0, 1).double() / 255

    return make


@pytest.fixture(scope="session")
def training(parity: Path) -> Callable[[str], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Read the reference losses, gradients and denoising group of a model."""

    def read(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        with np.load(parity / f"{name}_training.npz") as group:
            arrays = {key: group[key] for key in group}
        return json.loads((parity / f"{name}_training.json").read_text()), arrays

    return read

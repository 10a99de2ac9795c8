"""What the tests of several commands share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def images(shapes_data: Path) -> Path:
    """A folder with the 16 images that the small detector knows, and `shapes.json`."""
    return shapes_data.parent


@pytest.fixture
def model(shapes_model: Path, tmp_path: Path) -> Path:
    """A copy of the small trained detector, to export."""
    return Path(shutil.copy(shapes_model, tmp_path / "best.safetensors"))


@pytest.fixture
def traced(foreign_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse a traced float32 graph, since tracing takes seconds."""
    import onnx

    monkeypatch.setattr("rtdetr_cli.export.onnx.trace", lambda *args, **options: onnx.load(foreign_onnx))


@pytest.fixture(scope="session")
def write_untrained() -> Callable[..., Path]:
    """Return a function that writes a `tiny` of random weights with the classes of a dataset."""

    def write(path: Path, data: Path, imgsz: tuple[int, int], **header: Any) -> Path:
        import torch

        from rtdetr_cli.checks.load import load_splits
        from rtdetr_cli.config.presets import load_preset
        from rtdetr_cli.model.build import build_detector
        from rtdetr_cli.weights.load import save_model
        from tests.models import header_of

        splits, spec = load_splits(data), load_preset("tiny").model
        torch.manual_seed(0)
        model = build_detector(spec, num_classes=len(splits.categories))
        facts = {
            "category_ids": tuple(category.id for category in splits.categories),
            "dataset": {"name": splits.name, "fingerprint": splits.fingerprint},
        }
        names = tuple(category.name for category in splits.categories)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(path, model.state_dict(), header_of(spec, names, imgsz=imgsz, **facts, **header))
        return path

    return write

"""A long run takes no more memory, open files or space in its folder at its end than near its beginning."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.train.events import EpochDone
from rtdetr_cli.workflows.finetune import finetune
from tests.small import SETS

EPOCHS = int(os.environ.get("RTDETR_SOAK_EPOCHS", "300"))


def measure(folder: Path) -> tuple[float, int, float, int]:
    """Return memory in MB, open files, and the size of the run in MB without its growing texts, with its files."""
    process = psutil.Process()
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if path.suffix not in (".csv", ".log"))
    return process.memory_info().rss / 1e6, process.num_fds(), size / 1e6, len(files)


@pytest.mark.slow
def test_some_hundred_epochs_leave_memory_handles_and_disk_flat(tmp_path: Path) -> None:
    data = generate_dataset(tmp_path / "data", train=8, val=2, imgsz=64)
    flags = {"data": str(data), "out": str(tmp_path / "runs"), "name": "r", "preset": "tiny", "weights": "none"}
    flags |= {"imgsz": (64, 64), "epochs": EPOCHS, "effective_batch": 4, "batch": 4, "workers": 0, "device": "cpu"}
    config = resolve_run(flags, sets=[*SETS, "plots=true"])
    curve = []
    for event in finetune(config):
        if isinstance(event, EpochDone):
            curve.append(measure(tmp_path / "runs/r"))
    assert len(curve) == EPOCHS
    for epoch in range(0, EPOCHS, max(1, EPOCHS // 10)):
        print("epoch {}: {:.1f} MB, {} open files, {:.2f} MB in {} files".format(epoch + 1, *curve[epoch]))
    early, late = curve[EPOCHS // 5 : 2 * EPOCHS // 5], curve[-EPOCHS // 5 :]
    for column, allowed in ((0, 20), (1, 0), (2, 0.1), (3, 0)):
        before, after = max(row[column] for row in early), max(row[column] for row in late)
        assert after <= before + allowed, (column, before, after)

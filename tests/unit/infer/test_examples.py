"""The examples that use the Python API run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def test_predict_folder(shapes_onnx: Path, shapes_data: Path, tmp_path: Path) -> None:
    script = REPOSITORY / "examples/predict_folder.py"
    assert len(script.read_text().splitlines()) < 60
    ran = subprocess.run(
        [sys.executable, script, shapes_onnx, shapes_data.parent, "--class-name", "leaf", "--out", tmp_path / "crops"],
        capture_output=True,
        text=True,
        check=True,
    )
    counted = sum(int(line.split()[1]) for line in ran.stdout.splitlines())
    assert counted == len(list((tmp_path / "crops").glob("*.png"))) > 0

"""The examples that use the Python API."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def test_predict_folder(shapes_onnx: Path, shapes_data: Path, tmp_path: Path) -> None:
    script = REPOSITORY / "examples/predict_folder.py"
    assert len(script.read_text().splitlines()) < 60
    words = [shapes_onnx, shapes_data.parent, "--class-name", "leaf", "--out", tmp_path / "crops"]
    ran = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True)
    counted = sum(int(line.split()[1]) for line in ran.stdout.splitlines())
    assert counted == len(list((tmp_path / "crops").glob("*.png"))) > 0


def test_predict_folder_continues_after_an_unreadable_image(
    shapes_onnx: Path, shapes_data: Path, tmp_path: Path
) -> None:
    script = REPOSITORY / "examples/predict_folder.py"
    folder = tmp_path / "in"
    folder.mkdir()
    good = (shapes_data.parent / "shapes_00.png").read_bytes()
    for name, content in (("a.png", good), ("b.png", good[:200]), ("c.png", good)):
        (folder / name).write_bytes(content)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        given = [sys.executable, script, *words, "--out", tmp_path / "crops"]
        return subprocess.run(list(map(str, given)), capture_output=True, text=True, check=False)

    ran = run(shapes_onnx, folder, "--class-name", "leaf")
    assert ran.returncode == 1
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == ["a.png", "c.png"]
    assert "b.png" in ran.stderr
    for words, message in (
        ((shapes_onnx, folder, "--class-name", "leave"), "did you mean leaf"),
        ((tmp_path / "gone.onnx", folder, "--class-name", "leaf"), "does not exist"),
        ((shapes_onnx, tmp_path / "gone", "--class-name", "leaf"), "is not a folder"),
        ((), "usage:"),
    ):
        ran = run(*words)
        assert ran.returncode in (1, 2)
        assert message in ran.stderr
        assert "Traceback" not in ran.stderr

"""`rtdetr export --int8` and `--bundle` as users type them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.export import bundle, compare
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.options import BUNDLE_FILES
from rtdetr_cli.infer.onnx_backend import OnnxBackend
from rtdetr_cli.infer.timing import PARTS, Spread

pytestmark = pytest.mark.usefixtures("traced")

PROGRAM = """
import runpy, sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "rtdetr_cli", "cv2", "scipy", "onnx"]))
program, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(program, run_name="__main__")
"""


@pytest.fixture
def calibration(shapes_data: Path, tmp_path: Path) -> Path:
    """A folder of images that are not verified on."""
    folder = tmp_path / "calibration"
    folder.mkdir()
    for image in sorted(shapes_data.parent.glob("*.png"))[:3]:
        shutil.copy(image, folder)
    return folder


def run_program(folder: Path, *words: object) -> list[tuple[str, int, float, list[float]]]:
    """Run the program of a bundle without torch and rtdetr_cli."""
    command = [sys.executable, "-c", PROGRAM, folder / "detect.py", *words]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd="/")
    assert ran.returncode == 0, ran.stderr
    lines = [re.fullmatch(r"(\w+) \((\d+)\) (\S+) \[(.*)\]", line) for line in ran.stdout.splitlines()]
    return [(m[1], int(m[2]), float(m[3]), [float(v) for v in m[4].split(",")]) for m in lines if m]


def test_a_bundle_detects_what_predict_detects(
    rtdetr: Any, model: Path, shapes_data: Path, calibration: Path, tmp_path: Path
) -> None:
    """The INT8 file is preferred; thresholds can be edited; another export may replace the bundle."""
    folder = tmp_path / "deployed"
    words = ["export", model, "--dynamic", "--verify", shapes_data, "--device", "cpu", "--bundle", folder]
    words += ["--tol-ap", 0.1]  # on 16 images one box is several hundredths of AP
    ran = rtdetr(*words, "--int8", "--calibration", calibration, "--json", code=0)
    assert [a["precision"] for a in ran.json["artefacts"]] == ["fp32", "int8"]
    assert ran.json["bundle"] == str(folder)
    assert "calibrated on 3 images only" in ran.err
    assert "32 are enough" in ran.err
    assert sorted(path.name for path in folder.iterdir()) == sorted(BUNDLE_FILES)
    assert (folder / "model.onnx").read_bytes() == (model.parent / "export/best-int8.onnx").read_bytes()
    readme = (folder / "README.md").read_text()
    assert re.search(r"\d\.\d ms from the image file to boxes", readme)
    assert "AP 0.877 ->" in readme

    image = sorted(shapes_data.parent.glob("*.png"))[2]
    predicted = rtdetr("predict", image, "--weights", folder / "model.onnx", "--no-save", "--json").json["detections"]
    found = run_program(folder, image)
    assert len(found) == len(predicted) > 0
    for (name, category, score, box), expected in zip(found, predicted, strict=True):
        assert (name, category) == (expected["label"], expected["category_id"])
        assert score == pytest.approx(expected["score"], abs=1e-3)
        assert box == pytest.approx(expected["box_xyxy"], abs=0.06)

    labels = json.loads((folder / "labels.json").read_text())
    labels["thresholds"]["per_class"] = [2] * len(labels["names"])
    (folder / "labels.json").write_text(json.dumps(labels))
    assert run_program(folder, image) == []

    command = [sys.executable, folder / "detect.py", folder / "README.md"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"{folder / 'README.md'} cannot be read: ")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("p90", [10.5, 20.0])
def test_an_unstable_latency_is_marked(shapes_onnx: Path, monkeypatch: pytest.MonkeyPatch, p90: float) -> None:
    times = dict.fromkeys(PARTS, Spread(10.0, p90))
    monkeypatch.setattr(bundle, "measure_steadily", lambda *_, **__: times)
    readme = bundle.describe(OnnxBackend(shapes_onnx, device="cpu"), Artefact(shapes_onnx, "onnx", "fp32"), None)
    assert "10.0 ms from the image file to boxes" in readme
    assert ("measure again on an idle machine" in readme) == (p90 == 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bundle", "{empty}", "--raw"], "--bundle and --raw cannot be combined"),
        (["--bundle", "{empty}", "--openvino"], "--bundle needs an ONNX file"),
        (["--bundle", "{full}"], "already holds other files: 1.png"),
        (["--bundle", "{full}/1.png"], "is a file, not a folder"),
        (["--keep-float", "backbone"], "--keep-float has no effect without --int8"),
        (["--keep-float", "neck", "--int8"], "there is no part 'neck'"),
        (["--calibration", "{full}"], "--calibration has no effect without --int8"),
        (["--int8"], "no images to calibrate INT8 on"),
        (["--int8", "--calibration", "{empty}"], "no images to calibrate INT8 on"),
        (["--int8", "--calibration", "{full}/gone"], "gone"),
        (["--int8", "--calibration-images", "0"], "--calibration-images"),
    ],
)
def test_refusals(rtdetr: Any, model: Path, tmp_path: Path, words: list[str], message: str) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/1.png").touch()
    folders = {"empty": tmp_path / "empty", "full": tmp_path / "full"}
    ran = rtdetr("export", model, "--no-gate", *(word.format(**folders) for word in words))
    assert ran.code in (2, 3), ran.err
    assert message in ran.err
    assert not (model.parent / "export").exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("nncf", "NNCF, which quantizes for OpenVINO, is not installed"),
        ("openvino", "OpenVINO is not installed"),
    ],
)
def test_a_missing_package_is_noticed_before_any_work(
    rtdetr: Any, model: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    if module == "nncf":
        pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setitem(sys.modules, module, None)
    ran = rtdetr("export", model, "--no-gate", "--openvino", "--int8", "--calibration", calibration, code=7)
    assert message in ran.err
    assert "pip install 'rtdetr-cli[openvino]'" in ran.err
    assert not (model.parent / "export").exists()


def test_a_failed_int8_file(
    rtdetr: Any,
    model: Path,
    shapes_data: Path,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 6; what costs most is named with the flag that keeps it in float; there is no bundle."""
    monkeypatch.setitem(compare.LIMITS, "int8", replace(compare.LIMITS["int8"], matched=1.5))
    words = ["--int8", "--calibration", calibration, "--keep-float", "encoder,decoder", "--bundle", tmp_path / "kit"]
    ran = rtdetr("export", model, "--dynamic", "--verify", shapes_data, "--device", "cpu", *words, code=6)
    assert "best-int8.failed.onnx: agreement:" in ran.err
    assert "--keep-float encoder,decoder,backbone" in ran.err
    assert "with the backbone in float32: AP 0.877, 1.000 matched" in ran.out
    assert (model.parent / "export/best.onnx").is_file()
    assert list((tmp_path / "kit").iterdir()) == []

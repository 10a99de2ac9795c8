"""`rtdetr predict`: which model is used, with which thresholds and classes, and what it advises."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rtdetr_cli.weights.header import read_header, rewrite_header


def test_several_boxes_on_one_object_are_explained(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path
) -> None:
    given = ("predict", images / "shapes_00.png", "-w", shapes_onnx, "--no-save")
    hint = re.search(
        r"hint: (\d+) of 100 boxes overlap one with a higher score .*--conf.*--classes", rtdetr(*given, "--conf", 0).err
    )
    assert hint
    assert int(hint[1]) > 10
    assert "overlap" not in rtdetr(*given).err


def test_classes_conf_and_number(rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path) -> None:
    def run(*options: object) -> list[dict[str, Any]]:
        ran = rtdetr("predict", images, "-w", shapes_onnx, "--no-save", "--json", *options, code=0)
        return [row for d in ran.documents for row in d["detections"]]

    everything = run("--conf", 0)
    assert len(everything) == 16 * 100
    assert len(run("--conf", 0, "--max-det", 7)) == 16 * 7
    assert {row["label"] for row in run("--conf", 0.05, "--classes", "plum,tomato")} == {"plum", "tomato"}
    assert {row["label"] for row in run("--conf", 0.05, "--classes", "plum", "--classes", "leaf")} == {"plum", "leaf"}
    assert all(row["score"] >= 0.3 for row in run("--conf", 0.3))


def test_a_hint_when_nothing_is_detected(
    rtdetr: Callable[..., Any],
    here: Path,
    shapes_onnx: Path,
    shapes_model: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ("predict", images, "-w", shapes_onnx, "--no-save")
    best = max(row["score"] for d in rtdetr(*given, "--conf", 0, "--json").documents for row in d["detections"])
    ran = rtdetr(*given, "--conf", 0.999, code=0)
    assert ran.err.count("hint:") == 1
    assert f"nothing was detected; the best score is {best:.3f}" in ran.err
    lower = re.search(r"--conf (\d\.\d+)", ran.err)
    assert lower
    assert 0 < float(lower[1]) <= best
    assert any(d["detections"] for d in rtdetr(*given, "--conf", lower[1], "--json").documents)
    assert "--calibrate" not in ran.err  # thresholds cannot be stored in an export
    ran = rtdetr("predict", images, "-w", shapes_model, "--no-save", "--conf", 0.999, "--json")
    assert "nothing was detected" in ran.err
    assert "--calibrate" not in ran.err  # it has thresholds, which --conf overrides
    assert "nothing was detected" not in rtdetr(*given).err
    shutil.copy(shapes_model, "plain.safetensors")
    rewrite_header(here / "plain.safetensors", replace(read_header(shapes_model), thresholds=None))
    ran = rtdetr("predict", images, "-w", "plain.safetensors", "--no-save", "--conf", 0.999, "--json")
    assert "rtdetr eval --calibrate f1" in ran.err
    Image.new("RGB", (64, 48)).save("black.png")
    black = ("predict", "black.png", "-w", shapes_onnx, "--no-save", "--classes", "plum")
    plum = rtdetr(*black, "--conf", 0, "--json").json["detections"][0]["score"]
    assert f"the best score is {plum:.3f}" in rtdetr(*black, "--conf", 1).err
    monkeypatch.setattr("rtdetr_cli.cli.predict.LOW_SCORE", 0.9)
    ran = rtdetr(*black, "--conf", 1)
    assert "check that the model fits these images" in ran.err
    assert "next: " not in ran.err
    assert "--conf 0" not in ran.err


def test_warning_about_thresholds_of_another_size(
    rtdetr: Callable[..., Any], here: Path, shapes_model: Path, images: Path
) -> None:
    (here / "runs/tiny-01").mkdir(parents=True)
    shutil.copy(shapes_model, here / "runs/tiny-01/best.safetensors")
    given = ("predict", images / "shapes_00.png", "-w", "runs/tiny-01", "--no-save")
    ran = rtdetr(*given)
    assert "model runs/tiny-01/best.safetensors  torch 96x128" in ran.err
    assert "warning" not in ran.err
    ran = rtdetr(*given, "--imgsz", "128x160")
    assert "calibrated at 96x128" in ran.err
    assert "--imgsz 128x160 --calibrate f1" in ran.err
    assert "warning" not in rtdetr(*given, "--imgsz", "128x160", "--conf", 0.5).err
    words = ("--data", images / "shapes.json", "--split", "val", "--imgsz", "128x160", "--calibrate", "f1")
    rtdetr("eval", "runs/tiny-01", *words, code=0)
    header = read_header(here / "runs/tiny-01/best.safetensors")
    assert header.thresholds.imgsz == (128, 160)
    assert "warning" not in rtdetr(*given, "--imgsz", "128x160").err
    assert "calibrated at 128x160" in rtdetr(*given).err
    rewrite_header(here / "runs/tiny-01/best.safetensors", replace(header, thresholds=None))
    assert "warning" not in rtdetr(*given, "--imgsz", "128x160").err


def test_newest_run_is_the_default(rtdetr: Callable[..., Any], here: Path, shapes_model: Path, images: Path) -> None:
    for number, name in enumerate(("r18-old-01", "tiny-shapes-01")):
        folder = here / "runs" / name
        folder.mkdir(parents=True)
        shutil.copy(shapes_model, folder / "best.safetensors")
        os.utime(folder / "best.safetensors", (1e9 + number, 1e9 + number))
    ran = rtdetr("predict", images / "shapes_00.png", "--no-save", code=0)
    assert "runs/tiny-shapes-01/best.safetensors" in ran.err
    assert ran.err.endswith("next: rtdetr export runs/tiny-shapes-01\n")
    assert rtdetr("predict", images / "shapes_00.png", "--weights", "runs/r18-old-01", "--no-save").code == 0


def test_no_run_and_no_network(
    rtdetr: Callable[..., Any], here: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDETR_CLI_HOME", str(here / "cache"))
    monkeypatch.setenv("RTDETR_CLI_MIRROR", "http://127.0.0.1:9")  # nothing listens there
    ran = rtdetr("predict", images / "shapes_00.png", code=4)
    assert "using the published r18 COCO weights" in ran.err
    assert "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth" in ran.err
    assert not (here / "runs").exists()


def test_class_names_of_a_foreign_model_come_from_data(
    rtdetr: Callable[..., Any], shapes_onnx: Path, foreign_onnx: Path, images: Path
) -> None:
    given = ("predict", images / "shapes_00.png", "-w", foreign_onnx, "--no-save", "--json")
    nameless = rtdetr(*given).json
    assert {row["label"] for row in nameless["detections"]} <= {"class 0", "class 1", "class 2"}
    assert all(row["label"] == f"class {row['category_id']}" for row in nameless["detections"])
    named = rtdetr(*given, "--data", images / "shapes.json").json
    ours = rtdetr("predict", images / "shapes_00.png", "-w", shapes_onnx, "--no-save", "--json", "--conf", 0.5).json
    assert named == ours


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--conf", "2"], 2, "--conf 2 is neither auto nor a score from 0 to 1"),
        (["--imgsz", "100"], 2, "100 is not a multiple of 32"),
        (["--imgsz", "320"], 2, "has the fixed size 96x128"),
        (["--batch", "0"], 2, "0 is not in the range 1<=x<=65536"),
        (["--max-det", "0"], 2, "0 is not in the range x>=1"),
        (["--classes", "tomatoe"], 2, "did you mean tomato?"),
        (["--layers", "1"], 2, "--layers 1 does not apply"),
        (["--sampling", "cubic"], 2, "neither bilinear nor discrete"),
        (["--save-conf"], 2, "--save-conf adds scores to the files of --save-txt"),
        (["--weights", "file.engine", "--threads", "2"], 2, "--threads 2 has no effect on file.engine"),
        (["--out", "file"], 2, "--out file is a file"),
        (["--out", "file/below"], 1, "file"),
        (["--weights", "gone.onnx"], 4, "gone.onnx does not exist"),
        (["--weights", "file"], 4, "file is not a model file"),
        (["--weights", "cut.onnx"], 4, "cut.onnx does not open in ONNX Runtime"),
        (["--weights", "empty"], 4, "the folder empty is empty"),
        (["--data", "gone.json"], 3, "gone.json"),
        (["--frobnicate"], 2, "frobnicate"),
    ],
)
def test_refusals(
    rtdetr: Callable[..., Any],
    here: Path,
    shapes_onnx: Path,
    images: Path,
    options: list[str],
    code: int,
    said: str,
) -> None:
    for name in ("file", "file.engine"):
        (here / name).write_text("x")
    (here / "empty").mkdir()
    whole = shapes_onnx.read_bytes()
    (here / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    weights = [] if "--weights" in options else ["--weights", shapes_onnx]
    ran = rtdetr("predict", images / "shapes_00.png", *weights, *options, code=code)
    assert said in ran.err
    assert ran.out == ""
    assert sorted(p.name for p in here.iterdir()) == [
        "cut.onnx",
        "empty",
        "file",
        "file.engine",
    ]  # nothing half-written


def test_flag_aliases(rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path) -> None:
    image = images / "shapes_00.png"
    rtdetr("detect", "--source", image, "--model", shapes_onnx, "--conf_thres=0.3", "--output-dir", "out", code=0)
    assert (here / "out/shapes_00.png").exists()

"""`rtdetr export`: messages, files, JSON and exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

from rtdetr_cli.export import compare
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.infer.onnx_backend import OnnxBackend
from rtdetr_cli.weights.header import read_header, rewrite_header

Rtdetr = Callable[..., Any]


@pytest.fixture
def model(shapes_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "best.safetensors"
    shutil.copy(shapes_model, path)
    return path


@pytest.fixture
def traced(shapes_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse a traced float32 graph, since tracing takes seconds."""

    def trace(*args: object, **options: object) -> onnx.ModelProto:
        model = onnx.load(shapes_onnx)
        model.ClearField("metadata_props")
        return model

    monkeypatch.setattr(onnx_file, "trace", trace)


@pytest.mark.usefixtures("traced")
def test_export_and_report(rtdetr: Rtdetr, model: Path, shapes_data: Path) -> None:
    ran = rtdetr("export", model, "--dynamic", "--verify", shapes_data, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["schema_version"] == 1
    (artefact,) = ran.json["artefacts"]
    assert Path(artefact["path"]) == model.parent / "export/best.onnx"
    assert (artefact["format"], artefact["precision"]) == ("onnx", "fp32")
    assert artefact["gate"]["passed"] is True
    assert artefact["gate"]["matched"] == 1
    assert artefact["gate"]["ap_model"] == pytest.approx(artefact["gate"]["ap_export"], abs=0.002)
    parity = json.loads((model.parent / "export/parity.json").read_text())
    assert parity["artefacts"][0]["gate"]["matched"] == 1
    shown = rtdetr("export", model, "--onnx", "--dynamic", "--verify", shapes_data, "--device", "cpu")
    assert shown.code == 0
    assert "passed" in shown.out
    assert "verify  onnx fp32 on 16 images" in shown.err
    assert shown.err.splitlines()[-1].endswith(f"--weights {model.parent / 'export/best.onnx'}")


@pytest.mark.usefixtures("traced")
def test_folder_of_images(rtdetr: Rtdetr, model: Path, shapes_data: Path, tmp_path: Path) -> None:
    """Without labels, AP is not compared."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(shapes_data.parent.glob("*.png"))[:5]:
        shutil.copy(path, images)
    out = tmp_path / "deployed"
    ran = rtdetr("export", model, "--dynamic", "--verify", images, "--out", out, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    verdict = ran.json["artefacts"][0]["gate"]
    assert verdict["pictures"] == 5
    assert verdict["ap_model"] is None
    assert (out / "best.onnx").is_file()


@pytest.mark.usefixtures("traced")
def test_a_folder_with_labels_is_verified_by_ap(rtdetr: Rtdetr, model: Path, shapes_data: Path) -> None:
    words = ["export", model, "--dynamic", "--device", "cpu", "--json", "--verify", shapes_data.parent]
    ran = rtdetr(*words)
    assert ran.code == 0, ran.err
    assert ran.json["artefacts"][0]["gate"]["ap_model"] > 0
    ran = rtdetr(*words, "--split", "test")
    assert ran.code == 2
    assert "test split" in ran.json["error"]["message"]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("as_json", [False, True])
def test_failed_verification(
    rtdetr: Rtdetr, model: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Exit with code 6; the file is named `*.failed.*`, and its header says so."""
    monkeypatch.setitem(compare.LIMITS, "fp32", replace(compare.LIMITS["fp32"], matched=1.5))
    words = ["export", model, "--dynamic", "--verify", shapes_data, "--device", "cpu", *(["--json"] if as_json else [])]
    ran = rtdetr(*words)
    assert ran.code == 6
    folder = model.parent / "export"
    assert sorted(p.name for p in folder.iterdir()) == ["best.failed.onnx", "parity.json"]
    assert "verification failed: best.failed.onnx: agreement: 1.000 matched (limit 1.5)" in ran.err
    if as_json:
        assert ran.json["artefacts"][0]["gate"]["passed"] is False
    from rtdetr_cli.infer.backend import open_backend

    assert open_backend(folder / "best.failed.onnx").header.extra["gate"]["passed"] is False


@pytest.mark.usefixtures("traced")
def test_without_verification(rtdetr: Rtdetr, model: Path) -> None:
    ran = rtdetr("export", model, "--dynamic", "--no-gate")
    assert ran.code == 0, ran.err
    assert "these files have not been verified" in ran.err
    assert "skipped" in ran.out
    assert ran.out.splitlines()[-1] == str(model.parent / "export/best.onnx")
    shown = rtdetr("info", model.parent / "export/best.onnx")
    assert shown.code == 0, shown.err


def test_no_images(rtdetr: Rtdetr, model: Path) -> None:
    """Exit with code 2 before anything is written; the hint has both ways out."""
    ran = rtdetr("export", model)
    assert ran.code == 2
    assert "--verify" in ran.err
    assert "--no-gate" in ran.err
    assert not (model.parent / "export").exists()


@pytest.mark.parametrize("content", ["nothing", "videos", "no val split"])
def test_no_images_to_verify_on(rtdetr: Rtdetr, model: Path, tmp_path: Path, content: str) -> None:
    """The same for a folder without images."""
    folder = tmp_path / "named"
    folder.mkdir()
    if content == "videos":
        (folder / "a.mp4").touch()
    elif content == "no val split":
        (folder / "data.yaml").write_text("names: [tomato]\ntrain: images/train\ntest: images/test\n")
        for part in ("train", "test"):
            (folder / "images" / part).mkdir(parents=True)
            (folder / "labels" / part).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / f"images/{part}/{part}.png")
            (folder / f"labels/{part}/{part}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    ran = rtdetr("export", model, "--verify", folder)
    assert ran.code == 2, ran.err
    assert "--verify" in ran.err
    assert "--no-gate" in ran.err
    assert ".jpeg" not in ran.err
    assert not (model.parent / "export").exists()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("as_json", [False, True])
def test_without_tensorrt_the_other_formats_are_exported(
    rtdetr: Rtdetr, model: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Exit with code 7, and report what was exported before."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("rtdetr_cli.export.fp16.traced_program", lambda graph, *args, **options: graph)
    monkeypatch.setattr("rtdetr_cli.export.fp16.halve", lambda program, *args: program)
    monkeypatch.setattr("rtdetr_cli.export.fp16.HalfTwin", lambda *args, **options: None)
    monkeypatch.setattr("rtdetr_cli.export.run.compare_precision", lambda *args: [])  # the graph stays float32
    words = ["--trt-fp16", "--openvino", "--dynamic", "--verify", shapes_data, "--device", "cpu"]
    ran = rtdetr("export", model, *words, *(["--json"] if as_json else []))
    assert ran.code == 7, ran.err
    folder = model.parent / "export"
    files = ["best-fp16.onnx", "best.bin", "best.engine.json", "best.xml", "parity.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert "TensorRT is not installed" in ran.err
    assert "best.engine.json" in ran.err
    if as_json:
        verdicts = [(Path(a["path"]).name, a["gate"]["passed"]) for a in ran.json["artefacts"]]
        assert verdicts == [("best-fp16.onnx", True), ("best.xml", True)]
        assert ran.json["error"]["exit_code"] == 7
        assert "trtexec" in ran.json["error"]["hint"]
    else:
        assert ran.out.splitlines()[-2:] == [str(folder / "best-fp16.onnx"), str(folder / "best.xml")]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--opset", "16"], 2, "LayerNormalization"),
        (["--opset", "16", "--half"], 2, "LayerNormalization"),  # the name of another tool
        (["--imgsz", "100"], 2, "multiple of 32"),
        (["--batch", "0"], 2, "--batch"),
        (["--layers", "9", "--no-gate"], 2, "decoder layers"),
        (["--queries", "99", "--no-gate"], 2, "queries"),
        (["--raw", "--preprocess-in-graph"], 2, "cannot be combined"),
        (["--preprocess-in-graph", "--dynamic"], 2, "one image at a time"),
        (["--preprocess-in-graph", "--trt-fp16"], 2, "antialias"),
        (["--verify", "x", "--no-gate"], 2, "cannot be combined"),
        (["--tol-ap", "20"], 2, "--tol-ap"),
        (["--verify", "nowhere"], 3, "nowhere"),
        (["--sampling", "nearest", "--no-gate"], 2, "sampling"),
        (["--sampling", "discrete", "--no-gate"], 2, "rtdetr finetune-discrete"),
        (["--frobnicate"], 2, "frobnicate"),
    ],
)
def test_refusals(rtdetr: Rtdetr, model: Path, words: list[str], code: int, message: str) -> None:
    ran = rtdetr("export", model, *words)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not (model.parent / "export").exists()


def test_files_that_are_not_weights(rtdetr: Rtdetr, shapes_onnx: Path, tmp_path: Path) -> None:
    assert rtdetr("export", shapes_onnx).code == 2
    assert rtdetr("export", tmp_path / "missing.safetensors").code == 4
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\x00" * 100)
    assert rtdetr("export", cut, "--no-gate").code == 4


def test_a_folder_that_cannot_be_written(rtdetr: Rtdetr, model: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert rtdetr("export", model, "--no-gate", "--out", taken).code == 2
    ran = rtdetr("export", model, "--no-gate", "--out", taken / "below")
    assert ran.code == 1
    assert "cannot be written" in ran.err


@pytest.mark.slow
def test_all_formats(rtdetr: Rtdetr, model: Path, shapes_data: Path) -> None:
    """An engine needs TensorRT; without it the hint has the command for another machine."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    ran = rtdetr("export", model, "--onnx", "--fp16", "--openvino", "--dynamic", "--verify", shapes_data, "--json")
    assert ran.code == 0, ran.err
    assert [a["precision"] for a in ran.json["artefacts"]] == ["fp32", "fp16", "fp16"]
    ran = rtdetr("export", model, "--trt-fp16", "--verify", shapes_data)
    if ran.code != 0:
        assert ran.code == 7
        assert "trtexec --onnx=" in ran.err
        assert (model.parent / "export/best-fp16.onnx").is_file()


@pytest.mark.slow
def test_fewer_layers_and_queries(rtdetr: Rtdetr, model: Path, shapes_data: Path) -> None:
    """The export is verified against the model at the same setting."""
    ran = rtdetr("export", model, "--layers", 1, "--queries", 25, "--verify", shapes_data, "--json")
    assert ran.code == 0, ran.err
    assert OnnxBackend(model.parent / "export/best.onnx").spec.outputs[0].shape == (1, 75)


@pytest.mark.usefixtures("traced")
def test_thresholds_of_another_setting(rtdetr: Rtdetr, model: Path) -> None:
    header = read_header(model)
    assert header.thresholds is not None
    rewrite_header(model, replace(header, thresholds=replace(header.thresholds, layers=1)))
    ran = rtdetr("export", model, "--no-gate", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "warning: the stored thresholds were calibrated at 1 layer" in ran.err
    assert "exported anyway" in ran.err

"""`rtdetr export`: messages, files, JSON and exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rtdetr_cli.export import compare
from rtdetr_cli.infer.onnx_backend import OnnxBackend
from rtdetr_cli.weights.header import read_header, rewrite_header


@pytest.mark.usefixtures("traced")
def test_export_and_report(rtdetr: Any, model: Path, shapes_data: Path) -> None:
    ran = rtdetr("export", model, "--dynamic", "--verify", shapes_data, "--device", "cpu", "--json", code=0)
    assert ran.json["schema_version"] == 1
    (artefact,) = ran.json["artefacts"]
    assert Path(artefact["path"]) == model.parent / "export/best.onnx"
    assert (artefact["format"], artefact["precision"]) == ("onnx", "fp32")
    assert artefact["gate"]["passed"] is True
    assert artefact["gate"]["matched"] == 1
    assert artefact["gate"]["ap_model"] == pytest.approx(artefact["gate"]["ap_export"], abs=0.002)
    parity = json.loads((model.parent / "export/parity.json").read_text())
    assert parity["artefacts"][0]["gate"]["matched"] == 1
    shown = rtdetr("export", model, "--onnx", "--dynamic", "--verify", shapes_data, "--device", "cpu", code=0)
    assert "passed" in shown.out
    assert "verify  onnx fp32 on 16 images" in shown.err
    assert shown.err.splitlines()[-1].endswith(f"--weights {model.parent / 'export/best.onnx'}")


@pytest.mark.usefixtures("traced")
def test_folder_of_images(rtdetr: Any, model: Path, shapes_data: Path, tmp_path: Path) -> None:
    """Without labels, AP is not compared."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(shapes_data.parent.glob("*.png"))[:5]:
        shutil.copy(path, images)
    out = tmp_path / "deployed"
    ran = rtdetr("export", model, "--dynamic", "--verify", images, "--out", out, "--device", "cpu", "--json", code=0)
    verdict = ran.json["artefacts"][0]["gate"]
    assert verdict["pictures"] == 5
    assert verdict["ap_model"] is None
    assert (out / "best.onnx").is_file()


@pytest.mark.usefixtures("traced")
def test_a_folder_with_labels_is_verified_by_ap(rtdetr: Any, model: Path, shapes_data: Path) -> None:
    words = ["export", model, "--dynamic", "--device", "cpu", "--json", "--verify", shapes_data.parent]
    ran = rtdetr(*words, code=0)
    assert ran.json["artefacts"][0]["gate"]["ap_model"] > 0
    ran = rtdetr(*words, "--split", "test", code=2)
    assert "test split" in ran.json["error"]["message"]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("as_json", [False, True])
def test_failed_verification(
    rtdetr: Any, model: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Exit with code 6; the file is named `*.failed.*`, and its header says so."""
    monkeypatch.setitem(compare.LIMITS, "fp32", replace(compare.LIMITS["fp32"], matched=1.5))
    words = ["export", model, "--dynamic", "--verify", shapes_data, "--device", "cpu", *(["--json"] if as_json else [])]
    ran = rtdetr(*words, code=6)
    folder = model.parent / "export"
    assert sorted(p.name for p in folder.iterdir()) == ["best.failed.onnx", "parity.json"]
    assert "verification failed: best.failed.onnx: agreement: 1.000 matched (limit 1.5)" in ran.err
    if as_json:
        assert ran.json["artefacts"][0]["gate"]["passed"] is False
    from rtdetr_cli.infer.backend import open_backend

    assert open_backend(folder / "best.failed.onnx").header.extra["gate"]["passed"] is False


@pytest.mark.usefixtures("traced")
def test_without_verification(rtdetr: Any, model: Path) -> None:
    ran = rtdetr("export", model, "--dynamic", "--no-gate", code=0)
    assert "these files have not been verified" in ran.err
    assert "skipped" in ran.out
    assert ran.out.splitlines()[-1] == str(model.parent / "export/best.onnx")
    rtdetr("info", model.parent / "export/best.onnx", code=0)


@pytest.mark.parametrize("content", ["not named", "nothing", "videos", "no val split"])
def test_no_images_to_verify_on(rtdetr: Any, model: Path, tmp_path: Path, content: str) -> None:
    """Exit with code 2 before anything is written; the hint has both ways out."""
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
    ran = rtdetr("export", model, *([] if content == "not named" else ["--verify", folder]), code=2)
    assert "--verify" in ran.err
    assert "--no-gate" in ran.err
    assert ".jpeg" not in ran.err
    assert not (model.parent / "export").exists()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("as_json", [False, True])
def test_without_tensorrt_the_other_formats_are_exported(
    rtdetr: Any, model: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Exit with code 7, and report what was exported before."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("rtdetr_cli.export.fp16.traced_program", lambda graph, *args, **options: graph)
    monkeypatch.setattr("rtdetr_cli.export.fp16.halve", lambda program, *args: program)
    monkeypatch.setattr("rtdetr_cli.export.fp16.HalfTwin", lambda *args, **options: None)
    monkeypatch.setattr("rtdetr_cli.export.compare.graph_precision", lambda facts: None)  # the graph stays float32
    words = ["--trt-fp16", "--openvino", "--dynamic", "--verify", shapes_data, "--device", "cpu"]
    ran = rtdetr("export", model, *words, *(["--json"] if as_json else []), code=7)
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
        (["--opset", "21"], 2, "not supported"),
        (["--imgsz", "100"], 2, "multiple of 32"),
        (["--batch", "0"], 2, "--batch"),
        (["--layers", "9", "--no-gate"], 2, "decoder layers"),
        (["--queries", "99", "--no-gate"], 2, "queries"),
        (["--raw", "--preprocess-in-graph"], 2, "cannot be combined"),
        (["--preprocess-in-graph", "--dynamic"], 2, "one image at a time"),
        (["--preprocess-in-graph", "--trt-fp16"], 2, "antialias"),
        (["--preprocess-in-graph", "--opset", "17"], 2, "cannot antialias"),
        (["--verify", "x", "--no-gate"], 2, "cannot be combined"),
        (["--tol-ap", "20"], 2, "--tol-ap"),
        (["--verify", "nowhere"], 3, "nowhere"),
        (["--sampling", "nearest", "--no-gate"], 2, "sampling"),
        (["--sampling", "discrete", "--no-gate"], 2, "rtdetr finetune-discrete"),
        (["--frobnicate"], 2, "frobnicate"),
    ],
)
def test_refusals(rtdetr: Any, model: Path, words: list[str], code: int, message: str) -> None:
    rtdetr("export", model, *words, code=code, err=message)
    assert not (model.parent / "export").exists()


def test_files_that_are_not_weights(rtdetr: Any, shapes_onnx: Path, tmp_path: Path) -> None:
    assert rtdetr("export", shapes_onnx).code == 2
    assert rtdetr("export", tmp_path / "missing.safetensors").code == 4
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\x00" * 100)
    assert rtdetr("export", cut, "--no-gate").code == 4


def test_a_folder_that_cannot_be_written(rtdetr: Any, model: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert rtdetr("export", model, "--no-gate", "--out", taken).code == 2
    rtdetr("export", model, "--no-gate", "--out", taken / "below", code=1, err="cannot be written")


@pytest.mark.slow
def test_fewer_layers_and_queries(rtdetr: Any, model: Path, shapes_data: Path) -> None:
    """The export is verified against the model at the same setting."""
    rtdetr("export", model, "--layers", 1, "--queries", 25, "--verify", shapes_data, "--json", code=0)
    assert OnnxBackend(model.parent / "export/best.onnx").spec.outputs[0].shape == (1, 75)


@pytest.mark.usefixtures("traced")
def test_thresholds_of_another_setting(rtdetr: Any, model: Path) -> None:
    header = read_header(model)
    assert header.thresholds is not None
    rewrite_header(model, replace(header, thresholds=replace(header.thresholds, layers=1)))
    ran = rtdetr("export", model, "--no-gate", "--device", "cpu", code=0)
    assert "warning: the stored thresholds were calibrated at 1 layer" in ran.err
    assert "exported anyway" in ran.err

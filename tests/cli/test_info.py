"""`rtdetr info` on every kind of model file."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.weights.header import read_header


def test_our_model(rtdetr: Callable[..., Any], shapes_model: Path) -> None:
    found = rtdetr("info", shapes_model, "--json").json["model"]
    assert found["format"] == "rtdetr-cli model"
    assert found["bytes"] == shapes_model.stat().st_size
    assert {"header_version": 1, **found["header"]} == json.loads(read_header(shapes_model).to_json())
    header = found["header"]
    assert header["names"] == ["tomato", "leaf", "plum"]
    assert header["category_ids"] == [3, 7, 20]
    assert header["thresholds"]["per_class"] == [0.5, 0.45, 0.55]
    assert 100_000 < found["parameters"] < 1_000_000
    family = found["family"]
    assert (family["maker"], family["version"], family["published"]) == ("rtdetr-cli", "RT-DETRv2", None)
    assert family["gflops"]["imgsz"] == [96, 128]
    larger = rtdetr("info", shapes_model, "--imgsz", "192x256", "--json").json["model"]["family"]["gflops"]
    assert 3 < larger["value"] / family["gflops"]["value"] < 4.1  # four times the pixels, the same queries
    table = rtdetr("info", shapes_model, code=0)
    for text in ("3: tomato, leaf, plum", "3, 7, 20", "96x128 (height x width)", "f1: overall 0.500; tomato 0.500"):
        assert text in table.out


def test_onnx(rtdetr: Callable[..., Any], shapes_onnx: Path, foreign_onnx: Path) -> None:
    found = rtdetr("info", shapes_onnx, "--json").json["model"]
    assert found["format"] == "ONNX graph by rtdetr-cli"
    assert found["opset"] == 18
    assert [p["name"] for p in found["inputs"]] == ["images", "orig_target_sizes"]
    assert found["inputs"][0]["shape"] == ["batch", 3, 96, 128]
    assert found["operators"]["Conv"] > 10
    assert found["header"]["names"] == ["tomato", "leaf", "plum"]
    foreign = rtdetr("info", foreign_onnx)
    assert "ONNX graph, foreign, of the published contract" in foreign.out
    assert "none: no class names" in foreign.out


def test_openvino_without_its_package(
    rtdetr: Callable[..., Any], shapes_xml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = rtdetr("info", shapes_xml, "--json").json["model"]
    assert found["format"] == "OpenVINO graph by rtdetr-cli"
    assert found["header"]["names"] == ["tomato", "leaf", "plum"]
    assert {p["name"] for p in found["outputs"]} == {"labels", "boxes", "scores"}
    assert found["inputs"][0]["shape"][1:] == [3, 96, 128]
    assert found["weights"] == "shapes.bin"


def test_published_checkpoint(rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path) -> None:
    import torch

    from rtdetr_cli.config.presets import load_preset
    from rtdetr_cli.model.build import build_shapes
    from rtdetr_cli.weights.load import load_model

    model, _ = load_model(shapes_model)
    state = model.state_dict()
    torch.save({"model": state, "ema": {"module": state, "updates": 1}}, tmp_path / "published.pth")
    ran = rtdetr("info", tmp_path / "published.pth", "--json", code=0)
    found = ran.json["model"]
    assert found["format"] == "published checkpoint"
    assert "ema.module" in found["layout"]
    assert found["family"]["maker"] == "official"
    deim = load_preset("r18").model.model_copy(update={"decoder": "deim"})
    small = {
        n: torch.zeros((), dtype=t.dtype).expand(t.shape)
        for n, t in build_shapes(deim, num_classes=80).state_dict().items()
    }
    for i in range(3):
        small[f"decoder.decoder.layers.{i}.cross_attn.num_points_scale"] = torch.full((12,), 0.25)
    torch.save(small, tmp_path / "deim.pth")
    family = rtdetr("info", tmp_path / "deim.pth", "--imgsz", 64, "--json").json["model"]["family"]
    assert (family["maker"], family["variant"], family["published"]["ap"]) == ("DEIM", "r18", 0.49)
    assert len(found["header"]["names"]) == 3
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    assert "backbone" in rtdetr("info", tmp_path / "backbone.pth").out


def test_training_checkpoint(rtdetr: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    from rtdetr_cli.train.checkpoint import save_checkpoint

    state = {"learner": {"model": {"a": torch.zeros(3, 4)}}, "place": {"epoch": 7, "step": 12}}
    path = save_checkpoint(tmp_path, state)
    found = rtdetr("info", path, "--json").json["model"]
    assert found["format"] == "training checkpoint"
    assert found["place"] == {"epoch": 7, "step": 12}
    assert (found["tensors"], found["tensor_bytes"]) == (1, 48)
    assert f"rtdetr train --resume {tmp_path}" in rtdetr("info", path).out
    path.write_bytes(path.read_bytes()[:-10])
    rtdetr("info", path, code=4, err="truncated")


def test_engine_shows_its_header(rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.engine").write_bytes(b"\x00" * 100)
    assert "missing" in rtdetr("info", tmp_path / "m.engine").out
    (tmp_path / "m.engine.json").write_text(read_header(shapes_model).to_json())
    found = rtdetr("info", tmp_path / "m.engine", "--json").json["model"]
    assert found["format"] == "TensorRT engine"
    assert found["header"]["names"] == ["tomato", "leaf", "plum"]
    extra = {"targets": ["sm86", "sm89"], "versions": {"tensorrt-rtx": "1.7.1"}}
    (tmp_path / "m.engine.json").write_text(replace(read_header(shapes_model), extra=extra).to_json())
    assert "sm86, sm89, with version 1.7.1 of TensorRT for RTX" in " ".join(
        rtdetr("info", tmp_path / "m.engine").out.split()
    )


def test_safetensors_from_elsewhere(rtdetr: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros((2, 5), np.float32)}, tmp_path / "other.safetensors")
    found = rtdetr("info", tmp_path / "other.safetensors", "--json").json["model"]
    assert (found["parameters"], found["header"]) == (10, None)
    assert found["format"] == "safetensors without an rtdetr header"


def test_run_folder_and_newest_run(
    rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/tiny-shapes-01"
    folder.mkdir(parents=True)
    shutil.copy(shapes_model, folder / "best.safetensors")
    for arguments in ([], [folder]):
        ran = rtdetr("info", *arguments, "--json")
        assert ran.json["model"]["path"].endswith("tiny-shapes-01/best.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.onnx", b"<html></html>"),
        ("b.onnx", b""),
        ("c.safetensors", b"\x00" * 50),
        ("d.pth", b"hello"),
        ("e.xml", b"<net><layers>"),
        ("f.xml", b"<svg/>"),
        ("g.jpg", b"x"),
        ("h.xml", b'<!DOCTYPE x [<!ENTITY a "b">]><net>&a;</net>'),
    ],
)
def test_foreign_files(rtdetr: Callable[..., Any], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    rtdetr("info", tmp_path / name, code=4, err=name)
    rtdetr("info", tmp_path / "gone" / name, code=4)

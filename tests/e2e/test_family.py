"""Other members of the family from a published file to an export: trained, made discrete, and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_detector

SIZES: dict[str, Any] = {
    "width": 8, "hidden_dim": 32, "encoder_ffn": 48, "expansion": 0.5, "heads": 8, "decoder_dim": 32,
    "decoder_ffn": 40, "decoder_layers": 2, "eval_layers": 2,
}  # fmt: skip
QUICK = ["--imgsz", 96, "--epochs", 1, "--effective-batch", 4, "--workers", 0, "--device", "cpu",
         "--set", "plots=false"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(**SIZES, decoder="deim"),
        ModelSpec(**SIZES, num_points=(2, 4, 6)),
        ModelSpec(**SIZES, backbone="hgnetv2-l", freeze_norm=True, freeze_at=0),
    ],
    ids=["DEIM", "points that differ", "HGNetv2"],
)
def test_train_discretize_and_export(
    spec: ModelSpec, rtdetr: Callable[..., Any], shapes_data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights, runs = tmp_path / "start.pth", tmp_path / "runs"
    torch.save({"ema": {"module": build_detector(spec, num_classes=80).state_dict()}}, weights)
    ran = rtdetr("train", "--data", shapes_data, "--weights", weights, *QUICK, "--out", runs, "--name", "first", code=0)
    info = rtdetr("info", runs / "first", "--json").json["model"]
    trained = ModelSpec(**info["header"]["architecture"])
    assert (trained.decoder, trained.num_points, trained.backbone) == (spec.decoder, spec.num_points, spec.backbone)
    ran = rtdetr("finetune-discrete", runs / "first", "--epochs", 1, "--workers", 0, "--device", "cpu",
                 "--name", "second", "--json", code=0)  # fmt: skip
    second = next(p for p in runs.iterdir() if p.name == "second")
    ran = rtdetr("export", second, "--onnx", "--json", code=0)
    assert json.loads(ran.out)["artefacts"][0]["gate"]["passed"] is True

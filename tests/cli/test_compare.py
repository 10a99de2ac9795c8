from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.weights.load import load_model, save_model


@pytest.fixture
def worse(eval_pair: Path, tmp_path: Path) -> Path:
    """The public detections with every box moved a little: a small loss, in every image."""
    random = np.random.default_rng(0)
    rows = json.loads((eval_pair / "detections.json").read_text())
    for row in rows:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x + float(random.normal(0, 0.06)) * w, y, w, h]
    path = tmp_path / "worse.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_small_loss_in_every_image_is_significant(rtdetr: Callable[..., Any], eval_pair: Path, worse: Path) -> None:
    given = ("compare", eval_pair / "detections.json", worse, "--data", eval_pair / "ground_truth.json")
    document = rtdetr(*given, "--json").json
    assert document["verdict"] == "a"
    assert document["difference"]["upper"] < 0
    assert document["probability_b_better"] < 0.05
    assert document["difference"]["value"] == pytest.approx(
        document["b"]["metrics"]["AP"] - document["a"]["metrics"]["AP"]
    )
    # pairing decides: the separate intervals overlap
    assert document["a"]["interval"]["lower"] < document["b"]["interval"]["upper"]
    person = document["per_class"][0]
    assert person["difference"] == pytest.approx(person["b"] - person["a"])
    ran = rtdetr(*given)
    assert ran.out.strip().splitlines()[-1] == document["sentence"]
    assert document["sentence"].startswith("A is better than B by 0.0")


def test_the_next_step_is_to_export_the_better_model_or_to_time_both(
    rtdetr: Callable[..., Any], shapes_model: Path, shapes_data: Path, tmp_path: Path
) -> None:
    copy, broken = tmp_path / "copy.safetensors", tmp_path / "broken.safetensors"
    copy.write_bytes(shapes_model.read_bytes())
    model, header = load_model(shapes_model)
    tensors = model.state_dict()
    biases = [name for name in tensors if "bbox_head" in name and name.endswith("bias")]
    assert biases
    save_model(broken, {n: t + 0.2 if n in biases else t for n, t in tensors.items()}, header)
    given = ("--data", shapes_data, "--split", "val", "--ci", 100, "--device", "cpu")
    ran = rtdetr("compare", broken, shapes_model, *given)
    assert ran.err.endswith(f"next: rtdetr export {shapes_model}\n"), ran.err
    ran = rtdetr("compare", shapes_model, copy, *given)
    assert ran.err.endswith(f"next: rtdetr benchmark {shapes_model} {copy}\n"), ran.err


def test_invalid_comparisons(rtdetr: Callable[..., Any], eval_pair: Path, tmp_path: Path) -> None:
    rtdetr("compare", eval_pair / "detections.json", eval_pair / "detections.json", code=2, err="--data DATA")
    rtdetr("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--data", eval_pair, code=4)
    rtdetr("compare", tmp_path / "a.onnx", tmp_path / "a.onnx", code=2, err="A and B are both")

"""Bad input ends with one clear message and the documented exit code, without a traceback or files left behind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


def dataset(folder: Path, **changes: Any) -> Path:
    """Write four small images with a box each; `changes` replace parts of the first ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(4):
        name = f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8)).save(folder / name)
        images.append({"id": i, "file_name": name, "width": 96, "height": 64})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 32, 24], "area": 768, "iscrowd": 0}
        )
    images[0].update(changes.get("image", {}))
    annotations[0].update(changes.get("annotation", {}))
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    document.update(changes.get("document", {}))
    path = folder / "my.json"
    path.write_text(json.dumps(document))
    return path


DATA_FAULTS = {
    "missing image": ({"image": {"file_name": "gone.png"}}, "gone.png"),
    "unknown category": ({"annotation": {"category_id": 99}}, "category 99"),
    "unknown image": ({"annotation": {"image_id": 99}}, "99"),
    "no annotations": ({"document": {"annotations": []}}, "has a box"),
    "box outside": ({"annotation": {"bbox": [500, 500, 10, 10]}}, "outside"),
    "box not finite": ({"annotation": {"bbox": [1, 2, float("nan"), 4]}}, "annotation 0"),
    "not an object": ({"document": {"images": 3}}, "images"),
}


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_a_faulty_dataset_is_refused_by_train(name: str, rtdetr, tmp_path: Path) -> None:
    changes, message = DATA_FAULTS[name]
    path = dataset(tmp_path / "data", **changes)
    ran = rtdetr("train", "--preset", "tiny", "--data", path, "--out", tmp_path / "runs", "--epochs", 1)
    assert ran.code == 3, ran.err
    assert ran.err.count("error: ") == 1
    assert message in ran.err
    assert "rtdetr validate" in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "[]", "null", "\x00\x01"])
def test_a_malformed_file_is_refused(text: str, rtdetr, tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text(text)
    for command in (["train", "--preset", "tiny", "--data", path, "--out", tmp_path / "runs"], ["validate", path]):
        ran = rtdetr(*command)
        assert ran.code == 3
        assert "my.json" in ran.err + ran.out
        assert "Traceback" not in ran.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "r19"], "did you mean r18?"),
        (["--set", "epoch=3"], "did you mean epochs?"),
        (["--set", "model.quries=3"], "did you mean model.queries?"),
        (["--imgsz", "333"], "333 is not a multiple of 32"),
        (["--epochs", "0"], "epochs"),
        (["--batch", "32", "--effective-batch", "8"], "--effective-batch"),
        (["--aug", "storng"], "storng"),
    ],
)
def test_clashes_are_refused(flags: list[str], message: str, rtdetr, tmp_path: Path) -> None:
    path = dataset(tmp_path / "data")
    given = [] if "--preset" in flags else ["--preset", "tiny"]
    ran = rtdetr("train", "--data", path, "--out", tmp_path / "runs", *given, *flags)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert not (tmp_path / "runs").exists()


class Trap:
    """An object that runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_files_that_are_not_models_are_refused(rtdetr, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    trap = tmp_path / "sprung"
    files = {
        "empty.pth": b"",
        "text.pth": b"not a checkpoint",
        "trap.pth": pickle.dumps({"model": Trap(trap)}),
        "short.safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{",
        "text.onnx": b"not a graph",
        "model.zip": b"PK",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"model": Trap(trap)}, tmp_path / "trap2.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    for name in [*files, "trap2.pth", "foreign.pth", "gone.pth"]:
        for command in (
            ["predict", data.parent / "0.png", "--weights", tmp_path / name, "--out", tmp_path / "out"],
            ["eval", tmp_path / name, "--data", data],
        ):
            ran = rtdetr(*command)
            assert ran.code == 4, (name, ran.err)
            assert name in ran.err
            assert "Traceback" not in ran.err
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_first(rtdetr, tmp_path: Path) -> None:
    path = dataset(tmp_path / "data")
    (tmp_path / "file").write_text("in the way")
    ran = rtdetr("train", "--preset", "tiny", "--data", path, "--out", tmp_path / "file" / "runs")
    assert ran.code == 1
    assert "cannot write to the output folder" in ran.err

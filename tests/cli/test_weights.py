"""Weights on the command line: the settings that `train` takes from them, and the progress of a download."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rtdetr_cli.model.backbone import ResNet
from rtdetr_cli.weights import catalogue, hub
from tests.server import serve

QUICK = ["--epochs", "1", "--workers", "0", "--device", "cpu", "--effective-batch", "8", "--set", "plots=false"]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a server on loopback offers as the mirror, with an empty cache."""

    folder = tmp_path / "served"
    folder.mkdir()
    with serve(folder) as (address, _):
        monkeypatch.setenv(catalogue.MIRROR_VARIABLE, address)
        monkeypatch.setenv(hub.HOME_VARIABLE, str(tmp_path / "home"))
        monkeypatch.setenv(hub.OFFLINE_VARIABLE, "")  # so that `--offline` ends with the test
        yield folder


def test_settings_come_from_a_model_file_and_from_a_run(
    rtdetr, shapes_model: Path, shapes_data: Path, tmp_path: Path
) -> None:
    words = ["train", "--data", shapes_data, *QUICK, "--out", tmp_path / "runs"]
    first = rtdetr(*words, "--weights", shapes_model, code=0)
    lines = [line for line in first.err.splitlines() if line.startswith(f"from {shapes_model}: ")]
    assert len(lines) == 1
    assert "preset tiny, imgsz 96x128, model.width 12" in lines[0]
    run = next((tmp_path / "runs").glob("tiny-*"))
    rtdetr(*words, "--weights", run, code=0, err=f"from {run}")


def test_a_preset_must_match_the_weights(rtdetr, shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    words = ["train", "--data", shapes_data, *QUICK, "--imgsz", 64, "--out", tmp_path / "runs"]
    ran = rtdetr(*words, "--weights", shapes_model, "--preset", "r18", code=4)
    assert "has the weights of preset tiny, not of r18" in ran.err
    assert "leave out --preset" in ran.err
    assert not (tmp_path / "runs").exists()


def test_train_shows_the_progress_of_a_download(
    rtdetr, served: Path, shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "mine.toml"
    text = (Path(__file__).parents[2] / "presets" / "tiny.toml").read_text()
    file = "ResNet34_vd_pretrained_from_paddle.pth"
    preset.write_text(text.replace("imgsz =", f'imagenet = "{file}"\nimgsz ='))
    torch.save(ResNet(depth=10, width=24).state_dict(), served / file)
    entry = catalogue.Published("r34-imagenet", file, str(preset), "imagenet")
    monkeypatch.setattr(catalogue, "catalogue", lambda: {entry.name: entry})
    words = ["train", "--data", shapes_data, *QUICK, "--imgsz", 64, "--out", tmp_path / "runs", "--preset", preset]
    ran = rtdetr(*words, "--weights", "imagenet", code=0)
    assert f"fetching {file}  100%" in ran.err
    assert f"from ImageNet backbone {file}" in ran.err
    shutil.rmtree(tmp_path / "runs")
    ran = rtdetr(*words, "--weights", "imagenet", "--dry-run", "--offline", code=0)
    assert "from http://127.0.0.1:" in ran.err
    assert "sha256 recorded" in ran.err


@pytest.mark.parametrize("word", ["coco", "imagenet"])
def test_train_without_network(
    rtdetr, shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv(hub.HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setenv(catalogue.MIRROR_VARIABLE, "http://127.0.0.1:9")  # nothing listens there
    ran = rtdetr("train", "--data", shapes_data, *QUICK, "--out", tmp_path / "runs", "--weights", word, code=4)
    for text in ("no connection", "http://127.0.0.1:9/", str(tmp_path / "home"), "weights import", "--weights none"):
        assert text in ran.err
    assert not (tmp_path / "runs").exists()


def test_the_preset_of_a_config_file_must_match_the_weights(
    rtdetr, shapes_model: Path, shapes_data: Path, tmp_path: Path
) -> None:
    """A saved config states every value, so weights do not change any of them."""
    from rtdetr_cli.config.run import resolve_run

    (tmp_path / "config.toml").write_text(resolve_run({"data": str(shapes_data)}).to_toml())
    words = ["train", "--config", tmp_path / "config.toml", *QUICK, "--imgsz", 64, "--out", tmp_path / "runs"]
    ran = rtdetr(*words, "--weights", shapes_model, code=4)
    assert "has the weights of preset tiny, not of r18" in ran.err
    assert f"from {shapes_model}" not in ran.err

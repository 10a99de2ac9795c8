"""The settings that a weights file implies, and what a training that starts from it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rtdetr_cli.config.presets import load_preset
from rtdetr_cli.config.run import RunConfig, resolve_run
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.backbone import ResNet
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.load import save_model
from rtdetr_cli.workflows.starting_weights import load_starting_weights, settings_from_weights
from tests.models import header_of


def write_model(path: Path, spec: ModelSpec, **header: Any) -> Path:
    model = build_detector(spec, num_classes=1)
    save_model(path, model.state_dict(), header_of(spec, ("disc",), **{"imgsz": (192, 192), **header}))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of preset tiny, as `train` writes it."""
    return write_model(tmp_path_factory.mktemp("tiny") / "best.safetensors", load_preset("tiny").model, preset="tiny")


def built(config: RunConfig) -> RTDETR:
    return build_detector(config.preset.model, num_classes=3)


def test_a_plain_preset_implies_only_its_name(tiny: Path) -> None:
    assert settings_from_weights(str(tiny)) == (tiny, {"preset": "tiny"})
    assert settings_from_weights(str(tiny.parent)) == (tiny, {"preset": "tiny"})  # a run stands for its best model


@pytest.mark.parametrize("word", ["coco", "imagenet", "none", "gone.safetensors"])
def test_words_and_missing_files_imply_nothing(word: str) -> None:
    assert settings_from_weights(word) is None


def test_sizes_and_input_size_are_implied_but_not_freezing(tmp_path: Path) -> None:
    spec = load_preset("tiny").model.model_copy(update={"queries": 50, "width": 16, "freeze_at": 0})
    path = write_model(tmp_path / "m.safetensors", spec, preset="tiny", imgsz=(96, 128))
    expected = {"preset": "tiny", "imgsz": (96, 128), "model.width": 16, "model.queries": 50}
    assert settings_from_weights(str(path)) == (path, expected)


def test_a_file_of_no_known_preset_implies_the_nearest(shapes_model: Path, shapes_val: Dataset) -> None:
    found = settings_from_weights(str(shapes_model))
    assert found[1]["preset"] == "tiny"
    config = resolve_run({"weights": str(shapes_model)}, inherited=(str(shapes_model), found[1]))
    assert config.imgsz == (96, 128)
    assert config.source("imgsz") == config.source("model.width") == str(shapes_model)
    table, start = load_starting_weights(built(config), config, shapes_val)
    assert table.tensors_loaded == table.tensors_total
    assert [row.source_label is not None for row in table.classes].count(True) == 3
    assert start == shapes_model.name


def test_given_settings_override_implied_ones(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("epochs = 3\n")
    inherited = (str(tiny), {"preset": "tiny", "imgsz": (64, 64), "model.queries": 20})
    config = resolve_run(
        {"imgsz": (96, 96)}, sets=["model.queries=30"], config_file=tmp_path / "c.toml", inherited=inherited
    )
    assert (config.preset.name, config.imgsz, config.preset.model.queries) == ("tiny", (96, 96), 30)
    assert config.settings.epochs == 3
    assert config.source("preset") == str(tiny)
    assert config.given("preset")


@pytest.mark.parametrize("name", ["r18", "r50m", "r101"])
def test_a_published_file_implies_its_preset(tmp_path: Path, name: str) -> None:
    spec = load_preset(name).model
    with torch.device("meta"):
        state = build_detector(spec, num_classes=80).state_dict()
    # One value is enough of a tensor to give its shape: the file stays small.
    small = {n: torch.zeros((), dtype=t.dtype).expand(t.shape) for n, t in state.items()}
    for i in range(spec.decoder_layers):
        small[f"decoder.decoder.layers.{i}.cross_attn.num_points_scale"] = torch.full((12,), 0.25)
    torch.save({"ema": {"module": small}}, tmp_path / "x.pth")
    assert settings_from_weights(str(tmp_path / "x.pth")) == (tmp_path / "x.pth", {"preset": name})


def test_weights_of_other_sizes_name_them(tiny: Path, shapes_val: Dataset) -> None:
    config = resolve_run({"preset": "tiny", "weights": str(tiny)}, sets=["model.width=16"])
    with pytest.raises(ModelError, match="of other sizes: width 24, not 16") as caught:
        load_starting_weights(built(config), config, shapes_val)
    assert "--preset" in caught.value.hint


def test_sampling_points_queries_and_noise_may_differ(tiny: Path, shapes_val: Dataset) -> None:
    sets = ["model.num_points=[2,4,6]", "model.queries=30", "model.denoising=0", "model.eval_layers=2"]
    config = resolve_run({"preset": "tiny", "weights": str(tiny)}, sets=sets)
    table, _ = load_starting_weights(built(config), config, shapes_val)
    assert table.reinitialized
    assert all("cross_attn" in name for name in table.reinitialized)


def test_a_backbone_is_loaded_as_one(tmp_path: Path, shapes_val: Dataset) -> None:
    given = ResNet(depth=10, width=24).state_dict()
    torch.save(given, tmp_path / "backbone.pth")
    assert settings_from_weights(str(tmp_path / "backbone.pth")) is None
    config = resolve_run({"preset": "tiny", "weights": str(tmp_path / "backbone.pth")})
    model = built(config)
    table, start = load_starting_weights(model, config, shapes_val)
    assert start == "backbone backbone.pth"
    assert table.tensors_loaded == len(given)
    assert all(torch.equal(t, given[n]) for n, t in model.backbone.state_dict().items())
    config = resolve_run({"preset": "r18", "weights": str(tmp_path / "backbone.pth")})
    with pytest.raises(ModelError, match="the backbone of another model") as caught:
        load_starting_weights(built(config), config, shapes_val)
    assert caught.value.hint == "--preset tiny"


def test_a_discrete_model_implies_discrete_sampling(tmp_path: Path) -> None:
    model = load_preset("tiny").model
    path = write_model(tmp_path / "d.safetensors", model, preset="tiny", sampling="discrete", rounding="nearest")
    assert settings_from_weights(str(path)) == (path, {"preset": "tiny", "sampling": "discrete", "rounding": "nearest"})

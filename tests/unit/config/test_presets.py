"""Presets: every shipped file is valid and holds the published recipe; an invalid file lists all its problems."""

from __future__ import annotations

import pytest

from rtdetr_cli.config.presets import descriptions, flatten, load_preset, preset_folder, preset_names
from rtdetr_cli.config.schema import Preset
from rtdetr_cli.config.validation import validate
from rtdetr_cli.errors import UsageError


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_is_valid_and_explains_its_rates(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert preset.optim.why
    assert preset.description


# The merged values of the published configurations.
RECIPE = {
    "r18": (1e-4, 1e-4, 120, 117, 0, 3, 3),
    "r34": (1e-4, 5e-5, 120, 117, 117, 4, 4),
    "r50m": (1e-4, 1e-5, 84, 81, 81, 6, 3),
    "r50": (1e-4, 1e-5, 72, 71, 71, 6, 6),
    "r101": (1e-4, 1e-6, 72, 71, 71, 6, 6),
}


@pytest.mark.parametrize("name", RECIPE)
def test_published_presets_hold_the_published_recipe(name: str) -> None:
    p = load_preset(name)
    values = (
        p.optim.lr, p.optim.lr_backbone, p.official.epochs, p.official.strong_augmentation_until,
        p.official.multi_scale_until, p.model.decoder_layers, p.model.eval_layers,
    )  # fmt: skip
    assert values == RECIPE[name]
    assert p.optim.clip_norm == 0.1
    assert p.optim.weight_decay == 1e-4
    assert p.official.warmup_steps == 2000
    assert p.model.queries == 300


def test_all_problems_of_a_preset_file_are_reported_together(tmp_path) -> None:
    text = (preset_folder() / "r18.toml").read_text()
    text = text.replace("depth = 18", "depht = 18").replace("lr = 1e-4", 'lr = "fast"', 1).replace("epochs = 120", "")
    bad = tmp_path / "bad.toml"
    bad.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_preset(str(bad))
    message = caught.value.message
    assert "unknown key model.depht (did you mean depth?)" in message
    assert "optim.lr = 'fast'" in message
    assert "official.epochs is missing" in message


def test_contradicting_values_are_refused() -> None:
    values = load_preset("r18").model_dump()
    values["model"]["eval_layers"] = 4
    with pytest.raises(UsageError, match="eval_layers 4 is more than decoder_layers 3"):
        validate(Preset, values, source="x")


def test_malformed_toml_is_reported_with_its_line(tmp_path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("name = \n")
    with pytest.raises(UsageError, match="line 1"):
        load_preset(str(bad))


def test_every_key_of_a_preset_has_a_description() -> None:
    texts = descriptions(Preset)
    assert list(texts) == list(flatten(load_preset("r18")))
    assert [key for key, text in texts.items() if not text] == []

"""Settings of a run: which source overrides which, where each value came from, and which values are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.config.presets import flatten
from rtdetr_cli.config.run import SETTINGS, parse_set, resolve_run
from rtdetr_cli.errors import UsageError


def test_flag_over_set_over_file_over_preset_over_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('epochs = 7\nseed = 7\naug = "light"\npreset = "r34"\n[model]\nqueries = 77\n[optim]\nlr = 7e-4\n')
    run = resolve_run({"epochs": 9}, sets=["seed=8", "model.queries=88"], config_file=file)
    settings, preset = run.settings, run.preset
    assert (settings.epochs, run.source("epochs")) == (9, "--epochs")
    assert (settings.seed, run.source("seed")) == (8, "--set")
    assert (settings.aug, run.source("aug")) == ("light", str(file))
    assert (settings.patience, run.source("patience")) == (0, "default")
    assert (preset.model.queries, preset.optim.lr) == (88, 7e-4)
    assert (preset.optim.lr_backbone, run.source("optim.lr_backbone")) == (5e-5, "preset")


def test_every_value_has_a_source() -> None:
    run = resolve_run({"preset": "tiny", "data": "d.json"})
    tables = {"model.": run.preset.model, "optim.": run.preset.optim, "official.": run.preset.official}
    keys = [key for prefix, table in tables.items() for key in flatten(table, prefix)]
    assert set(run.provenance) == {*SETTINGS, *keys}
    assert run.values()["official.epochs"] == 120


def test_the_published_schedule_can_be_changed(tmp_path: Path) -> None:
    run = resolve_run({"preset": "r18"}, sets=["official.warmup_steps=50"])
    assert (run.preset.official.warmup_steps, run.source("official.warmup_steps")) == (50, "--set")
    (tmp_path / "config.toml").write_text(run.to_toml())
    assert resolve_run({}, config_file=tmp_path / "config.toml").preset == run.preset


def test_config_toml_gives_the_same_run_again(tmp_path: Path) -> None:
    run = resolve_run(
        {"preset": "tiny", "data": 'a "quoted" näme.json', "imgsz": (96, 64), "lr": 1e-5, "log": ("tensorboard",)},
        sets=["model.num_points=[2,4,6]", "schedule=official"],
    )
    file = tmp_path / "config.toml"
    file.write_text(run.to_toml(), encoding="utf-8")
    again = resolve_run({}, config_file=file)
    assert again.settings == run.settings
    assert again.preset == run.preset
    assert again.provenance == run.provenance, "a value that nobody chose must stay one"
    assert resolve_run({"epochs": 3}, config_file=file).source("epochs") == "--epochs"


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("schedule=official", "schedule", "official"),
        ("epochs=3", "epochs", 3),
        ("lr=1e-4", "lr", 1e-4),
        ("model.num_points=[2, 4, 6]", "model.num_points", [2, 4, 6]),
        ("compile=true", "compile", True),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
    ],
)
def test_set_values_are_toml_or_text(word: str, key: str, value: object) -> None:
    assert parse_set([word]) == {key: value}


@pytest.mark.parametrize(("given", "size"), [(320, (320, 320)), ("480x640", (480, 640)), ([96, 64], (96, 64))])
def test_image_sizes(given: object, size: tuple[int, int]) -> None:
    assert resolve_run({"imgsz": given}).imgsz == size


def test_the_input_size_defaults_to_that_of_the_preset() -> None:
    assert resolve_run({"preset": "tiny"}).imgsz == (192, 192)


def test_a_preset_without_published_weights_trains_from_scratch_by_default() -> None:
    assert resolve_run({"preset": "tiny"}).settings.weights == "none"
    assert resolve_run({"preset": "r18"}).settings.weights == "coco"
    assert resolve_run({"preset": "tiny", "weights": "coco"}).settings.weights == "coco", (
        "refused later, with a message about the weights"
    )


@pytest.mark.parametrize(
    ("flags", "sets", "optimizer"),
    [
        ({"preset": "tiny"}, [], "muon"),
        ({"preset": "r18", "weights": "none"}, [], "muon"),
        ({"preset": "r18"}, [], "adamw"),
        ({"preset": "r18", "weights": "imagenet"}, [], "adamw"),
        ({"preset": "r18", "weights": "imagenet"}, ["optimizer=muon"], "muon"),
        ({"preset": "tiny"}, ["optimizer=adamw"], "adamw"),
        ({"preset": "tiny"}, ["schedule=official"], "adamw"),
    ],
)
def test_random_weights_are_trained_with_muon(flags: dict[str, str], sets: list[str], optimizer: str) -> None:
    assert resolve_run(flags, sets=sets).settings.optimizer == optimizer


def test_a_run_of_an_earlier_version_keeps_its_optimizer(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    written = resolve_run({"preset": "tiny"}, sets=["optimizer=adamw"]).to_toml()
    file.write_text(re.sub(r"(?m)^optimizer = .*\n", "", written))
    assert resolve_run({}, config_file=file).settings.optimizer == "adamw"
    file.write_text('preset = "tiny"\n')  # of the user's own, which has no resolved values
    assert resolve_run({}, config_file=file).settings.optimizer == "muon"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch": "foo"}, "--batch foo: expected auto or an integer >= 1"),
        ({"workers": -1}, "--workers -1: expected auto or an integer >= 0"),
        ({"epochs": 0}, "--epochs 0: expected an integer >= 1"),
        ({"lr": -1.0}, "--lr -1.0: expected a number > 0 and < 1"),
        (
            {"freeze": "backbne"},
            "--freeze backbne: expected preset, none, stem, backbone or encoder (did you mean backbone?)",
        ),
        ({"log": ("x", "y")}, "--log x,y: expected tensorboard, wandb or mlflow"),
        ({"precision": "x"}, "--precision x: expected auto, fp32, bf16 or fp16"),
        ({"epochs": "many"}, "--epochs many: expected an integer >= 1"),
        ({"imgsz": "640x640x3"}, "--imgsz 640x640x3: '640x640x3' is not a size"),
        ({"effective_batch": 0, "patience": -1}, "--effective-batch 0: expected an integer >= 1; --patience -1: "),
    ],
)
def test_an_invalid_value_names_its_flag_and_the_allowed_values(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_run(flags)
    assert caught.value.message.startswith(message)
    assert "input" not in caught.value.message


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch=foo", "--set batch=foo: expected auto or an integer >= 1"),
        ("optim.lr=-1", "--set optim.lr=-1: expected a number > 0 and < 1"),
        ("model.num_points=[4, 0, 4]", "--set model.num_points=[4, 0, 4]: expected a list, each an integer >= 1"),
        ("warmup=2", "--set warmup=2: expected a number >= 0 and <= 0.9"),
        ("model.heads=x", "--set model.heads=x: expected an integer >= 1"),
        ("compile=maybe", "--set compile=maybe: expected true or false"),
        ("imgsz=33", "--set imgsz=33: 33 is not a multiple of 32 from 32 to 4096; the nearest sizes are 32 and 64"),
        ("name=3", "--set name=3: expected text"),
        ("schedule", "--set schedule is not key=value"),
    ],
)
def test_an_invalid_set_value_is_quoted_as_it_was_written(word: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_run({}, sets=[word])
    assert caught.value.message == message


def test_an_invalid_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('epochs = "x"\n')
    with pytest.raises(UsageError) as caught:
        resolve_run({}, config_file=file)
    assert caught.value.message == f'{file}: epochs = "x": expected an integer >= 1'


def test_an_unknown_key_lists_the_keys_of_its_table() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_run({"preset": "tiny"}, sets=["optim.nonsense=3"])
    assert "presets show tiny" in caught.value.hint
    assert "clip_norm" in caught.value.hint
    assert "r18" not in caught.value.hint
    with pytest.raises(UsageError, match=r"did you mean optim\.clip_norm") as close:
        resolve_run({}, sets=["optim.clip_nrm=3"])
    assert "clip_norm" not in close.value.hint, "the suggestion is enough"


def test_a_run_of_0_1_whose_preset_had_more_keys_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    text = resolve_run({"preset": "r18"}).to_toml()
    file.write_text(text.replace("[rest_of_preset]\n", '[rest_of_preset]\ndiscrete_weights = "x.pth"\n'))
    assert resolve_run({}, config_file=file).preset == resolve_run({"preset": "r18"}).preset


def test_an_unreadable_config_file_has_a_hint(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("not toml\n")
    with pytest.raises(UsageError, match="line 1") as caught:
        resolve_run({}, config_file=file)
    assert "epochs = 50" in caught.value.hint
    with pytest.raises(UsageError, match="cannot be read") as missing:
        resolve_run({}, config_file=tmp_path / "gone.toml")
    assert "config.toml" in missing.value.hint


def test_problems_of_the_run_and_of_its_preset_are_reported_together() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_run({"batch": "foo", "seed": -1}, sets=["optim.lr=-1"])
    for problem in ("--batch foo: expected", "--seed -1: expected", "--set optim.lr=-1: expected"):
        assert problem in caught.value.message
    with pytest.raises(UsageError, match=r"hidden_dim 96 must be a multiple of heads \(7\)"):
        resolve_run({"preset": "tiny"}, sets=["model.heads=7"])


def test_overfitting_few_images_shrinks_the_effective_batch() -> None:
    config = resolve_run({"overfit": 4})
    assert config.settings.effective_batch == 4
    assert "--overfit" in config.source("effective_batch")
    assert resolve_run({"overfit": 4, "effective_batch": 8}).settings.effective_batch == 8
    assert resolve_run({"overfit": 100}).settings.effective_batch == 16
    assert resolve_run({"overfit": 0}).settings.effective_batch == 16


USER_PRESET = """
name = "mine"
description = "ours"
params_m = 1.0
imgsz = [96, 128]
[model]
width = 8
queries = 12
[optim]
lr = 3e-4
[official]
epochs = 11
strong_augmentation_until = 9
"""


def test_config_toml_does_not_need_the_preset_file(tmp_path: Path) -> None:
    mine, file = tmp_path / "mine.toml", tmp_path / "config.toml"
    mine.write_text(USER_PRESET)
    run = resolve_run({"preset": str(mine)}, sets=["model.queries=20"])
    file.write_text(run.to_toml(), encoding="utf-8")
    mine.unlink()
    again = resolve_run({"epochs": 3}, config_file=file)
    assert again.preset == run.preset
    assert again.imgsz == (96, 128)
    assert again.preset.official.epochs == 11
    with pytest.raises(UsageError, match=r"other\.toml does not exist"):
        resolve_run({"preset": "other.toml"}, config_file=file)
    assert resolve_run({"preset": "r18"}, config_file=file).preset.official.epochs != 11, "another preset was named"


def test_config_toml_keeps_its_values_when_the_preset_file_changes(tmp_path: Path) -> None:
    mine, file = tmp_path / "mine.toml", tmp_path / "config.toml"
    mine.write_text(USER_PRESET)
    run = resolve_run({"preset": str(mine)})
    file.write_text(run.to_toml(), encoding="utf-8")
    mine.write_text(USER_PRESET.replace("96, 128", "320, 320").replace("epochs = 11", "epochs = 99"))
    assert resolve_run({}, config_file=file).preset == run.preset


def test_anchored_makes_paths_absolute_and_keeps_keywords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(USER_PRESET)
    settings = resolve_run({"data": "d", "preset": "mine.toml", "weights": "run", "aug": "a.json"}).anchored().settings
    for key, name in {"data": "d", "preset": "mine.toml", "weights": "run", "aug": "a.json"}.items():
        assert getattr(settings, key) == str(tmp_path / name)
    settings = resolve_run({"preset": "tiny"}).anchored().settings
    assert (settings.data, settings.images, settings.preset, settings.weights) == (None, None, "tiny", "none")
    assert settings.aug == "auto"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ("provenance = 3\n", "provenance: 3 is not an object"),
        ("[provenance]\nepochs = 3\n", "provenance: epochs"),
        ("rest_of_preset = [1]\n", "rest_of_preset: "),
        ('preset = "tiny"\n[rest_of_preset]\nname = "tiny"\n', "rest_of_preset has no table official"),
        ('preset = "tiny"\n[rest_of_preset]\nofficial = 3\n', "rest_of_preset has no table official"),
    ],
)
def test_a_damaged_file_of_a_resolved_run_is_refused(tables: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(tables)
    with pytest.raises(UsageError, match=message) as caught:
        resolve_run({}, config_file=file)
    assert str(file) in caught.value.message

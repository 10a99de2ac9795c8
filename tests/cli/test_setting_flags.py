"""The flags of settings: names, help, defaults and values of `train` and `finetune-discrete` follow the declaration."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from rtdetr_cli.cli.app import build
from rtdetr_cli.cli.setting_flags import TRAIN_FLAGS, with_setting_flags
from rtdetr_cli.config.settings import declarations

COMMAND_ONLY = {
    "train": {"dataset", "resume", "dry_run", "set_values", "config_file", "as_json", "offline"},
    "finetune-discrete": {"model", "max_drop", "resume", "set_values", "as_json"},
}
NOT_IN_SECOND_STAGE = {"preset", "weights", "overfit"}


def parameters(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(build(command))
    return {p.name: p for p in group.commands[command].params if p.name != "help"}


@pytest.mark.parametrize("command", COMMAND_ONLY)
def test_every_flag_is_a_setting_or_belongs_to_the_command_alone(command: str) -> None:
    settings = set(TRAIN_FLAGS) - (NOT_IN_SECOND_STAGE if command == "finetune-discrete" else set())
    assert set(parameters(command)) == settings | COMMAND_ONLY[command]


@pytest.mark.parametrize("command", COMMAND_ONLY)
def test_name_and_help_of_a_flag_are_those_of_the_setting(command: str) -> None:
    for name, parameter in parameters(command).items():
        if name in COMMAND_ONLY[command]:
            continue
        setting = declarations()[name]
        assert parameter.help == setting.help
        assert parameter.opts == [*filter(None, [setting.short]), f"--{name.replace('_', '-')}"]


def shown_defaults(help_text: str) -> dict[str, str]:
    """Return flag -> the default that the help shows."""
    entries = re.split(r"\n  (?=-)", help_text.partition("Options:")[2])
    defaults = {}
    for entry in entries:
        flag = re.search(r"--[a-z-]+", entry)
        default = re.search(r"\[default: (.*)\]", " ".join(entry.split()))
        if flag:
            defaults[flag[0]] = default[1] if default else ""
    return defaults


def test_train_shows_the_real_defaults(rtdetr) -> None:
    shown = shown_defaults(rtdetr("train", "--help").out)
    for name in TRAIN_FLAGS:
        declaration = declarations()[name]
        switched_off_or_unset = declaration.default in (None, "", ()) or declaration.default is False
        real = "" if switched_off_or_unset else str(declaration.default)
        unset = f"({declaration.unset})" if declaration.unset else ""
        assert shown[f"--{name.replace('_', '-')}"] == (real or unset), name
    assert shown["--epochs"] == "50"
    assert shown["--lr-backbone"] == "(the preset's share of --lr, or --lr from random weights)"


def test_finetune_discrete_shows_no_default_of_train(rtdetr) -> None:
    """Its defaults come from the run and the model that it continues."""
    shown = shown_defaults(rtdetr("finetune-discrete", "--help").out)
    for name in set(TRAIN_FLAGS) - NOT_IN_SECOND_STAGE:
        assert shown[f"--{name.replace('_', '-')}"].startswith("("), name


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {}),
        (["--epochs", "50"], {"epochs": 50}),
        (["-e", "3", "-b", "4"], {"epochs": 3, "batch": "4"}),
        (["--compile"], {"compile": True}),
        (["--data", "x", "--lr", "1e-3"], {"data": "x", "lr": 1e-3}),
        (["--log", "wandb,mlflow", "--imgsz", "480x640"], {"log": "wandb,mlflow", "imgsz": "480x640"}),
    ],
)
def test_a_command_receives_the_flags_that_were_given(words: list[str], given: dict[str, Any]) -> None:
    received: list[dict[str, Any]] = []

    def command(flags: dict[str, Any]) -> None:
        received.append(flags)

    app = typer.Typer()
    app.command()(with_setting_flags(TRAIN_FLAGS)(command))
    typer.main.get_command(app).main(args=words, standalone_mode=False)
    assert received == [given]

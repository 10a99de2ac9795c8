"""The declaration of the settings: each has a help text, and the text agrees with the type and the default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from rtdetr_cli.config.presets import flatten, preset_names
from rtdetr_cli.config.run import NAMED, resolve_run
from rtdetr_cli.config.settings import RunSettings, declarations

ROOT = Path(__file__).resolve().parents[3]


def literals(annotation: Any) -> list[str]:
    """Return the words that a type allows."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for inner in get_args(annotation) for word in literals(inner)]


@pytest.mark.parametrize("name", declarations())
def test_the_help_is_a_sentence_that_names_every_allowed_word(name: str) -> None:
    declaration = declarations()[name]
    text = declaration.help
    assert text[0].isupper()
    assert text.endswith(".")
    for word in (*literals(declaration.kind), *NAMED.get(name, ())):
        assert word in text, f"{word} is missing in the help of {name}"


def test_the_help_of_preset_names_every_preset() -> None:
    text = declarations()["preset"].help
    assert all(name in text for name in preset_names())


@pytest.mark.parametrize("name", declarations())
def test_only_a_default_that_cannot_be_shown_is_described(name: str) -> None:
    """`unset` may not stand beside a real default, which would be a second text that could be wrong."""
    declaration = declarations()[name]
    if declaration.unset:
        assert declaration.default in (None, "", ())


def test_the_defaults_are_valid_and_are_those_of_an_empty_command_line() -> None:
    settings = resolve_run({}).settings
    assert settings == RunSettings()
    assert resolve_run(flatten(settings)).settings == settings


def test_the_declaration_imports_the_standard_library_only() -> None:
    code = (
        "import sys, rtdetr_cli.config.settings\n"
        "loaded = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - {'rtdetr_cli'}\n"
        "print(sorted(m for m in loaded if not m.startswith('_')))\n"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]"

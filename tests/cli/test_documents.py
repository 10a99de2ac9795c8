"""The documents are true: every command and flag that they name exists, and every option has a help text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from rtdetr_cli.cli.app import COMMANDS, build

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "presets/README.md", "docs/learning.md", "docs/speed.md"]


@pytest.fixture(scope="module")
def group():
    return typer.main.get_command(build())


def leaves(command, words=()):
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from leaves(child, (*words, name))
    yield words, command


def test_every_command_and_option_has_a_help_text(group) -> None:
    without_help = []
    for words, command in leaves(group):
        if not command.help:
            without_help.append(" ".join(words))
        for parameter in command.params:
            if parameter.name not in ("help", "install_completion", "show_completion") and not getattr(
                parameter, "help", None
            ):
                without_help.append(" ".join([*words, parameter.opts[0]]))
    assert without_help == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_documents_exist(name: str, group) -> None:
    text = (ROOT / name).read_text()
    flags_of = {}
    for words, command in leaves(group):
        if words:
            flags_of.setdefault(words[0], set()).update(f for p in command.params for f in (*p.opts, *p.secondary_opts))
    used = re.findall(r"rtdetr ([a-z][a-z-]*)((?:[^`\n#])*)", text)
    assert used or name != "README.md"
    for command_name, rest in used:
        if command_name not in COMMANDS:
            continue
        for flag in re.findall(r"--[a-z][a-z0-9-]*", rest):
            assert flag in flags_of[command_name] | {"--help"}, f"{name}: rtdetr {command_name} {flag}"


def test_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"| `rtdetr {name}" in text, name


def test_readme_opens_with_two_commands_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install -e . && rtdetr demo" in text
    assert "pip install -e '.[dev]' && pytest -n logical\n" in text
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q -e '.[dev,rtx]'" in ci
    assert re.search(r"^pytest -n logical$", ci, re.MULTILINE)


def test_links_in_documents_point_to_existing_files() -> None:
    for name in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"

"""The README's map of the source matches the folders."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def entries_of_the_map() -> tuple[set[str], set[str]]:
    """Return what the README's tree names inside `rtdetr_cli/` and at the top level."""
    tree = re.search(
        r"## Source code\n\n```\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    inside, top = set(), set()
    for line in tree[1].splitlines():
        name = line.split()[0]
        (inside if line.startswith(" ") else top).add(name)
    return inside, top


def test_every_folder_and_module_of_the_package_is_on_the_map_and_nothing_else() -> None:
    inside, _ = entries_of_the_map()
    package = REPOSITORY / "rtdetr_cli"
    folders = {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    modules = {p.name for p in package.glob("*.py") if not p.name.startswith("__")}
    assert inside == folders | modules


def test_top_level_folders_exist() -> None:
    _, top = entries_of_the_map()
    assert {"rtdetr_cli/", "presets/", "examples/", "tests/"} <= top
    assert all((REPOSITORY / name).is_dir() for name in top)

"""A wheel, installed somewhere else, has its presets, its templates and its program."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("rtdetr_cli-*.whl")
    return built


def test_it_holds_presets_templates_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {f"rtdetr_cli/presets/{p.name}" for p in (ROOT / "presets").glob("*.toml")}
    templates = {f"rtdetr_cli/templates/{p.name}" for p in (ROOT / "rtdetr_cli" / "templates").iterdir()}
    assert len(presets) >= 6
    assert presets | templates | {"rtdetr_cli/py.typed"} <= names
    assert not [n for n in names if n.startswith(("tests/", "presets/"))]


def test_installed_elsewhere_it_finds_its_presets(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import rtdetr_cli.config.presets as p; print(p.__file__); print(p.preset_folder()); print(p.preset_names())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    module, folder, names = ran.stdout.splitlines()
    assert module.startswith(str(site))
    assert folder.startswith(str(site))
    assert "r50m" in names
    listed = subprocess.run(
        [sys.executable, "-m", "rtdetr_cli", "presets", "show", "r101"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "optim.lr_backbone" in listed.stdout

"""What the tests of several commands share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def images(shapes_data: Path) -> Path:
    """A folder with the 16 images that the small detector knows, and `shapes.json`."""
    return shapes_data.parent

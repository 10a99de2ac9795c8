"""What all tests share: real data where it exists, the command line in this process, and quiet libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def shared_data(name: str) -> Path:
    """Return a real dataset's folder, or skip with the reason."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data {name} is not on this machine")
    return path


@pytest.fixture(scope="session")
def bccd() -> Path:
    """Blood cells: 364 pictures, Pascal VOC."""
    return shared_data("data/bccd")


@pytest.fixture(scope="session")
def coco21() -> Path:
    """21 pictures of COCO with their annotations."""
    return shared_data("data/coco21")


@pytest.fixture(scope="session")
def eval_pair() -> Path:
    """A public ground truth and detection file with published metrics."""
    return shared_data("data/eval_pair")


@pytest.fixture(scope="session")
def parity() -> Path:
    """Reference numbers of the official code."""
    return shared_data("parity")


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        lines = self.out.strip().splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


@pytest.fixture
def rtdetr(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `rtdetr ARGS` in this process and return its exit code and output."""
    from rtdetr_cli.cli.app import run

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = run([str(a) for a in arguments])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return call

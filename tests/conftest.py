"""What all tests share: real data where it exists, the command line in this process, and quiet libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A bug must end a test with its traceback: see `cli.unexpected`.
os.environ.setdefault("RTDETR_CLI_TRACEBACK", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before torch is loaded: see `cli.app.run`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Importing openvino reports that over the network, in a thread that outlives the test, unless this import fails.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

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
    """Blood cells: 364 images, Pascal VOC."""
    return shared_data("data/bccd")


@pytest.fixture(scope="session")
def coco21() -> Path:
    """21 images of COCO with their annotations."""
    return shared_data("data/coco21")


@pytest.fixture(scope="session")
def eval_pair() -> Path:
    """A public ground truth and detection file with published metrics."""
    return shared_data("data/eval_pair")


@pytest.fixture(scope="session")
def parity() -> Path:
    """Reference numbers of the official code."""
    return shared_data("parity")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unpack zip files into a temporary folder, not into the cache of the user."""
    from rtdetr_cli.datasets import archive

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "cache_folder", lambda name: folder / name)
        yield


def golden_module(name: str) -> ModuleType:
    """Import a module of `golden/`."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", REPOSITORY / f"tests/golden/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shapes() -> ModuleType:
    """The module that made the small trained detector of `golden/`: its names, ids, size, and its images."""
    return golden_module("shapes")


@pytest.fixture(scope="session")
def standin() -> ModuleType:
    """The module that makes strict stand-ins for TensorRT."""
    return golden_module("tensorrt_standin")


@pytest.fixture(scope="session")
def shapes_model(shapes: ModuleType) -> Path:
    """The small trained detector: 3 classes, thresholds, an input that is no square."""
    path: Path = shapes.WEIGHTS
    return path


@pytest.fixture(scope="session")
def shapes_data(shapes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO JSON of 16 images that the small detector knows, the images beside it."""
    path: Path = shapes.write_dataset(tmp_path_factory.mktemp("shapes"))
    return path


@pytest.fixture(scope="session")
def shapes_onnx(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained detector as an ONNX graph with an open batch; not gated."""
    from rtdetr_cli.export.options import ExportOptions
    from rtdetr_cli.export.run import export_model
    from rtdetr_cli.weights.load import load_model

    model, header = load_model(shapes_model)
    folder = tmp_path_factory.mktemp("onnx")
    return export_model(model, header, folder, ExportOptions(dynamic=True), stem="shapes")[0].path


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

"""What all tests share: real data where it exists, the command line in this process, and quiet libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """Import a program by its path."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their annotations up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shapes(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The module that made the small trained detector of `golden/`: its names, ids, size, and its images."""
    return load_module(REPOSITORY / "tests/golden/shapes.py")


@pytest.fixture(scope="session")
def standin(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The module that makes strict stand-ins for TensorRT."""
    return load_module(REPOSITORY / "tests/golden/tensorrt_standin.py")


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


@pytest.fixture(scope="session")
def foreign_onnx(shapes_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph without our header, as other makers export it."""
    import onnx

    model = onnx.load(shapes_onnx)
    model.ClearField("metadata_props")
    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def shapes_xml(shapes_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph as an OpenVINO model with float32 weights, and with its header in the runtime information."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    import onnx

    model = openvino.Core().read_model(shapes_onnx)
    metadata = {e.key: e.value for e in onnx.load(shapes_onnx).metadata_props}
    model.set_rt_info(metadata["rtdetr"], ["rtdetr"])
    path = tmp_path_factory.mktemp("openvino") / "shapes.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="session")
def shapes_val(shapes_data: Path) -> Any:
    """The images and boxes of `shapes_data` as a split to evaluate on."""
    from rtdetr_cli.checks.load import load_splits

    return load_splits(shapes_data, split_single=False).val


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[Any]:
        """The JSON documents on stdout, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        (document,) = self.documents
        return document


@pytest.fixture
def rtdetr(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `rtdetr ARGS` in this process and return its exit code and output.

    `code` is the exit code that it must have, and `err` a text that must be on stderr. A bug ends the test with its
    traceback.
    """
    from rtdetr_cli.cli.app import run

    def call(*arguments: object, code: int | None = None, err: str = "") -> Ran:
        capfd.readouterr()
        ended = run([str(a) for a in arguments])
        captured = capfd.readouterr()
        assert code in (None, ended), f"exit code {ended}: {captured.out}{captured.err}"
        assert err in captured.err
        return Ran(ended, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def limit_seconds() -> Any:
    """Return a context that ends a test which waits for a pipe or counts to a billion."""

    @contextmanager
    def limit(seconds: int) -> Iterator[None]:
        def stop(*_: object) -> None:
            raise TimeoutError(f"nothing came back in {seconds} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(seconds)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return limit


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Return a function that opens a page in headless Chromium and returns what that prints."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")

    def open_page(page: Path, *flags: str) -> str:
        done = subprocess.run(
            [
                *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *("--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"),
                *("--virtual-time-budget=3000", *flags, page.as_uri()),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode != 0:
            pytest.skip(f"Chromium does not start here: {done.stderr.strip()[-200:]}")
        return done.stdout

    return open_page


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """Return a function that writes an RGB image, moved by one column more in every frame, as a video."""
    import cv2
    import numpy as np

    def write(path: Path, image: Any, frames: int, *, fps: float = 12.0, codec: str = "mp4v") -> Path:
        height, width = image.shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (width, height))
        for shift in range(frames):
            writer.write(np.ascontiguousarray(np.roll(image, shift, axis=1)[:, :, ::-1]))
        writer.release()
        return path

    return write

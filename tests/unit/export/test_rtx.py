"""Engines of TensorRT for RTX, built by NVIDIA's compiler, which needs no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, ExportError, UsageError
from rtdetr_cli.export import tensorrt
from rtdetr_cli.export.artefacts import Artefact, Notice
from rtdetr_cli.export.options import ExportOptions, choose_formats
from rtdetr_cli.export.run import export_events, export_model
from rtdetr_cli.infer.onnx_backend import OnnxBackend
from rtdetr_cli.infer.tensorrt_backend import (
    RTX_VERSION,
    TensorrtBackend,
    check_rtx_engine,
    is_rtx_engine,
)
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.binding import read_export_header
from rtdetr_cli.weights.header import ModelHeader

rtx = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")

Loaded = tuple[RTDETR, ModelHeader]
SHAPES = {"images": ((1, 3, 96, 128), (8, 3, 96, 128)), "orig_target_sizes": ((1, 2), (8, 2))}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return a function that gives this machine a GPU of a compute capability."""

    def install(major: int, minor: int) -> None:
        monkeypatch.setattr(tensorrt, "engine_device", lambda device: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return install


def test_an_engine_for_other_machines(
    half_graph: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is half precision, has the header that it needs, and its verification is left to the target."""
    monkeypatch.setattr(tensorrt, "engine_device", lambda device: None)
    options = ExportOptions(choose_formats(rtx=True), dynamic=True, targets=("sm86", "sm120"))
    events = list(export_events(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu"))
    graph, engine = [event for event in events if isinstance(event, Artefact)]
    assert graph.verdict is not None
    assert (engine.format, engine.precision, engine.path.name) == ("tensorrt", "fp16", "m-rtx.engine")
    assert engine.verdict is None
    assert "no GPU that it is built for (sm86, sm120)" in engine.pending
    assert any("must be verified on the target" in event.message for event in events if isinstance(event, Notice))
    assert any(isinstance(event, tensorrt.BuildProgress) for event in events)
    assert engine.operators["half"] > 3 * engine.operators["float"] > 0
    header = read_export_header(engine.path)
    assert header.names == loaded[1].names
    assert header.extra["targets"] == ["sm86", "sm120"]
    assert header.extra["gate"] == {"passed": None}
    assert header.extra["versions"][RTX_VERSION] == rtx.__version__
    assert is_rtx_engine(engine.path, header)
    assert is_rtx_engine(engine.path, None)
    with pytest.raises(EnvironmentProblem, match="needs a CUDA device"):
        TensorrtBackend(engine.path, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "m-fp16.onnx",
        "m-rtx.engine",
        "m-rtx.engine.json",
        "parity.json",
    ]


def test_an_engine_for_this_machine(
    half_graph: Artefact,
    loaded: Loaded,
    dataset: Dataset,
    gpu: Callable[[int, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is verified at once; only running it, which needs the GPU, is left to ONNX Runtime here."""
    gpu(8, 6)
    opened: list[tuple[str, torch.device]] = []

    def open_engine(path: Path, device: torch.device) -> OnnxBackend:
        opened.append((path.name, device))
        return OnnxBackend(half_graph.path, device="cpu")

    monkeypatch.setattr("rtdetr_cli.export.run.TensorrtBackend", open_engine)
    options = ExportOptions(("fp16", "rtx-fp16"), dynamic=True, targets=tensorrt.rtx_targets())
    images = dataset.subset([0, 1])
    events = export_events(*loaded, tmp_path, options, images=images, stem="m", device="cpu")
    *_, engine = [event for event in events if isinstance(event, Artefact)]
    assert engine.passed, engine.verdict.summary
    assert not engine.pending
    assert opened == [("m-rtx.unverified.engine", torch.device("cuda", 0))]
    header = read_export_header(engine.path)
    assert header.extra["targets"] == ["sm86"]
    assert header.extra["gate"]["passed"] is True


def test_a_float32_graph_is_refused(exported: dict[str, Artefact], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not half precision: 0 of"):
        tensorrt.build_engine(exported["onnx"].path, tmp_path / "m.engine", shapes=SHAPES, targets=["sm89"])
    assert not list(tmp_path.iterdir())


def test_the_compiler_gives_its_reason(exported: dict[str, Artefact], tmp_path: Path) -> None:
    """Turing has no float32 matrix products, which the islands for later GPUs contain."""
    with pytest.raises(ExportError, match=r"cannot build the engine: .*FP32 GEMM is not supported"):
        tensorrt.build_engine(exported["fp16"].path, tmp_path / "m.engine", shapes=SHAPES, targets=["sm75"])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot read broken.onnx: \S"):
        tensorrt.build_engine(broken, tmp_path / "m.engine", shapes={}, targets=["sm89"])


def test_targets(gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "engine_device", lambda device: None)
    every = tensorrt.rtx_targets()
    assert {"sm86", "sm89", "sm120"} <= set(every)
    assert tensorrt.TURING not in every
    assert tensorrt.rtx_targets("SM89, sm86,sm89") == ("sm89", "sm86")
    assert tensorrt.rtx_targets("sm75") == ("sm75",)
    assert tensorrt.runs_here(every) is None
    gpu(8, 9)
    assert tensorrt.rtx_targets() == ("sm89",)
    assert tensorrt.runs_here(["sm86", "sm89"]) == torch.device("cuda", 0)
    assert tensorrt.runs_here(["sm86"]) is None
    gpu(9, 0)
    with pytest.raises(EnvironmentProblem, match=r"does not support the GPU of this machine \(sm90\)"):
        tensorrt.rtx_targets()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sm87", "does not know 'sm87'", "sm86 (RTX 30)"),
        ("sm86,", "does not know ''", "sm86 (RTX 30)"),
        ("rtx4090", "does not know 'rtx4090'", "sm89 (RTX 40)"),
        ("sm75,sm86", "needs an engine of its own", "--target sm86, and --target sm75 --out DIR"),
    ],
)
def test_targets_that_are_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tensorrt.rtx_targets(text)
    assert hint in caught.value.hint


def test_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "__version__", "1.2.0.54")
    with pytest.raises(EnvironmentProblem, match=r"1\.2\.0\.54 is too old: version 1\.7 is needed") as caught:
        tensorrt.rtx_targets()
    assert caught.value.code == "tensorrt-version"


def test_without_the_package(
    rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed before anything is written."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    ran = rtdetr("export", shapes_model, "--trt-fp16", "--rtx", "--no-gate", "--out", tmp_path / "out", code=7)
    assert "pip install 'rtdetr-cli[rtx]'" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "sm86"], "add --rtx"),
        (["--rtx", "--target", "sm1"], "does not know"),
        (["--rtx", "--preprocess-in-graph"], "an engine cannot be combined"),
    ],
)
def test_refusals(
    rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    rtdetr("export", shapes_model, "--no-gate", "--out", tmp_path / "out", *words, code=2, err=message)
    assert not (tmp_path / "out").exists()


def test_an_engine_of_another_version_or_gpu() -> None:
    extra = {"versions": {RTX_VERSION: "1.7.1"}, "targets": ["sm86", "sm89"]}
    path, header = Path("m-rtx.engine"), ModelHeader(("a",), (1,), (96, 128), extra=extra)
    check_rtx_engine(path, header, "1.7.1", "sm86")
    with pytest.raises(EnvironmentProblem, match=r"was built by TensorRT for RTX 1\.7\.1 .*; 1\.8\.0 is installed"):
        check_rtx_engine(path, header, "1.8.0", "sm86")
    with pytest.raises(EnvironmentProblem, match="was built for sm86, sm89; this GPU is sm120") as caught:
        check_rtx_engine(path, header, "1.7.1", "sm120")
    assert caught.value.hint.endswith("--rtx --target sm120")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in preset_names() if name != "tiny"])
def test_presets(name: str, tmp_path: Path) -> None:
    """Random weights do: the types are in the graph."""
    model = build_detector(load_preset(name).model, num_classes=4).eval()
    header = ModelHeader(("a", "b", "c", "d"), (1, 2, 3, 4), (640, 640), layers=model.layers, queries=model.queries)
    options = ExportOptions(choose_formats(rtx=True), targets=("sm86", "sm120"))
    _, engine = export_model(model, header, tmp_path, options, stem=name)
    assert engine.operators["half"] > 2 * engine.operators["float"] > 0

"""Building engines, with a strict stand-in for TensorRT 10 and 11."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, ExportError, ModelError
from rtdetr_cli.export import compare, tensorrt
from rtdetr_cli.export.artefacts import Artefact, Notice
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.run import ExportEvent, export_events, export_model
from rtdetr_cli.export.tensorrt import BuildProgress
from rtdetr_cli.infer.graph import TensorSpec
from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.binding import header_path, read_export_header
from rtdetr_cli.weights.header import ModelHeader

Loaded = tuple[RTDETR, ModelHeader]
Export = Callable[[], list[ExportEvent]]
VERSIONS = ["10.16.1", "11.4.0"]
SHAPES = {"images": ((1, 3, 96, 128), (4, 3, 96, 128)), "orig_target_sizes": ((1, 2), (4, 2))}


@pytest.fixture
def use(standin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that replaces the package by a stand-in, and the GPU by the CPU."""

    def replace_package(version: str, **options: Any) -> ModuleType:
        module: ModuleType = standin.make(version, **options)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(tensorrt, "engine_device", lambda device: torch.device("cpu"))
        return module

    return replace_package


@pytest.fixture
def export(half_graph: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path) -> Export:
    """Return a function that exports the float16 graph and its engine."""
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True, batch=4)
    return lambda: list(export_events(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_verified_engine(version: str, use: Any, export: Export, loaded: Loaded, tmp_path: Path) -> None:
    """It is strongly typed, with the profile, the timing cache and the header that it needs."""
    module = use(version)
    events: list[ExportEvent] = []
    for _ in range(2):
        module.log.clear()
        events = export()
        engine = events[-1]
        assert isinstance(engine, Artefact)
        assert engine.verdict.passed, engine.verdict.summary
    assert (engine.format, engine.precision, engine.path.name) == ("tensorrt", "fp16", "m.engine")
    flags = dict(module.log)["network flags"]
    strongly_typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert flags == (0 if version.startswith("11") else strongly_typed)
    built = dict(module.log)["built"]
    assert built["typed"]
    assert built["shapes"]["images"] == ((1, 3, 96, 128), (8, 3, 96, 128), (8, 3, 96, 128))
    assert built["shapes"]["orig_target_sizes"] == ((1, 2), (8, 2), (8, 2))
    assert not built["tf32"]
    assert dict(module.log)["timing cache"] == b"+1"  # of the first build
    steps = [event for event in events if isinstance(event, BuildProgress)]
    assert steps == [BuildProgress("Building engine", 1, 2), BuildProgress("Building engine", 2, 2)]
    assert engine.operators["half"] > engine.operators["float"] > 0
    header = TensorrtBackend(engine.path, device=torch.device("cpu")).header
    assert header.names == loaded[1].names
    assert header.extra["gate"]["passed"] is True
    assert header.extra["versions"]["tensorrt"] == version
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "m-fp16.onnx",
        "m.engine",
        "m.engine.json",
        "parity.json",
        "tensorrt.cache",
    ]


def test_an_engine_that_does_not_open(use: Any, tmp_path: Path) -> None:
    """TensorRT does not tell an engine of another version or GPU from a truncated one."""
    use(VERSIONS[0])
    path = tmp_path / "m.engine"
    path.write_bytes(b"an engine of another GPU")
    with pytest.raises(ModelError, match="was built by another version or for another GPU") as caught:
        TensorrtBackend(path, device=torch.device("cpu"))
    assert "build it again on this machine" in caught.value.hint


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_that_is_not_half_precision(version: str, use: Any, export: Export, tmp_path: Path) -> None:
    """A builder that ignores the types of the graph."""
    use(version, precision="single")
    with pytest.raises(ExportError, match="not half precision: 0 of"):
        export()
    left = {p.name for p in tmp_path.iterdir()}
    assert "m-fp16.onnx" in left
    assert not {"m.engine", "m.unverified.engine", "m.failed.engine"} & left


@pytest.mark.parametrize(
    ("options", "message"),
    [({"refuse": "no importer for Foo"}, "no importer for Foo"), ({"plan": False}, "cannot build the engine")],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_that_cannot_be_built(
    version: str, options: dict[str, Any], message: str, use: Any, exported: dict[str, Artefact], tmp_path: Path
) -> None:
    use(version, **options)
    engine = tmp_path / "m.engine"
    with pytest.raises(ExportError, match=message):
        tensorrt.build_engine(exported["fp16"].path, engine, shapes=SHAPES)


def test_without_tensorrt(export: Export, loaded: Loaded, tmp_path: Path) -> None:
    """The verified graph stays, and the hint has the command for another machine."""
    with pytest.raises(EnvironmentProblem) as caught:
        export()
    graph, engine = tmp_path / "m-fp16.onnx", tmp_path / "m.engine"
    assert "TensorRT is not installed" in caught.value.message
    assert str(graph) in caught.value.message
    build, copy, check = caught.value.hint.splitlines()
    assert build.endswith(
        f"trtexec --onnx={graph} --saveEngine={engine} --stronglyTyped"
        " --minShapes=images:1x3x96x128,orig_target_sizes:1x2"
        " --optShapes=images:8x3x96x128,orig_target_sizes:8x2"
        " --maxShapes=images:8x3x96x128,orig_target_sizes:8x2"
    )
    assert str(header_path(engine)) in copy
    assert f"rtdetr eval {engine} --data" in check
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-fp16.onnx", "m.engine.json", "parity.json"]
    header = read_export_header(engine)
    assert (header.names, header.category_ids) == (loaded[1].names, loaded[1].category_ids)
    assert header.thresholds == loaded[1].thresholds
    assert header.extra["gate"] == {"passed": None}
    assert header.extra["format"] == "tensorrt"
    assert json.loads((tmp_path / "parity.json").read_text())["artefacts"][0]["gate"]["passed"]


def test_an_earlier_engine_keeps_its_header(export: Export, tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"earlier")
    header_path(engine).write_text("earlier header")
    with pytest.raises(EnvironmentProblem):
        export()
    assert not engine.exists()
    assert (tmp_path / "m.previous.engine").read_bytes() == b"earlier"
    assert header_path(tmp_path / "m.previous.engine").read_text() == "earlier header"


def test_no_engine_of_a_graph_that_failed_verification(
    use: Any, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("11.4.0")
    (tmp_path / "m.engine").write_bytes(b"earlier")
    monkeypatch.setitem(compare.LIMITS, "fp16", replace(compare.LIMITS["fp16"], matched=1.5))
    events = export()
    assert [event.passed for event in events if isinstance(event, Artefact)] == [False]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-fp16.failed.onnx", "m.previous.engine", "parity.json"]
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any("skipped" in notice for notice in notices)
    assert any(n.startswith("renamed m.engine of an earlier export to m.previous.engine") for n in notices)


def test_a_known_fault_of_a_version(
    use: Any, half_graph: Artefact, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint is another graph, not trtexec with the same graph."""
    use("11.4.0")
    monkeypatch.setitem(half_graph.operators, "GridSample", 3)
    with pytest.raises(EnvironmentProblem, match="GridSample") as caught:
        export()
    assert caught.value.code == "tensorrt-fault"
    assert "without --gridsample" in caught.value.hint
    assert "trtexec" not in caught.value.hint
    assert not header_path(tmp_path / "m.engine").exists()


def test_the_example_needs_the_header(tmp_path: Path) -> None:
    engine, image = tmp_path / "m.engine", tmp_path / "a.png"
    engine.touch()
    image.touch()
    script = Path(__file__).resolve().parents[3] / "examples/tensorrt_only.py"
    ran = subprocess.run([sys.executable, script, engine, image], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [f"{header_path(engine)} is missing: copy it next to the engine"]


def test_without_a_gpu(use: Any, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    use("11.4.0")
    monkeypatch.setattr(tensorrt, "engine_device", lambda device: None)
    with pytest.raises(EnvironmentProblem, match="no CUDA device"):
        export()


def test_a_fixed_batch_needs_no_range_of_shapes() -> None:
    shapes = tensorrt.profile_shapes([TensorSpec("images", np.dtype(np.float32), (2, 3, 96, 128))], max_batch=2)
    assert "Shapes" not in tensorrt.trtexec_command(Path("m.onnx"), Path("m.engine"), shapes)


@pytest.mark.parametrize(
    ("version", "operators", "message"),
    [
        ("8.6.1", {}, "too old"),
        ("10.0.1", {"Conv": 3, "Gather": 2}, ""),
        ("10.13.3", {"GridSample": 3}, ""),
        ("10.16.1.11", {"Conv": 3}, ""),
        ("11.4.0.106", {"Conv": 3}, ""),
        ("10.14.1", {"GridSample": 3}, "GridSample"),
        ("11.0.0", {"GridSample": 3}, "GridSample"),
    ],
)
def test_old_version_and_known_faults(
    version: str, operators: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is refused only for an operator that the graph has."""
    package = ModuleType("tensorrt")
    package.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    monkeypatch.setattr(tensorrt, "engine_device", lambda device: torch.device("cpu"))
    if not message:
        assert tensorrt.require_tensorrt("auto", operators) == (version, torch.device("cpu"))
        return
    with pytest.raises(EnvironmentProblem, match=message):
        tensorrt.require_tensorrt("auto", operators)


@pytest.mark.parametrize(
    ("device", "expected"), [("auto", "cuda"), ("1", "cuda:1"), ("cuda:1", "cuda:1"), ("cpu", "cuda:0")]
)
def test_engines_are_built_on_the_chosen_gpu(device: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` verifies on the CPU; the engine still needs a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tensorrt.engine_device(device) == torch.device(expected)


def test_the_build_thread_runs_on_the_chosen_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(tensorrt, "build_engine", lambda *args, **options: {"half": len(chosen)})
    events = tensorrt.build_in_thread(tmp_path, tmp_path, device=torch.device("cuda", 1))
    with pytest.raises(StopIteration) as stop:
        next(events)
    assert stop.value.value == {"half": 1}
    assert chosen == [torch.device("cuda", 1)]


def layer(output: str, *inputs: str, weights: str = "", key: str = "DataType") -> dict[str, Any]:
    """Return what the inspector says about a layer: the types of its tensors, in the words of one of its versions."""
    facts: dict[str, Any] = {"Inputs": [{key: kind} for kind in inputs], "Outputs": [{key: output}] if output else []}
    return {**facts, "Weights": {"Type": weights, "Count": 9408}} if weights else facts


@pytest.mark.parametrize(
    ("layers", "half", "single", "other"),
    [
        (
            [
                *(layer(f"Row major linear {kind} format", key="Format/Datatype") for kind in ("FP16", "FP32")),
                *(layer(kind, key="Format/Datatype") for kind in ("Half", "Int64", "")),
            ],
            *(2, 1, 2),
        ),
        ([layer("Half"), layer("Float")], 1, 1, 0),
        # A dynamic batch: only the weights have a type.
        ([layer("N/A due to dynamic shapes", weights=kind) for kind in ("Half", "Half", "Float")], 2, 1, 0),
        # Computed in float32, with float16 outputs.
        ([layer("Half", "Float", weights="Float"), layer("Half", "Float"), layer("Half", "Half", "Float")], 1, 1, 1),
        ([layer("Float", "Half")], 0, 0, 1),
        (["names only", "no types"], 0, 0, 2),
    ],
)
def test_count_types(layers: list[Any], half: int, single: int, other: int) -> None:
    assert tensorrt.count_types(layers) == {"half": half, "float": single, "other": other}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}', '{"Layers": ["names only"]}'])
def test_an_engine_without_types(text: str, use: Any, exported: dict[str, Artefact], tmp_path: Path) -> None:
    """Whatever the inspector says instead of types, the engine is refused."""
    use("11.4.0", information=text)
    with pytest.raises(ExportError, match=r"types|half precision"):
        tensorrt.build_engine(exported["fp16"].path, tmp_path / "m.engine", shapes=SHAPES)
    assert not (tmp_path / "m.engine").exists()


def test_the_standin_is_strict(standin: ModuleType) -> None:
    """It lacks what version 11 has removed, and what never existed."""
    ten, eleven = standin.make("10.16.1"), standin.make("11.4.0")
    assert hasattr(ten.BuilderFlag, "FP16")
    assert not hasattr(eleven.BuilderFlag, "FP16")
    assert not hasattr(eleven.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    builder = eleven.Builder(eleven.Logger())
    with pytest.raises(AttributeError):
        builder.build_engine()
    with pytest.raises(standin.NotSimulated):
        builder.is_network_supported()
    with pytest.raises(AttributeError):
        builder.create_builder_config().max_workspace_size = 1


@pytest.mark.gpu
def test_real_tensorrt(loaded: Loaded, dataset: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True, batch=4)
    artefacts = export_model(*loaded, tmp_path, options, images=dataset)
    assert all(a.passed for a in artefacts), [a.verdict and a.verdict.summary for a in artefacts]

"""The TensorRT path, walked whole against a strict stand-in of versions 10 and 11; no real engine is built here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, ExportError
from rtdetr_cli.export import gate, run, tensorrt
from rtdetr_cli.export.gate import Interface, TensorSpec
from rtdetr_cli.export.graph import ExportOptions
from rtdetr_cli.export.run import Artefact, Draft, Work, export_model, files_of, marked
from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend, header_path, read_engine_header
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader

Loaded = tuple[RTDETR, ModelHeader]
VERSIONS = ["10.16.1", "11.4.0"]
DYNAMIC = Interface(
    (TensorSpec("images", "float32", (None, 3, 96, 128)), TensorSpec("orig_target_sizes", "int64", (None, 2))), ()
)


@pytest.fixture
def use(standin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a stand-in where the package would be, and the CPU where the GPU would be."""

    def put(version: str, **facts: Any) -> ModuleType:
        module: ModuleType = standin.make(version, **facts)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(run, "engine_device", lambda: torch.device("cpu"))
        return module

    return put


@pytest.fixture
def ready(exported: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> Artefact:
    """Take the typed graph that has been exported already."""
    source = exported["fp16"]

    def draft(work: Work) -> Draft:
        final = work.out / f"{work.stem}-fp16.onnx"
        path = marked(final, "unverified")
        path.write_bytes(source.path.read_bytes())
        return Draft(path, final, "onnx", "fp16", lambda path, verdict: None, operators=source.operators)

    monkeypatch.setitem(run.DRAFTS, "fp16", draft)
    return source


@pytest.mark.parametrize("version", VERSIONS)
def test_engine_through_the_gate(
    version: str, use: Any, ready: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path
) -> None:
    """Built strongly typed from the typed graph, inspected, judged at batch 1 and N, and named."""
    module = use(version)
    told: list[tuple[str, int, int]] = []
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True, batch=4)

    def progress(phase: str, done: int, steps: int) -> None:
        told.append((phase, done, steps))

    for _ in range(2):
        module.log.clear()
        made = export_model(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu", build_progress=progress)
        engine = made[1]
        assert engine.verdict is not None
        assert engine.verdict.passed, engine.verdict.summary
    assert (engine.format, engine.precision, engine.path.name) == ("tensorrt", "fp16", "m.engine")
    flags = dict(module.log)["network flags"]
    strong = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert flags == (0 if version.startswith("11") else strong)
    built = dict(module.log)["built"]
    assert built["typed"]
    assert built["shapes"]["images"] == ((1, 3, 96, 128), (8, 3, 96, 128), (8, 3, 96, 128))
    assert built["shapes"]["orig_target_sizes"] == ((1, 2), (8, 2), (8, 2))  # the input that others forget
    assert dict(module.log)["timing cache"] == b"+1"  # of the first build
    assert told == [("Building engine", 1, 2), ("Building engine", 2, 2)] * 2
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


@pytest.mark.parametrize("version", VERSIONS)
def test_engine_that_is_not_half(
    version: str, use: Any, ready: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path
) -> None:
    """A builder that ignores the types, as tools of this family did: refused, the graph stays, nothing else."""
    use(version, precision="single")
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True)
    with pytest.raises(ExportError, match="not half precision: 0 of"):
        export_model(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu")
    left = {p.name for p in tmp_path.iterdir()}
    assert "m-fp16.onnx" in left
    assert not {"m.engine", "m.unverified.engine", "m.failed.engine"} & left


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"refuse": "no importer for Foo"}, "no importer for Foo"), ({"plan": False}, "could not build")],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_builder_that_refuses(
    version: str, facts: dict[str, Any], said: str, use: Any, exported: dict[str, Artefact], tmp_path: Path
) -> None:
    use(version, **facts)
    with pytest.raises(ExportError, match=said):
        tensorrt.build_engine(exported["fp16"].path, tmp_path / "m.engine", interface=DYNAMIC, operators={}, most=4)


def test_without_tensorrt(ready: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path) -> None:
    """Exit 7, the verified graph left ready, and the exact command for the machine that has it."""
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True)
    with pytest.raises(EnvironmentProblem) as caught:
        export_model(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu")
    graph, engine = tmp_path / "m-fp16.onnx", tmp_path / "m.engine"
    assert caught.value.exit_code == 7
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
    header = read_engine_header(engine)
    assert header is not None
    assert (header.names, header.category_ids) == (loaded[1].names, loaded[1].category_ids)
    assert header.thresholds == loaded[1].thresholds
    assert header.extra["gate"] == {"passed": None}  # nobody has seen that engine
    assert header.extra["format"] == "tensorrt"
    assert json.loads((tmp_path / "parity.json").read_text())["artefacts"][0]["gate"]["passed"]


def test_older_engine_does_not_get_the_new_header(
    ready: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path
) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"older")
    header_path(engine).write_text("older header")
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True)
    with pytest.raises(EnvironmentProblem):
        export_model(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu")
    assert not engine.exists()
    assert (tmp_path / "m.previous.engine").read_bytes() == b"older"
    assert header_path(tmp_path / "m.previous.engine").read_text() == "older header"


def test_no_engine_of_a_graph_that_failed(
    use: Any, ready: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a new one, nor an older one under its name."""
    use("11.4.0")
    (tmp_path / "m.engine").write_bytes(b"older")
    monkeypatch.setitem(gate.LIMITS, "fp16", replace(gate.LIMITS["fp16"], matched=1.5))
    told: list[str] = []
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True)
    made = export_model(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu", tell=told.append)
    assert [a.passed for a in made] == [False]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-fp16.failed.onnx", "m.previous.engine", "parity.json"]
    assert "m.engine of an earlier export is now m.previous.engine" in "\n".join(told)


def test_fault_of_a_version_is_no_reason_to_build_elsewhere(
    use: Any, ready: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint leads to a graph that the version computes rightly, not to trtexec with the same graph."""
    use("11.4.0")
    monkeypatch.setitem(ready.operators, "GridSample", 3)
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True)
    with pytest.raises(EnvironmentProblem, match="GridSample") as caught:
        export_model(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu")
    assert caught.value.code == "tensorrt-fault"
    assert "without --gridsample" in caught.value.hint
    assert "trtexec" not in caught.value.hint
    assert not header_path(tmp_path / "m.engine").exists()


def test_example_without_the_header(tmp_path: Path) -> None:
    engine, image = tmp_path / "m.engine", tmp_path / "a.png"
    engine.touch()
    image.touch()
    script = Path(__file__).resolve().parents[3] / "examples/tensorrt_only.py"
    ran = subprocess.run([sys.executable, script, engine, image], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [f"{header_path(engine)} is not there: copy it beside the engine"]


def test_without_a_gpu(
    use: Any, ready: Artefact, loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("11.4.0")
    monkeypatch.setattr(run, "engine_device", lambda: None)
    options = ExportOptions(formats=("fp16", "trt-fp16"))
    with pytest.raises(EnvironmentProblem, match="no CUDA device") as caught:
        export_model(*loaded, tmp_path, options, images=dataset, stem="m", device="cpu")
    assert "Shapes" not in caught.value.hint  # a fixed batch needs none


def test_old_version_and_known_faults() -> None:
    """Refused for what is in this graph, and for nothing else."""

    def package(version: str) -> Any:
        module = ModuleType("tensorrt")
        module.__version__ = version  # type: ignore[attr-defined]
        return module

    with pytest.raises(EnvironmentProblem, match="too old"):
        tensorrt.refuse_version(package("8.6.1"), {})
    for version in ("10.0.1", "10.13.3", "10.16.1.11", "11.4.0.106"):
        tensorrt.refuse_version(package(version), {"Conv": 3, "Gather": 2})
    tensorrt.refuse_version(package("10.13.3"), {"GridSample": 3})
    for version in ("10.14.1", "11.0.0"):
        with pytest.raises(EnvironmentProblem, match="GridSample") as caught:
            tensorrt.refuse_version(package(version), {"GridSample": 3})
        assert "without --gridsample" in caught.value.hint


@pytest.mark.parametrize(
    ("information", "counts"),
    [
        (
            {
                "Layers": [
                    {"Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
                    {"Outputs": [{"Format/Datatype": "Half"}]},
                    {"Outputs": [{"Format/Datatype": "Row major linear FP32 format"}]},
                    {"Outputs": [{"Format/Datatype": "Int64"}]},
                    {"Outputs": []},
                ],
                "Bindings": ["images"],
            },
            {"half": 2, "float": 1, "other": 2},
        ),
        (
            {
                "Layers": [
                    {"Outputs": [{"Format": "Row major linear FP16 format (kLINEAR)", "DataType": "Half"}]},
                    {"Outputs": [{"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Float"}]},
                ],
                "I/O Tensors": [],
            },
            {"half": 1, "float": 1, "other": 0},
        ),
        (  # an open batch: only the weights tell
            {
                "Layers": [
                    {
                        "Weights": {"Type": kind, "Count": 9408},
                        "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}],
                    }
                    for kind in ("Half", "Half", "Float")
                ]
            },
            {"half": 2, "float": 1, "other": 0},
        ),
        (  # computed in float32, and given away as half
            {
                "Layers": [
                    {
                        "Inputs": [{"DataType": "Float"}],
                        "Weights": {"Type": "Float"},
                        "Outputs": [{"DataType": "Half"}],
                    },
                    {"Inputs": [{"DataType": "Float"}], "Outputs": [{"DataType": "Half"}]},
                    {"Inputs": [{"DataType": "Half"}], "Outputs": [{"DataType": "Float"}]},
                    {"Inputs": [{"DataType": "Half"}, {"DataType": "Float"}], "Outputs": [{"DataType": "Half"}]},
                ]
            },
            {"half": 1, "float": 1, "other": 2},
        ),
        ({"Layers": ["names only", "no types"]}, {"half": 0, "float": 0, "other": 2}),
    ],
)
def test_types_of_an_engine(information: dict[str, Any], counts: dict[str, int]) -> None:
    assert tensorrt.count_types(json.dumps(information)) == counts


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}'])
def test_engine_that_says_nothing(text: str) -> None:
    with pytest.raises(ExportError):
        tensorrt.refuse_single(tensorrt.count_types(text))


def test_standin_is_strict(standin: ModuleType) -> None:
    """What version 11 has lost is not there, and what nobody ever had either."""
    ten, eleven = standin.make("10.16.1"), standin.make("11.4.0")
    assert hasattr(ten.BuilderFlag, "FP16")
    assert not hasattr(eleven.BuilderFlag, "FP16")
    assert not hasattr(eleven.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    builder = eleven.Builder(eleven.Logger())
    with pytest.raises(AttributeError):
        builder.build_engine()
    with pytest.raises(standin.NotActedOut):
        builder.is_network_supported()
    with pytest.raises(AttributeError):
        builder.create_builder_config().max_workspace_size = 1


def test_files_of_an_engine(tmp_path: Path) -> None:
    assert files_of(tmp_path / "m.engine") == [header_path(tmp_path / "m.engine"), tmp_path / "m.engine"]


@pytest.mark.gpu
def test_real_tensorrt(loaded: Loaded, dataset: Dataset, tmp_path: Path) -> None:
    """The whole path on a GPU, where TensorRT is installed."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    options = ExportOptions(formats=("fp16", "trt-fp16"), dynamic=True, batch=4)
    made = export_model(*loaded, tmp_path, options, images=dataset)
    assert all(a.passed for a in made), [a.verdict and a.verdict.summary for a in made]

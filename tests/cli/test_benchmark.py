"""`rtdetr benchmark`: tables, files, JSON and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rtdetr_cli.infer.tensorrt_backend import TensorrtBackend
from rtdetr_cli.infer.timing import Spread
from rtdetr_cli.workflows import benchmark
from rtdetr_cli.workflows.benchmark_report import Row


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out, the results go to the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def untrained_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rtdetr_cli.datasets.generate import generate_dataset

    folder = tmp_path_factory.mktemp("benchmark") / "shapes"
    generate_dataset(folder, train=2, val=6, imgsz=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def model(untrained_data: Path, write_untrained: Callable[..., Path]) -> Path:
    return write_untrained(untrained_data.parent / "model.safetensors", untrained_data, (64, 64))


def test_two_backends(rtdetr: Callable[..., Any], model: Path, untrained_data: Path) -> None:
    ran = rtdetr(
        *("benchmark", model, "--data", untrained_data, "--backends", "torch,onnx"),
        *("--warmup", 1, "--runs", 3, "--threads", 1, "--json"),
        code=0,
    )
    torch_row, onnx_row = ran.json["rows"]
    assert (torch_row["backend"], onnx_row["backend"]) == ("torch", "onnx")
    assert onnx_row["ap"] == pytest.approx(torch_row["ap"], abs=0.02)
    assert torch_row["difference"] is None
    assert onnx_row["difference"]["value"] == pytest.approx(onnx_row["ap"] - torch_row["ap"])
    for row in ran.json["rows"]:
        times = row["times"]
        assert set(times) == {"preprocess", "network", "postprocess", "total"}
        assert all(0 < part["median"] <= part["p90"] for part in times.values())
        assert times["network"]["median"] < times["total"]["median"]
    assert ran.json["environment"]["versions"]["torch"]
    assert ran.json["front"]


def test_one_failure_does_not_lose_the_other_rows(
    rtdetr: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that the runtime raises; rows are printed as they are measured, and INT8 among them."""
    real_export = benchmark._export

    def export(plan: Any, point: Any, *args: Any) -> Path:
        if point.backend == "onnx":
            raise ValueError("the runtime broke\nin many lines")
        return real_export(plan, point, *args)

    monkeypatch.setattr(benchmark, "_export", export)
    words = ["--backends", "torch,onnx,onnx-int8", "--warmup", 0, "--runs", 1, "--threads", 1]
    ran = rtdetr("benchmark", model, "--data", model.parent / "shapes", *words, "--json", code=1)
    assert [(row["backend"], row["precision"]) for row in ran.json["rows"]] == [("torch", "fp32"), ("onnx", "int8")]
    (failed,) = ran.json["failed"]
    assert (failed["backend"], failed["error"]) == ("onnx", "ValueError: the runtime broke")
    lines = ran.err.splitlines()
    measured = [next(i for i, line in enumerate(lines) if text in line) for text in ("torch fp32", "onnx int8")]
    assert measured[0] < lines.index("warning: onnx failed: ValueError: the runtime broke") < measured[1]


def test_int8_needs_images_to_calibrate_on(rtdetr: Callable[..., Any], model: Path) -> None:
    """Without --data there are none: exit with code 2 where it was requested, else it is skipped with the reason."""
    rtdetr("benchmark", model, "--backends", "onnx-int8", code=2, err="no images to calibrate INT8 on")
    plan = benchmark.plan_benchmark([model], device="cpu")
    left = plan.without_int8("none")
    assert plan.int8
    assert not left.int8
    assert left.skipped["onnx-int8"] == "none"


def test_a_sweep_writes_a_table_a_document_and_a_plot(
    rtdetr: Callable[..., Any], model: Path, untrained_data: Path, tmp_path: Path
) -> None:
    ran = rtdetr(
        *("benchmark", model, "--data", untrained_data, "--sweep", "layers=1/3,queries=20/100"),
        *("--out", tmp_path / "b", "--warmup", 0, "--runs", 2),
        code=0,
    )
    document = json.loads((tmp_path / "b" / "benchmark.json").read_text())
    settings = [(row["layers"], row["queries"]) for row in document["rows"]]
    assert settings == [(3, 100), (1, 20), (1, 100), (3, 20)]
    lines = (tmp_path / "b" / "benchmark.md").read_text().splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "b" / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
    assert "no other row is both faster and more accurate" in ran.out
    assert "\\n" not in ran.out, "a line break of a title is not escaped"
    assert "median / 90th percentile of 2 runs after 0 warmup runs" in ran.out
    parts = [cell.strip() for cell in lines[0].split("|")][6:10]
    assert parts == [f"{part} ms, median / p90" for part in ("pre", "network", "post", "total")]
    times = document["rows"][0]["times"]
    cells = [cell.strip() for cell in lines[2].split("|")][6:10]
    assert [cell.removesuffix(" ~") for cell in cells] == [
        f"{spread['median']:.1f} / {spread['p90']:.1f}" for spread in times.values()
    ]
    for cell in cells:
        assert cell in ran.out
    assert ran.err.endswith(f"next: rtdetr export {model}\n"), "an untrained model gains nothing from a smaller setting"


def test_the_fastest_accurate_row_is_the_next_step(
    rtdetr: Callable[..., Any], shapes_model: Path, shapes_data: Path
) -> None:
    measured = ("--data", shapes_data, "--split", "val", "--warmup", 0, "--runs", 2, "--threads", 1)
    ran = rtdetr("benchmark", shapes_model, *measured, "--sweep", "queries=1/40", code=0)
    assert ran.err.endswith(f"next: rtdetr export {shapes_model}\n"), "with one query, most objects are missed"
    ran = rtdetr("benchmark", shapes_model, *measured, "--backends", "torch")
    assert ran.err.splitlines()[-1].endswith(f"--weights {shapes_model}")
    assert ran.err.splitlines()[-1].startswith(f"next: rtdetr predict {shapes_data.parent}")


@pytest.mark.parametrize(
    ("int8", "command"), [((10.0, 0.495), "export {} --onnx --int8"), ((10.0, 0.48), "export {} --openvino")]
)
def test_the_next_step_names_all_flags_of_the_best_row(
    rtdetr: Callable[..., Any],
    shapes_model: Path,
    shapes_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    int8: tuple[float, float],
    command: str,
) -> None:
    """INT8 is the fastest, and is suggested if its AP is within a hundredth of the best."""
    measured = [("torch", "fp32", 40.0, 0.5), ("openvino", "fp32", 20.0, 0.5), ("onnx", "int8", *int8)]

    def rows(*_: object, **__: object) -> Iterator[Row]:
        for backend, precision, latency, ap in measured:
            times = {part: Spread(latency, latency) for part in ("preprocess", "network", "postprocess", "total")}
            yield Row(str(shapes_model), backend, precision, "cpu", (96, 128), 2, 40, 1, times, ap)

    monkeypatch.setattr(benchmark, "benchmark", rows)
    ran = rtdetr("benchmark", shapes_model, "--data", shapes_data, "--backends", "torch")
    assert ran.err.endswith(f"next: rtdetr {command.format(shapes_model)}\n")


def test_without_a_dataset_only_latency_is_measured(rtdetr: Callable[..., Any], model: Path) -> None:
    ran = rtdetr("benchmark", model, "--backends", "torch", "--warmup", 0, "--runs", 2, "--batch", 2, "--json", code=0)
    assert "AP is not measured" in ran.err
    (row,) = ran.json["rows"]
    assert row["ap"] is None
    assert not row["front"]
    assert row["pictures_per_second"] == pytest.approx(2000 / row["times"]["total"]["median"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--backends", "torch,coreml"], 2, "unknown backend 'coreml'"),
        (["--backends", ""], 2, "--backends is empty"),
        (["--sweep", "depth"], 2, "'depth' cannot be swept"),
        (["--sweep", "layers,layers"], 2, "is given twice"),
        (["--sweep", "layers=4"], 2, "1 to 3 layers"),
        (["--sweep", "imgsz=100"], 2, "not a multiple of 32"),
        (["--data", "nowhere"], 3, "does not exist"),
        (["--backends", "torch", "--out", "/dev/null/out"], 1, "cannot be written"),
        (["--backends", "torch,tensorrt", "--threads", "2"], 2, "--threads 2 has no effect on TensorRT"),
        (["--backends", "tensorrt", "--device", "cpu"], 2, "does not run on --device cpu"),
    ],
)
def test_refusals(rtdetr: Callable[..., Any], model: Path, words: list[str], code: int, message: str) -> None:
    rtdetr("benchmark", model, *words, code=code, err=message)


def test_a_backend_that_is_not_installed(
    rtdetr: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit with code 7 where it was requested; otherwise it is skipped with the reason."""
    monkeypatch.setitem(benchmark.PACKAGES, "tensorrt", "no_such_package")
    rtdetr("benchmark", model, "--backends", "tensorrt", code=7, err="pip install no_such_package")
    skipped = benchmark.plan_benchmark([model]).skipped
    assert skipped["tensorrt"] == "the package no_such_package is not installed"


@pytest.mark.parametrize(
    ("options", "reason"), [({"threads": 2}, "--threads 2 has no effect"), ({"device": "cpu"}, "--device cpu")]
)
def test_tensorrt_is_skipped_where_options_exclude_it(model: Path, options: dict[str, Any], reason: str) -> None:
    plan = benchmark.plan_benchmark([model], **options)
    assert reason in plan.skipped["tensorrt"]
    assert "tensorrt" not in {point.backend for point in plan.points}


def test_an_unknown_device_is_refused_before_any_work(
    rtdetr: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtdetr_cli.export.run.export_model", lambda *args, **options: pytest.fail("exported"))
    rtdetr("benchmark", model, "--device", "-", code=2, err="'-' is not a device")


@pytest.fixture
def standin_package(standin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    package = standin.make("11.4.0")
    package.__spec__ = ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", package)


@pytest.mark.usefixtures("standin_package")
def test_tensorrt_without_a_gpu_is_refused_before_any_work(
    rtdetr: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtdetr_cli.export.tensorrt.engine_device", lambda device: None)
    monkeypatch.setattr(benchmark, "measure_steadily", lambda *args, **options: pytest.fail("something was measured"))
    rtdetr("benchmark", model, "--backends", "torch,tensorrt", code=7, err="no CUDA device")


@pytest.mark.usefixtures("standin_package")
def test_tensorrt_measures_the_engine_of_the_float16_graph(
    rtdetr: Callable[..., Any], model: Path, untrained_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for TensorRT, on the CPU. The graph stays float32 for speed."""
    cpu = torch.device("cpu")
    monkeypatch.setattr("rtdetr_cli.export.tensorrt.engine_device", lambda device: cpu)
    monkeypatch.setattr("rtdetr_cli.export.tensorrt.refuse_single", lambda layers: None)
    monkeypatch.setattr("rtdetr_cli.export.fp16.traced_program", lambda graph, *args, **options: graph)
    monkeypatch.setattr("rtdetr_cli.export.fp16.halve", lambda program, *args: program)
    monkeypatch.setattr("rtdetr_cli.export.fp16.HalfTwin", lambda *args, **options: None)
    monkeypatch.setattr(benchmark, "open_backend", lambda path, **options: TensorrtBackend(path, device=cpu))
    ran = rtdetr(
        *("benchmark", model, "--data", untrained_data, "--backends", "tensorrt", "--warmup", 0, "--runs", 1, "--json"),
        code=0,
    )
    (row,) = ran.json["rows"]
    assert (row["backend"], row["precision"]) == ("tensorrt", "fp16")
    assert row["ap"] is not None


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("m.onnx", ["--sweep", "layers"], "cannot be swept"),
        ("m.engine", ["--threads", 2], "--threads 2 has no effect"),
    ],
)
def test_refusals_for_exported_models(
    rtdetr: Callable[..., Any], tmp_path: Path, name: str, words: list[object], message: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    rtdetr("benchmark", tmp_path / name, *words, code=2, err=message)

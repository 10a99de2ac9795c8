"""The programs in examples/ that run an export without rtdetr: they are short, and give the same detections."""

from __future__ import annotations

import ast
import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def imported(path: Path) -> set[str]:
    """Return the packages that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("onnxruntime_numpy", {"numpy", "onnxruntime", "PIL"}),
        ("tensorrt_only", {"numpy", "PIL"}),  # and TensorRT, whose package depends on the engine
    ],
)
def test_examples_are_short_and_import_only_what_they_name(name: str, packages: set[str]) -> None:
    path = EXAMPLES / f"{name}.py"
    assert imported(path) == packages
    assert len(path.read_text().splitlines()) < 70


def predicted(rtdetr: Callable[..., Any], model: Path, image: Path) -> list[dict[str, Any]]:
    ran = rtdetr("predict", image, "--weights", model, "--no-save", "--json", "--device", "cpu", code=0)
    detections: list[dict[str, Any]] = ran.json["detections"]
    return detections


def test_onnxruntime_example(rtdetr: Callable[..., Any], shapes_onnx: Path, shapes_data: Path) -> None:
    """What it prints, run as a program: names, ids, scores and boxes of `rtdetr predict`."""
    image = shapes_data.parent / "shapes_02.png"
    command = [sys.executable, EXAMPLES / "onnxruntime_numpy.py", shapes_onnx, image]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [re.fullmatch(r"(\w+) \((\d+)\) (\S+) \[(.*)\]", line) for line in ran.stdout.splitlines()]
    expected = predicted(rtdetr, shapes_onnx, image)
    assert len(lines) == len(expected) > 0
    for line, detection in zip(lines, expected, strict=True):
        assert (line[1], int(line[2])) == (detection["label"], detection["category_id"])
        assert float(line[3]) == pytest.approx(detection["score"], abs=1e-3)
        assert [float(v) for v in line[4].split(",")] == pytest.approx(detection["box_xyxy"], abs=0.06)


@pytest.mark.parametrize("name", ["onnxruntime_numpy.py", "tensorrt_only.py"])
def test_wrong_arguments_give_a_one_line_message(name: str, tmp_path: Path) -> None:
    for words, said in (
        ([], f"{name} MODEL"),
        (["a"], "usage:"),
        (["a", "b", "c"], "usage:"),
        ([str(tmp_path / "gone"), str(tmp_path / "gone.jpg")], "gone is not a file" if "onnx" in name else "usage:"),
    ):
        ran = subprocess.run([sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert said in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


def test_onnxruntime_example_refuses_a_raw_export(
    shapes_onnx: Path, foreign_onnx: Path, shapes_data: Path, tmp_path: Path
) -> None:
    """Its outputs are called what a raw export calls them; and a graph without our header is no traceback either."""
    model = onnx.load(shapes_onnx)
    renamed = {"labels": "logits", "boxes": "boxes_cxcywh"}
    for node in model.graph.node:
        node.output[:] = [renamed.get(o, o) for o in node.output]
        node.input[:] = [renamed.get(i, i) for i in node.input]
    for value in model.graph.output:
        value.name = renamed.get(value.name, value.name)
    onnx.save(model, tmp_path / "raw.onnx")
    for path, said in ((tmp_path / "raw.onnx", "is a raw export"), (foreign_onnx, "has no header")):
        words = [path, shapes_data.parent / "shapes_02.png"]
        ran = subprocess.run(
            [sys.executable, EXAMPLES / "onnxruntime_numpy.py", *words], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 1
        assert said in ran.stderr
        assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("change", ["fixed batch", "no thresholds", "preprocessing inside"])
def test_onnxruntime_example_on_variants(
    change: str,
    load_module: Callable[[Path], ModuleType],
    rtdetr: Callable[..., Any],
    shapes_onnx: Path,
    shapes_data: Path,
    tmp_path: Path,
) -> None:
    from rtdetr_cli.export.onnx import embed, prepend_preprocessing
    from rtdetr_cli.weights.header import ModelHeader

    model = onnx.load(shapes_onnx)
    header = json.loads(next(p.value for p in model.metadata_props if p.key == "rtdetr"))
    if change == "fixed batch":
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2
    elif change == "no thresholds":
        embed(model, ModelHeader.from_json(json.dumps({**header, "thresholds": None})))
    else:
        prepend_preprocessing(model, tuple(header["imgsz"]))
    path = tmp_path / "variant.onnx"
    onnx.save(model, path)
    example = load_module(EXAMPLES / "onnxruntime_numpy.py")
    for image in sorted(shapes_data.parent.glob("*.png"))[:3]:
        found = list(example.detect(*example.load(path), image))
        # The same file in both: with preprocessing inside, one of them resizes before and one in the graph.
        expected = predicted(rtdetr, path, image)
        loose = change == "preprocessing inside"
        assert [f[0] for f in found] == [e["label"] for e in expected]
        for row, detection in zip(found, expected, strict=True):
            assert row[2] == pytest.approx(detection["score"], abs=0.03 if loose else 1e-4)
            assert list(row[3:]) == pytest.approx(detection["box_xyxy"], abs=2 if loose else 0.02)


@pytest.mark.parametrize("version", ["10.16.1", "11.4.0"])
def test_tensorrt_example(
    version: str,
    standin: ModuleType,
    load_module: Callable[[Path], ModuleType],
    rtdetr: Callable[..., Any],
    shapes_onnx: Path,
    shapes_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for TensorRT and libcudart, without a GPU."""
    module = standin.make(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)

    class Cudart:
        held: ClassVar[dict[int, Any]] = {}

        def cudaMalloc(self, pointer: Any, size: ctypes.c_size_t) -> int:
            memory = ctypes.create_string_buffer(size.value)
            pointer._obj.value = ctypes.addressof(memory)
            self.held[ctypes.addressof(memory)] = memory
            return 0

        def cudaMemcpy(self, target: ctypes.c_void_p, source: ctypes.c_void_p, size: ctypes.c_size_t, _: int) -> int:
            ctypes.memmove(target, source, size.value)
            return 0

        def cudaFree(self, pointer: ctypes.c_void_p) -> int:
            del self.held[pointer.value or 0]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Cudart())
    from rtdetr_cli.export.tensorrt import build_engine, profile_shapes
    from rtdetr_cli.infer.onnx_backend import OnnxBackend

    example = load_module(EXAMPLES / "tensorrt_only.py")
    header = json.loads(next(p.value for p in onnx.load(shapes_onnx).metadata_props if p.key == "rtdetr"))
    monkeypatch.setattr("rtdetr_cli.export.tensorrt.refuse_single", lambda layers: None)
    built = tmp_path / "shapes.engine"
    build_engine(shapes_onnx, built, shapes=profile_shapes(OnnxBackend(shapes_onnx).spec.inputs, max_batch=2))
    engine = module.Runtime(module.Logger()).deserialize_cuda_engine(built.read_bytes())
    image = shapes_data.parent / "shapes_02.png"
    found = list(example.detect(engine, header, image))
    expected = predicted(rtdetr, shapes_onnx, image)
    assert len(found) == len(expected) > 0
    for row, detection in zip(found, expected, strict=True):
        assert row[:2] == (detection["label"], detection["category_id"])
        assert row[2] == pytest.approx(detection["score"], abs=1e-4)
        assert list(row[3:]) == pytest.approx(detection["box_xyxy"], abs=0.02)
    assert Cudart.held == {}

    class Raw:
        num_io_tensors = 3

        def get_tensor_name(self, index: int) -> str:
            return ("images", "logits", "boxes_cxcywh")[index]

    with pytest.raises(SystemExit, match="raw export"):
        list(example.detect(Raw(), header, image))


@pytest.mark.slow
def test_quickstart_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    program = (
        f"space = {{}}\nfor source in {sources!r}:\n    exec(source, space)\nassert len(space['detections']) == 4\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "quickstart/annotated.png").is_file()
    assert (tmp_path / "quickstart/runs/tiny-shapes-01/export/best.onnx").is_file()


def test_quickstart_notebook_is_stored_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")

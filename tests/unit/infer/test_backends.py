"""One model in every runtime: the same rows, the same batches, the same errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rtdetr_cli.errors import EnvironmentProblem, ModelError, UsageError
from rtdetr_cli.images.decode import read_image, stretch
from rtdetr_cli.infer.backend import check_model_path, name_classes, open_backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.duplicates import parse_dedupe
from rtdetr_cli.infer.graph import finish_raw
from rtdetr_cli.weights.binding import read_export_header, write_export_header

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images of the size of the network input, and the sizes of the originals."""
SCORE, PIXELS = 1e-4, 0.05  # differences of float32 summation order


@pytest.fixture(scope="module")
def images(shapes_data: Path, shapes: ModuleType) -> Images:
    read = [read_image(p) for p in sorted(shapes_data.parent.glob("*.png"))]
    stretched = np.stack([stretch(p, shapes.IMGSZ) for p in read])
    return stretched, np.array([(p.shape[1], p.shape[0]) for p in read])


@pytest.fixture(scope="module")
def reference(shapes_model: Path, images: Images) -> list[Detections]:
    return open_backend(shapes_model, device="cpu").run(*images)


def unmatched(a: Detections, b: Detections, *, min_score: float = 0.05) -> int:
    """Count the rows of `a` above a score that have no match in `b`."""
    missing = 0
    for box, score, label in zip(a.boxes_xyxy_px, a.scores, a.labels, strict=True):
        if score < min_score:
            continue
        near = (np.abs(b.boxes_xyxy_px - box).max(axis=1) <= PIXELS) & (np.abs(b.scores - score) <= SCORE)
        missing += not np.any(near & (b.labels == label))
    return missing


def assert_same(found: list[Detections], expected: list[Detections]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert b.size_wh == a.size_wh
        assert (b.names, b.category_ids) == (a.names, a.category_ids)
        assert b.boxes_xyxy_px.dtype == b.scores.dtype == np.float32
        assert b.labels.dtype == np.int64
        assert np.all(b.scores[:-1] >= b.scores[1:])
        assert unmatched(a, b) == unmatched(b, a) == 0


def test_reference_finds_something(reference: list[Detections]) -> None:
    assert sum(int((d.scores > 0.5).sum()) for d in reference) >= 16


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_graph_agrees_with_the_model(
    kind: str, reference: list[Detections], images: Images, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue("shapes_onnx" if kind == "onnx" else "shapes_xml")
    backend = open_backend(path, device="cpu", threads=1)
    assert backend.kind == kind
    assert backend.fixed_batch is None
    assert backend.imgsz == (96, 128)
    assert_same(backend.run(*images), reference)
    assert_same(backend.run(images[0][:1], images[1][:1]), reference[:1])


@pytest.mark.parametrize("batch", [1, 3])
def test_images_are_split_and_padded_to_a_fixed_batch(
    batch: int, shapes_onnx: Path, tmp_path: Path, reference: list[Detections], images: Images
) -> None:
    model = onnx.load(shapes_onnx)
    # The graph is dynamic; with fixed inputs onnxruntime accepts no other batch.
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    backend = open_backend(path)
    assert backend.fixed_batch == batch
    assert_same(backend.run(images[0][:7], images[1][:7]), reference[:7])


def foreign_graph(
    path: Path, *, hw: tuple[int | str, int | str] = (64, 96), dtype: int = TensorProto.FLOAT, shuffled: bool = False
) -> Path:
    """Write a graph of the published contract without metadata. It gives three rows; the first score is the mean."""
    boxes = np.array([[[0, 0, 0.5, 0.5], [0.25, 0.25, 1, 1], [0, 0, 1, 1]]], np.float32)
    scores = np.array([[0, 0.25, 0.125]], np.float32)
    constants = {
        "unit": boxes,
        "rest": scores,
        "first": np.array([[1, 0, 0]], np.float32),
        "seven": np.array([[7, 2, 7]], np.int64),
        "axes": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "axes"], ["column"]),
        helper.make_node("Mul", ["column", "first"], ["own"]),
        helper.make_node("Add", ["own", "rest"], ["scores"]),
        helper.make_node("Concat", ["orig_target_sizes", "orig_target_sizes"], ["sizes"], axis=1),
        helper.make_node("Cast", ["sizes"], ["sizes_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["sizes_float", "axes"], ["sizes_row"]),
        helper.make_node("Mul", ["sizes_row", "unit"], ["boxes"]),
        helper.make_node("Identity", ["seven"], ["labels"]),
    ]
    inputs = [
        helper.make_tensor_value_info("images", dtype, ["N", 3, *hw]),
        helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, ["N", 2]),
    ]
    outputs = [
        helper.make_tensor_value_info("labels", TensorProto.INT64, None),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        inputs[::-1] if shuffled else inputs,
        outputs[::-1] if shuffled else outputs,
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_foreign_graph_runs_without_names(tmp_path: Path, dtype: int, shuffled: bool) -> None:
    backend = open_backend(foreign_graph(tmp_path / "foreign.onnx", dtype=dtype, shuffled=shuffled))
    assert backend.imgsz == (64, 96)
    assert backend.header.names == ()
    grey = np.full((1, 64, 96, 3), 51, np.uint8)  # 51 / 255 = 0.2
    (found,) = backend.run(grey, np.array([[200, 100]]))
    # The graph gives 0.2 first, and the backend sorts.
    assert found.scores == pytest.approx([0.25, 0.2, 0.125], abs=1e-3)
    assert found.labels.tolist() == [2, 7, 7]
    assert found.boxes_xyxy_px.tolist() == [[50, 25, 200, 100], [0, 0, 100, 50], [0, 0, 200, 100]]
    assert found.class_names == ("class 2", "class 7", "class 7")
    name_classes(backend, ["a", "b", "c"], [10, 20, 30])
    assert backend.run(grey, np.array([[200, 100]]))[0].class_names == ("c", "class 7", "class 7")


def test_foreign_graph_with_dynamic_size(tmp_path: Path) -> None:
    path = foreign_graph(tmp_path / "open.onnx", hw=("H", "W"))
    assert open_backend(path).imgsz == (640, 640)
    assert open_backend(path, imgsz=(320, 352)).imgsz == (320, 352)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imgsz": (320, 320)}, "fixed size 64x96"),
        ({"layers": 1}, "--layers 1 does not apply"),
        ({"queries": 10}, "--queries 10 does not apply"),
        ({"sampling": "discrete"}, "--sampling discrete does not apply"),
        ({"device": "gpu"}, "'gpu' is not a device"),
    ],
)
def test_options_that_do_not_apply_to_a_graph(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = foreign_graph(tmp_path / "foreign.onnx")
    with pytest.raises(UsageError, match=message):
        open_backend(path, **options)  # type: ignore[arg-type]


def test_duplicates_are_rescored_after_a_graph_that_does_not_do_it(tmp_path: Path) -> None:
    path = foreign_graph(tmp_path / "foreign.onnx")
    grey, size = np.full((1, 64, 96, 3), 51, np.uint8), np.array([[200, 100]])
    (before,) = open_backend(path).run(grey, size)
    backend = open_backend(path, dedupe=1.0)
    (after,) = backend.run(grey, size)
    # The boxes of class 7 have an IoU of 1/4: the weaker one, 0.125, loses a quarter.
    assert before.scores == pytest.approx([0.25, 0.2, 0.125], abs=1e-3)
    assert after.scores == pytest.approx([0.25, 0.2, 0.09375], abs=1e-3)
    assert (backend.dedupe, backend.dedupe_in_graph, backend.header.dedupe_gamma) == (1.0, False, 1.0)


def test_a_graph_that_rescores_duplicates_cannot_be_changed(tmp_path: Path, shapes_onnx: Path) -> None:
    path = tmp_path / "with_gamma.onnx"
    shutil.copy(shapes_onnx, path)
    header = read_export_header(path)
    write_export_header(path, header.with_dedupe(8.0))
    backend = open_backend(path, dedupe=8.0)
    assert (backend.dedupe, backend.dedupe_in_graph) == (8.0, True)
    for gamma, shown in ((4.0, "--dedupe 4"), (0.0, "--dedupe off")):
        with pytest.raises(UsageError, match=f"{shown} does not apply to with_gamma.onnx.*exported with 8") as caught:
            open_backend(path, dedupe=gamma)
        assert caught.value.hint == f"rtdetr export MODEL {shown}"


@pytest.mark.parametrize(("value", "gamma"), [(None, None), ("off", 0.0), (0, 0.0), ("8", 8.0), (2.5, 2.5)])
def test_values_of_dedupe(value: float | str | None, gamma: float | None) -> None:
    assert parse_dedupe(value) == gamma
    for wrong in ("on", "", "-1", "nan", "inf", "1e9"):
        with pytest.raises(UsageError, match="neither off nor a number"):
            parse_dedupe(wrong)


def test_sampling_of_our_own_model_cannot_be_changed(tmp_path: Path, shapes_model: Path) -> None:
    from rtdetr_cli.weights.load import load_model, save_model

    assert open_backend(shapes_model, sampling="bilinear").header.sampling == "bilinear"
    with pytest.raises(UsageError, match="trained with bilinear") as caught:
        open_backend(shapes_model, sampling="discrete")
    assert "rtdetr finetune-discrete" in caught.value.hint
    model, header = load_model(shapes_model, sampling="discrete")
    changed = tmp_path / "discrete.safetensors"
    save_model(changed, model.state_dict(), header)
    with pytest.raises(UsageError, match="trained with discrete"):
        open_backend(changed, sampling="bilinear")
    published = tmp_path / "published.pth"
    import torch

    torch.save({"ema": {"module": model.state_dict()}}, published)
    assert open_backend(published, sampling="discrete").header.sampling == "discrete"


def test_missing_device_is_named(tmp_path: Path, shapes_model: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    path = foreign_graph(tmp_path / "foreign.onnx")
    for model in (path, shapes_model):
        with pytest.raises(EnvironmentProblem, match=r"device 0 (was not found|needs ONNX Runtime with CUDA)"):
            open_backend(model, device="0")


def test_raw_outputs_are_postprocessed_as_in_the_detector() -> None:
    import torch

    from rtdetr_cli.model.postprocess import select_detections

    random = np.random.default_rng(3)
    logits = random.normal(0, 3, (2, 50, 8)).astype(np.float32)
    logits[0, 0, 0] = -200  # its exponential overflows float32
    boxes = random.uniform(0.1, 0.9, (2, 50, 4)).astype(np.float32)
    sizes = np.array([[640, 480], [33, 77]])
    labels, corners, scores = finish_raw(logits, boxes, sizes)
    expected = select_detections(torch.from_numpy(logits), torch.from_numpy(boxes), torch.from_numpy(sizes))
    assert labels.tolist() == expected[0].tolist()
    assert corners == pytest.approx(expected[1].numpy(), abs=1e-3)
    assert scores == pytest.approx(expected[2].numpy(), abs=1e-6)
    assert finish_raw(logits[:, :2], boxes[:, :2], sizes)[0].shape == (2, 16)  # fewer than 300


@pytest.mark.slow
def test_raw_graph_gives_the_same_rows(
    shapes_model: Path, tmp_path: Path, reference: list[Detections], images: Images
) -> None:
    from rtdetr_cli.export.options import ExportOptions
    from rtdetr_cli.export.run import export_model
    from rtdetr_cli.weights.load import load_model

    model, header = load_model(shapes_model)
    made = export_model(model, header, tmp_path, ExportOptions(raw=True, batch=2), stem="raw")[0]
    assert_same(open_backend(made.path).run(images[0][:3], images[1][:3]), reference[:3])


def test_half_model_in_torch(shapes_model: Path, reference: list[Detections], images: Images) -> None:
    import torch

    from rtdetr_cli.infer.torch_backend import TorchBackend
    from rtdetr_cli.weights.load import load_model

    model, header = load_model(shapes_model)
    backend = TorchBackend(model.to(torch.bfloat16), header, device="cpu")
    for a, b in zip(reference, backend.run(*images), strict=True):
        assert b.scores.dtype == np.float32
        assert b.scores[0] == pytest.approx(a.scores[0], abs=0.1)


def test_torch_backend_restores_the_mode_of_the_model(shapes_model: Path, images: Images) -> None:
    from rtdetr_cli.infer.torch_backend import TorchBackend
    from rtdetr_cli.weights.load import load_model

    model, header = load_model(shapes_model)
    model.train()
    model.backbone.eval()  # as when it is frozen
    backend = TorchBackend(model, header, device="cpu")
    backend.run(images[0][:1], images[1][:1])
    assert model.training
    assert model.decoder.training
    assert not any(module.training for module in model.backbone.modules())
    model.eval()
    backend.run(images[0][:1], images[1][:1])
    assert not model.training


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".xml", ".pth"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x00" * 400, b"hello"])
def test_foreign_or_empty_file(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = write(tmp_path / f"model{suffix}", content)
    if suffix == ".xml":
        write(tmp_path / "model.bin", b"")
    with pytest.raises(ModelError) as raised:
        open_backend(path)
    assert str(path) in raised.value.message
    assert "\n" not in raised.value.message


def test_openvino_without_its_weights(tmp_path: Path, shapes_xml: Path) -> None:
    alone = Path(shutil.copy(shapes_xml, tmp_path / "alone.xml"))
    with pytest.raises(ModelError, match=r"are missing: .*alone\.bin"):
        open_backend(alone)


def test_graph_with_other_inputs_and_outputs(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixel_values"], ["logits"])],
        "other",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, 8, 8])],
    )
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(ModelError, match="inputs pixel_values and outputs logits") as raised:
        open_backend(path)
    assert "orig_target_sizes" in raised.value.hint


def test_broken_header_is_named(tmp_path: Path, shapes_onnx: Path) -> None:
    model = onnx.load(shapes_onnx)
    next(e for e in model.metadata_props if e.key == "rtdetr").value = json.dumps({"names": 3})
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ModelError, match=r"header of .*broken\.onnx cannot be read"):
        open_backend(tmp_path / "broken.onnx")


def test_paths_that_cannot_be_models(tmp_path: Path) -> None:
    for name in ("image.jpg", "model"):
        with pytest.raises(ModelError, match="is not a model file"):
            check_model_path(write(tmp_path / name, b"x"))
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ModelError, match="is a folder"):
        check_model_path(tmp_path / "folder.onnx")


@pytest.mark.parametrize(
    ("suffix", "module", "extra"), [(".xml", "openvino", "openvino"), (".engine", "tensorrt", "tensorrt")]
)
def test_missing_runtime_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = write(tmp_path / f"m{suffix}", b"x")
    with pytest.raises(EnvironmentProblem, match="is not installed") as raised:
        open_backend(path)
    assert raised.value.hint == f"pip install 'rtdetr-cli[{extra}]'"


def test_broken_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"installed but does not import: .*a_package_that_is_not_there"):
        open_backend(write(tmp_path / "m.xml", b"x"))


def test_openvino_is_imported_without_its_telemetry() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    code = (
        "import sys, threading; from rtdetr_cli.infer.openvino_backend import import_openvino; import_openvino();"
        "print(sorted(m for m in sys.modules if m.startswith('openvino_telemetry')), threading.active_count())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[] 1"


def test_signals_work_after_openvino_was_freed_in_another_thread(shapes_xml: Path) -> None:
    """The CPU plugin replaces the signal stack of the thread that loads it; see `openvino_core`."""
    code = (
        "import faulthandler, signal, threading; from pathlib import Path; faulthandler.enable();"
        "from rtdetr_cli.infer.backend import open_backend;"
        f"held = [open_backend(Path({str(shapes_xml)!r}))];"
        "thread = threading.Thread(target=held.clear); thread.start(); thread.join();"
        "signal.signal(signal.SIGINT, lambda *_: print('heard')); signal.raise_signal(signal.SIGINT)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "heard"), ran.stderr

"""`from rtdetr_cli import load`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rtdetr_cli
from rtdetr_cli.api import Detections, Detector, TrainSettings, load
from rtdetr_cli.config.settings import declarations
from rtdetr_cli.errors import DataError, EnvironmentProblem, GateError, ModelError, UsageError
from rtdetr_cli.export.artefacts import Artefact, Notice
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.images.decode import ImageError, read_image
from rtdetr_cli.workflows import finetune
from rtdetr_cli.workflows.events import RunFinished


@pytest.fixture(scope="module")
def detector(shapes_model: Path) -> Detector:
    return load(shapes_model, device="cpu")


@pytest.fixture(scope="module")
def images(shapes_data: Path) -> list[Path]:
    return sorted(shapes_data.parent.glob("*.png"))


def same(a: Detections, b: Detections) -> bool:
    return (
        np.array_equal(a.boxes_xyxy_px, b.boxes_xyxy_px)
        and np.array_equal(a.scores, b.scores)
        and a.class_names == b.class_names
    )


def test_package_imports_the_api_on_first_use() -> None:
    assert rtdetr_cli.load is load
    assert rtdetr_cli.Detections is Detections
    assert set(rtdetr_cli.__all__) <= set(dir(rtdetr_cli))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        rtdetr_cli.lod  # noqa: B018
    code = (
        "import sys, rtdetr_cli;"
        "print(sorted({'torch', 'numpy', 'PIL', 'pydantic', 'typer'} & set(sys.modules)));"
        "rtdetr_cli.load; print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["[]", "False"]


def test_one_image_of_every_type(detector: Detector, images: list[Path]) -> None:
    found = detector.predict(images[0])
    assert isinstance(found, Detections)
    assert len(found) > 0
    assert set(found.class_names) <= {"tomato", "leaf", "plum"}
    array = read_image(images[0])
    with Image.open(images[0]) as image:
        for form in (str(images[0]), array, image):
            assert same(detector.predict(form), found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.scores = found.scores  # type: ignore[misc]


def test_several_images_keep_their_order(detector: Detector, images: list[Path]) -> None:
    alone = [detector.predict(p) for p in images[:5]]
    for several in (images[:5], tuple(images[:5]), iter(images[:5])):
        found = detector.predict(several, batch=2)  # type: ignore[arg-type]
        assert isinstance(found, list)
        for a, b in zip(found, alone, strict=True):
            assert a.class_names == b.class_names
            assert a.boxes_xyxy_px == pytest.approx(b.boxes_xyxy_px, abs=0.01)
    assert detector.predict([]) == []


def test_grey_and_rotated_images(detector: Detector) -> None:
    grey = np.full((60, 80), 128, np.uint8)
    assert detector.predict(grey, conf=0).size_wh == (80, 60)
    image = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    image.getexif()[0x0112] = 6
    assert detector.predict(image, conf=0).size_wh == (20, 40)


def test_stored_thresholds_are_the_default(detector: Detector, images: list[Path]) -> None:
    found = detector.predict(images, conf="auto")
    floors = {"tomato": 0.5, "leaf": 0.45, "plum": 0.55}
    assert all(s >= floors[n] for d in found for n, s in zip(d.class_names, d.scores, strict=True))
    more = detector.predict(images, conf=0.05)
    assert sum(map(len, more)) > sum(map(len, found))
    only = detector.predict(images, conf=0.05, classes=["plum"], max_det=1)
    assert {n for d in only for n in d.class_names} == {"plum"}
    assert max(map(len, only)) == 1


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_not_images(detector: Detector, array: np.ndarray) -> None:
    with pytest.raises(UsageError, match="is not an image") as raised:
        detector.predict(array)
    assert "BGR" in raised.value.hint


def test_bad_input(detector: Detector, tmp_path: Path, shapes_model: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        detector.predict(tmp_path / "gone.jpg")
    with pytest.raises(UsageError, match="no class 'tomatoe'"):
        detector.predict(np.zeros((8, 8, 3), np.uint8), classes=["tomatoe"])
    with pytest.raises(UsageError, match="batch 0"):
        detector.predict(np.zeros((8, 8, 3), np.uint8), batch=0)
    with pytest.raises(ModelError, match=r"has no best\.safetensors"):
        load(tmp_path)
    with pytest.raises(UsageError, match="multiple of 32"):
        load(shapes_model, imgsz=100)


def test_run_folder_and_other_size(shapes_model: Path, tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "best.safetensors").write_bytes(shapes_model.read_bytes())
    other = load(tmp_path, device="cpu", imgsz=(128, 160))
    assert other.imgsz == (128, 160)
    assert "128x160, 3 classes" in repr(other)
    assert len(other.predict(images[0], conf=0.01)) > 0


def test_onnx_gives_the_same_without_torch(detector: Detector, shapes_onnx: Path, images: list[Path]) -> None:
    found, expected = load(shapes_onnx).predict(images), detector.predict(images)
    for a, b in zip(found, expected, strict=True):
        assert a.class_names == b.class_names
        assert a.boxes_xyxy_px == pytest.approx(b.boxes_xyxy_px, abs=0.05)
        assert a.scores == pytest.approx(b.scores, abs=1e-4)
    code = (
        f"import sys; from rtdetr_cli import load; d = load({str(shapes_onnx)!r}).predict({str(images[0])!r});"
        "print(len(d), sorted({'torch', 'pydantic', 'scipy', 'matplotlib', 'cv2', 'rich'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{len(expected[0])} []"


def test_folders_patterns_and_known_images(detector: Detector, images: list[Path], tmp_path: Path) -> None:
    folder = images[0].parent
    found = detector.predict(folder)
    assert [d.image for d in found] == images
    assert all(same(a, b) for a, b in zip(found, detector.predict(images), strict=True))
    assert len(detector.predict(str(folder / "shapes_0[12]*.png"))) == 2
    (tmp_path / "odd[1].png").write_bytes(images[0].read_bytes())
    odd = detector.predict(tmp_path / "odd[1].png")
    assert odd.class_names == found[0].class_names
    assert np.array_equal(odd.plot(), detector.predict(read_image(images[0])).plot())
    assert not np.array_equal(odd.plot(), read_image(images[0]))
    with pytest.raises(ImageError, match="refused"):
        detector.predict("http://127.0.0.1:9/a.jpg")


def fake_run(folder: Path, configs: list[Any]) -> Callable[..., Iterator[Any]]:
    """Return a stand-in for `finetune.finetune` that finishes at once with the model in `folder`."""

    def finetune(config: Any, **_: Any) -> Iterator[Any]:
        configs.append(config)
        yield RunFinished(folder, folder / "best.safetensors", {"AP": 0.5}, 0, 1, "done", 1.0)

    return finetune


def test_train_starts_from_the_model_and_becomes_the_best_one(
    shapes_model: Path, shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(finetune, "finetune", fake_run(tmp_path, configs))
    (tmp_path / "best.safetensors").write_bytes(shapes_model.read_bytes())
    trained = load(shapes_model, device="cpu", imgsz=(128, 160))
    run = trained.train(shapes_data, epochs=3, quiet=True)
    assert (run.folder, run.metrics, trained.run) == (tmp_path, {"AP": 0.5}, run)
    assert (trained.path, trained.imgsz) == (tmp_path / "best.safetensors", (96, 128))
    settings = configs[0].settings
    assert (settings.weights, settings.data) == (str(shapes_model), str(shapes_data))
    assert (settings.epochs, settings.device, settings.imgsz) == (3, "cpu", (128, 160))

    preset = load("tiny")
    assert repr(preset) == "<Detector, preset tiny>"
    events = list(preset.train_events(data=shapes_data, sets=["eval_every=2"]))
    assert events == [preset.run]
    assert (configs[1].settings.preset, configs[1].settings.eval_every) == ("tiny", 2)
    assert len(preset.names) == 3


def test_training_refused(shapes_model: Path, shapes_onnx: Path, shapes_data: Path) -> None:
    with pytest.raises(UsageError, match=r"shapes\.onnx is an export, which cannot be trained"):
        load(shapes_onnx).train_events(shapes_data)
    with pytest.raises(UsageError, match="device cpu,cpu needs several processes"):
        load(shapes_model).train_events(shapes_data, device="cpu,cpu")
    with pytest.raises(UsageError, match="no dataset given"):
        load("tiny").train()
    with pytest.raises(UsageError, match="queries of load apply to a model that predicts"):
        load(shapes_model, queries=10).train(shapes_data)
    with pytest.raises(UsageError, match=r"unknown preset r8 \(did you mean"):
        load("r8")
    with pytest.raises(ModelError, match="preset tiny has no published weights: train it first"):
        load("tiny").predict(np.zeros((8, 8, 3), np.uint8))


def test_train_settings_are_those_of_the_command() -> None:
    flags = {name for name, setting in declarations().items() if setting.flag} - {"data"}
    assert set(TrainSettings.__annotations__) == flags


def test_evaluate(detector: Detector, shapes_data: Path, shapes_onnx: Path) -> None:
    done: list[int] = []
    evaluation = detector.evaluate(shapes_data, progress=done.append)
    assert sum(done) == 16
    assert (evaluation.metrics["AP"] or 0) > 0.3
    onnx = load(shapes_onnx).evaluate(shapes_data, batch=2)
    assert onnx.metrics["AP"] == pytest.approx(evaluation.metrics["AP"], abs=1e-3)
    with pytest.raises(DataError, match="gone"):
        detector.evaluate("gone.json")
    with pytest.raises(UsageError, match="not one"):
        load(shapes_onnx).evaluate(shapes_data, calibrate="f1")


def test_calibrated_thresholds_are_stored_and_used(shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(shapes_model.read_bytes())
    calibrated = load(path, device="cpu")
    before = calibrated.header.thresholds
    with pytest.raises(UsageError, match="train split"):
        calibrated.evaluate(shapes_data, split="train", calibrate="f1")
    calibrated.evaluate(shapes_data, calibrate="precision=0.99")
    stored = load(path, device="cpu").header.thresholds
    assert calibrated.header.thresholds == stored != before
    assert (stored.target, stored.imgsz) == ("precision=0.99", calibrated.imgsz)


def test_export(
    detector: Detector, shapes_onnx: Path, shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Artefact(tmp_path / "a.failed.onnx", "onnx", "fp32", SimpleNamespace(passed=False, summary="AP lost"))
    passed = Artefact(tmp_path / "a.onnx", "onnx", "fp32")
    results, calls = [[passed], [passed, failed]], []

    def export_events(model: Any, header: Any, folder: Path, options: Any, **given: Any) -> Iterator[Any]:
        calls.append((folder, options, given))
        yield Notice("writes")
        yield from results[len(calls) - 1]

    monkeypatch.setattr("rtdetr_cli.export.run.export_events", export_events)
    events: list[Any] = []
    assert detector.export(no_gate=True, on_event=events.append) == [passed]
    assert events == [Notice("writes"), passed]
    with pytest.raises(GateError, match=r"verification failed: a\.failed\.onnx: AP lost"):
        detector.export(fp16=True, dynamic=True, imgsz=64, verify=shapes_data, out=tmp_path / "out", tol_ap=0.1)
    (folder, default, given), (out, options, verified) = calls
    assert (folder.name, default, given["images"]) == ("export", ExportOptions(), None)
    assert (out, options) == (tmp_path / "out", ExportOptions(("fp16",), (64, 64), dynamic=True))
    assert (len(verified["images"]), verified["tol_ap"], verified["device"]) == (16, 0.1, "cpu")
    with pytest.raises(UsageError, match="is already exported"):
        load(shapes_onnx).export()
    with pytest.raises(UsageError, match="add --rtx"):
        detector.export(trt_fp16=True, target="sm86")


def test_supervision(detector: Detector, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = detector.predict(images[0])
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(EnvironmentProblem, match="supervision is not installed") as raised:
        found.to_supervision()
    assert raised.value.hint == "pip install 'rtdetr-cli[supervision]'"
    monkeypatch.undo()
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    converted = found.to_supervision()
    assert isinstance(converted, supervision.Detections)
    assert converted.xyxy == pytest.approx(found.boxes_xyxy_px)
    assert list(converted.data["class_name"]) == list(found.class_names)

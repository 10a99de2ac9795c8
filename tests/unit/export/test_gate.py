"""The gate: what it lets pass, and every planted fault caught by the part that should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from PIL import Image
from torch import Tensor

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.export.fp16 import HalfTwin, half_program
from rtdetr_cli.export.gate import (
    LIMITS,
    Gate,
    Interface,
    Limits,
    Part,
    TensorSpec,
    Verdict,
    at_a_time,
    choose_floor,
    compare_headers,
    compare_interfaces,
    judge_agreement,
    match_sets,
)
from rtdetr_cli.export.gate import gate as hold
from rtdetr_cli.export.graph import DeployGraph, ExportOptions, count_norms, deployable, example_inputs
from rtdetr_cli.export.run import Artefact, export_model
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.detector import RTDETR, Outputs, Prediction
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

Edit = Callable[[Callable[[onnx.ModelProto], None]], Path]
Loaded = tuple[RTDETR, ModelHeader]


def detections(rows: list[tuple[int, float, list[float]]]) -> Detections:
    return Detections(
        np.array([box for _, _, box in rows], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in rows], np.float32),
        np.array([label for label, _, _ in rows], np.int64),
        (100, 100),
    )


A, B = [10.0, 10, 50, 50], [60.0, 60, 90, 90]


# ------------------------------------------------------------------------------------------------ pure parts


@pytest.mark.parametrize(
    ("theirs", "rows", "matched"),
    [
        ([(0, 0.9, A), (1, 0.5, B)], 4, 4),
        ([(1, 0.5, B), (0, 0.9, A)], 4, 4),  # as sets: the order says nothing
        ([(0, 0.9, A)], 3, 2),  # one lost
        ([(0, 0.9, A), (1, 0.5, B), (2, 0.8, B)], 5, 4),  # one invented
        ([(0, 0.9, A), (2, 0.5, B)], 4, 2),  # another class
        ([(0, 0.9, A), (1, 0.6, B)], 4, 2),  # another score
        ([(0, 0.9, A), (1, 0.5, [60, 60, 90, 80])], 4, 2),  # another box
        ([(0, 0.9, A), (0, 0.9, A), (1, 0.5, B)], 5, 4),  # a duplicate does not match twice
        ([], 2, 0),
    ],
)
def test_match_sets(theirs: list[tuple[int, float, list[float]]], rows: int, matched: int) -> None:
    ours = detections([(0, 0.9, A), (1, 0.5, B)])
    found = match_sets(ours, detections(theirs), floor=0.1, limits=LIMITS["fp32"])
    assert (found.rows, found.matched) == (rows, matched)


def test_row_at_the_floor_finds_its_partner_below_it() -> None:
    ours, theirs = detections([(0, 0.1005, A)]), detections([(0, 0.0995, A)])
    found = match_sets(ours, theirs, floor=0.1, limits=LIMITS["fp32"])
    assert (found.rows, found.matched) == (1, 1)


def test_floor_follows_a_weak_model() -> None:
    strong = [detections([(0, 0.9, A)] * 10)]
    weak = [detections([(0, 0.02 - 0.001 * i, A) for i in range(10)])]
    assert choose_floor(strong) == 0.1
    assert 0.01 < choose_floor(weak) < 0.02
    assert choose_floor([]) == 0.1


def test_agreement_is_not_empty_praise() -> None:
    """A model that finds nothing agrees with nobody."""
    nothing = [detections([])]
    assert judge_agreement(nothing, nothing, LIMITS["fp32"]).passed is False


def test_agreement_sees_what_is_not_finite() -> None:
    ours = [detections([(0, 0.9, A)])]
    part = judge_agreement(ours, [detections([(0, float("nan"), A)])], LIMITS["fp32"])
    assert part.passed is False
    assert "NaN" in part.findings[0]


def test_weak_model_is_named_as_the_cause() -> None:
    ours, theirs = detections([(0, 0.012, A)]), detections([(0, 0.012, B)])
    part = judge_agreement([ours], [theirs], LIMITS["fp32"])
    assert "too little trained" in part.findings[0]


def test_pass_of_a_weak_model_proves_little() -> None:
    def verdict(score: float) -> Verdict:
        part = judge_agreement([detections([(0, score, A)])], [detections([(0, score, A)])], LIMITS["fp32"])
        return Verdict("fp32", LIMITS["fp32"], 1, Part(True), part, Part(None))

    assert verdict(0.02).passed
    assert "proves little" in verdict(0.02).weak
    assert verdict(0.8).weak == ""


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (TensorSpec("images", "float32", (1, 3, 96, 128)), "shape 1x3x96x128, not ?x3x96x128"),
        (TensorSpec("images", "float16", (None, 3, 96, 128)), "float16, not float32"),
        (TensorSpec("input", "float32", (None, 3, 96, 128)), "inputs are input, not images"),
    ],
)
def test_interfaces(found: TensorSpec, said: str) -> None:
    wanted = Interface((TensorSpec("images", "float32", (None, 3, 96, 128)),), ())
    assert compare_interfaces(wanted, wanted) == []
    assert said in compare_interfaces(Interface((found,), ()), wanted)[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"names": ("tomato", "plum", "leaf")}, "class list"),
        ({"names": ("tomato", "leaf")}, "class list has 2 names"),
        ({"category_ids": (0, 1, 2)}, "category ids"),
        ({"imgsz": (128, 96)}, "imgsz"),
        ({"sampling": "discrete"}, "sampling"),
        ({"thresholds": None}, "thresholds"),
    ],
)
def test_headers(loaded: Loaded, change: dict[str, object], said: str) -> None:
    header = loaded[1]
    assert compare_headers(header, header) == []
    assert said in compare_headers(replace(header, **change), header)[0]  # type: ignore[arg-type]


def test_two_hundred_images_at_most(loaded: Loaded, dataset: Dataset) -> None:
    backend = TorchBackend(*loaded, device="cpu")
    paths = [dataset.path(i % len(dataset)) for i in range(1000)]
    chosen = Gate(backend, paths).paths
    assert len(chosen) == 200
    assert (chosen[0], chosen[-1]) == (paths[0], paths[-1])
    assert len(Gate(backend, dataset, most=3).paths) == 3
    with pytest.raises(DataError):
        Gate(backend, [])


def test_unreadable_images(loaded: Loaded, dataset: Dataset, tmp_path: Path) -> None:
    """One broken file is left out; only broken files is an error."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    backend = TorchBackend(*loaded, device="cpu")
    verdict = hold(backend, backend, [broken, dataset.path(0), dataset.path(1)])
    assert verdict.passed
    assert verdict.images == 2
    with pytest.raises(DataError, match="none of the 1 images"):
        hold(backend, backend, [broken])


# --------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("name", ["onnx", "fp16", "openvino"])
def test_exports_pass(exported: dict[str, Artefact], name: str) -> None:
    verdict = exported[name].verdict
    assert verdict is not None
    assert verdict.passed, verdict.summary
    assert verdict.ap.figures["ap_model"] > 0.8  # a model that finds nothing would prove nothing
    assert verdict.agreement.figures["detections"] > 80
    assert verdict.agreement.figures["matched"] == 1
    assert (verdict.half is not None) == (name == "fp16")


def test_images_without_labels(gate: Gate, exported: dict[str, Artefact]) -> None:
    """The first two parts are judged, the third says why not."""
    plain = Gate(gate.reference, gate.paths[:6])
    verdict = plain.judge(open_backend(exported["onnx"].path, device="cpu"))
    assert verdict.passed
    assert verdict.ap.passed is None
    assert "no labels" in verdict.ap.figures["why_not"]


def test_tolerance_of_ap(gate: Gate, exported: dict[str, Artefact]) -> None:
    """AP alone can fail an export, and `--tol-ap` decides."""
    loose = Limits(matched=0, iou=0.5, score_step=1, score_error=1, box_error=1)
    faulty = Damaged(open_backend(exported["onnx"].path, device="cpu"), boxes=lambda box: box * 0.97)
    verdict = gate.judge(faulty, limits=loose)
    assert verdict.failed_parts == ("ap",)
    assert gate.judge(faulty, limits=loose, tol_ap=1.0).passed


# ------------------------------------------------------------------------------------------ planted faults


class Damaged:
    """A backend with something wrong in front of it or behind it."""

    def __init__(
        self,
        inner: Backend,
        *,
        images: Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.uint8]] | None = None,
        boxes: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    ) -> None:
        self.header, self.kind, self.imgsz, self.fixed_batch = inner.header, inner.kind, inner.imgsz, inner.fixed_batch
        self.largest_batch: int | None = None
        self.inner, self.images, self.boxes = inner, images, boxes

    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        if self.images is not None:
            images = self.images(images, sizes_wh)
        found = self.inner.run(images, sizes_wh)
        if self.boxes is not None:
            found = [replace(f, boxes_xyxy_px=self.boxes(f.boxes_xyxy_px)) for f in found]
        return found


def caught(gate: Gate, candidate: Backend, *, precision: str = "fp32", dynamic: bool | None = True) -> Verdict:
    verdict = gate.judge(candidate, precision=precision, dynamic=dynamic)
    assert not verdict.passed
    return verdict


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def test_swapped_norms(gate: Gate, edited: Edit) -> None:
    """Two layer norms of the decoder with each other's weights."""

    def swap(model: onnx.ModelProto) -> None:
        norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
        first, second = norms[-1], norms[-2]
        for position in (1, 2):
            first.input[position], second.input[position] = second.input[position], first.input[position]

    assert "agreement" in caught(gate, open_backend(edited(swap), device="cpu")).failed_parts


def test_channel_order(gate: Gate, edited: Edit) -> None:
    """BGR for RGB, in the graph: nothing outside shows it but the detections."""

    def flip(model: onnx.ModelProto) -> None:
        first = next(n for n in model.graph.node if n.op_type == "Conv")
        weight = initializer(model, first.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, ::-1].copy(), weight.name))

    verdict = caught(gate, open_backend(edited(flip), device="cpu"))
    assert verdict.contract.passed
    assert verdict.failed_parts == ("agreement", "ap")


def test_mean_and_std_added(gate: Gate, edited: Edit) -> None:
    def normalise(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for position, name in enumerate(node.input):
                if name == "images":
                    node.input[position] = "normalised"
        mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
        std = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
        model.graph.initializer.extend([numpy_helper.from_array(mean, "mean"), numpy_helper.from_array(std, "std")])
        model.graph.node.insert(0, helper.make_node("Sub", ["images", "mean"], ["centred"]))
        model.graph.node.insert(1, helper.make_node("Div", ["centred", "std"], ["normalised"]))

    verdict = caught(gate, open_backend(edited(normalise), device="cpu"))
    assert "agreement" in verdict.failed_parts


@pytest.mark.parametrize(
    ("key", "value"),
    [("mean", [0.485, 0.456, 0.406]), ("colour", "BGR"), ("resize", "letterbox"), ("filter", "bilinear")],
)
def test_preprocessing_said_to_be_another(gate: Gate, edited: Edit, key: str, value: object) -> None:
    """The same faults in what the file says about itself: a program that believes it would feed other images."""

    def lie(model: onnx.ModelProto) -> None:
        header = ModelHeader.from_json(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))
        onnx_file.embed(model, replace(header, preprocessing={**header.preprocessing, key: value}))

    verdict = caught(gate, open_backend(edited(lie), device="cpu"))
    assert verdict.failed_parts == ("contract",)
    assert f"preprocessing {key}" in verdict.contract.findings[0]


def test_letterbox_for_stretch(gate: Gate, exported: dict[str, Artefact]) -> None:
    def letterbox(images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> NDArray[np.uint8]:
        framed = np.full_like(images, 114)
        height, width = images.shape[1:3]
        for target, image, (w, h) in zip(framed, images, sizes_wh, strict=True):
            scale = min(width / w, height / h)
            size = (max(1, round(w * scale)), max(1, round(h * scale)))
            top, left = (height - size[1]) // 2, (width - size[0]) // 2
            small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
            target[top : top + size[1], left : left + size[0]] = np.asarray(small)
        return framed

    verdict = caught(gate, Damaged(open_backend(exported["onnx"].path, device="cpu"), images=letterbox))
    assert "agreement" in verdict.failed_parts


def test_top_k_by_query(gate: Gate, loaded: Loaded) -> None:
    """One class for each query, its best, in place of the best pairs of query and class."""
    model, header = loaded

    class ByQuery(torch.nn.Module):
        def __init__(self, inner: RTDETR) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Outputs:
            main = self.inner(images).main
            best = main.logits.max(-1, keepdim=True).values
            return Outputs(Prediction(torch.where(main.logits < best, -20.0, main.logits), main.boxes_cxcywh))

    # The trained model is sure of its classes; one that wavers shows the difference.
    wavering = deployable(model)
    with torch.no_grad():
        for head in wavering.decoder.dec_score_head:
            head.bias += torch.tensor([3.0, 3.0, 3.0])  # type: ignore[operator]
    judge = Gate(TorchBackend(wavering, header, device="cpu"), gate.dataset or [])
    assert judge.judge(TorchBackend(wavering, header, device="cpu")).passed
    verdict = caught(judge, TorchBackend(ByQuery(wavering), header, device="cpu"), dynamic=None)  # type: ignore[arg-type]
    assert "agreement" in verdict.failed_parts


def test_frozen_batch_is_seen_in_the_shapes(gate: Gate, edited: Edit) -> None:
    """An export that was to be open and is fixed at one."""

    def freeze(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1

    verdict = caught(gate, open_backend(edited(freeze), device="cpu"))
    assert verdict.failed_parts == ("contract",)
    assert "fixed at 1" in verdict.contract.findings[0]


def test_frozen_batch_inside(gate: Gate, edited: Edit) -> None:
    """Inputs that say they are open, before a graph that holds its batch as a constant: D-FINE and DEIM had it."""

    def freeze(model: onnx.ModelProto) -> None:
        asked = [
            n for n in model.graph.node if n.op_type == "Shape" and {"start", "end"} <= {a.name for a in n.attribute}
        ]
        assert asked
        for node in asked:
            held = numpy_helper.from_array(np.array([2], np.int64))
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), value=held))

    verdict = caught(gate, open_backend(edited(freeze), device="cpu"))
    assert "contract" in verdict.failed_parts
    assert any("does not run" in finding for finding in verdict.contract.findings)


def test_batch_elements_that_see_each_other(gate: Gate, exported: dict[str, Artefact]) -> None:
    """What TensorRT did to batched engines of this family: the first element right, the others mixed up."""

    def blend(images: NDArray[np.uint8], _: NDArray[np.int64]) -> NDArray[np.uint8]:
        mixed = images.copy()
        mixed[1:] = images[1:] // 2 + images[:1] // 2
        return mixed

    verdict = caught(gate, Damaged(open_backend(exported["onnx"].path, device="cpu"), images=blend))
    assert any("not independent" in finding for finding in verdict.contract.findings)


def test_one_image_repeated(gate: Gate, exported: dict[str, Artefact]) -> None:
    def fade(images: NDArray[np.uint8], _: NDArray[np.int64]) -> NDArray[np.uint8]:
        weights = np.linspace(1, 0.2, len(images)).reshape(-1, 1, 1, 1)
        return (images * weights).astype(np.uint8)

    verdict = caught(gate, Damaged(open_backend(exported["onnx"].path, device="cpu"), images=fade))
    assert any("repeated 4 times" in finding for finding in verdict.contract.findings)


def test_later_places_of_a_fixed_batch(gate: Gate, edited: Edit) -> None:
    """An export with a batch of eight that finds nothing from the fifth image on: each part of the gate sees it."""

    def empty(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 8
        last = next(n for n in model.graph.node if "scores" in n.output)
        last.output[list(last.output).index("scores")] = "whole scores"
        kept = np.array([1] * 4 + [0] * 4, np.float32).reshape(8, 1)
        model.graph.initializer.append(numpy_helper.from_array(kept, "kept"))
        model.graph.node.append(helper.make_node("Mul", ["whole scores", "kept"], ["scores"]))

    candidate = open_backend(edited(empty), device="cpu")
    assert candidate.fixed_batch == 8
    verdict = caught(gate, candidate, dynamic=False)
    assert verdict.failed_parts == ("contract", "agreement", "ap")
    assert any("alone against a batch of 8" in finding for finding in verdict.contract.findings)
    assert any("repeated 8 times" in finding for finding in verdict.contract.findings)
    few = caught(Gate(gate.reference, gate.paths[:3]), candidate, dynamic=False)  # the images are repeated
    assert any("alone against a batch of 8" in finding for finding in few.contract.findings)


def test_later_places_of_an_engine(gate: Gate, exported: dict[str, Artefact]) -> None:
    """The same in a batch that is open up to eight, as the profile of an engine is."""

    def blank(images: NDArray[np.uint8], _: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.concatenate([images[:4], np.zeros_like(images[4:])])

    candidate = Damaged(open_backend(exported["onnx"].path, device="cpu"), images=blank)
    assert gate.judge(candidate, dynamic=True).passed  # nobody has said that it takes more than four
    candidate.largest_batch = 8
    assert caught(gate, candidate).failed_parts == ("contract", "agreement", "ap")


@pytest.mark.parametrize(
    ("fixed", "largest", "together"), [(None, None, 4), (1, 1, 4), (3, 3, 6), (8, 8, 8), (None, 16, 16)]
)
def test_images_at_a_time(exported: dict[str, Artefact], fixed: int | None, largest: int | None, together: int) -> None:
    """Full batches, and never fewer than four images."""
    backend = Damaged(open_backend(exported["onnx"].path, device="cpu"))
    backend.fixed_batch, backend.largest_batch = fixed, largest
    assert at_a_time(backend) == together


def test_stale_class_list(gate: Gate, edited: Edit) -> None:
    def rename(model: onnx.ModelProto) -> None:
        header = ModelHeader.from_json(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))
        onnx_file.embed(model, replace(header, names=("leaf", "tomato", "plum")))

    verdict = caught(gate, open_backend(edited(rename), device="cpu"))
    assert "contract" in verdict.failed_parts
    assert "leaf for tomato" in verdict.contract.findings[0]


def test_gridsample_with_the_other_corners(
    gate: Gate, loaded: Loaded, exported: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The convention alone, in torch; the slow test below plants it in a graph."""
    grid_sample = torch.nn.functional.grid_sample
    gate.answers()

    def other(*args: object, align_corners: bool) -> Tensor:
        return grid_sample(*args, align_corners=not align_corners)  # type: ignore[arg-type]

    monkeypatch.setattr("rtdetr_cli.model.attention.functional.grid_sample", other)
    assert "agreement" in caught(gate, TorchBackend(*loaded, device="cpu"), dynamic=None).failed_parts


@pytest.mark.slow
def test_gridsample_with_the_other_corners_in_a_graph(gate: Gate, loaded: Loaded, tmp_path: Path) -> None:
    model, header = loaded
    path = export_model(model, header, tmp_path, ExportOptions(gridsample=True, dynamic=True))[0].path
    assert gate.judge(open_backend(path, device="cpu"), dynamic=True).passed
    graph = onnx.load(path)
    for node in graph.graph.node:
        if node.op_type == "GridSample":
            next(a for a in node.attribute if a.name == "align_corners").i = 1
    onnx.save(graph, path)
    assert "agreement" in caught(gate, open_backend(path, device="cpu")).failed_parts


def test_half_precision_overflow(loaded: Loaded, dataset: Dataset) -> None:
    """The feed-forward layer blown up by 2^17 and brought down again: the same in float32, infinite in half.

    The twin shows it. ONNX Runtime's CPU kernels, which compute in float32, need not.
    """
    original, header = loaded
    model = original.fuse()
    model.deployed = True
    with torch.no_grad():
        layer = model.decoder.decoder.layers[0]
        layer.linear1.weight *= 2.0**17  # type: ignore[operator, union-attr]
        layer.linear1.bias *= 2.0**17  # type: ignore[operator, union-attr]
        layer.linear2.weight *= 2.0**-17  # type: ignore[operator, union-attr]
    judge = Gate(TorchBackend(model, header, device="cpu"), dataset)
    assert judge.judge(TorchBackend(original, header, device="cpu")).passed  # in float32 nothing has changed
    options = ExportOptions(dynamic=True)
    graph = DeployGraph(deployable(model)).eval()
    count_norms(graph, example_inputs(options, header.imgsz, batch=1))
    program = half_program(graph, example_inputs(options, header.imgsz, batch=2), dynamic=True)
    twin = HalfTwin(program, header, imgsz=header.imgsz, fixed_batch=None)
    verdict = judge.judge(TorchBackend(original, header, device="cpu"), precision="fp16", twin=twin)
    assert verdict.failed_parts == ("half",)
    assert verdict.half is not None
    assert "NaN or infinite" in verdict.half.findings[0]


def test_labels_of_other_classes(gate: Gate, dataset: Dataset, exported: dict[str, Artefact]) -> None:
    """A labelled dataset of something else still serves for the first two parts."""
    other = replace(dataset, categories=tuple(replace(c, name=f"other {c.id}") for c in dataset.categories))
    verdict = Gate(gate.reference, other, most=4).judge(open_backend(exported["onnx"].path, device="cpu"))
    assert verdict.passed
    assert verdict.ap.passed is None
    assert "share no class" in verdict.ap.figures["why_not"]

"""Verification: exports that pass, and planted faults that fail in the right part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.compare import LIMITS, Limits, Part, compare_operators
from rtdetr_cli.export.fp16 import HalfTwin, halve, traced_program
from rtdetr_cli.export.graph import DeployGraph, count_norms, deployable, example_inputs, expected_spec
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.verify import Reference, Verdict, images_per_run, result_of, verify
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.inspect import inspect_model
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.attention import Levels, sample_bilinear
from rtdetr_cli.model.decoder import Prediction
from rtdetr_cli.model.detector import RTDETR, Outputs
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

Edit = Callable[[Callable[[onnx.ModelProto], None]], Path]
Loaded = tuple[RTDETR, ModelHeader]


Fault = Callable[[Backend, NDArray[np.uint8], NDArray[np.int64]], list[Detections]]


class FaultyBackend:
    """A backend with a fault in what it returns for images of given sizes."""

    def __init__(self, inner: Backend, fault: Fault | None = None) -> None:
        self.header, self.kind, self.imgsz, self.fixed_batch = inner.header, inner.kind, inner.imgsz, inner.fixed_batch
        self.largest_batch: int | None = None
        self.inner, self.fault = inner, fault

    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        return self.fault(self.inner, images, sizes_wh) if self.fault else self.inner.run(images, sizes_wh)


def each(change: Callable[[Detections], Detections]) -> Fault:
    """Return a fault that changes the detections of each image."""
    return lambda inner, images, sizes: [change(d) for d in inner.run(images, sizes)]


def seen(change: Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.uint8]]) -> Fault:
    """Return a fault that changes the images before they are run."""
    return lambda inner, images, sizes: inner.run(change(images, sizes), sizes)


def wrong_from(position: int) -> Fault:
    return seen(lambda images, _: np.concatenate([images[:position], np.zeros_like(images[position:])]))


def letterbox(images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Keep the ratio of the sides, on a gray ground, where the model was trained on stretched images."""
    framed = np.full_like(images, 114)
    height, width = images.shape[1:3]
    for target, image, (w, h) in zip(framed, images, sizes_wh, strict=True):
        scale = min(width / w, height / h)
        size = (max(1, round(w * scale)), max(1, round(h * scale)))
        top, left = (height - size[1]) // 2, (width - size[0]) // 2
        small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
        target[top : top + size[1], left : left + size[0]] = np.asarray(small)
    return framed


def blend(images: NDArray[np.uint8], _: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Mix each image with the first: TensorRT did this to batched engines, of which only the first image was right."""
    return np.concatenate([images[:1], images[1:] // 2 + images[:1] // 2])


def fade(images: NDArray[np.uint8], _: NDArray[np.int64]) -> NDArray[np.uint8]:
    weights = np.linspace(1, 0.2, len(images)).reshape(-1, 1, 1, 1)
    return (images * weights).astype(np.uint8)


def queries_missing(found: Detections) -> Detections:
    """Leave out the last fifth of the rows, and fill up with copies of the last that is left."""
    return found.keep(np.minimum(np.arange(len(found)), int(0.8 * len(found)) - 1))


@pytest.fixture
def candidate(exported: dict[str, Artefact]) -> Backend:
    """The float32 export."""
    return open_backend(exported["onnx"].path, device="cpu")


def verdict_of(candidate: Backend, reference: Reference, **options: Any) -> Verdict:
    return result_of(verify(candidate, reference, **options))


def failure_of(candidate: Backend, reference: Reference) -> Verdict:
    verdict = verdict_of(candidate, reference)
    assert not verdict.passed
    return verdict


def test_at_most_two_hundred_images(loaded: Loaded, dataset: Dataset) -> None:
    backend = TorchBackend(*loaded, device="cpu")
    paths = [dataset.path(i % len(dataset)) for i in range(1000)]
    chosen = Reference(backend, paths).paths
    assert len(chosen) == 200
    assert (chosen[0], chosen[-1]) == (paths[0], paths[-1])
    assert len(Reference(backend, dataset, max_images=3).paths) == 3
    with pytest.raises(DataError):
        Reference(backend, [])


def test_unreadable_images_are_left_out(loaded: Loaded, dataset: Dataset, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    backend = TorchBackend(*loaded, device="cpu")
    verdict = verdict_of(backend, Reference(backend, [broken, dataset.path(0), dataset.path(1)]))
    assert verdict.passed
    assert verdict.images == 2
    with pytest.raises(DataError, match="none of the 1 verification images"):
        verdict_of(backend, Reference(backend, [broken]))


def test_the_model_is_run_once_for_all_exports(loaded: Loaded, dataset: Dataset, candidate: Backend) -> None:
    reference = Reference(TorchBackend(*loaded, device="cpu"), dataset, max_images=4)
    counts = [sum(1 for _ in verify(candidate, reference)) for _ in range(2)]
    assert counts == [8, 4]


@pytest.mark.parametrize("name", ["onnx", "fp16", "openvino"])
def test_exports_pass(exported: dict[str, Artefact], name: str) -> None:
    verdict = exported[name].verdict
    assert verdict.passed, verdict.summary
    assert verdict.ap.figures["ap_model"] > 0.8  # a model without detections would prove nothing
    assert verdict.agreement.figures["detections"] > 80
    assert verdict.agreement.figures["matched"] == 1
    assert (verdict.half is not None) == (name == "fp16")
    assert verdict.summary.startswith("1.000 matched")


def test_images_without_labels_are_compared_without_ap(reference: Reference, candidate: Backend) -> None:
    verdict = verdict_of(candidate, Reference(reference.backend, reference.paths[:6]))
    assert verdict.passed
    assert verdict.ap.passed is None
    assert "no labels" in verdict.ap.figures["why_not"]


def test_labels_of_other_classes_are_compared_without_ap(
    reference: Reference, dataset: Dataset, candidate: Backend
) -> None:
    other = replace(dataset, categories=tuple(replace(c, name=f"other {c.id}") for c in dataset.categories))
    verdict = verdict_of(candidate, Reference(reference.backend, other, max_images=4))
    assert verdict.passed
    assert verdict.ap.passed is None
    assert "no class in common" in verdict.ap.figures["why_not"]


@pytest.mark.parametrize(("score", "weak"), [(0.02, True), (0.8, False)])
def test_a_pass_of_a_weak_model_proves_little(score: float, weak: bool) -> None:
    agreement = Part(True, (), {"best_score": score})
    verdict = Verdict("fp32", LIMITS["fp32"], 1, Part(True), agreement, Part(None))
    assert verdict.passed
    assert ("proves little" in verdict.weakness) == weak


def test_summary_of_a_failure() -> None:
    verdict = Verdict("fp32", LIMITS["fp32"], 1, Part(False, ("planted",)), Part(True), Part(None))
    assert verdict.summary == "contract: planted"
    assert verdict.failed_parts == ("contract",)
    assert replace(verdict, half=Part(False, ("infinite",))).failed_parts == ("contract", "half")


def test_tol_ap_decides_where_only_ap_differs(
    reference: Reference, candidate: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "fp32", Limits(matched=0, iou=0.5, score_step=1, score_error=1, box_error=1))
    faulty = FaultyBackend(candidate, each(lambda d: replace(d, boxes_xyxy_px=d.boxes_xyxy_px * np.float32(0.97))))
    assert verdict_of(faulty, reference).failed_parts == ("ap",)
    assert verdict_of(faulty, reference, tol_ap=1.0).passed


def swap_norms(model: onnx.ModelProto) -> None:
    """Give two layer norms of the decoder each other's weights."""
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    first, second = norms[-1], norms[-2]
    for position in (1, 2):
        first.input[position], second.input[position] = second.input[position], first.input[position]


def flip_channels(model: onnx.ModelProto) -> None:
    """Take BGR for RGB inside the graph, which only the detections show."""
    first = next(n for n in model.graph.node if n.op_type == "Conv")
    weight = next(t for t in model.graph.initializer if t.name == first.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, ::-1].copy(), weight.name))


def normalise(model: onnx.ModelProto) -> None:
    """Subtract a mean and divide by a deviation."""
    for node in model.graph.node:
        node.input[:] = ["normalised" if name == "images" else name for name in node.input]
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    std = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
    model.graph.initializer.extend([numpy_helper.from_array(mean, "mean"), numpy_helper.from_array(std, "std")])
    model.graph.node.insert(0, helper.make_node("Sub", ["images", "mean"], ["centred"]))
    model.graph.node.insert(1, helper.make_node("Div", ["centred", "std"], ["normalised"]))


@pytest.mark.parametrize("fault", [swap_norms, flip_channels, normalise])
def test_faults_inside_the_graph(reference: Reference, edited: Edit, fault: Callable[[onnx.ModelProto], None]) -> None:
    verdict = failure_of(open_backend(edited(fault), device="cpu"), reference)
    assert {"contract", "agreement"} <= set(verdict.failed_parts)
    assert all("synthetic images" in finding for finding in verdict.contract.findings)


def test_false_header(reference: Reference, edited: Edit) -> None:
    """A program that believes this header would name other classes."""

    def rewrite(model: onnx.ModelProto) -> None:
        header = ModelHeader.from_json(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))
        onnx_file.embed(model, replace(header, names=("leaf", "tomato", "plum")))

    verdict = failure_of(open_backend(edited(rewrite), device="cpu"), reference)
    assert "contract" in verdict.failed_parts
    assert "leaf for tomato" in verdict.contract.findings[0]


@pytest.mark.parametrize("gamma", [0.0, 4.0])
def test_duplicates_that_are_rescored_otherwise(reference: Reference, loaded: Loaded, gamma: float) -> None:
    """The header states the model's gamma, but the graph has none or another."""
    candidate = TorchBackend(*loaded, device="cpu")
    candidate.dedupe = gamma
    verdict = failure_of(candidate, reference)
    assert "contract" in verdict.failed_parts
    assert any("too high or too low" in finding for finding in verdict.contract.findings)


def test_problems_found_by_the_caller_fail_the_contract(reference: Reference, candidate: Backend) -> None:
    verdict = verdict_of(candidate, reference, problems=["input images has shape 1x3x96x128, not ?x3x96x128"])
    assert verdict.failed_parts == ("contract",)


def test_top_k_over_queries(loaded: Loaded, dataset: Dataset) -> None:
    """The best class of each query, instead of the best pairs of query and class."""
    model, header = loaded

    class BestClassOnly(torch.nn.Module):
        def __init__(self, inner: RTDETR) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Outputs:
            main = self.inner(images).main
            best = main.logits.max(-1, keepdim=True).values
            return Outputs(Prediction(torch.where(main.logits < best, -20.0, main.logits), main.boxes_cxcywh))

    # Raise all scores, so that several classes of a query are among the best pairs.
    unsure = deployable(model)
    with torch.no_grad():
        for head in unsure.decoder.dec_score_head:
            head.bias += torch.tensor([3.0, 3.0, 3.0])  # type: ignore[operator]
    reference = Reference(TorchBackend(unsure, header, device="cpu"), dataset)
    assert verdict_of(TorchBackend(unsure, header, device="cpu"), reference).passed
    verdict = failure_of(TorchBackend(BestClassOnly(unsure), header, device="cpu"), reference)  # type: ignore[arg-type]
    assert "agreement" in verdict.failed_parts


def test_dynamic_inputs_of_a_graph_with_a_constant_batch(reference: Reference, edited: Edit) -> None:
    """Exports of D-FINE and DEIM had this fault."""

    def freeze(model: onnx.ModelProto) -> None:
        shapes = [
            n for n in model.graph.node if n.op_type == "Shape" and {"start", "end"} <= {a.name for a in n.attribute}
        ]
        assert shapes
        for node in shapes:
            constant = numpy_helper.from_array(np.array([2], np.int64))
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), value=constant))

    verdict = failure_of(open_backend(edited(freeze), device="cpu"), reference)
    assert "contract" in verdict.failed_parts
    assert any("does not run" in finding for finding in verdict.contract.findings)


def test_later_positions_of_a_fixed_batch(reference: Reference, edited: Edit) -> None:
    """An export with a batch of eight that detects nothing from the fifth image on fails every part."""

    def empty(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 8
        last = next(n for n in model.graph.node if "scores" in n.output)
        last.output[list(last.output).index("scores")] = "all_scores"
        mask = np.array([1] * 4 + [0] * 4, np.float32).reshape(8, 1)
        model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
        model.graph.node.append(helper.make_node("Mul", ["all_scores", "mask"], ["scores"]))

    candidate = open_backend(edited(empty), device="cpu")
    assert candidate.fixed_batch == 8
    verdict = failure_of(candidate, reference)
    assert verdict.failed_parts == ("contract", "agreement", "ap")
    assert any("in a batch of 8" in finding for finding in verdict.contract.findings)
    assert any("repeated 8 times" in finding for finding in verdict.contract.findings)
    few = failure_of(candidate, Reference(reference.backend, reference.paths[:3]))  # the images are repeated
    assert any("in a batch of 8" in finding for finding in few.contract.findings)


def test_later_positions_of_an_engine(reference: Reference, candidate: Backend) -> None:
    """The same with a dynamic batch of up to 16, as in the profile of an engine."""

    faulty = FaultyBackend(candidate, wrong_from(8))
    assert verdict_of(faulty, reference).passed  # its largest batch is not known, so eight images are enough
    faulty.largest_batch = 16
    assert failure_of(faulty, reference).failed_parts == ("contract", "agreement", "ap")


def approximate_gelu(model: onnx.ModelProto) -> None:
    """Compute GELU by its tanh form, as some converters do: scores move by a millionth."""
    graph = model.graph
    constants = {"root": 2**0.5, "cubed": 0.044715, "three": 3.0, "factor": (2 / np.pi) ** 0.5}
    graph.initializer.extend(numpy_helper.from_array(np.float32(value), name) for name, value in constants.items())
    position = next(i for i, node in enumerate(graph.node) if node.op_type == "Erf")
    source, target = graph.node[position].input[0], graph.node[position].output[0]
    del graph.node[position]
    steps = [
        ("Mul", [source, "root"], "x"),
        ("Pow", ["x", "three"], "x3"),
        ("Mul", ["x3", "cubed"], "small"),
        ("Add", ["x", "small"], "sum"),
        ("Mul", ["sum", "factor"], "inner"),
        ("Tanh", ["inner"], target),
    ]
    for offset, (operator, inputs, output) in enumerate(steps):
        graph.node.insert(position + offset, helper.make_node(operator, inputs, [output]))


def test_the_tanh_form_of_gelu(edited: Edit, exported: dict[str, Artefact]) -> None:
    """No detection shows it, so the operators do."""
    right = inspect_model(exported["onnx"].path)["operators"]
    assert compare_operators(right) == []
    path = edited(approximate_gelu)
    assert open_backend(path, device="cpu").run(np.zeros((1, 96, 128, 3), np.uint8), np.array([[9, 9]]))
    assert "approximates GELU" in compare_operators(inspect_model(path)["operators"])[0]
    xml = exported["openvino"].path
    assert compare_operators(inspect_model(xml)["operators"]) == []


@pytest.mark.parametrize(
    ("fault", "part", "finding"),
    [
        (wrong_from(4), "contract", "not independent"),
        (wrong_from(7), "contract", "not independent"),
        (seen(blend), "contract", "not independent"),
        (seen(fade), "contract", "repeated 8 times"),
        (seen(letterbox), "agreement", ""),
        (lambda b, images, sizes: b.run(images[::-1] if len(images) == 3 else images, sizes), "contract", "batch of 3"),
        (lambda b, images, sizes: b.run(images, np.repeat(sizes[:1], len(sizes), 0)), "contract", "not independent"),
        (lambda b, images, sizes: b.run(images, sizes[:, ::-1]), "contract", "do not scale with the width and height"),
        (each(lambda d: replace(d, labels=d.labels + (d.scores < 0.05) * 9)), "contract", "is out of range"),
        (each(lambda d: d.keep(np.arange(len(d)) < 0.8 * len(d))), "contract", "detections per image"),
        (each(lambda d: replace(d, scores=d.scores * (d.scores > 0.05))), "agreement", "rank by rank"),
        (each(lambda d: replace(d, scores=d.scores * np.float32(0.995))), "contract", "are 0.50% too high or too low"),
        (each(lambda d: replace(d, boxes_xyxy_px=d.boxes_xyxy_px * np.float32(1.0005))), "contract", "1 - IoU"),
        (each(queries_missing), "contract", "0.800 of all rows of synthetic images matched"),
    ],
    ids=[
        "fifth",
        "eighth",
        "blended",
        "faded",
        "letterbox",
        "three",
        "first",
        "swapped",
        "labels",
        "fewer",
        "tail",
        "scores",
        "boxes",
        "queries",
    ],
)
def test_faults_of_a_runtime(reference: Reference, candidate: Backend, fault: Fault, part: str, finding: str) -> None:
    """Most of these pass on images of one square size, in small batches, or above the score floor."""
    verdict = failure_of(FaultyBackend(candidate, fault), reference)
    assert part in verdict.failed_parts
    assert any(finding in text for text in verdict.parts[part].findings), verdict.summary


@pytest.mark.parametrize(
    ("fixed", "largest", "images"), [(None, None, 8), (1, 1, 8), (3, 3, 9), (8, 8, 8), (None, 16, 16)]
)
def test_images_per_run(candidate: Backend, fixed: int | None, largest: int | None, images: int) -> None:
    """Full batches, and at least eight images."""
    backend = FaultyBackend(candidate)
    backend.fixed_batch, backend.largest_batch = fixed, largest
    assert images_per_run(backend) == images


def test_gridsample_with_aligned_corners(reference: Reference, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_sample = torch.nn.functional.grid_sample
    list(reference.predictions())

    def other(*args: object, align_corners: bool) -> Tensor:
        return grid_sample(*args, align_corners=not align_corners)  # type: ignore[arg-type]

    def sample(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
        return sample_bilinear(value, locations, weights, levels, [locations.shape[3] // len(levels.shapes)] * 3)

    monkeypatch.setattr("rtdetr_cli.model.attention.functional.grid_sample", other)
    monkeypatch.setattr("rtdetr_cli.model.attention.sample_bilinear_cpu", sample)
    assert "agreement" in failure_of(TorchBackend(*loaded, device="cpu"), reference).failed_parts


def test_half_precision_overflow(loaded: Loaded, dataset: Dataset) -> None:
    """A feed-forward layer scaled by 2^17 and back is the same in float32 and overflows in float16.

    The twin shows it. ONNX Runtime's CPU kernels compute in float32 and may not.
    """
    original, header = loaded
    model = original.fuse()
    model.deployed = True
    with torch.no_grad():
        layer = model.decoder.decoder.layers[0]
        layer.linear1.weight *= 2.0**17  # type: ignore[operator, union-attr]
        layer.linear1.bias *= 2.0**17  # type: ignore[operator, union-attr]
        layer.linear2.weight *= 2.0**-17  # type: ignore[operator, union-attr]
    reference = Reference(TorchBackend(model, header, device="cpu"), dataset)
    assert verdict_of(TorchBackend(original, header, device="cpu"), reference).passed
    options = ExportOptions(dynamic=True)
    graph = DeployGraph(deployable(model)).eval()
    count_norms(graph, example_inputs(options, header.imgsz, batch=1))
    program = halve(traced_program(graph, example_inputs(options, header.imgsz, batch=2), dynamic=True))
    twin = HalfTwin(program, expected_spec(options, header), device=torch.device("cpu"))
    candidate = TorchBackend(original, replace(header, extra={"precision": "fp16"}), device="cpu")
    verdict = verdict_of(candidate, reference, half_twin=twin)
    assert verdict.failed_parts == ("half",)
    assert "NaN or infinite" in verdict.half.findings[0]

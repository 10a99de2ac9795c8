from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from rtdetr_cli.export import onnx as onnx_file
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.duplicates import rescore
from rtdetr_cli.infer.graph import GraphSpec, TensorSpec, finish_raw
from rtdetr_cli.infer.openvino_backend import openvino_core
from rtdetr_cli.model.postprocess import select_detections


def test_best_pairs_of_query_and_class_in_pixels() -> None:
    logits = torch.tensor([[[3.0, -1.0, 2.0], [-5.0, 2.5, -5.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.0, 1.0, 0.5, 0.5]]])
    labels, xyxy, scores = select_detections(logits, boxes, torch.tensor([[200, 100]]), top_k=4)
    assert labels.tolist() == [[0, 1, 2, 1]]  # one query gives several classes
    assert torch.allclose(scores, torch.sigmoid(torch.tensor([[3.0, 2.5, 2.0, -1.0]])))
    expected = [[80, 30, 120, 70], [-50, 75, 50, 125], [80, 30, 120, 70], [80, 30, 120, 70]]  # not clipped
    assert np.allclose(xyxy[0], expected, atol=1e-4)


def test_duplicates_of_a_class_lose_their_score() -> None:
    # Three boxes of 20 x 40 pixels, the second 2 pixels to the right of the first (IoU 9/11), the third far away.
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.52, 0.5, 0.2, 0.4], [0.2, 0.2, 0.2, 0.2]]])
    logits = torch.tensor([[[3.0, -9.0], [2.0, 1.0], [0.0, -9.0]]])
    labels, xyxy, scores = select_detections(logits, boxes, torch.tensor([[100, 100]]), gamma=4.0)
    lowered = 0.880797 * (1 - (9 / 11) ** 4)  # 0.486: below the third box, which has 0.5
    expected = torch.tensor([0.952574, 0.731059, 0.5, lowered])
    assert torch.allclose(scores[0, :4], expected, atol=1e-6)
    assert labels[0, :4].tolist() == [0, 1, 0, 0]  # the same box as another class keeps its score
    assert np.allclose(xyxy[0, 3], [42, 30, 62, 70], atol=1e-4)


def test_without_gamma_the_post_processing_is_the_published_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 40, 8, generator=generator), torch.rand(2, 40, 4, generator=generator)
    published = select_detections(logits, boxes, torch.tensor([[640, 480], [33, 77]]), gamma=0.0)
    scores, index = logits.sigmoid().flatten(1).topk(300)
    assert torch.equal(published[2], scores)
    assert torch.equal(published[0], index % 8)


@pytest.fixture(scope="module")
def crowded() -> tuple[Tensor, Tensor, Tensor]:
    """Raw outputs with ten copies of each of 20 objects, and image sizes."""
    generator = torch.Generator().manual_seed(0)
    objects = torch.rand(2, 20, 4, generator=generator) * 0.5 + 0.2
    boxes = objects.repeat(1, 10, 1) + 0.01 * torch.randn(2, 200, 4, generator=generator)
    logits = 2 * torch.randn(2, 200, 5, generator=generator) - 2
    return logits, boxes.clamp(0.02, 0.98), torch.tensor([[640, 480], [1, 1]])


def same_rows(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    (labels, boxes, scores), (expected_labels, expected_boxes, expected_scores) = a, b
    assert (np.asarray(labels) == np.asarray(expected_labels)).all()
    assert np.allclose(boxes, expected_boxes, atol=1e-3)
    assert np.allclose(scores, expected_scores, atol=5e-6)
    assert (np.diff(np.asarray(scores)) <= 0).all()  # best first


@pytest.mark.parametrize("gamma", [2.0, 16.0])
def test_duplicates_are_rescored_outside_the_graph_as_in_it(
    crowded: tuple[Tensor, Tensor, Tensor], gamma: float
) -> None:
    labels, boxes, scores = finish_raw(*(tensor.numpy() for tensor in crowded))
    finished = [
        rescore(Detections(box, score, label, (1, 1)), gamma)
        for label, box, score in zip(labels, boxes, scores, strict=True)
    ]
    rows = tuple(np.stack([getattr(d, name) for d in finished]) for name in ("labels", "boxes_xyxy_px", "scores"))
    same_rows(rows, select_detections(*crowded, gamma=gamma))


def test_an_image_without_detections_stays_as_it_is() -> None:
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), (1, 1))
    assert len(rescore(nothing, 8.0)) == 0


@pytest.mark.parametrize("opset", [17, 18])
def test_duplicates_are_rescored_in_every_exported_graph(crowded: tuple[Tensor, Tensor, Tensor], opset: int) -> None:
    class PostProcessing(nn.Module):
        def forward(self, logits: Tensor, boxes: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
            return select_detections(logits, boxes, sizes, gamma=8.0)

    float32, int64 = np.dtype(np.float32), np.dtype(np.int64)
    inputs = [TensorSpec(name, kind, (None,)) for name, kind in (("l", float32), ("b", float32), ("s", int64))]
    spec = GraphSpec(None, inputs, [TensorSpec(name, float32, ()) for name in ("labels", "boxes", "scores")])
    model = onnx_file.trace(PostProcessing(), crowded, spec=spec, opset=opset)
    onnx_file.audit(model, norms=0)
    assert model.ByteSize() < 20_000  # no constants of 300 x 300
    feeds = {item.name: tensor.numpy() for item, tensor in zip(inputs, crowded, strict=True)}
    expected = select_detections(*crowded, gamma=8.0)
    same_rows(tuple(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)), expected)
    pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino_core()
    graph = core.read_model(model.SerializeToString())
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(feeds)
    same_rows(tuple(results[name] for name in ("labels", "boxes", "scores")), expected)

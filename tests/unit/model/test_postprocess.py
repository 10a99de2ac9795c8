from __future__ import annotations

import numpy as np
import torch

from rtdetr_cli.model.postprocess import select_detections


def test_best_pairs_of_query_and_class_in_pixels() -> None:
    logits = torch.tensor([[[3.0, -1.0, 2.0], [-5.0, 2.5, -5.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.0, 1.0, 0.5, 0.5]]])
    labels, xyxy, scores = select_detections(logits, boxes, torch.tensor([[200, 100]]), top_k=4)
    assert labels.tolist() == [[0, 1, 2, 1]]  # one query gives several classes
    assert torch.allclose(scores, torch.sigmoid(torch.tensor([[3.0, 2.5, 2.0, -1.0]])))
    expected = [[80, 30, 120, 70], [-50, 75, 50, 125], [80, 30, 120, 70], [80, 30, 120, 70]]  # not clipped
    assert np.allclose(xyxy[0], expected, atol=1e-4)


def test_fewer_pairs_than_the_maximum() -> None:
    labels, boxes, scores = select_detections(torch.randn(2, 5, 1), torch.rand(2, 5, 4), torch.ones(2, 2))
    assert labels.shape == scores.shape == (2, 5)
    assert boxes.shape == (2, 5, 4)

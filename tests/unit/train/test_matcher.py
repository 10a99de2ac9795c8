from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from rtdetr_cli.model.decoder import Prediction
from rtdetr_cli.train.matcher import iou_and_giou, match

K = 4


def predictions(layers: int, batch: int, queries: int, seed: int = 0) -> list[Prediction]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Prediction(
            torch.randn(batch, queries, K, generator=generator),
            torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.2,
        )
        for _ in range(layers)
    ]


def targets(counts: list[int], seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return (
        [torch.rand(n, 4, generator=generator) * 0.4 + 0.2 for n in counts],
        [torch.randint(K, (n,), generator=generator) for n in counts],
    )


def plain_cost(logits: Tensor, box: Tensor, target: Tensor, label: int) -> float:
    """Compute one cell of the cost matrix in plain arithmetic."""
    p = 1 / (1 + np.exp(-float(logits[label])))
    focal = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8)
    a, b = box.tolist(), target.tolist()
    l1 = sum(abs(x - y) for x, y in zip(a, b, strict=True))
    corners = [(c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2) for c in (a, b)]
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = corners
    inter = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    union = a[2] * a[3] + b[2] * b[3] - inter
    outer = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return 2 * focal + 5 * l1 - 2 * (inter / union - (outer - union) / outer)


def test_the_matching_is_the_cheapest_of_all() -> None:
    layers, queries, counts = 2, 5, [3, 0, 2, 4]
    given = predictions(layers, len(counts), queries)
    boxes, labels = targets(counts)
    matches = match(given, boxes, labels)
    starts = np.cumsum([0, *counts])
    for layer in range(layers):
        pairs = dict(zip(matches.targets[layer].tolist(), matches.rows[layer].tolist(), strict=True))
        assert sorted(pairs) == list(range(sum(counts)))
        for image, count in enumerate(counts):
            cost = [
                [
                    plain_cost(given[layer].logits[image, q], given[layer].boxes_cxcywh[image, q],
                               boxes[image][t], int(labels[image][t]))
                    for t in range(count)
                ]
                for q in range(queries)
            ]  # fmt: skip
            best = min(sum(cost[q][t] for t, q in enumerate(p)) for p in permutations(range(queries), count))
            chosen = [pairs[int(starts[image]) + t] - image * queries for t in range(count)]
            assert all(0 <= q < queries for q in chosen)
            assert sum(cost[q][t] for t, q in enumerate(chosen)) == pytest.approx(best, abs=1e-4)


def test_more_boxes_than_queries() -> None:
    boxes, labels = targets([7, 2])
    matches = match(predictions(1, 2, 5), boxes, labels)
    assert matches.rows.shape == (1, 7)
    assert len(set(matches.rows[0].tolist())) == 7
    assert (matches.targets[0][:5] < 7).all()


def test_a_batch_without_boxes() -> None:
    boxes, labels = targets([0, 0])
    matches = match(predictions(3, 2, 5), boxes, labels)
    assert matches.rows.shape == matches.targets.shape == (3, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_predictions_match_last_and_raise_no_error(bad: float) -> None:
    given = predictions(1, 1, 6)
    given[0].boxes_cxcywh[0, :3] = bad
    given[0].logits[0, 5] = float("nan")
    boxes, labels = targets([2])
    assert set(match(given, boxes, labels).rows[0].tolist()) == {3, 4}
    given[0].boxes_cxcywh[:] = bad
    assert match(given, boxes, labels).rows.shape == (1, 2)


def test_iou_and_giou() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [2, 0, 3, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1]])
    iou, giou = iou_and_giou(a, b)
    assert iou.tolist() == pytest.approx([1 / 7, 0, 0, 1])
    assert giou.tolist() == pytest.approx([1 / 7 - 2 / 9, -1 / 3, 0, 1])

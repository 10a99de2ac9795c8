from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.model.decoder import Tokens
from rtdetr_cli.train.dense_head import DenseHead, DensePrediction, align, dense_losses
from rtdetr_cli.train.plan import make_plan

K, C = 3, 8
SHAPES = ((4, 4), (2, 2), (1, 1))
TOKENS = 21


def tokens(images: int, *, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randn(images, TOKENS, C, generator=generator, dtype=torch.float64), SHAPES)


def targets(*counts: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    boxes = [torch.rand(n, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.3 for n in counts]
    return boxes, [torch.randint(K, (n,), generator=generator) for n in counts]


def head() -> DenseHead:
    torch.manual_seed(0)
    return DenseHead(dim=C, num_classes=K).double()


def test_a_box_is_matched_with_the_tokens_inside_it_and_the_best_one_gets_its_iou() -> None:
    grid = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    centers = torch.stack([grid.repeat(10), grid.repeat_interleave(10)], -1)
    boxes = torch.cat([centers, torch.full((100, 2), 0.5, dtype=torch.float64)], -1)[None]
    box = torch.tensor([[[0.45, 0.45, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    exists = torch.tensor([[True, False]])
    logits = torch.zeros(1, 100, K, dtype=torch.float64)

    quality, owner = align(logits, boxes, centers, box, torch.tensor([[1, 0]]), exists)

    matched = quality[0] > 0
    assert int(matched.sum()) == 13
    assert int(quality[0].argmax()) == 44
    assert float(quality[0, 44]) == pytest.approx(1.0)
    assert set(owner[0][matched].tolist()) == {0}
    assert ((centers[matched] - 0.45).abs() < 0.25).all()


def test_a_better_score_makes_a_match_of_two_equal_boxes() -> None:
    centers = torch.tensor([[0.4, 0.5], [0.6, 0.5]], dtype=torch.float64)
    boxes = torch.tensor([[[0.4, 0.5, 0.4, 0.4], [0.6, 0.5, 0.4, 0.4]]], dtype=torch.float64)
    box = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]], dtype=torch.float64)
    logits = torch.tensor([[[-3.0, 0.0], [3.0, 0.0]]], dtype=torch.float64)

    quality, _ = align(logits, boxes, centers, box, torch.tensor([[0]]), torch.tensor([[True]]))

    assert float(quality[0, 1]) == pytest.approx(0.6)  # its IoU with the box
    assert float(quality[0, 0]) == pytest.approx(0.6 * torch.tensor(-3.0).sigmoid() / torch.tensor(3.0).sigmoid())


def test_a_token_of_two_boxes_goes_to_the_one_that_it_fits() -> None:
    centers = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]], dtype=torch.float64)
    both = torch.tensor([[[0.5, 0.5, 0.8, 0.8], [0.5, 0.5, 0.25, 0.25]]], dtype=torch.float64)
    logits = torch.zeros(1, 1, K, dtype=torch.float64)

    quality, owner = align(logits, boxes, centers, both, torch.tensor([[0, 2]]), torch.tensor([[True, True]]))

    assert int(owner[0, 0]) == 1
    assert float(quality[0, 0]) == pytest.approx(0.04 / 0.0625)


def test_a_box_smaller_than_the_distance_of_tokens_is_matched() -> None:
    centers = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.9, 0.9]], dtype=torch.float64)
    boxes = torch.cat([centers, torch.full((5, 2), 0.3, dtype=torch.float64)], -1)[None]
    box = torch.tensor([[[0.45, 0.45, 0.01, 0.01]]], dtype=torch.float64)

    quality, _ = align(
        torch.zeros(1, 5, K, dtype=torch.float64), boxes, centers, box, torch.tensor([[0]]), torch.tensor([[True]])
    )

    assert (quality[0, :4] >= 0).all()
    assert float(quality[0, 4]) == 0


def test_terms_of_micro_batches_sum_to_those_of_the_batch() -> None:
    model, given = head(), tokens(3)
    boxes, labels = targets(2, 0, 4)
    whole = dense_losses(model(given), boxes, labels, num_boxes=6)
    parts = [
        dense_losses(
            model(Tokens(given.memory[i : i + 1], SHAPES)), boxes[i : i + 1], labels[i : i + 1], num_boxes=6
        )
        for i in range(3)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("counts", [(2, 0, 4), (0, 0)])
def test_every_parameter_gets_a_gradient(counts: tuple[int, ...]) -> None:
    model = head()
    boxes, labels = targets(*counts)
    terms = dense_losses(model(tokens(len(counts))), boxes, labels, num_boxes=sum(counts))
    assert list(terms) == ["loss_vfl_dense", "loss_bbox_dense", "loss_giou_dense"]
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_steps_on_the_loss_predict_the_boxes() -> None:
    model, given = head(), tokens(2)
    boxes, labels = targets(1, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        torch.stack(list(dense_losses(model(given), boxes, labels, num_boxes=3).values())).sum().backward()
        optimizer.step()
    found: DensePrediction = model(given)
    for image, (own, classes) in enumerate(zip(boxes, labels, strict=True)):
        for box, label in zip(own, classes, strict=True):
            best = found.logits[image, :, label].argmax()
            assert (found.boxes_cxcywh[image, best] - box).abs().max() < 0.1 or len(own) > 1


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({"weights": "none"}, True),
        ({"weights": "none", "dense_head": "off"}, False),
        ({"weights": "none", "schedule": "official"}, False),
        ({"weights": "coco"}, False),
        ({"weights": "coco", "dense_head": "on"}, True),
    ],
)
def test_it_is_used_for_random_weights_or_when_asked_for(settings: dict[str, str], used: bool) -> None:
    words = [f"{key}={value}" for key, value in settings.items()]
    config = resolve_run({"preset": "tiny", "data": "x"}, sets=words)
    assert make_plan(config, images=100).dense_head is used

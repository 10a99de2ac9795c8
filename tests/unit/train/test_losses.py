from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rtdetr_cli.model.decoder import Prediction
from rtdetr_cli.model.denoising import DenoisingGroup, draw_denoising
from rtdetr_cli.model.detector import Outputs
from rtdetr_cli.model.layers import cxcywh_to_xyxy
from rtdetr_cli.train.losses import compute_losses
from rtdetr_cli.train.matcher import iou_and_giou, match

K, Q = 4, 6


def prediction(batch: int, queries: int, generator: torch.Generator) -> Prediction:
    return Prediction(
        torch.randn(batch, queries, K, generator=generator, dtype=torch.float64).requires_grad_(),
        (torch.rand(batch, queries, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2).requires_grad_(),
    )


def case(counts: list[int], *, seed: int = 0) -> tuple[Outputs, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    boxes = [torch.rand(n, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.3 for n in counts]
    labels = [torch.randint(K, (n,), generator=generator) for n in counts]
    group = draw_denoising(boxes, labels, num_classes=K, queries=Q, num_positives=8, generator=generator)
    batch = len(counts)
    copies = () if group is None else tuple(prediction(batch, group.size, generator) for _ in range(3))
    return (
        Outputs(
            prediction(batch, Q, generator),
            tuple(prediction(batch, Q, generator) for _ in range(2)),
            prediction(batch, Q, generator),
            copies,
            group,
        ),
        boxes,
        labels,
    )


def plain(p: Prediction, pairs: list[tuple[int, int, Tensor, int]], normalizer: float) -> list[float]:
    """Compute the three terms of one layer query by query. pairs: (image, query, box, label)."""
    aim = torch.zeros_like(p.logits)
    weight = 0.75 * p.logits.sigmoid() ** 2
    l1 = giou_loss = 0.0
    for image, query, box, label in pairs:
        predicted = p.boxes_cxcywh[image, query]
        iou, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(box))
        aim[image, query, label] = iou
        weight[image, query, label] = iou
        l1 += float((predicted - box).abs().sum())
        giou_loss += float(1 - giou)
    vfl = functional.binary_cross_entropy_with_logits(p.logits, aim, weight=weight, reduction="sum")
    return [float(vfl) / normalizer, 5 * l1 / normalizer, 2 * giou_loss / normalizer]


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [1]])
def test_terms_equal_a_plain_computation(counts: list[int]) -> None:
    outputs, boxes, labels = case(counts)
    terms = compute_losses(outputs, boxes, labels, num_boxes=sum(counts))
    normalizer = max(1, sum(counts))
    every_box, every_label = torch.cat(boxes), torch.cat(labels)
    with torch.no_grad():
        for suffix, p in [("", outputs.main), ("_aux_0", outputs.aux[0]), ("_aux_1", outputs.aux[1]),
                          ("_enc_0", outputs.encoder)]:  # fmt: skip
            matches = match([p], boxes, labels)
            pairs = [(r // Q, r % Q, every_box[t], int(every_label[t]))
                     for r, t in zip(matches.rows[0].tolist(), matches.targets[0].tolist(), strict=True)]  # fmt: skip
            got = [terms[f"loss_{name}{suffix}"].item() for name in ("vfl", "bbox", "giou")]
            assert got == pytest.approx(plain(p, pairs, normalizer), rel=1e-9), suffix
        for i, p in enumerate(outputs.denoising):
            group = outputs.group
            pairs = [(b, int(q), boxes[b][t], int(labels[b][t])) for b in range(len(counts))
                     for q, t in zip(group.positives[b], group.targets[b], strict=True)]  # fmt: skip
            got = [terms[f"loss_{name}_dn_{i}"].item() for name in ("vfl", "bbox", "giou")]
            assert got == pytest.approx(plain(p, pairs, normalizer * group.num_groups), rel=1e-9), i
    assert len(terms) == 3 * (4 + len(outputs.denoising))


def part(p: Prediction, rows: slice) -> Prediction:
    return Prediction(p.logits[rows], p.boxes_cxcywh[rows])


def test_terms_of_micro_batches_sum_to_those_of_the_batch() -> None:
    outputs, boxes, labels = case([2, 0, 3, 1])
    whole = compute_losses(outputs, boxes, labels, num_boxes=6)
    total = dict.fromkeys(whole, 0.0)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        cut = Outputs(
            part(outputs.main, rows),
            tuple(part(p, rows) for p in outputs.aux),
            part(outputs.encoder, rows),
            tuple(part(p, rows) for p in outputs.denoising),
            outputs.group.rows(rows),
        )
        for name, value in compute_losses(cut, boxes[rows], labels[rows], num_boxes=6).items():
            total[name] += value.item()
    assert total == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-9)


def test_a_batch_without_boxes_gives_every_prediction_a_gradient() -> None:
    outputs, boxes, labels = case([0, 0])
    terms = compute_losses(outputs, boxes, labels, num_boxes=0)
    torch.stack(list(terms.values())).sum().backward()
    for p in (outputs.main, *outputs.aux, outputs.encoder):
        assert p.logits.grad.abs().sum() > 0
        assert not p.boxes_cxcywh.grad.any()
    assert outputs.denoising == ()


def test_non_finite_predictions_give_non_finite_terms_and_no_error() -> None:
    outputs, boxes, labels = case([2, 1])
    with torch.no_grad():
        outputs.main.boxes_cxcywh[:] = float("nan")
        outputs.aux[0].logits[:] = float("inf")
    terms = compute_losses(outputs, boxes, labels, num_boxes=3)
    assert terms["loss_bbox"].isnan()
    assert terms["loss_bbox_aux_1"].isfinite()


def test_boxes_without_area_give_finite_terms() -> None:
    outputs, _, labels = case([2, 1])
    boxes = [torch.full((2, 4), 0.5, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)]
    boxes[0][:, 2:] = 0
    with torch.no_grad():
        outputs.main.boxes_cxcywh[..., 2:] = 0
    terms = compute_losses(outputs, boxes, labels, num_boxes=3)
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.isfinite() for value in terms.values())
    assert outputs.main.boxes_cxcywh.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_compared_in_float32(dtype: torch.dtype) -> None:
    outputs, boxes, labels = case([2, 1])
    half = Outputs(Prediction(outputs.main.logits.detach().to(dtype), outputs.main.boxes_cxcywh.detach().to(dtype)))
    single = Outputs(Prediction(*(t.detach().to(dtype).float() for t in outputs.main)))
    got, expected = (compute_losses(o, boxes, labels, num_boxes=3) for o in (half, single))
    assert {n: (v.dtype, v.item()) for n, v in got.items()} == {
        n: (torch.float32, v.item()) for n, v in expected.items()
    }


def test_a_truncated_denoising_group_is_normalized_by_its_own_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.rand(50, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.3]
    labels = [torch.randint(K, (50,), generator=generator)]
    group = draw_denoising(boxes, labels, num_classes=K, queries=Q, num_positives=8, generator=generator, max_total=20)
    assert isinstance(group, DenoisingGroup)
    assert group.share == 0.2
    p = prediction(1, group.size, generator)
    outputs = Outputs(prediction(1, Q, generator), denoising=(p,), group=group)
    terms = compute_losses(outputs, boxes, labels, num_boxes=50)
    difference = p.boxes_cxcywh[0][group.positives[0]] - boxes[0][group.targets[0]]
    assert terms["loss_bbox_dn_0"].item() == pytest.approx(5 * difference.abs().sum().item() / 10)

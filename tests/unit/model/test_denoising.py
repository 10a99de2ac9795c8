from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rtdetr_cli.model.denoising import DenoisingGroup, draw_denoising
from rtdetr_cli.model.layers import cxcywh_to_xyxy

K, Q = 7, 11


def targets(counts: list[int], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    boxes = [torch.rand(n, 4, generator=generator) * 0.2 + torch.tensor([0.4, 0.4, 0.1, 0.1]) for n in counts]
    return boxes, [torch.randint(K, (n,), generator=generator) for n in counts]


def drawn(counts: list[int], seed: int = 0, **changes: float) -> DenoisingGroup | None:
    boxes, labels = targets(counts)
    settings_ = {"num_classes": K, "queries": Q, "generator": torch.Generator().manual_seed(seed), **changes}
    return draw_denoising(boxes, labels, **settings_)


@pytest.mark.parametrize(
    ("counts", "groups", "size"), [([1], 100, 200), ([3, 1], 33, 198), ([60, 2], 1, 120), ([100], 1, 200)]
)
def test_published_number_of_groups(counts: list[int], groups: int, size: int) -> None:
    group = drawn(counts)
    assert (group.num_groups, group.size, group.share) == (groups, size, 1.0)


def test_number_of_queries_is_bounded() -> None:
    group = drawn([1000, 3])
    assert group.size == 400
    assert [len(p) for p in group.positives] == [200, 3]
    assert len(set(group.targets[0].tolist())) == 200
    assert group.share == pytest.approx(203 / 1003)


@pytest.mark.parametrize(("counts", "num_positives"), [([], 100), ([0, 0], 100), ([3, 1], 0)])
def test_no_denoising(counts: list[int], num_positives: int) -> None:
    assert drawn(counts, num_positives=num_positives) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 60), st.integers(2, 80))
def test_targets_of_positives(counts: list[int], num_positives: int, max_total: int) -> None:
    group = drawn(counts, num_positives=num_positives, max_total=max_total, label_noise=0.0, box_noise=0.0)
    if group is None:
        assert max(counts) == 0
        return
    assert group.size <= max(max_total, 2)
    boxes, labels = targets(counts)
    for i, (positives, wanted_boxes) in enumerate(zip(group.positives, group.targets, strict=True)):
        assert len(positives) == len(wanted_boxes)
        # without noise a positive query is its box
        found = torch.sigmoid(group.boxes_unactivated[i, positives])
        assert torch.allclose(found, boxes[i][wanted_boxes], atol=1e-5)
        assert torch.equal(group.class_ids[i, positives], labels[i][wanted_boxes])
    padded = group.class_ids == K
    assert padded.sum() == group.class_ids.numel() - 2 * sum(len(p) for p in group.positives)


def test_noise_is_within_its_bounds() -> None:
    group = drawn([4], box_noise=0.5)
    boxes, _ = targets([4])
    moved = cxcywh_to_xyxy(torch.sigmoid(group.boxes_unactivated[0]))
    original = cxcywh_to_xyxy(boxes[0]).repeat(2 * group.num_groups, 1)
    half = boxes[0][:, 2:].repeat(2 * group.num_groups, 2) / 2
    inside = (moved > 0.001).all(-1) & (moved < 0.999).all(-1)  # not clipped at the border
    distance = ((moved - original).abs() / half)[inside]
    far = torch.ones(group.size, dtype=torch.bool)
    far[group.positives[0]] = False
    assert distance[~far[inside]].max() <= 0.5 + 1e-3
    assert distance[far[inside]].min() >= 0.5 - 1e-3
    assert distance[far[inside]].max() <= 1.0 + 1e-3


def test_a_quarter_of_the_labels_is_redrawn() -> None:
    boxes, labels = targets([50] * 40)
    group = draw_denoising(boxes, labels, num_classes=K, queries=Q, generator=torch.Generator().manual_seed(0))
    same = torch.cat([group.class_ids[i, p] == labels[i][t] for i, (p, t) in
                      enumerate(zip(group.positives, group.targets, strict=True))])  # fmt: skip
    assert 1 - same.float().mean().item() == pytest.approx(0.25 * (K - 1) / K, abs=0.03)


def test_attention_mask() -> None:
    group = drawn([2, 1], num_positives=6)  # three groups of 2 positives and 2 negatives
    assert (group.num_groups, group.size) == (3, 12)
    for row in range(group.size + Q):
        for column in range(group.size + Q):
            row_group = row // 4 if row < 12 else None
            column_group = column // 4 if column < 12 else None
            hidden = column_group is not None and row_group != column_group
            assert bool(group.attention_mask[row, column]) == hidden


def test_draw_depends_on_the_generator_only_and_cuts_into_rows() -> None:
    one, two, other = drawn([3, 0, 5], seed=1), drawn([3, 0, 5], seed=1), drawn([3, 0, 5], seed=2)
    assert torch.equal(one.boxes_unactivated, two.boxes_unactivated)
    assert not torch.equal(one.boxes_unactivated, other.boxes_unactivated)
    part = one.rows(slice(1, 3))
    assert torch.equal(part.class_ids, one.class_ids[1:3])
    assert [len(p) for p in part.positives] == [0, len(one.positives[2])]
    assert part.to("cpu").num_groups == one.num_groups

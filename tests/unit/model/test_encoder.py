from __future__ import annotations

import math

import pytest
import torch

from rtdetr_cli.model.encoder import position_table
from rtdetr_cli.model.layers import add_bounded, with_dense_gradient


def test_position_table_is_rows_first_on_rectangles() -> None:
    table = position_table(2, 3, 8)[0]
    omega = [1.0, 1 / 100]  # 10000 ** (-i / 2)
    for row in range(2):
        for column in range(3):
            expected = [
                *(math.sin(row * w) for w in omega),
                *(math.cos(row * w) for w in omega),
                *(math.sin(column * w) for w in omega),
                *(math.cos(column * w) for w in omega),
            ]
            assert table[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", [5, 20])
def test_position_table_equals_the_published_one_on_squares(side: int) -> None:
    omega = 1.0 / 10000 ** (torch.arange(16, dtype=torch.float32) / 16)
    first, second = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    one, two = first.flatten()[:, None] * omega, second.flatten()[:, None] * omega
    published = torch.cat([one.sin(), one.cos(), two.sin(), two.cos()], 1)[None]
    assert torch.equal(position_table(side, side, 64), published)


def test_float16_sums_stay_finite_and_float32_sums_are_not_clamped() -> None:
    big = torch.tensor([60000.0, float("inf"), -60000.0])
    half = add_bounded(big.half(), big.half())
    assert half.tolist() == [65504.0, 65504.0, -65504.0]
    assert add_bounded(big, big.half()).isfinite().all()  # as under autocast: a float32 residual, a half update
    assert add_bounded(big, big).tolist() == [120000.0, float("inf"), -120000.0]


def test_gradient_of_a_joined_map_is_dense() -> None:
    maps = [torch.rand(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
    dense: list[bool] = []
    for x in maps:
        with_dense_gradient(x).register_hook(lambda g: dense.append(g.is_contiguous(memory_format=torch.channels_last)))
    torch.cat(maps, 1).square().sum().backward()
    assert dense == [True, True]

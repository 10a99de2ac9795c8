from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rtdetr_cli.model.attention import (
    DeformableAttention,
    Levels,
    SelfAttention,
    sample_bilinear,
    sample_bilinear_gather,
    sample_discrete,
)
from rtdetr_cli.model.cpu_sampling import sample_bilinear_cpu

SHAPES = ((4, 6), (2, 3), (1, 2))  # not square, on purpose
POINTS = (2, 4, 6)


def naive(value: Tensor, locations: Tensor, weights: Tensor, method: str) -> Tensor:
    """Sample point by point, in loops."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    out = torch.zeros(batch, queries, heads, channels, dtype=value.dtype)
    levels = [level for level, n in enumerate(POINTS) for _ in range(n)]
    starts = [sum(h * w for h, w in SHAPES[:i]) for i in range(len(SHAPES))]
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                for p, level in enumerate(levels):
                    height, width = SHAPES[level]
                    x, y = (locations[b, q, head, p] * torch.tensor([width, height])).tolist()
                    if method == "bilinear":
                        left, top = math.floor(x - 0.5), math.floor(y - 0.5)
                        read = torch.zeros(channels, dtype=value.dtype)
                        for column in (left, left + 1):
                            for row in (top, top + 1):
                                if 0 <= column < width and 0 <= row < height:
                                    share = (1 - abs(x - 0.5 - column)) * (1 - abs(y - 0.5 - row))
                                    read += share * value[b, starts[level] + row * width + column, head]
                    else:
                        shift = 0.5 if method == "published" else 0.0
                        column = min(max(int(x + shift), 0), width - 1)
                        row = min(max(int(y + shift), 0), height - 1)
                        read = value[b, starts[level] + row * width + column, head]
                    out[b, q, head] += weights[b, q, head, p] * read
    return out.flatten(2)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Levels]:
    generator = torch.Generator().manual_seed(0)
    tokens, points = sum(h * w for h, w in SHAPES), sum(POINTS)
    value = torch.randn(2, tokens, 3, 5, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 4, 3, points, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3  # some outside
    weights = torch.rand(2, 4, 3, points, generator=generator, dtype=torch.float64)
    return value, locations, weights, Levels.from_shapes(SHAPES, POINTS, torch.device("cpu"))


def test_bilinear_equals_the_naive_loop(inputs: tuple[Tensor, Tensor, Tensor, Levels]) -> None:
    value, locations, weights, levels = inputs
    expected = naive(value, locations, weights, "bilinear")
    assert torch.allclose(sample_bilinear(value, locations, weights, levels, POINTS), expected, atol=1e-12)
    assert torch.allclose(sample_bilinear_gather(value, locations, weights, levels), expected, atol=1e-12)
    assert torch.allclose(sample_bilinear_cpu(value, locations, weights, levels), expected, atol=1e-12)


def test_gradients_of_sampling_on_a_cpu_equal_those_of_grid_sample(
    inputs: tuple[Tensor, Tensor, Tensor, Levels],
) -> None:
    *tensors, levels = inputs
    for tensor in tensors:
        tensor.requires_grad_()
    out = sample_bilinear_cpu(*tensors, levels)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    got = torch.autograd.grad(out, tensors, weight)
    expected = torch.autograd.grad(sample_bilinear(*tensors, levels, POINTS), tensors, weight)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sampling_on_a_cpu_computes_half_precision_in_float32(
    inputs: tuple[Tensor, Tensor, Tensor, Levels], dtype: torch.dtype
) -> None:
    value, locations, weights, levels = inputs
    value, locations, weights = value.to(dtype), locations.float(), weights.float()
    got = sample_bilinear_cpu(value, locations, weights, levels)
    assert got.dtype is dtype
    assert torch.equal(got, sample_bilinear_cpu(value.float(), locations, weights, levels).to(dtype))


@pytest.mark.parametrize("rounding", ["published", "nearest"])
def test_discrete_equals_the_naive_loop(inputs: tuple[Tensor, Tensor, Tensor, Levels], rounding: str) -> None:
    value, locations, weights, levels = inputs
    got = sample_discrete(value, locations, weights, levels, rounding=rounding)
    assert torch.allclose(got, naive(value, locations, weights, rounding), atol=1e-12)


@pytest.mark.parametrize(("rounding", "x", "column"), [("published", 0.125, 1), ("nearest", 0.125, 0),
                                                       ("published", 0.124, 0), ("nearest", 0.999, 3),
                                                       ("published", -0.3, 0), ("nearest", -0.3, 0),
                                                       ("nearest", 7.0, 3), ("published", 7.0, 3)])  # fmt: skip
def test_rounding_of_a_four_wide_map(rounding: str, x: float, column: int) -> None:
    levels = Levels.from_shapes([(1, 4)], [1], torch.device("cpu"))
    value = torch.arange(4.0).reshape(1, 4, 1, 1)
    got = sample_discrete(value, torch.tensor([[[[[x, 0.5]]]]]), torch.ones(1, 1, 1, 1), levels, rounding=rounding)
    assert got.item() == column


def test_nan_locations_do_not_crash(inputs: tuple[Tensor, Tensor, Tensor, Levels]) -> None:
    value, locations, weights, levels = inputs
    locations = locations.clone()
    locations[0, 0, 0, 0] = float("nan")
    sample_discrete(value, locations, weights, levels)
    sample_bilinear_gather(value, locations, weights, levels)
    got = sample_bilinear_cpu(value, locations, weights, levels)
    assert got[0, 0, :5].isnan().all(), "as with grid_sample"
    assert got[0, 1:].isfinite().all()


def attention(seed: int = 0) -> DeformableAttention:
    torch.manual_seed(seed)
    module = DeformableAttention(dim=16, heads=4, num_points=POINTS)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def test_operators_agree_in_value_and_gradient() -> None:
    module = attention()
    levels = Levels.from_shapes(SHAPES, POINTS, torch.device("cpu"))
    query = torch.randn(2, 4, 16, requires_grad=True)
    memory = torch.randn(2, sum(h * w for h, w in SHAPES), 16, requires_grad=True)
    reference = (torch.rand(2, 4, 4) * 0.8 + 0.1).requires_grad_()
    results = []
    for used in ("grid_sample", "gather"):
        module.set_sampling("bilinear", operator=used)
        out = module(query, reference, memory, levels)
        results.append([out, *torch.autograd.grad(out.square().sum(), [query, memory, reference])])
    for ours, other in zip(*results, strict=True):
        assert torch.allclose(ours, other, atol=1e-5, rtol=1e-4)


def test_discrete_freezes_its_offsets_and_bilinear_unfreezes_them() -> None:
    module = attention()
    module.set_sampling("discrete")
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == [
        "sampling_offsets.weight",
        "sampling_offsets.bias",
    ]
    module.set_sampling("bilinear")
    assert all(p.requires_grad for p in module.parameters())


def test_initial_offsets_point_in_the_heads_directions() -> None:
    module = DeformableAttention(dim=16, heads=4, num_points=(1, 2, 3))
    offsets = module.sampling_offsets.bias.reshape(4, 6, 2)
    right = torch.tensor([[1.0, 0], [1, 0], [2, 0], [1, 0], [2, 0], [3, 0]])
    assert torch.allclose(offsets[0], right, atol=1e-6)
    assert torch.allclose(offsets[2], -right, atol=1e-6)
    assert module.num_points_scale.tolist() == pytest.approx([1, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])


def test_self_attention_equals_torch() -> None:
    torch.manual_seed(0)
    ours = SelfAttention(dim=16, heads=4)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, positions = torch.randn(2, 7, 16), torch.randn(1, 7, 16)
    hidden = torch.rand(7, 7) < 0.3
    hidden.fill_diagonal_(False)
    for mask in (None, hidden):
        expected, _ = theirs(x + positions, x + positions, x, attn_mask=mask)
        assert torch.allclose(ours(x, positions, mask), expected, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_products_equal_the_fused_operator(masked: bool) -> None:
    """Compare values and gradients of the implementation for bfloat16 on a CPU, in float64."""
    from rtdetr_cli.model.attention import attend_with_products

    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand((9, 9), generator=generator) < 0.4 if masked else None
    if hidden is not None:
        hidden.fill_diagonal_(False)
    inputs = [torch.randn((2, 3, 9, 5), generator=generator, dtype=torch.float64) for _ in range(3)]
    results = []
    for attend in ("fused", "products"):
        q, k, v = (t.clone().requires_grad_() for t in inputs)
        if attend == "fused":
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=None if hidden is None else ~hidden
            )
        else:
            out = attend_with_products(q, k, v, hidden)
        out.square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for fused, products in zip(*results, strict=True):
        torch.testing.assert_close(products, fused, rtol=1e-5, atol=1e-6)  # its softmax is float32

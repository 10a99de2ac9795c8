"""Self-attention, and the deformable cross-attention of RT-DETRv2 (arXiv 2407.17140, section 3.1).

The deformable attention samples each level at its own number of points: between pixels (`bilinear`, as in
`grid_sample`), or at one pixel (`discrete`, which every runtime supports). There are three implementations:

* `grid_sample`: one call per level; the fastest on a GPU. On a CPU, sums of rows (`cpu_sampling`) take its place.
* `gather`: bilinear sampling as one gather of four corners over all levels. It equals `grid_sample` within rounding,
  and serves graphs without GridSample and deterministic training on CUDA.
* discrete: one gather.

Departures from the official code: discrete coordinates are clamped by width and height (the official code clamps both
by the height), and there is `nearest` rounding besides the official one, which is half a pixel off.

Shapes: B batch, Q queries, N tokens, C channels, H heads, D channels of a head (C / H), P points of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.model.cpu_sampling import sample_bilinear_cpu

Sampling = Literal["bilinear", "discrete"]
Rounding = Literal["published", "nearest"]
Operator = Literal["grid_sample", "gather"]


class SelfAttention(nn.Module):
    """Multi-head self-attention with positions added to queries and keys; parameters are named as in torch."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attend; returns (B, N, C).

        Args:
            x: (B, N, C).
            positions: (B or 1, N, C), added to queries and keys, not to values.
            attention_mask: (N, N) bool, True where a row must not attend to a column.
        """
        batch, tokens, dim = x.shape
        weight_qk, weight_v = self.in_proj_weight[: 2 * dim], self.in_proj_weight[2 * dim :]
        qk = functional.linear(x + positions, weight_qk, self.in_proj_bias[: 2 * dim])
        v = functional.linear(x, weight_v, self.in_proj_bias[2 * dim :])
        q, k = qk[..., :dim], qk[..., dim:]
        q, k, v = (
            t.reshape(batch, tokens, self.heads, dim // self.heads).transpose(1, 2) for t in (q, k, v)
        )  # B H N D
        if q.dtype is torch.bfloat16 and q.device.type == "cpu":
            out = attend_with_products(q, k, v, attention_mask)
        else:
            visible = None if attention_mask is None else ~attention_mask
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        projected: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, tokens, dim))
        return projected


def attend_with_products(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Attend with batched matrix products; all tensors are (B, H, N, D).

    In bfloat16 on a CPU, the backward pass of torch's fused attention takes four times as long at the sizes of a
    decoder (37 ms instead of 9 ms for 16 images, 4 heads and 170 queries, on one core with AVX512-BF16).
    """
    batch, heads, tokens, channels = q.shape
    q, k, v = (t.reshape(batch * heads, tokens, channels) for t in (q, k, v))
    bias = q.new_zeros((tokens, tokens))
    if attention_mask is not None:
        bias = bias.masked_fill(attention_mask, float("-inf"))
    scores = torch.baddbmm(bias.expand(batch * heads, -1, -1), q, k.transpose(1, 2), alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), v).reshape(batch, heads, tokens, channels)


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The sizes of the feature maps that the decoder samples, and constants of each sampling point's level.

    Attributes:
        shapes: (height, width) of each level, finest first.
        sizes_wh: (P, 2) float32, width and height of the level.
        limits_wh: (P, 2) int64, last column and row of the level.
        widths: (P,) int64, width of the level.
        starts: (P,) int64, index of the level's first token.
    """

    shapes: tuple[tuple[int, int], ...]
    sizes_wh: Tensor
    limits_wh: Tensor
    widths: Tensor
    starts: Tensor

    @classmethod
    def from_shapes(cls, shapes: Sequence[tuple[int, int]], num_points: Sequence[int], device: torch.device) -> Levels:
        """Make the constants for levels of these (height, width), on `device`."""
        sizes, starts, start = [], [], 0
        for (height, width), points in zip(shapes, num_points, strict=True):
            sizes += [[width, height]] * points
            starts += [start] * points
            start += height * width
        sizes_wh = torch.tensor(sizes, device=device)
        return cls(
            tuple(shapes),
            sizes_wh.float(),
            sizes_wh - 1,
            sizes_wh[:, 0].contiguous(),
            torch.tensor(starts, device=device),
        )


class DeformableAttention(nn.Module):
    """Deformable cross-attention: each query samples a few points of every level around its reference box.

    Args:
        dim: channels C of queries and values.
        heads: number of attention heads.
        num_points: number of sampling points of each level, such as (4, 4, 4) or (2, 4, 6).
    """

    num_points_scale: Tensor

    def __init__(self, *, dim: int, heads: int, num_points: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.heads = heads
        self.num_points = tuple(num_points)
        total = sum(self.num_points)
        self.sampling: Sampling = "bilinear"
        self.rounding: Rounding = "published"
        self.operator: Operator = "grid_sample"
        self.offset_scale = 0.5
        self.register_buffer("num_points_scale", torch.tensor([1 / n for n in self.num_points for _ in range(n)]))
        self.sampling_offsets = nn.Linear(dim, heads * total * 2)
        self.attention_weights = nn.Linear(dim, heads * total)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self._initialize()

    def _initialize(self) -> None:
        """Point the heads in different directions, each point one step further (Deformable DETR)."""
        # On the CPU, since arithmetic on `meta` would make torch import its compiler.
        angles = torch.arange(self.heads, dtype=torch.float32, device="cpu") * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # H 2
        steps = torch.cat([torch.arange(1, n + 1, device="cpu") for n in self.num_points]).float()
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((directions[:, None] * steps[None, :, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def set_sampling(
        self, method: Sampling, rounding: Rounding = "published", operator: Operator | None = None
    ) -> None:
        """Choose the sampling. Discrete sampling has no gradient for the offsets, so it freezes them."""
        self.sampling, self.rounding = method, rounding
        self.operator = operator or self.operator
        for parameter in self.sampling_offsets.parameters():
            parameter.requires_grad_(method == "bilinear")

    def forward(self, query: Tensor, reference_cxcywh: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """Sample the memory; returns (B, Q, C).

        Args:
            query: (B, Q, C), positions already added.
            reference_cxcywh: (B, Q, 4), 0 to 1.
            memory: (B, N, C), the tokens of all levels.
            levels: the sizes of the levels.
        """
        batch, queries, _ = query.shape
        tokens = memory.shape[1]
        total = sum(self.num_points)
        value = self.value_proj(memory).reshape(batch, tokens, self.heads, self.dim // self.heads)  # B N H D
        offsets = self.sampling_offsets(query).reshape(batch, queries, self.heads, total, 2)
        weights = self.attention_weights(query).reshape(batch, queries, self.heads, total).softmax(-1)

        reference = reference_cxcywh[:, :, None, None]  # B Q 1 1 4
        # Reshaped to what the heads share first: operations that broadcast over the last two numbers are slow.
        reach = self.num_points_scale.to(reference.dtype)[:, None] * reference[..., 2:] * self.offset_scale  # B Q 1 P 2
        locations = reference[..., :2].expand_as(reach).contiguous() + offsets * reach  # B Q H P 2

        if self.sampling == "discrete":
            sampled = sample_discrete(value, locations, weights, levels, rounding=self.rounding)
        elif self.operator == "gather":
            sampled = sample_bilinear_gather(value, locations, weights, levels)
        elif value.device.type == "cpu" and not torch.compiler.is_compiling():  # an exported graph has grid_sample
            sampled = sample_bilinear_cpu(value, locations, weights, levels)
        else:
            sampled = sample_bilinear(value, locations, weights, levels, self.num_points)
        projected: Tensor = self.output_proj(sampled)
        return projected


def sample_bilinear(
    value: Tensor, locations: Tensor, weights: Tensor, levels: Levels, num_points: Sequence[int]
) -> Tensor:
    """Sample between pixels with `grid_sample`, with zeros outside a map; returns (B, Q, C).

    Args:
        value: (B, N, H, D), tokens of all levels by head.
        locations: (B, Q, H, P, 2) as (x, y), 0 to 1.
        weights: (B, Q, H, P).
        levels: sizes of the maps.
        num_points: number of points of each level, P together.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    dtype = torch.promote_types(value.dtype, locations.dtype)  # float16 values, float32 locations
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # B*H D N
    grid = (2 * locations - 1).to(dtype).transpose(1, 2).flatten(0, 1)  # B*H Q P 2
    by_head = weights.transpose(1, 2).flatten(0, 1)[:, None]  # B*H 1 Q P
    parts, start, point = [], 0, 0
    for (height, width), points in zip(levels.shapes, num_points, strict=True):
        level = maps[:, :, start : start + height * width].reshape(-1, channels, height, width)
        these = slice(point, point + points)
        sampled = functional.grid_sample(level, grid[:, :, these], "bilinear", "zeros", align_corners=False)
        # Summed level by level, since the samples of all levels would be the largest tensor of the decoder.
        parts.append((sampled * by_head[..., these]).sum(-1))  # B*H D Q
        start, point = start + height * width, point + points
    total = torch.stack(parts).sum(0)
    return total.reshape(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


def sample_bilinear_gather(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """Sample as `sample_bilinear`, with one gather of the four pixels around each point."""
    pixels = locations * levels.sizes_wh.to(locations.dtype) - 0.5  # B Q H P 2
    corner = pixels.floor()
    share = pixels - corner
    low = corner.to(torch.int64)
    low_x, low_y = low[..., 0], low[..., 1]
    x, y = torch.stack([low_x, low_x + 1], -1), torch.stack([low_y, low_y + 1], -1)  # B Q H P 2: two pixels each
    limit_x, limit_y = levels.limits_wh[:, 0, None], levels.limits_wh[:, 1, None]
    inside_x, inside_y = (x >= 0) & (x <= limit_x), (y >= 0) & (y <= limit_y)
    share_x = torch.stack([1 - share[..., 0], share[..., 0]], -1) * inside_x
    share_y = torch.stack([1 - share[..., 1], share[..., 1]], -1) * inside_y
    x, y = torch.minimum(x.clamp(min=0), limit_x), torch.minimum(y.clamp(min=0), limit_y)
    index = (y * levels.widths[:, None])[..., None] + x[..., None, :] + levels.starts[:, None, None]
    by_corner = (share_y[..., None] * share_x[..., None, :]) * weights[..., None, None]  # B Q H P 2 2
    return _gather(value, index.flatten(3), by_corner.flatten(3))


def sample_discrete(
    value: Tensor, locations: Tensor, weights: Tensor, levels: Levels, *, rounding: Rounding = "published"
) -> Tensor:
    """Sample one pixel for each point, the nearest one for a point outside the map; see `sample_bilinear`.

    `published` truncates location * size + 0.5, as the published discrete weights were trained with; `nearest` takes
    the pixel that contains the location.
    """
    shift = 0.5 if rounding == "published" else 0.0
    pixels = (locations * levels.sizes_wh.to(locations.dtype) + shift).to(torch.int64)
    pixels = torch.minimum(pixels.clamp(min=0), levels.limits_wh)  # truncation equals floor from 0 on
    index = pixels[..., 1] * levels.widths + pixels[..., 0] + levels.starts
    return _gather(value, index, weights)


def _gather(value: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum the rows `index` (B, Q, H, S) of `value` (B, N, H, D) with `weights` (B, Q, H, S); returns (B, Q, C)."""
    batch, tokens, heads, channels = value.shape
    queries, samples = index.shape[1], index.shape[3]
    by_head = value.transpose(1, 2).reshape(batch * heads * tokens, channels)
    first_row = torch.arange(batch * heads, device=value.device).reshape(batch, 1, heads, 1) * tokens
    rows = by_head.index_select(0, (index + first_row).flatten())
    rows = rows.reshape(batch * queries * heads, samples, channels)
    flat_weights = weights.to(value.dtype).reshape(batch * queries * heads, 1, samples)
    return torch.bmm(flat_weights, rows).reshape(batch, queries, heads * channels)

"""Bilinear sampling on a CPU: weighted sums of rows, faster than `grid_sample` (docs/speed.md).

`grid_sample` reads channel by channel, and leaves it to a second pass to weigh and add the samples. Here each sample is
four rows of D channels, and `embedding_bag` adds up the weighted rows of a query in one pass. Its own backward pass is
slow, so the gradients are computed here; that of the values is a sum of the same kind, over the sorted samples.

Tried, and slower in training: `grid_sample` on channels-last maps, one gather with a matrix product, and the backward
pass of `embedding_bag`.

Shapes as in `attention`: B batch, Q queries, N tokens, H heads, D channels of a head, P points of all levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

if TYPE_CHECKING:
    from rtdetr_cli.model.attention import Levels


def sample_bilinear_cpu(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """Sample as `sample_bilinear`, to rounding; returns (B, Q, C)."""
    sampled: Tensor = _SampleRows.apply(value, locations, weights, levels)
    return sampled


def _neighbors(pixels: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
    """Return the two pixels around a coordinate, whether each is inside, and their shares (0 if outside)."""
    corner = pixels.floor()
    share = pixels - corner
    low = corner.to(torch.int32)
    high = low + 1
    low_inside, high_inside = ((i >= 0).logical_and_(i <= limit).to(pixels.dtype) for i in (low, high))
    low, high = (torch.minimum(i.clamp_(min=0), limit) for i in (low, high))
    return low, high, low_inside, high_inside, (1 - share) * low_inside, share * high_inside


class _SampleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
        batch, tokens, heads, channels = value.shape
        queries, points = locations.shape[1], locations.shape[3]
        dtype = torch.promote_types(value.dtype, locations.dtype)
        rows = value.to(dtype).transpose(1, 2).reshape(batch * heads * tokens, channels)
        pixels = locations.to(dtype) * levels.sizes_wh.to(dtype) - 0.5  # B Q H P 2
        limits = levels.limits_wh.to(torch.int32)
        x0, x1, x0_inside, x1_inside, share_x0, share_x1 = _neighbors(pixels[..., 0], limits[:, 0])
        y0, y1, y0_inside, y1_inside, share_y0, share_y1 = _neighbors(pixels[..., 1], limits[:, 1])
        first = torch.arange(batch * heads, dtype=torch.int32).reshape(batch, 1, heads, 1) * tokens
        first = first + levels.starts.to(torch.int32)
        widths = levels.widths.to(torch.int32)
        y0, y1 = y0.mul_(widths).add_(first), y1.mul_(widths).add_(first)
        index = torch.stack([y0 + x0, y0 + x1, y1 + x0, y1 + x1], -1).reshape(-1, 4 * points)
        shares = torch.stack([share_y0 * share_x0, share_y0 * share_x1, share_y1 * share_x0, share_y1 * share_x1], -1)
        weights = weights.to(dtype)
        by_row = (shares * weights[..., None]).reshape(-1, 4 * points)
        sums = functional.embedding_bag(index, rows, mode="sum", per_sample_weights=by_row)
        ctx.save_for_backward(
            rows, index, shares, by_row, weights, levels.sizes_wh,
            x0_inside, x1_inside, y0_inside, y1_inside, share_x0, share_x1, share_y0, share_y1,
        )  # fmt: skip
        ctx.sizes, ctx.dtypes = (batch, tokens, heads, channels), (value.dtype, locations.dtype)
        return sums.reshape(batch, queries, heads * channels).to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from scipy.sparse import csr_array  # here, since prediction does not need it

        rows, index, shares, by_row, weights, sizes_wh, *factors = ctx.saved_tensors
        x0_inside, x1_inside, y0_inside, y1_inside, share_x0, share_x1, share_y0, share_y1 = factors
        batch, tokens, heads, channels = ctx.sizes
        grad = grads[0].to(rows.dtype).reshape(-1, channels)  # B*Q*H D
        bags, samples = index.shape

        # Every row of the values gets the gradients of the queries that sampled it.
        ends = np.arange(0, bags * samples + 1, samples, dtype=np.int32)
        by_bag = csr_array((by_row.numpy().ravel(), index.numpy().ravel(), ends), shape=(bags, len(rows)))
        by_row_of_values = by_bag.tocsc()  # a counting sort
        row_grad = functional.embedding_bag(
            torch.from_numpy(by_row_of_values.indices),
            grad,
            torch.from_numpy(by_row_of_values.indptr[:-1]),
            mode="sum",
            per_sample_weights=torch.from_numpy(by_row_of_values.data),
        )
        value_grad = row_grad.reshape(batch, heads, tokens, channels).transpose(1, 2).to(ctx.dtypes[0])

        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad,
            rows,
            index.flatten(),
            torch.arange(0, bags * samples, samples, dtype=torch.int32),
            torch.arange(bags, dtype=torch.int32).repeat_interleave(samples),
            0,  # mode: sum
        ).reshape(shares.shape)  # B Q H P 4: of the gradient and each row
        p00, p01, p10, p11 = products.unbind(-1)
        dx = share_y0 * (x1_inside * p01 - x0_inside * p00) + share_y1 * (x1_inside * p11 - x0_inside * p10)
        dy = share_x0 * (y1_inside * p10 - y0_inside * p00) + share_x1 * (y1_inside * p11 - y0_inside * p01)
        location_grad = torch.stack([dx * weights, dy * weights], -1) * sizes_wh.to(rows.dtype)
        return value_grad, location_grad.to(ctx.dtypes[1]), (products * shares).sum(-1), None

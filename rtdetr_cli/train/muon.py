"""Muon: a step along the nearest orthogonal matrix of each weight's momentum.

Adam scales single numbers, so the few directions that dominate a gradient dominate its step as well. Muon gives all
directions of a matrix the same length. From random weights that learns far more in the same number of steps
(docs/learning.md). After Jordan et al. 2024, with the length of the step by Liu et al. 2025 (arXiv 2502.16982).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
SMALLEST_SIDE = 16
ITERATIONS = 5
# Of the polynomial a x + b x^3 + c x^5, which brings singular values from 0.01 to 1 close to 1 within five iterations.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is the matrix of a hidden layer, dense or of a convolution.

    Norms, biases, embeddings, the first convolution, depthwise convolutions and the layers that end in scores or boxes
    are none.
    """
    sides = parameter.shape[:2]
    return len(sides) == 2 and min(sides) >= SMALLEST_SIDE and "score_head" not in name and "embed" not in name


class Muon:
    """Steps for the groups of `parameter_groups` that hold matrices.

    Matrices of one shape are stacked. A convolution's filters are the rows of its matrix, and the three projections of
    an attention are three matrices.

    Args:
        groups: from `parameter_groups`.
        dtype: in which momentum is made orthogonal; bfloat16 is enough.
    """

    def __init__(self, groups: list[dict[str, Any]], *, dtype: torch.dtype) -> None:
        self.dtype = dtype
        stacks: dict[tuple[int, int, float, float], list[tuple[nn.Parameter, int]]] = {}
        for group in groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                count = 3 if name.endswith("in_proj_weight") else 1
                rows, columns = parameter.shape[0] // count, parameter[0].numel()
                key = (rows, columns, group["lr"], group["weight_decay"])
                stacks.setdefault(key, []).append((parameter, count))
        self.stacks = list(stacks.items())
        self.momentum = [
            torch.zeros(sum(count for _, count in members), rows, columns, device=members[0][0].device)
            for (rows, columns, _, _), members in self.stacks
        ]

    def step(self, share: float, *, scale: Tensor, found_inf: Tensor) -> None:
        """Update the matrices.

        Args:
            share: of the peak learning rate.
            scale: () by which the gradients are divided.
            found_inf: () 1 to change nothing.
        """
        skipped = found_inf > 0
        for ((rows, columns, lr, decay), members), momentum in zip(self.stacks, self.momentum, strict=True):
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p, _ in members]
            stack = torch.cat([g.reshape(-1, rows, columns) for g in grads]) / scale
            momentum.copy_(torch.where(skipped, momentum, momentum.lerp(stack, 1 - MOMENTUM)))
            direction = orthogonalize(stack.lerp(momentum, MOMENTUM), dtype=self.dtype)
            # Its elements have a root mean square of 1 / sqrt(max(rows, columns)); those of Adam's first step are 1.
            length = lr * share * max(rows, columns) ** 0.5
            updates = torch.split(torch.where(skipped, 0.0, direction * length), [count for _, count in members])
            kept = torch.where(skipped, 1.0, 1 - lr * share * decay)
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.mul_(kept).sub_(update.reshape(parameter.shape))


def orthogonalize(matrices: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Bring all singular values close to 1, by Newton and Schulz's iteration.

    Args:
        matrices: (K, rows, columns) float32.
        dtype: of the products.

    Returns:
        (K, rows, columns) float32, singular values from about 0.7 to 1.2 unless they were 100 times below the largest.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)).to(dtype)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()

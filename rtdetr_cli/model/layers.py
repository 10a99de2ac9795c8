"""Layers and functions that several parts of the detector share.

Parameters are named as in the published state dict (`conv`, `norm`, `layers.N`), so published files load directly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Value = TypeVar("Value")
Activation = Callable[[Tensor], Tensor]
_CACHE_SIZE = 48


class FrozenBatchNorm2d(nn.Module):
    """A constant batch norm.

    Its four vectors are buffers, so no optimizer changes them; `num_batches_tracked` of a file is ignored.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, *, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
    ) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift (B, C, H, W)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[None, :, None, None] + shift.to(x.dtype)[None, :, None, None]


class ConvNorm(nn.Module):
    """A convolution without bias, a batch norm, and an optional activation."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)
        self.act = act if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return cast(Tensor, self.act(self.norm(self.conv(x))))

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the float64 weight and bias of a single convolution that equals this convolution and its norm."""
        norm = cast(nn.BatchNorm2d, self.norm)  # or a FrozenBatchNorm2d, which has the same attributes
        mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
        scale = norm.weight.double() / (variance + norm.eps).sqrt()
        return self.conv.weight.double() * scale[:, None, None, None], norm.bias.double() - mean * scale

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the norm into the convolution, in place; the result cannot be trained."""
        if isinstance(self.norm, nn.Identity):
            return
        weight, bias = self.folded()
        old = self.conv
        dtype = old.weight.dtype
        self.conv = convolution(weight.to(dtype), bias.to(dtype), stride=old.stride[0], groups=old.groups)
        self.norm = nn.Identity()


def convolution(weight: Tensor, bias: Tensor, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Make a convolution padded as in `ConvNorm` from a weight (C', C / groups, k, k) and a bias (C',)."""
    out_channels, in_channels, kernel, _ = weight.shape
    padding = (kernel - 1) // 2
    conv = nn.Conv2d(in_channels * groups, out_channels, kernel, stride, padding=padding, groups=groups).to(weight)
    conv.weight.data = weight
    conv.bias.data = bias  # type: ignore[union-attr]
    return conv


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(
        self, *, in_dim: int, hidden_dim: int, out_dim: int, layers: int, act: Activation = functional.relu
    ) -> None:
        super().__init__()
        self.act = act
        sizes = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return cast(Tensor, self.layers[-1](x))


class ConstantCache:
    """A cache of constants that depend only on the input's size: positions, anchors, level sizes.

    They are not part of the state dict, so a model takes any input size. Nothing is added to the cache while a graph
    is traced, but what a forward pass has added before becomes a constant of the exported graph.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, object] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the constant of `key`, and make it if needed."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return make()  # the compiler would put a guard on every entry of a dict
        if key in self._values:
            return cast(Value, self._values[key])
        if torch.compiler.is_exporting():
            return make()
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor cannot be used in training
            value = make()
        while len(self._values) >= _CACHE_SIZE:
            self._values.pop(next(iter(self._values)))
        self._values[key] = value
        return value

    def __deepcopy__(self, memo: dict[int, object]) -> ConstantCache:
        return ConstantCache()


def with_dense_gradient(x: Tensor) -> Tensor:
    """Return a channels-last map (B, C, H, W) whose gradient will be contiguous, too, although `cat` gives a slice.

    On a CPU, the backward pass of a batch norm is slow for a slice.
    """
    if x.requires_grad and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))  # type: ignore[no-untyped-call]
    return x


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of x, which is clipped to [0, 1] and kept `eps` away from both ends."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def add_bounded(residual: Tensor, update: Tensor) -> Tensor:
    """Add, and clamp the sum to float16's range where the update is float16.

    In long float16 training, activations beyond 65504 became infinite and then NaN. The official v1 code clamps before
    the decoder's last norm; the v2 code does not.
    """
    total = residual + update
    if update.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        total = total.clamp(-limit, limit)
    return total


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from center and size to corners, in the same unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from corners to center and size, in the same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) * 0.5, high - low], -1)

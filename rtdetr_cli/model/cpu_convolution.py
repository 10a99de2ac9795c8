"""Convolutions on a CPU with their activation, for prediction (docs/speed.md).

oneDNN's kernels apply an activation to a value while it is in the cache, and read weights fastest in an order of their
own. torch uses both only in compiled graphs; these are the operators that it uses there.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

from rtdetr_cli.model.encoder import RepBlock
from rtdetr_cli.model.layers import ConvNorm

_ACTIVATIONS = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "swish"}


class ActivatedConvolution(nn.Module):
    """A convolution followed by an activation; it keeps only oneDNN's copy of the weight."""

    def __init__(self, conv: nn.Conv2d, activation: str) -> None:
        super().__init__()
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.geometry)
        self.bias = conv.bias
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            x, self.weight, self.bias, *self.geometry, self.activation, [], ""
        )


def activate_in_convolutions(model: nn.Module) -> None:
    """Replace the convolutions of a fused float32 model, in place; it can then only predict on this CPU.

    Nothing changes where torch has no oneDNN for x86, or in other precisions.
    """
    on_x86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not on_x86 or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, RepBlock):
                assert child.conv is not None, "the model is not fused"
                setattr(parent, name, ActivatedConvolution(child.conv, "swish"))
            elif isinstance(child, ConvNorm) and type(child.act) in _ACTIVATIONS:
                setattr(parent, name, ActivatedConvolution(child.conv, _ACTIVATIONS[type(child.act)]))

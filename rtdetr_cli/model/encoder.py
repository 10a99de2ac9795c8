"""The hybrid encoder of RT-DETR (arXiv 2304.08069, section 4.2): attention within the coarsest map, then fusion.

Self-attention (AIFI) is applied to the stride-32 map only. Cross-scale fusion goes from coarse to fine and back
through blocks of re-parameterized convolutions, which `RepBlock.fuse` turns into equivalent 3x3 convolutions.

Departure from the official code: the position table encodes the row in the first half of the channels and the column
in the second. On square maps this equals the official table bit for bit; on rectangles the official one is scrambled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.model.attention import SelfAttention
from rtdetr_cli.model.layers import ConstantCache, ConvNorm, add_bounded, convolution, with_dense_gradient


def position_table(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Return sine and cosine positions (1, height * width, dim) in float32.

    Sine of the row, cosine of the row, sine and cosine of the column have a quarter of the channels each.
    """
    quarter = dim // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * omega  # H C/4
    columns = torch.arange(width, dtype=torch.float32, device=device)[:, None] * omega  # W C/4
    by_row = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(height, width, 2 * quarter)
    by_column = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(height, width, 2 * quarter)
    return torch.cat([by_row, by_column], -1).reshape(1, height * width, dim)


class EncoderLayer(nn.Module):
    """A transformer layer with post-norm and exact GELU."""

    def __init__(self, *, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim=dim, heads=heads)
        self.linear1 = nn.Linear(dim, ffn)
        self.linear2 = nn.Linear(ffn, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        x = self.norm1(add_bounded(x, self.self_attn(x, positions)))
        return cast(Tensor, self.norm2(add_bounded(x, self.linear2(functional.gelu(self.linear1(x))))))


class RepBlock(nn.Module):
    """The sum of a 3x3 and a 1x1 convolution, and SiLU (RepVGG, arXiv 2101.03697); `fuse` merges the two."""

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels=channels, out_channels=channels, kernel=3)
        self.conv2 = ConvNorm(in_channels=channels, out_channels=channels, kernel=1)
        self.conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return functional.silu(self.conv1(x) + self.conv2(x) if self.conv is None else self.conv(x))

    @torch.no_grad()
    def fuse(self) -> None:
        """Replace the two branches with one convolution, in place."""
        if self.conv is not None:
            return
        dtype = self.conv1.conv.weight.dtype
        weight3, bias3 = self.conv1.folded()
        weight1, bias1 = self.conv2.folded()
        self.conv = convolution((weight3 + functional.pad(weight1, [1, 1, 1, 1])).to(dtype), (bias3 + bias1).to(dtype))
        del self.conv1, self.conv2


class FusionBlock(nn.Module):
    """A cross-stage-partial block: one branch has re-parameterized blocks, the other bypasses them."""

    def __init__(self, *, in_channels: int, out_channels: int, expansion: float, depth: int) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1 = ConvNorm(in_channels=in_channels, out_channels=hidden, act=nn.SiLU(inplace=True))
        self.conv2 = ConvNorm(in_channels=in_channels, out_channels=hidden, act=nn.SiLU(inplace=True))
        self.bottlenecks = nn.Sequential(*[RepBlock(channels=hidden) for _ in range(depth)])
        self.conv3: nn.Module = (
            ConvNorm(in_channels=hidden, out_channels=out_channels, act=nn.SiLU(inplace=True))
            if hidden != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        return cast(Tensor, self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x)))


class HybridEncoder(nn.Module):
    """The encoder: three maps of the backbone to three fused maps of `hidden_dim` channels.

    Args:
        in_channels: channels of the maps of strides 8, 16 and 32.
        hidden_dim: channels of every output.
        heads, ffn, layers: of the attention within the stride-32 map.
        expansion: ratio of a fusion block's inner channels to `hidden_dim`.
        depth_mult: a third of the number of re-parameterized blocks in a fusion block.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        hidden_dim: int,
        heads: int,
        ffn: int,
        layers: int,
        expansion: float,
        depth_mult: float,
    ) -> None:
        super().__init__()
        self._constants = ConstantCache()
        self.input_proj = nn.ModuleList(ConvNorm(in_channels=c, out_channels=hidden_dim) for c in in_channels)
        attention = nn.ModuleList(EncoderLayer(dim=hidden_dim, heads=heads, ffn=ffn) for _ in range(layers))
        self.encoder = nn.ModuleList([nn.ModuleDict({"layers": attention})])  # nested for the published names
        depth = round(3 * depth_mult)
        steps = range(len(in_channels) - 1)
        self.lateral_convs = nn.ModuleList(
            ConvNorm(in_channels=hidden_dim, out_channels=hidden_dim, act=nn.SiLU(inplace=True)) for _ in steps
        )
        self.fpn_blocks = nn.ModuleList(
            FusionBlock(in_channels=2 * hidden_dim, out_channels=hidden_dim, expansion=expansion, depth=depth)
            for _ in steps
        )
        self.downsample_convs = nn.ModuleList(
            ConvNorm(in_channels=hidden_dim, out_channels=hidden_dim, kernel=3, stride=2, act=nn.SiLU(inplace=True))
            for _ in steps
        )
        self.pan_blocks = nn.ModuleList(
            FusionBlock(in_channels=2 * hidden_dim, out_channels=hidden_dim, expansion=expansion, depth=depth)
            for _ in steps
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map three (B, C_l, H_l, W_l) to three (B, hidden_dim, H_l, W_l), finest first."""
        projected = [with_dense_gradient(proj(x)) for proj, x in zip(self.input_proj, maps, strict=True)]
        projected[-1] = self._attend(projected[-1])

        fused = [projected[-1]]  # coarsest first
        for lateral, block, low in zip(self.lateral_convs, self.fpn_blocks, projected[-2::-1], strict=True):
            fused[-1] = lateral(fused[-1])
            up = functional.interpolate(fused[-1], scale_factor=2.0, mode="nearest")
            fused.append(block(torch.cat([up, low], 1)))

        outs = [fused[-1]]  # finest first
        for down, block, high in zip(self.downsample_convs, self.pan_blocks, fused[-2::-1], strict=True):
            outs.append(block(torch.cat([down(outs[-1]), high], 1)))
        return outs

    def _attend(self, x: Tensor) -> Tensor:
        """Apply self-attention within one map (B, C, H, W)."""
        _, channels, height, width = x.shape
        positions = self._constants.get(
            (height, width, x.device), lambda: position_table(height, width, channels, x.device)
        )
        tokens = x.flatten(2).transpose(1, 2)  # B H*W C
        for layer in cast(nn.ModuleList, self.encoder[0].layers):
            tokens = layer(tokens, positions.to(x.dtype))
        return tokens.transpose(1, 2).reshape(-1, channels, height, width)

"""HGNetv2, the other published backbone of RT-DETR (PaddlePaddle's PP-HGNetV2).

Each block concatenates the outputs of its layers, and two 1x1 convolutions reduce them. In the light stages a layer is
a 1x1 convolution followed by a depthwise one.

Departure from the official code: `width` scales every channel. In the published files the norms are called `bn`, and
two convolutions of the stem have one more level in their names; `weights.names` translates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.model.backbone import Backbone
from rtdetr_cli.model.layers import ConvNorm

HGNetName = Literal["hgnetv2-l", "hgnetv2-x", "hgnetv2-h"]
LAYERS = 6  # of every block
LIGHT = (False, False, True, True)  # whether the layers of a stage are light


class Sizes(NamedTuple):
    """Channels of the stem, within and out of it; and of the four stages: channels of a layer and out, and blocks."""

    stem: tuple[int, int]
    channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def in_channels(self) -> tuple[int, ...]:
        """Channels of the input of each stage."""
        return (self.stem[1], *self.out_channels[:-1])


SIZES: dict[HGNetName, Sizes] = {
    "hgnetv2-l": Sizes((32, 48), (48, 96, 192, 384), (128, 512, 1024, 2048), (1, 1, 3, 1)),
    "hgnetv2-x": Sizes((32, 64), (64, 128, 256, 512), (128, 512, 1024, 2048), (1, 2, 5, 2)),
    "hgnetv2-h": Sizes((48, 96), (96, 192, 384, 768), (192, 512, 1024, 2048), (2, 3, 6, 3)),
}
"""The published sizes, at width 64."""


def scaled_sizes(name: HGNetName, width: int) -> Sizes:
    """Return the sizes of a backbone whose channels are `width` / 64 of the published ones."""
    sizes = SIZES[name]
    scaled = {
        field: tuple(max(2, channels * width // 64) for channels in getattr(sizes, field))
        for field in ("stem", "channels", "out_channels")
    }
    return sizes._replace(**scaled)


class Stem(nn.Module):
    """Five convolutions to stride 4; two 2x2 convolutions run beside a pooling."""

    def __init__(self, *, channels: int, out_channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.stem1 = _conv(3, channels, kernel=3, stride=2)
        self.stem2a = _conv(channels, half, kernel=2)
        self.stem2b = _conv(half, channels, kernel=2)
        self.stem3 = _conv(2 * channels, channels, kernel=3, stride=2)
        self.stem4 = _conv(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, C, H / 4, W / 4)."""
        x = functional.pad(self.stem1(x), (0, 1, 0, 1))
        convolved = self.stem2b(functional.pad(self.stem2a(x), (0, 1, 0, 1)))
        pooled = functional.max_pool2d(x, 2, stride=1)
        return cast(Tensor, self.stem4(self.stem3(torch.cat([pooled, convolved], 1))))


class LightLayer(nn.Module):
    """A 1x1 convolution without activation, and a 5x5 depthwise one."""

    def __init__(self, *, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels=in_channels, out_channels=channels)
        self.conv2 = _conv(channels, channels, kernel=5, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        return cast(Tensor, self.conv2(self.conv1(x)))


class Block(nn.Module):
    """Layers in a row whose outputs are concatenated and reduced; all but a stage's first block are residual."""

    def __init__(self, *, in_channels: int, channels: int, out_channels: int, light: bool, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        inputs = [in_channels, *[channels] * (LAYERS - 1)]
        self.layers = nn.ModuleList(
            LightLayer(in_channels=n, channels=channels) if light else _conv(n, channels, kernel=3) for n in inputs
        )
        self.aggregation_squeeze_conv = _conv(in_channels + LAYERS * channels, out_channels // 2)
        self.aggregation_excitation_conv = _conv(out_channels // 2, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        out: Tensor = self.aggregation_excitation_conv(self.aggregation_squeeze_conv(torch.cat(outputs, 1)))
        return out + x if self.residual else out


def _stage(sizes: Sizes, index: int) -> nn.Sequential:
    """Return the blocks at one resolution, after a depthwise convolution of stride 2 in all stages but the first."""
    n, out_channels = sizes.in_channels[index], sizes.out_channels[index]
    downsample = ConvNorm(in_channels=n, out_channels=n, kernel=3, stride=2, groups=n) if index else nn.Identity()
    blocks = [
        Block(
            in_channels=out_channels if i else n,
            channels=sizes.channels[index],
            out_channels=out_channels,
            light=LIGHT[index],
            residual=i > 0,
        )
        for i in range(sizes.blocks[index])
    ]
    return nn.Sequential(OrderedDict(downsample=downsample, blocks=nn.Sequential(*blocks)))


class HGNetV2(Backbone):
    """The backbone; its outputs are the maps of strides 8, 16 and 32.

    Args:
        name: the published sizes.
        width: 64 for those sizes; other widths scale every channel.
    """

    def __init__(self, *, name: HGNetName, width: int = 64) -> None:
        super().__init__()
        sizes = scaled_sizes(name, width)
        self.stem = Stem(channels=sizes.stem[0], out_channels=sizes.stem[1])
        self.stages = nn.ModuleList(_stage(sizes, index) for index in range(4))
        self.out_channels = sizes.out_channels[1:]

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The stem and the stages."""
        return [self.stem, *self.stages]


def _conv(in_channels: int, out_channels: int, *, kernel: int = 1, stride: int = 1, groups: int = 1) -> ConvNorm:
    act = nn.ReLU(inplace=True)
    return ConvNorm(
        in_channels=in_channels, out_channels=out_channels, kernel=kernel, stride=stride, groups=groups, act=act
    )

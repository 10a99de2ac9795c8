"""HGNetv2, the other published backbone of RT-DETR (PaddlePaddle's PP-HGNetV2).

Each block concatenates the outputs of its layers, and two 1x1 convolutions reduce them. In the light stages a layer is
a 1x1 convolution followed by a depthwise one.

Departure from the official code: `width` scales every channel. In the published files the norms are called `bn`, and
two convolutions of the stem have one more level in their names; `weights.names` translates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.model.backbone import Backbone
from rtdetr_cli.model.layers import ConvNorm

HGNetName = Literal["hgnetv2-l", "hgnetv2-x", "hgnetv2-h"]
LAYERS = 6  # of every block


class StageSizes(NamedTuple):
    """Channels, number of blocks and kind of one stage."""

    in_channels: int
    channels: int  # of each layer
    out_channels: int
    blocks: int
    light: bool


class Sizes(NamedTuple):
    """Channels of the stem, within and out of it, and the four stages."""

    stem: tuple[int, int]
    stages: tuple[StageSizes, ...]


SIZES: dict[HGNetName, Sizes] = {
    "hgnetv2-l": Sizes((32, 48), (
        StageSizes(48, 48, 128, 1, False), StageSizes(128, 96, 512, 1, False),
        StageSizes(512, 192, 1024, 3, True), StageSizes(1024, 384, 2048, 1, True),
    )),
    "hgnetv2-x": Sizes((32, 64), (
        StageSizes(64, 64, 128, 1, False), StageSizes(128, 128, 512, 2, False),
        StageSizes(512, 256, 1024, 5, True), StageSizes(1024, 512, 2048, 2, True),
    )),
    "hgnetv2-h": Sizes((48, 96), (
        StageSizes(96, 96, 192, 2, False), StageSizes(192, 192, 512, 3, False),
        StageSizes(512, 384, 1024, 6, True), StageSizes(1024, 768, 2048, 3, True),
    )),
}  # fmt: skip
"""The published sizes, at width 64."""


def scaled_sizes(name: HGNetName, width: int) -> Sizes:
    """Return the sizes of a backbone whose channels are `width` / 64 of the published ones."""

    def scaled(channels: int) -> int:
        return max(2, channels * width // 64)

    sizes = SIZES[name]
    stages = tuple(
        s._replace(in_channels=scaled(s.in_channels), channels=scaled(s.channels), out_channels=scaled(s.out_channels))
        for s in sizes.stages
    )
    return Sizes((scaled(sizes.stem[0]), scaled(sizes.stem[1])), stages)


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

    def __init__(self, *, in_channels: int, sizes: StageSizes, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        inputs = [in_channels, *[sizes.channels] * (LAYERS - 1)]
        self.layers = nn.ModuleList(
            LightLayer(in_channels=n, channels=sizes.channels) if sizes.light else _conv(n, sizes.channels, kernel=3)
            for n in inputs
        )
        self.aggregation_squeeze_conv = _conv(in_channels + LAYERS * sizes.channels, sizes.out_channels // 2)
        self.aggregation_excitation_conv = _conv(sizes.out_channels // 2, sizes.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        out: Tensor = self.aggregation_excitation_conv(self.aggregation_squeeze_conv(torch.cat(outputs, 1)))
        return out + x if self.residual else out


class Stage(nn.Module):
    """Blocks at one resolution, after a depthwise convolution of stride 2 in all stages but the first."""

    def __init__(self, *, sizes: StageSizes, downsample: bool) -> None:
        super().__init__()
        n = sizes.in_channels
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = ConvNorm(in_channels=n, out_channels=n, kernel=3, stride=2, groups=n)
        self.blocks = nn.ModuleList(
            Block(in_channels=n if i == 0 else sizes.out_channels, sizes=sizes, residual=i > 0)
            for i in range(sizes.blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class HGNetV2(Backbone):
    """The backbone; its outputs are the maps of strides 8, 16 and 32.

    Args:
        name: the published sizes.
        width: 64 for those sizes; other widths scale every channel.
        freeze_at: -1 freezes nothing, 0 the stem, n the stem and n stages.
        freeze_norm: make every batch norm constant.
    """

    def __init__(self, *, name: HGNetName, width: int = 64, freeze_at: int = -1, freeze_norm: bool = False) -> None:
        super().__init__()
        (channels, out_channels), stages = scaled_sizes(name, width)
        self.stem = Stem(channels=channels, out_channels=out_channels)
        self.stages = nn.ModuleList(Stage(sizes=sizes, downsample=i > 0) for i, sizes in enumerate(stages))
        self.out_channels = tuple(s.out_channels for s in stages[1:])
        self.finish(freeze_at=freeze_at, freeze_norm=freeze_norm)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The stem and the stages."""
        return [self.stem, *self.stages]


def _conv(in_channels: int, out_channels: int, *, kernel: int = 1, stride: int = 1, groups: int = 1) -> ConvNorm:
    act = nn.ReLU(inplace=True)
    return ConvNorm(
        in_channels=in_channels, out_channels=out_channels, kernel=kernel, stride=stride, groups=groups, act=act
    )

"""What backbones share, and ResNet-vd (He et al. 2018, "Bag of Tricks", arXiv 1812.01187, variant D).

The stem has three 3x3 convolutions, the stride of a bottleneck is in its 3x3 convolution, and a strided shortcut has
an average pool before its 1x1 convolution.

Departures from the official code: `width` scales every stage, and `depth` 10 has one basic block per stage, for the
`tiny` preset; the batch norms of frozen stages keep their statistics, which the official code updates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.model.layers import ConvNorm, FrozenBatchNorm2d

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def resnet_depth(blocks: Sequence[int], *, bottleneck: bool) -> int:
    """Return the depth of the ResNet with these numbers of blocks; raises ValueError where there is none."""
    for depth, counts in BLOCKS.items():
        if counts == tuple(blocks) and (depth >= 50) == bottleneck:
            return depth
    raise ValueError(f"no ResNet has {tuple(blocks)} {'bottleneck' if bottleneck else 'basic'} blocks")


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the projection of a stage's first block."""
    projection = ConvNorm(in_channels=in_channels, out_channels=out_channels)
    if stride == 1:
        return projection
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2, 2, ceil_mode=True), conv=projection))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (depths below 50)."""

    expansion = 1

    def __init__(self, *, in_channels: int, channels: int, stride: int, project: bool) -> None:
        super().__init__()
        self.short = _shortcut(in_channels, channels, stride) if project else nn.Identity()
        self.branch2a = ConvNorm(
            in_channels=in_channels, out_channels=channels, kernel=3, stride=stride, act=nn.ReLU(inplace=True)
        )
        self.branch2b = ConvNorm(in_channels=channels, out_channels=channels, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        return functional.relu(self.branch2b(self.branch2a(x)) + self.short(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (depths from 50)."""

    expansion = 4

    def __init__(self, *, in_channels: int, channels: int, stride: int, project: bool) -> None:
        super().__init__()
        self.branch2a = ConvNorm(in_channels=in_channels, out_channels=channels, act=nn.ReLU(inplace=True))
        self.branch2b = ConvNorm(
            in_channels=channels, out_channels=channels, kernel=3, stride=stride, act=nn.ReLU(inplace=True)
        )
        self.branch2c = ConvNorm(in_channels=channels, out_channels=channels * self.expansion)
        self.short = _shortcut(in_channels, channels * self.expansion, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        return functional.relu(self.branch2c(self.branch2b(self.branch2a(x))) + self.short(x))


def _stage(
    block: type[BasicBlock | Bottleneck], *, in_channels: int, channels: int, count: int, stride: int
) -> nn.Sequential:
    """Return the blocks at one resolution; the first has the stride, and a projection in its shortcut."""
    first = block(in_channels=in_channels, channels=channels, stride=stride, project=True)
    n = channels * block.expansion
    others = [block(in_channels=n, channels=channels, stride=1, project=False) for _ in range(count - 1)]
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(first, *others)))


class Backbone(nn.Module):
    """A stem and four stages; the outputs are the maps of strides 8, 16 and 32.

    Attributes:
        out_channels: channels of the three maps.
    """

    out_channels: tuple[int, ...]
    _frozen_parts = 0

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The stem and the stages."""
        raise NotImplementedError

    def freeze(self, at: int) -> None:
        """Freeze the stem (0), the stem and `at` stages (1 to 4), or nothing (-1)."""
        self._frozen_parts = at + 1
        for part in self.parts[: self._frozen_parts]:
            for parameter in part.parameters():
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; frozen parts stay in eval mode."""
        super().train(mode)
        for part in self.parts[: self._frozen_parts]:
            part.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to three maps (B, C_l, H / s, W / s), s = 8, 16, 32."""
        stem, *stages = self.parts
        x = stem(images)
        maps = []
        for stage in stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class ResNet(Backbone):
    """The backbone; its outputs are the maps of strides 8, 16 and 32.

    Args:
        depth: 10, 18, 34, 50 or 101.
        width: channels of the first stage; the other stages and the stem scale with it.
    """

    def __init__(self, *, depth: int, width: int = 64) -> None:
        super().__init__()
        block: type[BasicBlock | Bottleneck] = Bottleneck if depth >= 50 else BasicBlock
        half = width // 2
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv1_1=ConvNorm(in_channels=3, out_channels=half, kernel=3, stride=2, act=nn.ReLU(inplace=True)),
                conv1_2=ConvNorm(in_channels=half, out_channels=half, kernel=3, act=nn.ReLU(inplace=True)),
                conv1_3=ConvNorm(in_channels=half, out_channels=width, kernel=3, act=nn.ReLU(inplace=True)),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        stages: list[nn.Module] = []
        in_channels = width
        for i, count in enumerate(BLOCKS[depth]):
            channels, stride = width * 2**i, 2 if i else 1
            stages.append(_stage(block, in_channels=in_channels, channels=channels, count=count, stride=stride))
            in_channels = channels * block.expansion
        self.res_layers = nn.ModuleList(stages)
        self.out_channels = tuple(width * 2**i * block.expansion for i in (1, 2, 3))

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The stem and the stages."""
        return [self.conv1, *self.res_layers]


def freeze_norms(module: nn.Module) -> None:
    """Replace every batch norm in `module` with a constant one of the same values."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(channels=child.num_features, eps=child.eps).to(child.weight.device)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child)

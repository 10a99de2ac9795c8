from __future__ import annotations

import pytest
import torch
from torch import nn

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.backbone import ResNet, freeze_norms
from rtdetr_cli.model.build import build_backbone
from rtdetr_cli.model.layers import FrozenBatchNorm2d


@pytest.mark.parametrize(
    ("depth", "width", "channels"),
    [(10, 8, (16, 32, 64)), (18, 8, (16, 32, 64)), (34, 8, (16, 32, 64)), (50, 8, (64, 128, 256))],
)
def test_three_maps_of_strides_8_16_32(depth: int, width: int, channels: tuple[int, ...]) -> None:
    backbone = ResNet(depth=depth, width=width).eval()
    assert backbone.out_channels == channels
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(("at", "stages"), [(-1, None), (0, 0), (1, 1), (4, 4)])
def test_freezing(at: int, stages: int | None) -> None:
    backbone = build_backbone(ModelSpec(depth=10, width=8, freeze_at=at)).train()
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    sum(m.sum() for m in backbone(torch.rand(2, 3, 32, 32)) if m.requires_grad or at == 4)
    frozen = {n.split(".blocks")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    parts = {n.rsplit(".", 3)[0] if n.startswith("conv1") else n for n in frozen}
    assert {n.split(".")[0] for n in parts if n.startswith("conv1")} == (set() if stages is None else {"conv1"})
    assert {n for n in parts if n.startswith("res")} == {f"res_layers.{i}" for i in range(stages or 0)}
    moved = {n for n, b in backbone.named_buffers() if not torch.equal(b, before[n])}
    still = ("conv1.", *(f"res_layers.{i}." for i in range(stages or 0))) if stages is not None else ()
    assert not any(n.startswith(still) for n in moved) if still else moved


def test_frozen_norms_equal_norms_in_eval_mode_and_have_no_parameters() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    holder = nn.Sequential(norm)
    x = torch.randn(2, 4, 3, 3)
    expected = holder(x)
    freeze_norms(holder)
    assert isinstance(holder[0], FrozenBatchNorm2d)
    assert torch.allclose(holder.train()(x), expected, atol=1e-6)
    assert not list(holder.parameters())
    holder.load_state_dict({f"0.{k}": v for k, v in norm.state_dict().items()})  # with num_batches_tracked


def test_frozen_norm_model_has_no_norm_parameters() -> None:
    backbone = build_backbone(ModelSpec(depth=50, width=8, freeze_at=0, freeze_norm=True))
    assert not [n for n, _ in backbone.named_parameters() if ".norm." in n]
    assert not [n for n in backbone.state_dict() if n.endswith("num_batches_tracked")]

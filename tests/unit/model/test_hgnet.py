from __future__ import annotations

import pytest
import torch

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_backbone, build_detector
from rtdetr_cli.model.hgnet import SIZES, HGNetV2
from rtdetr_cli.weights.architecture import derive_spec

SPEC = ModelSpec(
    backbone="hgnetv2-x", width=8, hidden_dim=32, encoder_ffn=48, expansion=0.5, heads=8, decoder_dim=32,
    decoder_ffn=40, decoder_layers=2, eval_layers=2, queries=20, freeze_at=0, freeze_norm=True,
)  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_three_maps_of_strides_8_16_32(name: str) -> None:
    backbone = HGNetV2(name=name, width=4).eval()
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(backbone.out_channels, (8, 16, 32), strict=True)
    ]


def test_the_architecture_is_derived_and_the_fused_network_gives_the_same() -> None:
    torch.manual_seed(0)
    model = build_detector(SPEC, num_classes=5).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    assert derive_spec(model.state_dict()) == SPEC.model_copy(update={"queries": 300})  # which no tensor tells
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = model(images).main, model.fuse()(images).main
    assert torch.allclose(got.logits, expected.logits, atol=1e-4)


def test_freezing() -> None:
    backbone = build_backbone(ModelSpec(backbone="hgnetv2-l", width=4, freeze_at=1, freeze_norm=True)).train()
    trained = {".".join(n.split(".")[:2]) for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"stages.1", "stages.2", "stages.3"}
    assert not [n for n in backbone.state_dict() if n.endswith("num_batches_tracked")]


def test_a_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="depth 50 is for a ResNet"):
        ModelSpec(backbone="hgnetv2-l", depth=50)

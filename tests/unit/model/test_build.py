from __future__ import annotations

import pytest
import torch

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.model.build import build_detector

MILLIONS = {"r18": 20.2, "r34": 31.4, "r50m": 36.6, "r50": 42.9, "r101": 76.6}


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build_detector(load_preset(name).model, num_classes=80)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == MILLIONS[name]


def test_presets_state_their_size() -> None:
    for name in preset_names():
        preset = load_preset(name)
        with torch.device("meta"):
            model = build_detector(preset.model, num_classes=80)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(preset.params_m, abs=0.06), name


def test_published_initialization() -> None:
    torch.manual_seed(0)
    decoder = build_detector(load_preset("tiny").model, num_classes=4).decoder
    for head in (decoder.enc_score_head, *decoder.dec_score_head):
        assert torch.sigmoid(head.bias).tolist() == pytest.approx([0.01] * 4)
    for head in (decoder.enc_bbox_head, *decoder.dec_bbox_head):
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
    assert not decoder.denoising_class_embed.weight[-1].any()

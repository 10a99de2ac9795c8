from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR

SMALL = ModelSpec(
    depth=10, width=8, hidden_dim=32, encoder_ffn=32, expansion=0.5, depth_mult=0.34, heads=4, decoder_dim=32,
    decoder_ffn=32, decoder_layers=3, eval_layers=3, num_points=(2, 4, 6), queries=20,
)  # fmt: skip


@pytest.fixture
def small_spec() -> ModelSpec:
    """The smallest detector with all parts, and another number of sampling points for each scale."""
    return SMALL


@pytest.fixture
def make_small() -> Callable[..., RTDETR]:
    """Build it, with weights that are not as regular as the initial ones, and batch norms with a history."""

    def make(*, num_classes: int = 5, seed: int = 0, **changes: object) -> RTDETR:
        torch.manual_seed(seed)
        model = build_detector(SMALL.model_copy(update=changes), num_classes=num_classes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                    module.running_var *= 0.5 + torch.rand_like(module.running_var)
        return model.eval()

    return make

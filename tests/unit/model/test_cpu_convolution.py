"""Convolutions with their activation, as `predict` uses them on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.model.cpu_convolution import ActivatedConvolution, activate_in_convolutions
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.layers import ConvNorm

HERE = torch.nn.Sequential(ConvNorm(in_channels=1, out_channels=1))
HERE[0].fold()  # type: ignore[operator]
activate_in_convolutions(HERE)
needs_onednn = pytest.mark.skipif(
    not isinstance(HERE[0], ActivatedConvolution), reason="torch has no oneDNN for x86 here"
)


def activated(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, ActivatedConvolution))


@needs_onednn
@pytest.mark.parametrize("act", [None, nn.ReLU(inplace=True), nn.SiLU(inplace=True)])
@pytest.mark.parametrize("shape", [{}, {"kernel": 3}, {"kernel": 3, "stride": 2}, {"kernel": 5, "groups": 8}])
@torch.inference_mode()
def test_an_activated_convolution_equals_its_parts(act: nn.Module | None, shape: dict[str, int]) -> None:
    layer = ConvNorm(in_channels=8, out_channels=16, act=act, **shape).eval()
    nn.init.uniform_(layer.norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    nn.init.normal_(layer.norm.running_mean)  # type: ignore[arg-type]
    layer.fold()
    replaced = nn.Sequential(layer)
    activate_in_convolutions(replaced)
    assert len(list(activated(replaced))) == 1
    for size in ((1, 8, 20, 31), (3, 8, 7, 9)):  # the weight is packed once, for any size
        images = torch.randn(size).to(memory_format=torch.channels_last)
        before = images.clone()
        assert torch.allclose(replaced(images), layer(images), atol=1e-5)
        assert torch.equal(images, before)


@needs_onednn
@torch.inference_mode()
def test_a_detector_gives_the_same_maps(make_small: Callable[..., RTDETR]) -> None:
    model = make_small().fuse()
    images = torch.rand(2, 3, 64, 96)
    expected = model.encoder(model.backbone(images))
    parts = sum(isinstance(module, ConvNorm) for module in model.modules())
    activate_in_convolutions(model)
    assert len(list(activated(model))) >= parts > 0
    for got, want in zip(model.encoder(model.backbone(images)), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-4)


def test_other_precisions_are_left_alone(make_small: Callable[..., RTDETR]) -> None:
    model = make_small().double().fuse()
    activate_in_convolutions(model)
    assert not list(activated(model))


@needs_onednn
def test_prediction_on_a_cpu_uses_them(shapes_model: Path) -> None:
    backend = open_backend(shapes_model, device="cpu")
    assert list(activated(backend.model))  # type: ignore[attr-defined]

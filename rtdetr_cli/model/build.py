"""Build a detector from a `ModelSpec`; no other module of the network depends on the configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.attention import Rounding, Sampling
from rtdetr_cli.model.backbone import Backbone, ResNet, freeze_norms
from rtdetr_cli.model.decoder import Decoder
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.encoder import HybridEncoder
from rtdetr_cli.model.hgnet import HGNetV2


class _WithoutNormal(TorchFunctionMode):
    """Skip normal values: on `meta`, they would make torch import its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_shapes(spec: ModelSpec, *, num_classes: int, **options: Any) -> RTDETR:
    """Build a detector on `meta`: names and shapes without values. The options are those of `build_detector`.

    It does not advance torch's random generator.
    """
    with torch.device("meta"), _WithoutNormal():
        return build_detector(spec, num_classes=num_classes, **options)


def build_backbone(spec: ModelSpec) -> Backbone:
    """Build the backbone of an architecture, with initial values, and freeze what it says."""
    backbone: Backbone
    if spec.backbone == "resnet":
        backbone = ResNet(depth=spec.depth, width=spec.width)
    else:
        backbone = HGNetV2(name=spec.backbone, width=spec.width)
    if spec.freeze_norm:
        freeze_norms(backbone)
    backbone.freeze(spec.freeze_at)
    return backbone


def build_detector(
    spec: ModelSpec,
    *,
    num_classes: int,
    sampling: Sampling = "bilinear",
    rounding: Rounding = "published",
) -> RTDETR:
    """Build a detector with the published initialization, drawn from torch's global generator.

    Args:
        spec: the architecture.
        num_classes: K.
        sampling: how the decoder samples the maps; `discrete` freezes the sampling offsets.
        rounding: rounding of discrete sampling.
    """
    backbone = build_backbone(spec)
    encoder = HybridEncoder(
        in_channels=backbone.out_channels,
        hidden_dim=spec.hidden_dim,
        heads=spec.heads,
        ffn=spec.encoder_ffn,
        layers=spec.encoder_layers,
        expansion=spec.expansion,
        depth_mult=spec.depth_mult,
    )
    decoder = Decoder(
        num_classes=num_classes,
        feature_dim=spec.hidden_dim,
        dim=spec.decoder_dim,
        heads=spec.heads,
        ffn=spec.decoder_ffn,
        layers=spec.decoder_layers,
        eval_layers=spec.eval_layers,
        num_points=spec.num_points,
        queries=spec.queries,
        form=spec.decoder,
    )
    model = RTDETR(backbone=backbone, encoder=encoder, decoder=decoder)
    model.set_sampling(sampling, rounding)
    return model

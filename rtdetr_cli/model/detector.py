"""The whole detector: backbone, encoder, decoder, and what can be asked of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtdetr_cli.errors import UsageError
from rtdetr_cli.model.attention import Operator, Rounding, Sampling
from rtdetr_cli.model.backbone import ResNet
from rtdetr_cli.model.decoder import Decoder, LayerOutput
from rtdetr_cli.model.denoising import DenoisingGroup
from rtdetr_cli.model.encoder import HybridEncoder, RepBlock
from rtdetr_cli.model.layers import ConvNorm

Prediction = LayerOutput
"""Logits (B, Q, K) and boxes_cxcywh (B, Q, 4), 0 to 1, of one layer."""


@dataclass(slots=True)
class Outputs:
    """Everything a forward pass says.

    Attributes:
        main: the last layer.
        aux: the layers before it; training only.
        encoder: the selected tokens themselves; training only.
        denoising: every layer's answer to the denoising queries; empty without a group.
        group: the denoising group that went in.
    """

    main: Prediction
    aux: tuple[Prediction, ...] = ()
    encoder: Prediction | None = None
    denoising: tuple[Prediction, ...] = ()
    group: DenoisingGroup | None = None


class RTDETR(nn.Module):
    """RT-DETRv2.

    Attributes:
        backbone, encoder, decoder: its parts, named as published.
        num_classes: K.
        deployed: True for the result of `fuse`, which must not be trained.
    """

    def __init__(self, *, backbone: ResNet, encoder: HybridEncoder, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.deployed = False

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.decoder.num_classes

    def forward(self, images: Tensor, group: DenoisingGroup | None = None) -> Outputs:
        """Detect.

        Args:
            images: (B, 3, H, W), RGB, 0 to 1; H and W multiples of 32.
            group: denoising queries, for training.

        Returns:
            In training mode all of `Outputs`, in eval mode `main` only.

        Raises:
            UsageError: a side is no multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise UsageError(
                f"an input of {height}x{width} pixels does not fit: both sides must be multiples of 32",
                hint=f"use {max(32, round(height / 32) * 32)}x{max(32, round(width / 32) * 32)}",
            )
        layers, encoder = self.decoder(self.encoder(self.backbone(images)), group if self.training else None)
        if not self.training:
            return Outputs(layers[-1])
        denoising: tuple[Prediction, ...] = ()
        if group is not None:
            copies = group.size
            denoising = tuple(Prediction(o.logits[:, :copies], o.boxes_cxcywh[:, :copies]) for o in layers)
            layers = [Prediction(o.logits[:, copies:], o.boxes_cxcywh[:, copies:]) for o in layers]
        return Outputs(layers[-1], tuple(layers[:-1]), encoder, denoising, group)

    def train(self, mode: bool = True) -> RTDETR:
        """Set the mode; a deployed model has no training mode."""
        if mode and self.deployed:
            raise RuntimeError("a fused model cannot be trained; train the model that it was made of")
        super().train(mode)
        return self

    @property
    def layers(self) -> int:
        """Decoder layers that inference uses."""
        return self.decoder.eval_layers

    @property
    def queries(self) -> int:
        """Queries that inference uses."""
        return self.decoder.eval_queries

    def set_inference(self, *, layers: int | None = None, queries: int | None = None) -> None:
        """Choose where inference leaves the decoder and how many queries it takes; None keeps what is set.

        Raises:
            UsageError: more layers than there are, more queries than were trained, or fewer than one.
        """
        decoder = self.decoder
        if layers is not None:
            if not 1 <= layers <= decoder.num_layers:
                raise UsageError(
                    f"this model has {decoder.num_layers} decoder layers, so it cannot use {layers}",
                    hint=f"--layers 1 to {decoder.num_layers}",
                )
            decoder.eval_layers = layers
        if queries is not None:
            if not 1 <= queries <= decoder.num_queries:
                raise UsageError(
                    f"this model was trained with {decoder.num_queries} queries, so it cannot use {queries}",
                    hint=f"--queries 1 to {decoder.num_queries}",
                )
            decoder.eval_queries = queries

    def set_sampling(
        self, method: Sampling, rounding: Rounding = "published", operator: Operator | None = None
    ) -> None:
        """Choose how the decoder reads the maps.

        Args:
            method: `bilinear`, or `discrete`: one pixel a point, whose offsets are frozen.
            rounding: of discrete sampling.
            operator: of bilinear sampling: `grid_sample` or `gather`; None keeps what is set.
        """
        self.decoder.set_sampling(method, rounding, operator)

    @property
    def sampling(self) -> tuple[Sampling, Rounding]:
        """The method and rounding in use."""
        attention = self.decoder.decoder.layers[0].cross_attn
        return attention.sampling, attention.rounding  # type: ignore[union-attr, return-value]

    def fuse(self) -> RTDETR:
        """Return a deployed copy: re-parameterised blocks and norms folded into convolutions, eval mode, frozen.

        The copy computes the same (within rounding), keeps every method of the original, and cannot be trained.
        """
        deployed = copy.deepcopy(self).eval()
        for module in list(deployed.modules()):
            if isinstance(module, RepBlock):
                module.fuse()
        for module in deployed.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        for parameter in deployed.parameters():
            parameter.requires_grad_(False)
        deployed.deployed = True
        return deployed

    @torch.no_grad()
    def prepare(self, height: int, width: int) -> None:
        """Make the tables of one input size, so that a trace of the model holds them as constants."""
        mode = self.training
        parameter = next(self.parameters())
        self.eval()
        self(torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype))
        if mode:
            self.train()

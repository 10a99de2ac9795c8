"""The detector: backbone, encoder and decoder, and the settings of inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from rtdetr_cli.config.image_size import STRIDE
from rtdetr_cli.errors import UsageError
from rtdetr_cli.model.attention import DeformableAttention, Operator, Rounding, Sampling
from rtdetr_cli.model.backbone import Backbone
from rtdetr_cli.model.decoder import Decoder, Prediction
from rtdetr_cli.model.denoising import DenoisingGroup
from rtdetr_cli.model.encoder import HybridEncoder, RepBlock
from rtdetr_cli.model.layers import ConvNorm


@dataclass(slots=True)
class Outputs:
    """The outputs of a forward pass.

    Attributes:
        main: predictions of the last layer.
        aux: predictions of the layers before it; training only.
        encoder: predictions of the query selection; training only.
        denoising: every layer's predictions for the denoising queries; empty without a group.
        group: the denoising group of the input.
    """

    main: Prediction
    aux: tuple[Prediction, ...] = ()
    encoder: Prediction | None = None
    denoising: tuple[Prediction, ...] = ()
    group: DenoisingGroup | None = None


class RTDETR(nn.Module):
    """RT-DETRv2 (arXiv 2407.17140).

    Attributes:
        backbone, encoder, decoder: its parts, named as published.
        num_classes: K.
        deployed: whether it is the result of `fuse`, which cannot be trained.
    """

    def __init__(self, *, backbone: Backbone, encoder: HybridEncoder, decoder: Decoder) -> None:
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
        """Predict.

        Args:
            images: (B, 3, H, W), RGB, 0 to 1; H and W multiples of 32.
            group: denoising queries, for training.

        Returns:
            In training mode all of `Outputs`, in eval mode `main` only.

        Raises:
            UsageError: H or W is not a multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            nearest = [max(STRIDE, round(side / STRIDE) * STRIDE) for side in (height, width)]
            raise UsageError(
                f"the input is {height}x{width} pixels, but both sides must be multiples of {STRIDE}",
                hint=f"use {nearest[0]}x{nearest[1]}",
            )
        layers, encoder = self.decoder(self.encoder(self.backbone(images)), group if self.training else None)
        if not self.training:
            return Outputs(layers[-1])
        denoising: tuple[Prediction, ...] = ()
        if group is not None:
            size = group.size
            denoising = tuple(Prediction(o.logits[:, :size], o.boxes_cxcywh[:, :size]) for o in layers)
            layers = [Prediction(o.logits[:, size:], o.boxes_cxcywh[:, size:]) for o in layers]
        return Outputs(layers[-1], tuple(layers[:-1]), encoder, denoising, group)

    def train(self, mode: bool = True) -> RTDETR:
        """Set the mode; a fused model has no training mode."""
        if mode and self.deployed:
            raise RuntimeError("a fused model cannot be trained; train the model that it was made from")
        super().train(mode)
        return self

    @property
    def layers(self) -> int:
        """Number of decoder layers at inference."""
        return self.decoder.eval_layers

    @property
    def queries(self) -> int:
        """Number of queries at inference."""
        return self.decoder.eval_queries

    def set_inference(self, *, layers: int | None = None, queries: int | None = None) -> None:
        """Set the number of decoder layers and of queries at inference; None leaves a setting as it is.

        Raises:
            UsageError: more layers or queries than were trained, or fewer than one.
        """
        decoder = self.decoder
        if layers is not None:
            if not 1 <= layers <= decoder.num_layers:
                raise UsageError(
                    f"the model has {decoder.num_layers} decoder layers, so it cannot use {layers}",
                    hint=f"--layers 1 to {decoder.num_layers}",
                )
            decoder.eval_layers = layers
        if queries is not None:
            if not 1 <= queries <= decoder.num_queries:
                raise UsageError(
                    f"the model was trained with {decoder.num_queries} queries, so it cannot use {queries}",
                    hint=f"--queries 1 to {decoder.num_queries}",
                )
            decoder.eval_queries = queries

    def set_sampling(
        self, method: Sampling, rounding: Rounding = "published", operator: Operator | None = None
    ) -> None:
        """Choose how the decoder samples the maps.

        Args:
            method: `bilinear`; or `discrete`, one pixel per point, which freezes the offsets.
            rounding: rounding of discrete sampling.
            operator: operator of bilinear sampling: `grid_sample` or `gather`; None leaves it as it is.
        """
        for attention in self._sampling_layers():
            attention.set_sampling(method, rounding, operator)

    @property
    def sampling(self) -> tuple[Sampling, Rounding]:
        """The sampling method and rounding in use."""
        attention = next(self._sampling_layers())
        return attention.sampling, attention.rounding

    def _sampling_layers(self) -> Iterator[DeformableAttention]:
        return (module for module in self.modules() if isinstance(module, DeformableAttention))

    def fuse(self) -> RTDETR:
        """Return a copy for inference, with re-parameterized blocks and norms folded into convolutions.

        The copy gives the same outputs within rounding, and cannot be trained.
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

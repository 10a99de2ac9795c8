"""Query selection and the decoder of RT-DETRv2 (arXiv 2407.17140; arXiv 2304.08069, section 4.3).

The tokens of three maps are scored, the best become queries, and each decoder layer refines their boxes. In training
every layer has a loss, and the loss of a layer's boxes also reaches the layer before it (look forward twice, DINO,
arXiv 2203.03605). At inference any layer can be the last, and any number of queries can be used, without retraining.

Departures from the official code: invalid anchors are large logits instead of infinite ones (the sigmoid of both is
exactly 1), and anchors are computed for any input size; boxes are predicted only for the selected tokens, since no
other is used; an input can have fewer tokens than queries; sums in float16 cannot overflow, as in the official v1.

Shapes: B batch, Q queries, N tokens of all maps, C channels, K classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.model.attention import DeformableAttention, Levels, SelfAttention
from rtdetr_cli.model.denoising import DenoisingGroup
from rtdetr_cli.model.layers import (
    MLP,
    Activation,
    ConstantCache,
    ConvNorm,
    add_bounded,
    inverse_sigmoid,
    with_dense_gradient,
)

Form = Literal["rtdetrv2", "deim"]
"""The published decoder, or that of DEIM's RT-DETRv2 (arXiv 2412.04234), which has SiLU in place of ReLU and computes
query positions with three linear layers instead of two."""

INVALID_ANCHOR = 50.0
"""Logit of anchors too close to the border; its sigmoid is exactly 1 in float32 and float64, as that of infinity."""
MARGIN = 1e-2  # of the anchors to the border, in shares of the image


class Anchors(NamedTuple):
    """The initial box of each token: logits (1, N, 4) of cxcywh, and a mask (1, N, 1) of the valid ones."""

    logits: Tensor
    valid: Tensor


def anchor_table(
    shapes: Sequence[tuple[int, int]], device: torch.device | None = None, *, dtype: torch.dtype = torch.float32
) -> Anchors:
    """Return the anchors of maps of these (height, width). Half precision would be too coarse for them."""
    levels = []
    for i, (height, width) in enumerate(shapes):
        y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
        side = torch.full((height, width), 0.05 * 2.0**i, dtype=dtype, device=device)
        boxes = torch.stack([x.expand(height, width), y[:, None].expand(height, width), side, side], -1)
        levels.append(boxes.reshape(1, height * width, 4))
    boxes = torch.cat(levels, 1)
    valid = ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(-1, keepdim=True)
    logits = torch.log(boxes / (1 - boxes))
    return Anchors(torch.where(valid, logits, INVALID_ANCHOR), valid)


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the maps, and a feed-forward network; post-norm."""

    def __init__(self, *, dim: int, heads: int, ffn: int, num_points: Sequence[int], act: Activation) -> None:
        super().__init__()
        self.act = act
        self.self_attn = SelfAttention(dim=dim, heads=heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim=dim, heads=heads, num_points=num_points)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn)
        self.linear2 = nn.Linear(ffn, dim)
        self.norm3 = nn.LayerNorm(dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        reference_cxcywh: Tensor,
        memory: Tensor,
        levels: Levels,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Refine queries `x` (B, Q, C) with their positions (B, Q, C) and boxes (B, Q, 4)."""
        x = self.norm1(add_bounded(x, self.self_attn(x, positions, attention_mask)))
        x = self.norm2(add_bounded(x, self.cross_attn(x + positions, reference_cxcywh, memory, levels)))
        return cast(Tensor, self.norm3(add_bounded(x, self.linear2(self.act(self.linear1(x))))))


class Prediction(NamedTuple):
    """The output of one layer: logits (B, Q, K) and boxes_cxcywh (B, Q, 4), 0 to 1."""

    logits: Tensor
    boxes_cxcywh: Tensor


class Decoder(nn.Module):
    """Query selection and decoder layers: three maps to the predictions of one or of all layers.

    Args:
        num_classes: K.
        feature_dim: channels of the maps.
        dim, heads, ffn: channels C, attention heads, and inner channels of the feed-forward network.
        layers: number of layers in training.
        eval_layers: number of layers at inference.
        num_points: number of sampling points of each map.
        queries: number of queries Q.
        form: activations and the number of layers for query positions.

    Attributes:
        eval_layers, eval_queries: layers and queries at inference; `RTDETR.set_inference` changes them.
        published_anchors: those that a published file brought, by the shapes of the maps.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        feature_dim: int,
        dim: int,
        heads: int,
        ffn: int,
        layers: int,
        eval_layers: int,
        num_points: Sequence[int],
        queries: int,
        form: Form = "rtdetrv2",
    ) -> None:
        super().__init__()
        act: Activation = functional.silu if form == "deim" else functional.relu
        self.num_classes = num_classes
        self.num_points = tuple(num_points)
        self.num_layers = layers
        self.eval_layers = eval_layers
        self.num_queries = queries
        self.eval_queries = queries
        self._constants = ConstantCache()
        self.published_anchors: dict[tuple[tuple[int, int], ...], Anchors] = {}
        self.input_proj = nn.ModuleList(ConvNorm(in_channels=feature_dim, out_channels=dim) for _ in num_points)
        decoder_layers = nn.ModuleList(
            DecoderLayer(dim=dim, heads=heads, ffn=ffn, num_points=num_points, act=act) for _ in range(layers)
        )
        self.decoder = nn.ModuleDict({"layers": decoder_layers})  # a level of its own for the published names
        self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes)
        width, depth = (dim, 3) if form == "deim" else (2 * dim, 2)
        self.query_pos_head = MLP(in_dim=4, hidden_dim=width, out_dim=dim, layers=depth, act=act)
        self.enc_output = nn.Sequential(OrderedDict(proj=nn.Linear(dim, dim), norm=nn.LayerNorm(dim)))
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = MLP(in_dim=dim, hidden_dim=dim, out_dim=4, layers=3, act=act)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(layers))
        self.dec_bbox_head = nn.ModuleList(
            MLP(in_dim=dim, hidden_dim=dim, out_dim=4, layers=3, act=act) for _ in range(layers)
        )
        self._initialize()

    def _initialize(self) -> None:
        """Start with a score of 1 % for every class, and with boxes that equal their anchors."""
        for score_head in [self.enc_score_head, *self.dec_score_head]:
            nn.init.constant_(cast(nn.Linear, score_head).bias, -math.log(99))
        for bbox_head in [self.enc_bbox_head, *self.dec_bbox_head]:
            last = cast(nn.Linear, cast(MLP, bbox_head).layers[-1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.xavier_uniform_(cast(nn.Linear, self.enc_output.proj).weight)
        for linear in self.query_pos_head.layers:
            nn.init.xavier_uniform_(cast(nn.Linear, linear).weight)
        for proj in self.input_proj:
            nn.init.xavier_uniform_(cast(ConvNorm, proj).conv.weight)
        nn.init.normal_(self.denoising_class_embed.weight[:-1])

    def use_published_anchors(self, shapes: Sequence[tuple[int, int]], logits: Tensor, valid: Tensor) -> None:
        """Use a published file's own anchors for maps of these shapes, at inference only.

        The exponential moving average of the weights includes the anchors, and by rounding has moved them by up to
        2e-4; the published weights were evaluated with these. Training computes anchors, as the official code does.
        """
        finite = torch.where(torch.isfinite(logits), logits, INVALID_ANCHOR)
        self.published_anchors[tuple(shapes)] = Anchors(finite.detach().float(), valid.detach().bool())

    def forward(
        self, maps: Sequence[Tensor], group: DenoisingGroup | None = None
    ) -> tuple[list[Prediction], Prediction | None]:
        """Predict.

        Args:
            maps: three (B, C, H, W), finest first.
            group: denoising queries; training only.

        Returns:
            In training, the outputs of all layers, each for the D denoising queries and then for the Q selected ones,
            and the output of the query selection. At inference, the output of the last layer, and None.
        """
        memory, levels = self._tokens(maps)
        queries = self.num_queries if self.training else self.eval_queries
        content, unactivated, encoder_output = self._select(memory, levels, queries)
        attention_mask = None
        if self.training:
            content, unactivated, attention_mask = self._add_denoising(content, unactivated, group)
        outputs = self._refine(content, torch.sigmoid(unactivated), memory, levels, attention_mask)
        return outputs, encoder_output

    def _tokens(self, maps: Sequence[Tensor]) -> tuple[Tensor, Levels]:
        """Project and flatten the maps to memory (B, N, C), and return it with the sizes of the levels."""
        projected = [with_dense_gradient(proj(x)) for proj, x in zip(self.input_proj, maps, strict=True)]
        shapes = tuple((int(x.shape[2]), int(x.shape[3])) for x in projected)
        device = projected[0].device
        levels = self._constants.get(
            ("levels", shapes, device), lambda: Levels.from_shapes(shapes, self.num_points, device)
        )
        return torch.cat([x.flatten(2).transpose(1, 2) for x in projected], 1), levels

    def _anchors(self, levels: Levels, like: Tensor) -> Anchors:
        """Return the anchors of these levels on the device of `like`, in its type or in float32 for half precision."""
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        if not self.training and levels.shapes in self.published_anchors:
            published = self.published_anchors[levels.shapes]
            return self._constants.get(
                ("published", levels.shapes, device, dtype),
                lambda: Anchors(published.logits.to(device, dtype), published.valid.to(device)),
            )
        return self._constants.get(
            ("anchors", levels.shapes, device, dtype), lambda: anchor_table(levels.shapes, device, dtype=dtype)
        )

    def _select(self, memory: Tensor, levels: Levels, queries: int) -> tuple[Tensor, Tensor, Prediction | None]:
        """Select the best tokens: contents (B, Q, C) and logits of boxes (B, Q, 4), detached, and what has a loss."""
        anchors = self._anchors(levels, memory)
        tokens = self.enc_output(anchors.valid.to(memory.dtype) * memory)  # B N C
        logits = self.enc_score_head(tokens)  # B N K
        best = logits.max(-1).values.topk(min(queries, logits.shape[1]), dim=1).indices  # B Q

        content = _select_rows(tokens, best)
        initial = _select_rows(anchors.logits.expand(memory.shape[0], -1, -1), best)
        unactivated = self.enc_bbox_head(content) + initial  # B Q 4, at least float32
        output = Prediction(_select_rows(logits, best), torch.sigmoid(unactivated)) if self.training else None
        return content.detach(), unactivated.detach(), output

    def _add_denoising(
        self, content: Tensor, unactivated: Tensor, group: DenoisingGroup | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put the denoising queries before the selected ones, and return the attention mask of both."""
        if group is None:
            # Every parameter must get a gradient in every step, so that processes and micro-batches agree.
            return content + 0.0 * self.denoising_class_embed.weight.sum().to(content.dtype), unactivated, None
        total = group.size + content.shape[1]  # less than the mask's size when there are fewer tokens than queries
        embedded = self.denoising_class_embed(group.class_ids).to(content.dtype)
        return (
            torch.cat([embedded, content], 1),
            torch.cat([group.boxes_unactivated.to(unactivated.dtype), unactivated], 1),
            group.attention_mask[:total, :total],
        )

    def _refine(
        self, x: Tensor, reference: Tensor, memory: Tensor, levels: Levels, attention_mask: Tensor | None
    ) -> list[Prediction]:
        """Run the layers on queries `x` (B, Q, C) with boxes `reference` (B, Q, 4)."""
        outputs: list[Prediction] = []
        previous: Tensor | None = None  # the boxes of the layer before, with their gradient
        layers = cast(nn.ModuleList, self.decoder.layers)
        last = self.num_layers if self.training else self.eval_layers
        for i in range(last):
            positions = self.query_pos_head(reference.to(x.dtype))
            x = layers[i](x, positions, reference, memory, levels, attention_mask)
            if not self.training and i < last - 1:
                reference = torch.sigmoid(self.dec_bbox_head[i](x) + inverse_sigmoid(reference))
                continue
            delta = self.dec_bbox_head[i](x)
            refined = torch.sigmoid(delta + inverse_sigmoid(reference))
            boxes = refined if previous is None else torch.sigmoid(delta + inverse_sigmoid(previous))
            outputs.append(Prediction(self.dec_score_head[i](x), boxes))
            previous, reference = refined, refined.detach()
        return outputs


def _select_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` (B, Q) of `x` (B, N, C) as (B, Q, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

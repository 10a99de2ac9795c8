"""A second head for training only, which predicts at every location of the three maps.

Of the queries only those that were matched teach the encoder and the backbone where objects are: one for each box. In
a short run from random weights that is little. This head predicts a class and a box for every token and matches each
box with several of them (RT-DETRv3, arXiv 2409.08475), by the task-aligned rule of TOOD (arXiv 2108.07755). It is not a
part of the model: nothing of it is averaged, saved with the weights, or exported.

Shapes: B batch, N tokens, M boxes of the image with the most, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from rtdetr_cli.model.decoder import Tokens, anchor_table
from rtdetr_cli.model.layers import MLP, cxcywh_to_xyxy
from rtdetr_cli.train.losses import BBOX_WEIGHT, GIOU_WEIGHT, varifocal
from rtdetr_cli.train.matcher import iou_and_giou

MATCHES = 13  # tokens for each box
SCORE_POWER, IOU_POWER = 1.0, 6.0
NEAREST = 4  # tokens that a box can match even if their centers lie outside it, as around a very small one
WEIGHT = 4.0


class DensePrediction(NamedTuple):
    """Logits (B, N, K), boxes_cxcywh (B, N, 4) from 0 to 1, and the tokens' centers (N, 2)."""

    logits: Tensor
    boxes_cxcywh: Tensor
    centers: Tensor


class DenseHead(nn.Module):
    """Classes and boxes of all tokens.

    Args:
        dim: C.
        num_classes: K.
    """

    def __init__(self, *, dim: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, num_classes))
        self.box = MLP(in_dim=dim, hidden_dim=dim, out_dim=4, layers=3, act=functional.relu)
        nn.init.constant_(cast(nn.Linear, self.score[-1]).bias, -math.log(99))  # a score of 1 %
        last = cast(nn.Linear, self.box.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, tokens: Tokens) -> DensePrediction:
        """Predict from the tokens of a forward pass in training mode."""
        memory = tokens.memory
        dtype = torch.promote_types(memory.dtype, torch.float32)
        anchors = anchor_table(tokens.shapes, memory.device, dtype=dtype, margin=0.0).logits
        boxes = torch.sigmoid(self.box(memory).to(dtype) + anchors)
        return DensePrediction(self.score(memory), boxes, anchors[0, :, :2].sigmoid())


def dense_losses(
    prediction: DensePrediction, boxes_cxcywh: Sequence[Tensor], labels: Sequence[Tensor], *, num_boxes: float
) -> dict[str, Tensor]:
    """Return the weighted terms `loss_vfl_dense`, `loss_bbox_dense` and `loss_giou_dense`.

    Args:
        prediction: of the head.
        boxes_cxcywh: for each image (N, 4), 0 to 1.
        labels: for each image (N,) int64, below K.
        num_boxes: boxes of the effective batch, as for `compute_losses`.
    """
    device = prediction.logits.device
    with torch.autocast(device.type, enabled=False):
        boxes = prediction.boxes_cxcywh
        logits = prediction.logits.to(boxes.dtype)
        most = max(1, *(len(b) for b in boxes_cxcywh))
        exists = torch.tensor([[i < len(b) for i in range(most)] for b in boxes_cxcywh]).to(device)
        nothing = boxes.new_zeros(most, 4)
        targets = pad_sequence([nothing, *(b.to(boxes) for b in boxes_cxcywh)], batch_first=True)[1:]  # (B, M, 4)
        classes = pad_sequence([exists.new_zeros(most).long(), *(x.to(device) for x in labels)], batch_first=True)[1:]
        quality, owner = align(logits, boxes, prediction.centers, targets, classes, exists)

        # Each image is divided by its own sum of qualities, so that the gradient does not depend on micro-batches.
        boxes_of, sums = exists.sum(1).to(quality), quality.sum(1)
        share = torch.where(boxes_of > 0, boxes_of / torch.maximum(sums, 0.1 * boxes_of), 1.0)
        share = share / max(float(num_boxes), 1.0)
        cells = classes.gather(1, owner)[..., None]
        target = torch.zeros_like(logits).scatter(2, cells, quality[..., None])
        vfl = varifocal(logits, target, (target > 0).to(target))
        own = targets.gather(1, owner[..., None].expand(-1, -1, 4))
        _, giou = iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(own))
        by_image = {
            "loss_vfl_dense": vfl.sum((1, 2)),
            "loss_bbox_dense": BBOX_WEIGHT * ((boxes - own).abs().sum(-1) * quality).sum(1),
            "loss_giou_dense": GIOU_WEIGHT * ((1 - giou) * quality).sum(1),
        }
        return {name: WEIGHT * (share * values).sum() for name, values in by_image.items()}


@torch.no_grad()
def align(
    logits: Tensor, boxes_cxcywh: Tensor, centers: Tensor, targets: Tensor, classes: Tensor, exists: Tensor
) -> tuple[Tensor, Tensor]:
    """Match each box with the tokens inside it that predict it best.

    Args:
        logits: (B, N, K).
        boxes_cxcywh: (B, N, 4), 0 to 1.
        centers: of the tokens (N, 2).
        targets: padded boxes (B, M, 4), cxcywh.
        classes: padded classes (B, M).
        exists: (B, M), false where padded.

    Returns:
        quality (B, N), the target score of a token, 0 without a match; for each box it is highest at its best token,
        and there equal to the IoU. And owner (B, N), the box that a token is matched with.
    """
    tokens, most = logits.shape[1], targets.shape[1]
    corners = cxcywh_to_xyxy(targets)
    iou, _ = iou_and_giou(cxcywh_to_xyxy(boxes_cxcywh)[:, :, None], corners[:, None])  # (B, N, M)
    points = centers[None, :, None]
    inside = ((points > corners[:, None, :, :2]) & (points < corners[:, None, :, 2:])).all(-1)
    distance = (points - targets[:, None, :, :2]).square().sum(-1)
    inside.scatter_(1, distance.topk(min(NEAREST, tokens), dim=1, largest=False).indices, True)

    score = logits.sigmoid().gather(2, classes[:, None].expand(-1, tokens, most))
    metric = score**SCORE_POWER * iou.clamp(min=1e-3) ** IOU_POWER * (inside & exists[:, None])
    best = metric.topk(min(MATCHES, tokens), dim=1)
    matched = torch.zeros_like(inside).scatter(1, best.indices, best.values > 0)
    owner = torch.where(matched, iou, -1.0).argmax(2)  # a token of several boxes goes to that of the highest IoU
    matched &= torch.zeros_like(matched).scatter(2, owner[..., None], True)
    metric = metric * matched
    highest = (iou * matched).amax(1, keepdim=True)
    quality = metric / metric.amax(1, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny) * highest
    return quality.gather(2, owner[..., None])[..., 0], owner

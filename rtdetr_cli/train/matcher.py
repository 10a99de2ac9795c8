"""Matching queries with annotated boxes: a bipartite matching of least cost (DETR, arXiv 2005.12872).

The costs of all layers and images are computed together on the device and copied to the host once per step; the
official code copies once for each layer and image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rtdetr_cli.model.decoder import Prediction
from rtdetr_cli.model.layers import cxcywh_to_xyxy

POSITION = False
CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
NON_FINITE_COST = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Matched pairs of S layers, the same number M in each.

    Attributes:
        rows: (S, M) int64, image * Q + query.
        targets: (S, M) int64, index into the concatenated boxes of all images.
    """

    rows: Tensor
    targets: Tensor


def iou_and_giou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU (arXiv 1902.09630) of boxes whose shapes broadcast to (..., 4).

    Boxes without area give 0 and not NaN.
    """
    low = torch.maximum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    high = torch.minimum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    area = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(-1)
    other = (others_xyxy[..., 2:] - others_xyxy[..., :2]).prod(-1)
    union = area + other - intersection
    iou = intersection / union.clamp(min=1e-9)
    outer_low = torch.minimum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    outer_high = torch.maximum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    outer = (outer_high - outer_low).clamp(min=0).prod(-1)
    return iou, iou - (outer - union) / outer.clamp(min=1e-9)


@torch.no_grad()
def match(predictions: Sequence[Prediction], boxes_cxcywh: Sequence[Tensor], labels: Sequence[Tensor]) -> Matches:
    """Match every layer's queries with every image's boxes.

    Args:
        predictions: of S layers, all with B images and Q queries.
        boxes_cxcywh: for each image (N, 4), 0 to 1.
        labels: for each image (N,) int64.

    Returns:
        min(Q, N) pairs for each image and layer, on the predictions' device. Predictions that are not finite are bad
        matches and no error: the training loop checks the loss.
    """
    device = predictions[0].logits.device
    counts = [len(b) for b in boxes_cxcywh]
    logits = torch.stack([p.logits for p in predictions])  # (S, B, Q, K)
    boxes = torch.stack([p.boxes_cxcywh for p in predictions])
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    target_boxes = pad_sequence(list(boxes_cxcywh), batch_first=True).to(device, dtype)  # (B, M, 4)
    target_labels = pad_sequence(list(labels), batch_first=True).to(device)
    with torch.autocast(device.type, enabled=False):
        cost = _cost_matrix(logits.to(dtype), boxes.to(dtype), target_boxes, target_labels)
        finite = cost.nan_to_num(nan=NON_FINITE_COST, posinf=NON_FINITE_COST, neginf=-NON_FINITE_COST)
        on_host = finite.cpu().numpy()  # the only transfer
    return _assign(on_host, counts, device)


def _cost_matrix(logits: Tensor, boxes_cxcywh: Tensor, target_boxes: Tensor, target_labels: Tensor) -> Tensor:
    """Return the costs (S, B, Q, M) of matching each of Q queries with each of M padded targets."""
    index = target_labels[:, None].expand(*logits.shape[:-1], -1)
    p = logits.gather(-1, index).sigmoid()  # (S, B, Q, M)
    _, giou = iou_and_giou(cxcywh_to_xyxy(boxes_cxcywh)[..., :, None, :], cxcywh_to_xyxy(target_boxes)[..., None, :, :])
    if POSITION:
        p = p * ((giou + 1) / 2).clamp(min=0).sqrt()
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + 1e-8).log()
    l1 = torch.cdist(boxes_cxcywh, target_boxes.expand(*boxes_cxcywh.shape[:-2], -1, -1), p=1)
    _, giou = iou_and_giou(cxcywh_to_xyxy(boxes_cxcywh)[..., :, None, :], cxcywh_to_xyxy(target_boxes)[..., None, :, :])
    return L1_COST * l1 + CLASS_COST * (positive - negative) - GIOU_COST * giou


def _assign(cost: np.ndarray, counts: Sequence[int], device: torch.device) -> Matches:
    """Solve the assignments of cost (S, B, Q, M) on the host, and copy the pairs to the device."""
    offsets = np.stack([np.arange(len(counts)) * cost.shape[2], np.cumsum(counts) - counts], 1)  # (B, 2)
    pairs = []
    for layer in cost:
        of_images = zip(layer, counts, offsets, strict=True)
        found = [np.stack(linear_sum_assignment(c[:, :count])) + offset[:, None] for c, count, offset in of_images]
        pairs.append(np.concatenate(found, 1))
    on_device = torch.from_numpy(np.stack(pairs)).to(device, non_blocking=True)  # (S, 2, M)
    return Matches(on_device[:, 0], on_device[:, 1])

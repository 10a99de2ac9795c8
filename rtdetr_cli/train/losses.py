"""The training loss of RT-DETRv2: varifocal classification, L1 and GIoU of boxes, for every layer.

The terms of all layers are computed together, in float32 (or float64 if the model is), whatever the autocast. Nothing
here waits for the device, and values that are not finite come out as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from rtdetr_cli.model.decoder import Prediction
from rtdetr_cli.model.denoising import DenoisingGroup
from rtdetr_cli.model.detector import Outputs
from rtdetr_cli.model.layers import cxcywh_to_xyxy
from rtdetr_cli.train.matcher import Matches, iou_and_giou, match

KIND, VFL_WEIGHT, MAL_GAMMA = "varifocal", 1.0, 1.5
VFL_ALPHA, VFL_GAMMA = 0.75, 2.0  # arXiv 2008.13367
BBOX_WEIGHT, GIOU_WEIGHT = 5.0, 2.0  # that of the varifocal loss is 1


def compute_losses(
    outputs: Outputs, boxes_cxcywh: Sequence[Tensor], labels: Sequence[Tensor], *, num_boxes: float
) -> dict[str, Tensor]:
    """Return every term, weighted; their sum is the loss.

    Args:
        outputs: of the model in training mode.
        boxes_cxcywh: for each image (N, 4), 0 to 1.
        labels: for each image (N,) int64, below K.
        num_boxes: boxes of the effective batch, over all micro-batches and processes; at least 1 is used, so that a
            batch without boxes has a loss too.

    Returns:
        `loss_vfl`, `loss_bbox`, `loss_giou` of the last layer, and the same with `_aux_i`, `_dn_i`, `_enc_0`.
    """
    device = outputs.main.logits.device
    predictions = {"": outputs.main} | {f"_aux_{i}": p for i, p in enumerate(outputs.aux)}
    if outputs.encoder is not None:
        predictions["_enc_0"] = outputs.encoder
    with torch.autocast(device.type, enabled=False):
        target_boxes = torch.cat(list(boxes_cxcywh)).to(device, non_blocking=True)
        target_labels = torch.cat(list(labels)).to(device, non_blocking=True)
        matches = match(list(predictions.values()), boxes_cxcywh, labels)
        normalizer = max(float(num_boxes), 1.0)
        terms = _loss_terms(predictions, matches, target_boxes, target_labels, normalizer)
        if outputs.denoising and outputs.group is not None:
            group = outputs.group
            denoising = {f"_dn_{i}": p for i, p in enumerate(outputs.denoising)}
            matches = _denoising_matches(group, boxes_cxcywh, len(denoising), device)
            normalizer *= group.num_groups * group.share
            terms |= _loss_terms(denoising, matches, target_boxes, target_labels, normalizer)
    return terms


def _loss_terms(
    predictions: dict[str, Prediction],
    matches: Matches,
    target_boxes: Tensor,
    target_labels: Tensor,
    normalizer: float,
) -> dict[str, Tensor]:
    """Compute the terms of S predictions of one shape, by the suffix of their names, at once."""
    logits = torch.stack([p.logits for p in predictions.values()]).flatten(1, 2)  # (S, B * Q, K)
    boxes = torch.stack([p.boxes_cxcywh for p in predictions.values()]).flatten(1, 2)
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    logits, boxes = logits.to(dtype), boxes.to(dtype)
    predicted = boxes.gather(1, matches.rows[..., None].expand(-1, -1, 4))  # (S, M, 4)
    expected = target_boxes.to(dtype)[matches.targets]
    iou, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected))

    # One flat index for (row, class): the target score is the IoU where matched and zero elsewhere.
    cells = matches.rows * logits.shape[2] + target_labels[matches.targets]
    target = torch.zeros_like(logits).flatten(1).scatter(1, cells, iou.detach())
    matched = torch.zeros_like(target).scatter(1, cells, 1.0)
    flat = logits.flatten(1)
    p = flat.detach().sigmoid()
    weight = VFL_ALPHA * p**VFL_GAMMA * (1 - matched) + target
    quality = iou.detach()
    if KIND == "matchability":
        target = torch.zeros_like(target).scatter(1, cells, quality**MAL_GAMMA)
        weight = p**MAL_GAMMA * (1 - matched) + matched
    elif KIND.startswith("position"):
        first = next(iter(predictions.values())).logits
        image = matches.rows // first.shape[1]
        best = torch.zeros(len(quality), first.shape[0], dtype=dtype, device=quality.device)
        best = best.scatter_reduce(1, image, quality**2, "amax")
        quality = quality**2 / best.gather(1, image).clamp(min=1e-6)
        target = torch.zeros_like(target).scatter(1, cells, quality)
        weight = 0.75 * p**2 * (1 - matched) + 0.25 * (target - p) ** 2 * matched
    vfl = functional.binary_cross_entropy_with_logits(flat, target, weight=weight, reduction="none").sum(1)

    by_term = {
        "loss_vfl": VFL_WEIGHT * vfl / normalizer,
        "loss_bbox": BBOX_WEIGHT * (predicted - expected).abs().sum((1, 2)) / normalizer,
        "loss_giou": GIOU_WEIGHT * (1 - giou).sum(1) / normalizer,
    }
    return {name + s: values[i] for i, s in enumerate(predictions) for name, values in by_term.items()}


def _denoising_matches(
    group: DenoisingGroup, boxes_cxcywh: Sequence[Tensor], layers: int, device: torch.device
) -> Matches:
    """Return rows and targets of the denoising queries, which are the same for every layer."""
    starts = [0, *accumulate(map(len, boxes_cxcywh))][:-1]
    rows = torch.cat([positives + image * group.size for image, positives in enumerate(group.positives)])
    targets = torch.cat([of_image + start for of_image, start in zip(group.targets, starts, strict=True)])
    pairs = torch.stack([rows, targets]).to(device, non_blocking=True)
    return Matches(pairs[0].expand(layers, -1), pairs[1].expand(layers, -1))

"""Post-process predictions: the best pairs of query and class, duplicates rescored, without NMS and clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from rtdetr_cli.boxes import overlap_with_better, rescore_duplicates
from rtdetr_cli.model.layers import cxcywh_to_xyxy


def select_detections(
    logits: Tensor, boxes_cxcywh: Tensor, sizes_wh: Tensor, top_k: int = 300, *, gamma: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the `top_k` best of all pairs of query and class.

    A query can give several classes. Boxes are not clipped to the image.

    Args:
        logits: (B, Q, K).
        boxes_cxcywh: (B, Q, 4), 0 to 1.
        sizes_wh: (B, 2), width and height of the original images in pixels.
        top_k: maximum number N of detections per image.
        gamma: of `boxes.rescore_duplicates`; 0 is the published post-processing, which does not rescore.

    Returns:
        labels (B, N) int64, boxes_xyxy_px (B, N, 4) and scores (B, N), best first.
    """
    classes = logits.shape[2]
    flat = logits.flatten(1)
    values, index = flat.topk(min(top_k, flat.shape[1]), dim=1)
    query = torch.div(index, classes, rounding_mode="trunc")
    labels, scores = index - query * classes, torch.sigmoid(values)
    boxes = cxcywh_to_xyxy(boxes_cxcywh).gather(1, query[..., None].expand(-1, -1, 4))
    if gamma:
        overlap = overlap_with_better(boxes, labels.to(boxes.dtype), torch)
        scores, order = rescore_duplicates(scores, overlap, gamma).topk(scores.shape[1], dim=1)
        labels, boxes = labels.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return labels, boxes * sizes_wh.to(boxes.dtype).repeat(1, 2)[:, None], scores

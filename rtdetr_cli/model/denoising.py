"""Contrastive denoising (DINO, arXiv 2203.03605, section 3.3, with the settings of RT-DETR).

Noisy copies of the annotated boxes go through the decoder together with the selected queries, in groups that cannot
attend to each other. A copy with little noise must recover its box, one with much noise must be classified as
background. Their targets are known, so no matching is needed.

Departures from the official code: the noise is drawn once for the effective batch from a CPU generator, so it does
not depend on the device or the micro-batches; the number of queries is bounded (in the official code, 350 boxes in an
image make 700 queries and can run out of memory); a batch without boxes has no group (see `Decoder`).

Shapes: B batch, D denoising queries, Q selected queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rtdetr_cli.model.layers import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh

MAX_TOTAL = 400
"""Maximum number of denoising queries per image. With up to 100 boxes the published rule needs at most 200."""


@dataclass(frozen=True, slots=True, eq=False)
class DenoisingGroup:
    """The denoising queries of a batch: D per image, before the Q selected ones.

    Attributes:
        class_ids: (B, D) int64, some of them changed; the number of classes in padding.
        boxes_unactivated: (B, D, 4) float32, logits of noisy cxcywh.
        attention_mask: (D + Q, D + Q) bool, True where a row must not attend to a column.
        positives: for each image the indices of the queries with a box as target, group by group.
        targets: for each image the index of the box of each of `positives`.
        num_groups: number of positive copies of every box.
        share: fraction of the batch's boxes in the group; below 1 only where an image has too many boxes.
    """

    class_ids: Tensor
    boxes_unactivated: Tensor
    attention_mask: Tensor
    positives: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    num_groups: int
    share: float = 1.0

    @property
    def size(self) -> int:
        """The number of denoising queries per image, D."""
        return self.class_ids.shape[1]

    def rows(self, images: slice) -> DenoisingGroup:
        """Return the part of a micro-batch."""
        return replace(
            self,
            class_ids=self.class_ids[images],
            boxes_unactivated=self.boxes_unactivated[images],
            positives=self.positives[images],
            targets=self.targets[images],
        )

    def to(self, device: torch.device | str) -> DenoisingGroup:
        """Return the group with the decoder's inputs on `device`; the indices for the loss stay on the CPU."""
        return replace(
            self,
            class_ids=self.class_ids.to(device, non_blocking=True),
            boxes_unactivated=self.boxes_unactivated.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
        )


def attention_mask(*, size: int, num_groups: int, queries: int) -> Tensor:
    """Return a mask (D + Q, D + Q), True where a row must not attend to a column.

    Selected queries do not attend to denoising queries, and groups do not attend to each other.
    """
    group = torch.arange(size) // (size // num_groups)
    mask = torch.zeros(size + queries, size + queries, dtype=torch.bool)
    mask[size:, :size] = True
    mask[:size, :size] = group[:, None] != group[None]
    return mask


def draw_denoising(
    boxes_cxcywh: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    num_classes: int,
    queries: int,
    num_positives: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
    generator: torch.Generator,
    max_total: int = MAX_TOTAL,
) -> DenoisingGroup | None:
    """Draw the denoising queries of an effective batch.

    Args:
        boxes_cxcywh: for each image (N, 4), 0 to 1, on the CPU.
        labels: for each image (N,) int64.
        num_classes: K; also the class id of padding.
        queries: number of selected queries Q.
        num_positives: target number of positive queries per image; 0 for no denoising.
        label_noise: twice the share of labels that get a random class.
        box_noise: noise of a corner in half sides of the box: up to one for positives, one to two for negatives.
        generator: a CPU generator, the only source of randomness.
        max_total: maximum number of queries per image. An image with more than half as many boxes gives a random part
            of them.

    Returns:
        The group, or None when `num_positives` is 0 or no image has a box.
    """
    counts = [len(b) for b in boxes_cxcywh]
    if num_positives <= 0 or max(counts, default=0) == 0:
        return None
    most = min(max(counts), max(max_total // 2, 1))
    chosen = [
        torch.arange(n) if n <= most else torch.randperm(n, generator=generator)[:most].sort().values for n in counts
    ]
    boxes = pad_sequence([b[c] for b, c in zip(boxes_cxcywh, chosen, strict=True)], batch_first=True).float()
    known_labels = pad_sequence(
        [one[c] for one, c in zip(labels, chosen, strict=True)], batch_first=True, padding_value=num_classes
    )  # B M
    num_groups = max(1, min(num_positives, max_total // 2) // most)
    copies = 2 * num_groups
    class_ids = known_labels.repeat(1, copies)  # B D, with D = M * copies
    noisy = boxes.repeat(1, copies, 1)
    real = class_ids != num_classes
    far = (torch.arange(copies * most) // most % 2 == 1)[None, :, None]  # the second half of each group

    flipped = torch.rand(class_ids.shape, generator=generator) < label_noise * 0.5
    others = torch.randint(num_classes, class_ids.shape, generator=generator)
    class_ids = torch.where(flipped & real, others, class_ids)

    distance = torch.rand(noisy.shape, generator=generator) + far
    sign = torch.randint(2, noisy.shape, generator=generator) * 2 - 1
    half_sides = noisy[..., 2:].repeat(1, 1, 2) * (0.5 * box_noise)
    corners = (cxcywh_to_xyxy(noisy) + sign * distance * half_sides).clamp(0, 1)
    unactivated = inverse_sigmoid(torch.where(real[..., None], xyxy_to_cxcywh(corners), 0.0))

    starts = torch.arange(num_groups)[:, None] * (2 * most)
    return DenoisingGroup(
        class_ids=class_ids,
        boxes_unactivated=unactivated,
        attention_mask=attention_mask(size=copies * most, num_groups=num_groups, queries=queries),
        positives=tuple((starts + torch.arange(len(c))).flatten() for c in chosen),
        targets=tuple(c.repeat(num_groups) for c in chosen),
        num_groups=num_groups,
        share=sum(len(c) for c in chosen) / sum(counts),
    )

"""Contrastive denoising (DINO, arXiv 2203.03605, section 3.3; RT-DETR's settings).

Noisy copies of the annotated boxes go through the decoder beside the selected queries, in groups that cannot see
each other: near copies must find back to their box, far copies must learn to be nothing. Their targets are known,
so no matching is needed.

Departures from the official code: drawn once for the whole effective batch from a CPU generator, so the draw does
not depend on the device or on how the batch is cut; bounded, where 350 boxes in an image used to mean 700 queries
and out of memory; a batch without boxes has no group, and the graph stays symmetric all the same (see the decoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rtdetr_cli.model.layers import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh

MAX_TOTAL = 400
"""Most denoising queries in an image; up to 100 boxes the published rule stays at or below 200."""


@dataclass(frozen=True, slots=True, eq=False)
class DenoisingGroup:
    """The denoising queries of a batch of B images; D in each, before the Q selected ones.

    Attributes:
        class_ids: (B, D) int64, possibly flipped; the number of classes where there is no box.
        boxes_unactivated: (B, D, 4) float32, logits of noisy cxcywh.
        attention_mask: (D + Q, D + Q) bool, True where a row must not see a column.
        positives: for each image the query indices that must find a box, group after group.
        targets: for each image the box that each of `positives` must find.
        num_groups: copies of every box that are positives.
        share: of the batch's boxes that are in here; below 1 only when the bound was met.
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
        """D, the number of denoising queries in an image."""
        return self.class_ids.shape[1]

    def rows(self, images: slice) -> DenoisingGroup:
        """Return the group of some images of the batch, for a micro-batch."""
        return replace(
            self,
            class_ids=self.class_ids[images],
            boxes_unactivated=self.boxes_unactivated[images],
            positives=self.positives[images],
            targets=self.targets[images],
        )

    def to(self, device: torch.device | str) -> DenoisingGroup:
        """Return the group with the decoder's inputs on `device`; the indices of the loss stay on the CPU."""
        return replace(
            self,
            class_ids=self.class_ids.to(device, non_blocking=True),
            boxes_unactivated=self.boxes_unactivated.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
        )


def attention_mask(*, size: int, num_groups: int, queries: int) -> Tensor:
    """Return (D + Q, D + Q) bool, True = hidden: selected queries see no copies, groups do not see each other."""
    group = torch.arange(size) // max(size // max(num_groups, 1), 1)
    hidden = torch.zeros(size + queries, size + queries, dtype=torch.bool)
    hidden[size:, :size] = True
    hidden[:size, :size] = group[:, None] != group[None]
    return hidden


def draw_denoising(
    boxes_cxcywh: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    num_classes: int,
    queries: int,
    wanted: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
    generator: torch.Generator,
    max_total: int = MAX_TOTAL,
) -> DenoisingGroup | None:
    """Draw the denoising queries of an effective batch.

    Args:
        boxes_cxcywh: for each image (N, 4), 0 to 1, on the CPU.
        labels: for each image (N,) int64.
        num_classes: K; also the id of "no box".
        queries: Q, the selected queries that follow in the decoder.
        wanted: denoising positives wanted in an image; 0 for none.
        label_noise: share of labels that may be changed; half of them are.
        box_noise: noise of a side in half sides; positives within one, negatives between one and two.
        generator: on the CPU; the only source of randomness.
        max_total: most queries in an image. Of images with more than half as many boxes a random part is taken.

    Returns:
        The group, or None when nothing was wanted or no image has a box.
    """
    counts = [len(b) for b in boxes_cxcywh]
    if wanted <= 0 or max(counts, default=0) == 0:
        return None
    most = min(max(counts), max(max_total // 2, 1))
    chosen = [
        torch.arange(n) if n <= most else torch.randperm(n, generator=generator)[:most].sort().values for n in counts
    ]
    boxes = pad_sequence([b[c] for b, c in zip(boxes_cxcywh, chosen, strict=True)], batch_first=True).float()
    known_labels = pad_sequence(
        [one[c] for one, c in zip(labels, chosen, strict=True)], batch_first=True, padding_value=num_classes
    )  # (B, M)
    num_groups = max(1, min(wanted, max_total // 2) // most)
    copies = 2 * num_groups
    class_ids = known_labels.repeat(1, copies)  # (B, D), D = M * copies
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

"""The cost of one forward pass, counted on shapes alone."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_shapes


def count_gflops(
    spec: ModelSpec, *, num_classes: int, imgsz: tuple[int, int], layers: int | None = None, queries: int | None = None
) -> float:
    """Return the GFLOPs of one image: two per multiplication and addition, before blocks are fused, as published.

    Products of matrices and convolutions are counted; sampling, norms and activations are not. The published figures
    (60, 92, 100, 136 and 259 from r18 to r101) also count boxes of tokens that are not selected, which this
    implementation does not compute: 59, 91, 98, 136, 258. Fusing saves another 1 to 4 %.

    Args:
        spec: the architecture.
        num_classes: K.
        imgsz: height and width in pixels.
        layers: decoder layers used at inference; None for the architecture's own.
        queries: queries used at inference; None for the architecture's own.
    """
    model = build_shapes(spec, num_classes=num_classes).eval()
    with torch.device("meta"), torch.no_grad():
        model.set_inference(layers=layers, queries=queries)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *imgsz))
    return float(counter.get_total_flops()) / 1e9

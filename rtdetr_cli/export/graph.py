"""The detector as a graph for deployment: folded, without GridSample, with post-processing.

It has the inputs `images` and `orig_target_sizes` and the outputs `labels`, `boxes` and `scores` of the official
exports, so that a program written for those runs with ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.infer.graph import FINISHED, IMAGES, RAW, SIZES, TOP_K, GraphSpec, TensorSpec
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.postprocess import select_detections
from rtdetr_cli.weights.header import ModelHeader

STRIDES = (8, 16, 32)


class DeployGraph(nn.Module):
    """A model from `deployable` with the inputs and outputs of the official exports.

    `raw` is without post-processing: the outputs are logits and boxes of all queries. `gamma` rescores duplicates, see
    `select_detections`.
    """

    def __init__(self, model: RTDETR, *, raw: bool = False, gamma: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.raw = raw
        self.gamma = gamma

    def forward(self, images: Tensor, orig_target_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            images: (B, 3, H, W) float32 RGB, 0 to 1.
            orig_target_sizes: (B, 2) int64, (width, height) of the original images; unused when raw.

        Returns:
            labels (B, K) int64, boxes (B, K, 4) xyxy in original pixels, scores (B, K); or, where raw, logits
            (B, Q, classes) and boxes (B, Q, 4) cxcywh, 0 to 1.
        """
        main = self.model(images).main
        logits, boxes = main.logits.float(), main.boxes_cxcywh.float()
        if self.raw:
            return logits, boxes
        assert orig_target_sizes is not None
        return select_detections(logits, boxes, orig_target_sizes, TOP_K, gamma=self.gamma)


def deployable(model: RTDETR, *, gridsample: bool = False) -> RTDETR:
    """Return a copy for deployment: re-parameterized, norms folded, sampling as a gather or as GridSample."""
    copy = model.fuse().cpu().float()
    copy.set_sampling(*model.sampling, operator="grid_sample" if gridsample else "gather")
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy


def count_norms(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Return how many layer norms a forward pass runs. It also fills the tables that tracing needs."""
    count = 0

    def increment(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [m.register_forward_hook(increment) for m in module.modules() if isinstance(m, nn.LayerNorm)]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return count


def example_inputs(options: ExportOptions, imgsz: tuple[int, int], *, batch: int) -> tuple[Tensor, ...]:
    """Return inputs of the right shapes to trace the graph with."""
    images = torch.rand(batch, 3, *imgsz, generator=torch.Generator().manual_seed(0))
    if options.raw:
        return (images,)
    return images, torch.tensor([[imgsz[1], imgsz[0]]] * batch)


def expected_spec(options: ExportOptions, header: ModelHeader) -> GraphSpec:
    """Return the header and the tensors that an export of this model with these options must have."""
    batch = None if options.dynamic else options.batch
    height, width = header.imgsz
    tokens = sum((height // stride) * (width // stride) for stride in STRIDES)
    queries, classes = min(header.queries, tokens), len(header.names)
    rows = min(TOP_K, queries * classes)

    def tensor(name: str, dtype: type[np.generic], *shape: int | None) -> TensorSpec:
        return TensorSpec(name, np.dtype(dtype), (batch, *shape))

    images = tensor(IMAGES, np.float32, 3, height, width)
    if options.preprocess:
        images = tensor(IMAGES, np.uint8, None, None, 3)
    if options.raw:
        logits, boxes = RAW
        outputs = [tensor(logits, np.float32, queries, classes), tensor(boxes, np.float32, queries, 4)]
        return GraphSpec(header, [images], outputs)
    labels, boxes, scores = FINISHED
    outputs = [tensor(labels, np.int64, rows), tensor(boxes, np.float32, rows, 4), tensor(scores, np.float32, rows)]
    return GraphSpec(header, [images, tensor(SIZES, np.int64, 2)], outputs)

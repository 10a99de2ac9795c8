"""The detector as a graph for deployment: folded, without GridSample, with post-processing.

It has the inputs `images` and `orig_target_sizes` and the outputs `labels`, `boxes` and `scores` of the official
exports, so that a program written for those runs with ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtdetr_cli.errors import UsageError
from rtdetr_cli.export.compare import Interface, TensorSpec
from rtdetr_cli.infer.graph import TOP_K
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.postprocess import select_detections
from rtdetr_cli.weights.header import ModelHeader

FORMATS = ("onnx", "fp16", "openvino", "trt-fp16")
OPSETS = (17, 18)
STRIDES = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    Attributes:
        formats: of `FORMATS`, in this order.
        imgsz: (height, width) instead of the model's own.
        batch: the fixed batch size, or the largest one of a dynamic TensorRT engine.
        dynamic: dynamic batch size.
        opset: 17 or 18; older ones have no LayerNormalization.
        gridsample: use the GridSample operator instead of gather.
        raw: no post-processing: `logits` and `boxes_cxcywh` of all queries.
        preprocess: accept uint8 images of any size (height x width x RGB) and resize them in the graph.
    """

    formats: tuple[str, ...] = ("onnx",)
    imgsz: tuple[int, int] | None = None
    batch: int = 1
    dynamic: bool = False
    opset: int = 18
    gridsample: bool = False
    raw: bool = False
    preprocess: bool = False

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return ["images"] if self.raw else ["images", "orig_target_sizes"]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        return ["logits", "boxes_cxcywh"] if self.raw else ["labels", "boxes", "scores"]

    def check(self) -> None:
        """Refuse options that clash, before anything heavy is loaded.

        Raises:
            UsageError: options that cannot be combined.
        """
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise UsageError(f"unknown export format {unknown[0]!r}", hint=f"choose from: {', '.join(FORMATS)}")
        if "trt-fp16" in self.formats and "fp16" not in self.formats[: self.formats.index("trt-fp16")]:
            raise UsageError("the format trt-fp16 is built from fp16, which must come before it")
        if self.opset not in OPSETS:
            reason = "is not supported"
            if self.opset < min(OPSETS):
                reason = "has no LayerNormalization, and a norm in pieces breaks half precision"
            raise UsageError(f"--opset {self.opset} {reason}", hint="use --opset 18 (the default) or 17", code="opset")
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is less than one")
        if self.preprocess:
            self._check_preprocess()

    def _check_preprocess(self) -> None:
        if self.opset < 18:
            raise UsageError("--preprocess-in-graph needs --opset 18: older Resize cannot antialias", code="opset")
        if self.raw:
            raise UsageError("--preprocess-in-graph and --raw exclude each other")
        if self.dynamic or self.batch > 1:
            raise UsageError(
                "--preprocess-in-graph takes one image at a time: images of different sizes cannot be batched",
                hint="remove --dynamic and --batch",
            )
        if "trt-fp16" in self.formats:
            raise UsageError(
                "--preprocess-in-graph and --trt-fp16 exclude each other: TensorRT's Resize does not antialias",
                hint="export twice, or resize images before running the engine",
            )


class DeployGraph(nn.Module):
    """The folded detector with the inputs and outputs of the official exports.

    Args:
        model: from `deployable`.
        raw: output logits and boxes of all queries.
        top_k: maximum detections per image.
    """

    def __init__(self, model: RTDETR, *, raw: bool = False, top_k: int = TOP_K) -> None:
        super().__init__()
        self.model = model
        self.raw = raw
        self.top_k = top_k

    def forward(self, images: Tensor, orig_target_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            images: (B, 3, H, W) float32 RGB, 0 to 1.
            orig_target_sizes: (B, 2) int64, (width, height) of the original images; unused when raw.

        Returns:
            labels (B, K) int64, boxes (B, K, 4) xyxy in original pixels, scores (B, K); or logits (B, Q, classes) and
            boxes (B, Q, 4) cxcywh, 0 to 1.
        """
        main = self.model(images).main
        if self.raw:
            return main.logits.float(), main.boxes_cxcywh.float()
        assert orig_target_sizes is not None
        return select_detections(main.logits.float(), main.boxes_cxcywh.float(), orig_target_sizes, self.top_k)


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


def expected_interface(options: ExportOptions, header: ModelHeader) -> Interface:
    """Return the tensors that an export of this model with these options must have."""
    batch = None if options.dynamic else options.batch
    height, width = header.imgsz
    tokens = sum((height // stride) * (width // stride) for stride in STRIDES)
    queries, classes = min(header.queries, tokens), len(header.names)
    images = TensorSpec("images", "float32", (batch, 3, height, width))
    if options.preprocess:
        images = TensorSpec("images", "uint8", (batch, None, None, 3))
    if options.raw:
        logits = TensorSpec("logits", "float32", (batch, queries, classes))
        return Interface((images,), (logits, TensorSpec("boxes_cxcywh", "float32", (batch, queries, 4))))
    rows = min(TOP_K, queries * classes)
    return Interface(
        (images, TensorSpec("orig_target_sizes", "int64", (batch, 2))),
        (
            TensorSpec("labels", "int64", (batch, rows)),
            TensorSpec("boxes", "float32", (batch, rows, 4)),
            TensorSpec("scores", "float32", (batch, rows)),
        ),
    )

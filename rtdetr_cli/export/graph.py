"""The detector as a graph for deployment: folded, without GridSample, post-processing inside.

The published contract: `images` and `orig_target_sizes` in, `labels`, `boxes` and `scores` out, so that a program
written for one export of this family runs with ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtdetr_cli.errors import UsageError
from rtdetr_cli.export.gate import Interface, TensorSpec
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.postprocess import select_detections

FORMATS = ("onnx", "fp16", "openvino", "trt-fp16")
OPSETS = (17, 18)
TOP_K = 300


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to make.

    Attributes:
        formats: of `FORMATS`, in the order they are made.
        imgsz: (height, width) in place of the model's own.
        batch: the fixed batch, and the largest that a TensorRT engine is built for when `dynamic`.
        dynamic: leave the batch open in all inputs and outputs.
        opset: 17 or 18; below, LayerNormalization does not exist and would be split into pieces.
        gridsample: use the GridSample operator in place of the gather.
        raw: no post-processing: `logits` and `boxes_cxcywh` of all queries.
        preprocess: take uint8 images of any size, height x width x RGB, and resize them in the graph.
    """

    formats: tuple[str, ...] = ("onnx",)
    imgsz: tuple[int, int] | None = None
    batch: int = 1
    dynamic: bool = False
    opset: int = 18
    gridsample: bool = False
    raw: bool = False
    preprocess: bool = False

    def check(self) -> None:
        """Refuse what clashes, before anything heavy is loaded.

        Raises:
            UsageError: options that do not go together.
        """
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise UsageError(f"there is no export format {unknown[0]!r}", hint=f"one of: {', '.join(FORMATS)}")
        if self.opset < min(OPSETS):
            raise UsageError(
                f"--opset {self.opset} has no LayerNormalization: it would be split into pieces, and half precision "
                "then detects nothing or the wrong things",
                hint="--opset 18 (the default) or 17",
                code="opset",
            )
        if self.opset not in OPSETS:
            raise UsageError(
                f"--opset {self.opset} is not supported", hint="--opset 18 (the default) or 17", code="opset"
            )
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is less than one")
        if self.preprocess and self.opset < 18:
            raise UsageError("--preprocess-in-graph needs --opset 18: before, Resize cannot antialias", code="opset")
        if self.preprocess and self.raw:
            raise UsageError("--preprocess-in-graph and --raw exclude each other")
        if self.preprocess and (self.dynamic or self.batch > 1):
            raise UsageError(
                "--preprocess-in-graph takes one image at a time, since images of several sizes make no batch",
                hint="leave out --dynamic and --batch",
            )
        if self.preprocess and "trt-fp16" in self.formats:
            raise UsageError(
                "--preprocess-in-graph and --trt-fp16 exclude each other: TensorRT's Resize does not antialias",
                hint="export twice, or resize before the engine",
            )


class DeployGraph(nn.Module):
    """The folded detector with the published inputs and outputs.

    Args:
        model: made by `deployable`.
        raw: give logits and boxes of all queries.
        top_k: detections of an image, at most.
    """

    def __init__(self, model: RTDETR, *, raw: bool = False, top_k: int = TOP_K) -> None:
        super().__init__()
        self.model = model
        self.raw = raw
        self.top_k = top_k

    def forward(self, images: Tensor, orig_target_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (B, 3, H, W) float32 RGB, 0 to 1.
            orig_target_sizes: (B, 2) int64, (width, height) of the originals; not used when raw.

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
    """Return a copy for deployment: re-parameterised, norms folded, sampling as a gather unless asked otherwise."""
    copy = model.fuse().cpu().float()
    copy.set_sampling(*model.sampling, operator="grid_sample" if gridsample else "gather")
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy


def count_norms(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Return how many layer norms a forward pass goes through, and make the tables that a trace needs."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, nn.LayerNorm)]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return count


def example_inputs(options: ExportOptions, imgsz: tuple[int, int], *, batch: int) -> tuple[Tensor, ...]:
    """Return inputs of the right shapes to trace the graph with."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *imgsz, generator=generator)
    if options.raw:
        return (images,)
    return images, torch.tensor([[imgsz[1], imgsz[0]]] * batch)


def input_names(options: ExportOptions) -> list[str]:
    """Return the names of the inputs."""
    return ["images"] if options.raw else ["images", "orig_target_sizes"]


def output_names(options: ExportOptions) -> list[str]:
    """Return the names of the outputs."""
    return ["logits", "boxes_cxcywh"] if options.raw else ["labels", "boxes", "scores"]


def interface_of(
    options: ExportOptions, imgsz: tuple[int, int], *, tokens: int, queries: int, classes: int
) -> Interface:
    """Return the tensors that an export made with these options must have."""
    batch = None if options.dynamic else options.batch
    queries = min(queries, tokens)
    if options.preprocess:
        images = TensorSpec("images", "uint8", (batch, None, None, 3))
    else:
        images = TensorSpec("images", "float32", (batch, 3, *imgsz))
    if options.raw:
        return Interface(
            (images,),
            (
                TensorSpec("logits", "float32", (batch, queries, classes)),
                TensorSpec("boxes_cxcywh", "float32", (batch, queries, 4)),
            ),
        )
    rows = min(TOP_K, queries * classes)
    return Interface(
        (images, TensorSpec("orig_target_sizes", "int64", (batch, 2))),
        (
            TensorSpec("labels", "int64", (batch, rows)),
            TensorSpec("boxes", "float32", (batch, rows, 4)),
            TensorSpec("scores", "float32", (batch, rows)),
        ),
    )

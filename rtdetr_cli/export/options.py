"""The options of an export, checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from rtdetr_cli.errors import UsageError

OPSETS = (17, 18)
ENGINES = ("trt-fp16", "rtx-fp16")


def choose_formats(
    *, onnx: bool = False, fp16: bool = False, trt_fp16: bool = False, openvino: bool = False, rtx: bool = False
) -> tuple[str, ...]:
    """Return the formats that the flags of an export ask for, ONNX where there is none.

    Engines come last: many machines cannot build them, and everything else should be finished by then.
    """
    requested = {
        "onnx": onnx,
        "fp16": fp16 or trt_fp16 or rtx,
        "openvino": openvino,
        "trt-fp16": trt_fp16 and not rtx,
        "rtx-fp16": rtx,
    }
    return tuple(name for name, wanted in requested.items() if wanted) or ("onnx",)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    Attributes:
        formats: `onnx`, `fp16`, `openvino`, and the engines `trt-fp16` and `rtx-fp16`, which come after `fp16`.
        imgsz: (height, width) instead of the model's own.
        batch: the fixed batch size, or the largest one of a dynamic TensorRT engine.
        dynamic: dynamic batch size.
        opset: 17 or 18; older ones have no LayerNormalization.
        gridsample: use the GridSample operator instead of gather.
        raw: no post-processing: `logits` and `boxes_cxcywh` of all queries.
        preprocess: accept uint8 images of any size (height x width x RGB) and resize them in the graph.
        targets: GPUs that `rtx-fp16` is built for, such as `sm86`.
    """

    formats: tuple[str, ...] = ("onnx",)
    imgsz: tuple[int, int] | None = None
    batch: int = 1
    dynamic: bool = False
    opset: int = 18
    gridsample: bool = False
    raw: bool = False
    preprocess: bool = False
    targets: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UsageError for options that cannot be combined, before anything heavy is loaded."""
        if self.opset not in OPSETS:
            raise UsageError(
                f"--opset {self.opset} is not supported: 17 is the first with LayerNormalization, which half precision "
                "needs, and 18 the newest that is tested",
                hint="use --opset 18 (the default) or 17",
                code="opset",
            )
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is less than one")
        if not self.preprocess:
            return
        if self.opset < 18:
            raise UsageError("--preprocess-in-graph needs --opset 18: Resize cannot antialias before", code="opset")
        if self.raw:
            raise UsageError("--preprocess-in-graph and --raw cannot be combined")
        if self.dynamic or self.batch > 1:
            raise UsageError(
                "--preprocess-in-graph takes one image at a time: images of different sizes cannot be batched",
                hint="remove --dynamic and --batch",
            )
        if set(ENGINES) & set(self.formats):
            raise UsageError(
                "--preprocess-in-graph and an engine cannot be combined: TensorRT's Resize does not antialias",
                hint="export twice, or resize images before running the engine",
            )

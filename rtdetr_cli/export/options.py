"""The options of an export, checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from rtdetr_cli.errors import EnvironmentProblem, UsageError
from rtdetr_cli.infer.packages import has_package

OPSETS = (17, 18)
ENGINES = ("trt-fp16", "rtx-fp16")
NEEDED_PACKAGES = (
    ("openvino", "openvino", "OpenVINO"),
    ("openvino-int8", "nncf", "NNCF, which quantizes for OpenVINO,"),
)
"""Format, module and title of what must be there before work starts; engines can also be built on another machine."""
BUNDLE_FILES = ("model.onnx", "labels.json", "detect.py", "requirements.txt", "Dockerfile", "README.md")
CALIBRATION_IMAGES = 32
INT8_PARTS = ("backbone", "encoder", "decoder")
FLOAT_FORMATS = {"int8": "onnx", "openvino-int8": "openvino"}
"""The float format that an INT8 format is made from and compared with."""


def choose_formats(
    *,
    onnx: bool = False,
    fp16: bool = False,
    trt_fp16: bool = False,
    openvino: bool = False,
    rtx: bool = False,
    int8: bool = False,
) -> tuple[str, ...]:
    """Return the formats that the flags of an export ask for, ONNX where there is none.

    INT8 is added to each of ONNX and OpenVINO, with the float file that it is compared with. Engines come last: many
    machines cannot build them, and everything else should be finished by then.
    """
    onnx = onnx or (int8 and not openvino) or not (fp16 or trt_fp16 or openvino or rtx)
    requested = {
        "onnx": onnx,
        "int8": int8 and onnx,
        "fp16": fp16 or trt_fp16 or rtx,
        "openvino": openvino,
        "openvino-int8": int8 and openvino,
        "trt-fp16": trt_fp16 and not rtx,
        "rtx-fp16": rtx,
    }
    return tuple(name for name, wanted in requested.items() if wanted)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    Attributes:
        formats: see `choose_formats`.
        imgsz: (height, width) instead of the model's own.
        batch: the fixed batch size, or the largest one of a dynamic TensorRT engine.
        dynamic: dynamic batch size.
        opset: 17 or 18; older ones have no LayerNormalization.
        gridsample: use the GridSample operator instead of gather.
        raw: no post-processing: `logits` and `boxes_cxcywh` of all queries.
        preprocess: accept uint8 images of any size (height x width x RGB) and resize them in the graph.
        targets: GPUs that `rtx-fp16` is built for, such as `sm86`.
        float_parts: parts of `INT8_PARTS` that INT8 leaves in float.
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
    float_parts: tuple[str, ...] = ()

    @property
    def int8(self) -> bool:
        """Whether an INT8 file is exported."""
        return bool(FLOAT_FORMATS.keys() & set(self.formats))

    def check(self) -> None:
        """Check the options before anything heavy is loaded.

        Raises:
            UsageError: they cannot be combined.
            EnvironmentProblem: OpenVINO or NNCF is needed and missing.
        """
        if self.opset not in OPSETS:
            raise UsageError(
                f"--opset {self.opset} is not supported: 17 is the first with LayerNormalization, which half precision "
                "needs, and 18 the newest that is tested",
                hint="use --opset 18 (the default) or 17",
                code="opset",
            )
        for name, module, title in NEEDED_PACKAGES:
            if name in self.formats and not has_package(module):
                raise EnvironmentProblem(
                    f"{title} is not installed", hint="pip install 'rtdetr-cli[openvino]'", code="package-missing"
                )
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is less than one")
        unknown = [name for name in self.float_parts if name not in INT8_PARTS]
        if unknown:
            raise UsageError(
                f"there is no part {unknown[0]!r} to keep in float",
                hint=f"--keep-float {','.join(INT8_PARTS)}, or some of them",
            )
        if self.float_parts and not self.int8:
            raise UsageError("--keep-float has no effect without --int8")
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

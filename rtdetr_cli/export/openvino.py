"""OpenVINO files: `.xml` and `.bin`, weights compressed to float16, the header in the runtime information."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from rtdetr_cli.errors import ExportError
from rtdetr_cli.export.compare import Interface, TensorSpec
from rtdetr_cli.infer.graph import first_line
from rtdetr_cli.infer.openvino_backend import import_openvino, openvino_core
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

TYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "u8": "uint8"}


class OpenvinoFile:
    """A graph converted to OpenVINO, ready to be written.

    Raises:
        EnvironmentProblem: the package is missing.
        ExportError: OpenVINO cannot read the graph.
    """

    def __init__(self, model: onnx.ModelProto, *, preprocess: bool = False) -> None:
        """Read a graph.

        Args:
            model: with a float input.
            preprocess: accept uint8 images of any size. This uses OpenVINO's own Pillow-like resize, since OpenVINO
                ignores the antialiasing of an ONNX Resize.
        """
        self.openvino: Any = import_openvino()
        try:
            self.model = openvino_core().read_model(model.SerializeToString())
            if preprocess:
                self.model = self._with_resize(self.model)
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO {self.openvino.__version__} cannot read the graph: {first_line(error)}"
            ) from error

    def _with_resize(self, model: Any) -> Any:
        steps = self.openvino.preprocess
        processor = steps.PrePostProcessor(model)
        images = processor.input("images")
        images.tensor().set_element_type(self.openvino.Type.u8).set_layout(self.openvino.Layout("NHWC"))
        images.tensor().set_spatial_dynamic_shape()
        images.model().set_layout(self.openvino.Layout("NCHW"))
        images.preprocess().resize(steps.ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
        images.preprocess().convert_element_type(self.openvino.Type.f32).scale(255.0)
        return processor.build()

    @property
    def versions(self) -> dict[str, str]:
        """The package's version."""
        return {"openvino": str(self.openvino.__version__)}

    def save(self, path: Path, header: ModelHeader) -> None:
        """Write `path` (`.xml`) and the `.bin` beside it."""
        self.model.set_rt_info(header.to_json(), [METADATA_KEY])
        try:
            self.openvino.save_model(self.model, str(path), compress_to_fp16=True)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot write {path}: {first_line(error)}") from error

    def interface(self) -> Interface:
        """Return the inputs and outputs."""

        def spec(port: Any) -> TensorSpec:
            shape = tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape())
            dtype = port.get_element_type().get_type_name()
            return TensorSpec(port.get_any_name(), TYPES.get(dtype, dtype), shape)

        return Interface(tuple(map(spec, self.model.inputs)), tuple(map(spec, self.model.outputs)))

    def operators(self) -> dict[str, int]:
        """Count the operators."""
        counts = Counter(node.get_type_name() for node in self.model.get_ops())
        return dict(sorted((k, v) for k, v in counts.items() if k not in ("Constant", "Parameter", "Result")))

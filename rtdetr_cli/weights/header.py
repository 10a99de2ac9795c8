"""What a model file says about itself, in every format: class names, preprocessing, sampling, thresholds, origin.

One JSON document under the key `rtdetr` of the safetensors metadata, the ONNX metadata, the OpenVINO runtime
information or beside a TensorRT engine. No torch and no pydantic here: `predict` on an ONNX file reads it first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rtdetr_cli.errors import ModelError

METADATA_KEY = "rtdetr"
HEADER_VERSION = 1

EXPORT_SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".engine": "tensorrt", ".plan": "tensorrt"}
"""Suffixes of exported models, with the runtime that each runs in."""

MODEL_SUFFIXES = (".safetensors", ".pth", ".pt", *EXPORT_SUFFIXES)
"""Suffixes of all files that a command takes as a model."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Score thresholds found by `eval --calibrate`: one for all classes and one for each, in label order.

    Attributes:
        target: `f1` or `precision=0.9`.
        overall: for all classes together.
        per_class: for each class.
        imgsz: (height, width) of the input at which they were found; None is the model's own, of older files.
        layers, queries: of the decoder with which they were found; None is not known, of older files.
    """

    target: str
    overall: float
    per_class: tuple[float, ...]
    imgsz: tuple[int, int] | None = None
    layers: int | None = None
    queries: int | None = None


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """Everything that `predict` needs besides the tensors.

    Attributes:
        names: class names in label order.
        category_ids: the dataset's own ids in label order.
        imgsz: (height, width) of the network's input in pixels.
        architecture: `config.schema.ModelSpec` as plain values.
        preset: name of the preset, or "" for a foreign file.
        sampling: `bilinear` or `discrete`.
        rounding: of the discrete sampling: `published` or `nearest`.
        layers: decoder layers used at inference.
        queries: object queries used at inference.
        preprocessing: a sentence-free record of how images become inputs.
        thresholds: calibrated score thresholds, or None.
        metrics: of the evaluation that chose these weights, such as {"AP": 0.41}.
        dataset: {"name", "fingerprint", ...} of the training data.
        identity: sha256 over the tensors (names, types, shapes, bytes); "" until saved.
        version: of rtdetr-cli that wrote it.
        extra: whatever a format adds (the gate's verdict, precision, source identity).
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    imgsz: tuple[int, int]
    architecture: dict[str, Any] = field(default_factory=dict)
    preset: str = ""
    sampling: str = "bilinear"
    rounding: str = "published"
    layers: int = 0
    queries: int = 300
    preprocessing: dict[str, Any] = field(
        default_factory=lambda: {
            "colour": "RGB",
            "resize": "stretch",
            "filter": "bilinear-antialias",
            "scale": 1 / 255,
            "mean": None,
            "std": None,
            "exif": True,
        }
    )
    thresholds: Thresholds | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    identity: str = ""
    version: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the header as one line of JSON with sorted keys."""
        return json.dumps({"header_version": HEADER_VERSION, **asdict(self)}, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, source: str = "") -> ModelHeader:
        """Read `to_json`'s text; unknown keys are ignored.

        Raises:
            ModelError: the text is not such a header.
        """
        try:
            values = json.loads(text)
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            known["names"] = tuple(str(n) for n in known["names"])
            known["category_ids"] = tuple(int(i) for i in known["category_ids"])
            height, width = known["imgsz"]
            known["imgsz"] = (int(height), int(width))
            if known.get("thresholds"):
                found = known["thresholds"]
                size = found.get("imgsz")
                known["thresholds"] = Thresholds(
                    str(found["target"]),
                    float(found["overall"]),
                    tuple(float(t) for t in found["per_class"]),
                    (int(size[0]), int(size[1])) if size else None,
                    int(found["layers"]) if found.get("layers") else None,
                    int(found["queries"]) if found.get("queries") else None,
                )
            return cls(**known)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{source or 'the model'} has a header that cannot be read: {error}", code="model-header"
            ) from error

"""rtdetr-cli: finetune RT-DETRv2 on your own images, and deploy it.

from rtdetr_cli import load

detector = load("best.safetensors")  # or .pth, .onnx, .xml, .engine, a run folder
detections = detector.predict("street.jpg")
print(detections.class_names, detections.scores, detections.boxes_xyxy_px)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rtdetr_cli.version import __version__

if TYPE_CHECKING:
    from rtdetr_cli.infer.api import Detector, load
    from rtdetr_cli.infer.detections import Detections

__all__ = ["Detections", "Detector", "__version__", "load"]

_MODULES = {"load": "infer.api", "Detector": "infer.api", "Detections": "infer.detections"}


def __getattr__(name: str) -> Any:
    """Import a name of the Python API on first use, so that the command line starts without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

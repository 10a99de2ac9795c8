"""rtdetr-cli: finetune RT-DETRv2 on your own images, and deploy it.

The Python API is a few names, imported when first used:

    from rtdetr_cli import load

    detector = load("best.safetensors")  # or .pth, .onnx, .xml, .engine, a run folder
    found = detector.predict("street.jpg")  # Detections: boxes_xyxy_px, scores, labels, class_names
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtdetr_cli.infer.api import Detector, load
    from rtdetr_cli.infer.detections import Detections

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "__version__", "load"]

_HOMES = {"load": "infer.api", "Detector": "infer.api", "Detections": "infer.detections"}


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first asked for: the command line starts without any of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

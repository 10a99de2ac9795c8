"""rtdetr-cli: finetune RT-DETRv2 on your own images, and deploy it.

from rtdetr_cli import load

detector = load("best.safetensors")  # or .pth, .onnx, .xml, .engine, a run folder, a preset
detections = detector.predict("street.jpg")
print(detections.class_names, detections.scores, detections.boxes_xyxy_px)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rtdetr_cli.version import __version__

if TYPE_CHECKING:
    from rtdetr_cli.api import Detections, Detector, load

__all__ = ["Detections", "Detector", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import a name of the Python API on first use, so that the command line starts without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rtdetr_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

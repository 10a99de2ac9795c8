"""`--backend auto`: run a verified export in place of the weights that it was made from, where that is faster."""

from __future__ import annotations

from pathlib import Path

from rtdetr_cli.errors import UsageError
from rtdetr_cli.infer.packages import has_package
from rtdetr_cli.weights.binding import read_export_header, status
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, ModelHeader, own_header

MANY_IMAGES = 20  # for fewer, another runtime is not loaded
_SAME = ("identity", "imgsz", "layers", "queries", "sampling", "rounding", "thresholds", "dedupe")


def choose_file(backend: str, model: Path, *, images: int, device: str, changed: bool) -> tuple[Path, str]:
    """Return the file to run for a model, and a sentence that says so where `--backend` had a choice.

    Args:
        backend: `torch`, or `auto` for a verified float32 export of the same model in `export/` next to it.
        model: weights; an exported file is run as it is.
        images: to predict.
        device: as for `open_backend`; on a GPU torch is used.
        changed: other options change the model, which an export cannot follow.

    Raises:
        UsageError: there is no such backend.
    """
    if backend not in ("torch", "auto"):
        raise UsageError(f"there is no backend {backend!r}", hint="--backend torch or --backend auto")
    if backend == "torch" or model.suffix.lower() in EXPORT_SUFFIXES:
        return model, ""
    if changed:
        return model, "backend  torch: an export cannot follow the options that change the model"
    if images < MANY_IMAGES:
        return model, f"backend  torch: an export is used from {MANY_IMAGES} images on"
    if not _runs_on_cpu(device):
        return model, "backend  torch: exports are used on a CPU"
    found = verified_export(model)
    if found is None:
        return model, f"backend  torch: {model.parent / 'export'} has no verified float32 export of this model"
    return found, f"backend  {EXPORT_SUFFIXES[found.suffix]}: {found} was verified to give the same detections"


def verified_export(model: Path) -> Path | None:
    """Return a float32 export of a model that passed verification and is unchanged since, OpenVINO before ONNX."""
    folder = model.parent / "export"
    header = own_header(model) if folder.is_dir() else None
    if header is None:
        return None
    suffixes = (".xml", ".onnx") if has_package("openvino") else (".onnx",)
    files = [path for suffix in suffixes for path in sorted(folder.glob(f"*{suffix}"))]
    return next((path for path in files if _is_verified_export(path, header)), None)


def _is_verified_export(path: Path, model: ModelHeader) -> bool:
    header = read_export_header(path)
    return (
        header is not None
        and header.extra.get("precision") == "fp32"
        and all(getattr(header, name) == getattr(model, name) for name in _SAME)
        and status(path, header)[0] == "unchanged"
    )


def _runs_on_cpu(device: str) -> bool:
    if device in ("cpu", "rtx"):
        return device == "cpu"
    from rtdetr_cli.infer.torch_backend import choose_device

    return choose_device(device).type == "cpu"

"""Inspect this machine: packages, devices, memory, disk space, and what is known to cause trouble.

Each check stands alone and changes nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from rtdetr_cli.machine import cpu_count, cpu_flags, cpu_name, free_bytes, installed_version
from rtdetr_cli.runs import nearest_existing

GIB = 2**30
LOW_MEMORY = LOW_DISK = 2 * GIB
LOW_SHARED_MEMORY = GIB // 4

# Packages that rtdetr needs, with their purpose.
NEEDED = {
    "torch": "the network",
    "torchvision": "antialiased resizing on the device",
    "numpy": "arrays",
    "scipy": "matching predictions with boxes",
    "pydantic": "settings and presets",
    "pillow": "reading images",
    "albumentations": "augmentation",
    "hotcoco": "COCO metrics with error analysis",
    "pycocotools": "COCO metrics",
    "onnx": "ONNX export",
    "onnxruntime": "verifying exports, fast prediction",
    "safetensors": "model files",
}
OPTIONAL = {
    "openvino": "export --openvino; fast on Intel and AMD processors",
    "nncf": "export --int8 --openvino",
    "transformers": "convert --to hf",
    "tensorrt": "export --trt-fp16",
    "tensorrt-rtx-cu13": "export --rtx: engines for GeForce RTX, built on any machine",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "predict --device rtx (experimental)",
    "tensorboard": "train --log tensorboard",
    "wandb": "train --log wandb",
    "mlflow": "train --log mlflow",
    "supervision": "Detections.to_supervision()",
}
# TensorRT releases that have given wrong boxes for similar detectors. This only warns: every export is verified.
TENSORRT_CAUTION = ("8.5", "8.6")
EXTENSIONS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "avx2": "AVX2"}


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    state: str  # `ok`, `warn`, `fail`, or `none` for something optional that is absent
    result: str
    advice: str = ""  # what to do about the result
    missing: str = ""  # what this machine lacks, if the check failed


def inspect_machine(out: Path) -> list[Check]:
    """Check everything that a run needs; `out` is the folder that runs would be written to."""
    extensions = [name for flag, name in EXTENSIONS.items() if flag in cpu_flags()]
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        Check("rtdetr-cli", "ok", installed_version("rtdetr-cli") or "runs from a checkout, not installed"),
        *_packages(),
        *_name_clash(),
        Check("processor", "ok", ", ".join([cpu_name(), f"{cpu_count()} cores", *extensions])),
        *_gpus(),
        *_providers(),
        *_memory(),
        _disk(out),
    ]


def _packages() -> Iterator[Check]:
    for package, purpose in NEEDED.items():
        if version := installed_version(package):
            yield Check(package, "ok", version)
        else:
            yield Check(package, "fail", "not installed", f"pip install {package}  ({purpose})", missing=package)
    for package, purpose in OPTIONAL.items():
        version = installed_version(package) or (installed_version("mlflow-skinny") if package == "mlflow" else "")
        if not version:
            yield Check(package, "none", f"not installed: {purpose}")
        elif package == "tensorrt" and version.startswith(TENSORRT_CAUTION):
            yield Check(package, "warn", version, "half precision has given wrong boxes for similar detectors")
        else:
            yield Check(package, "ok", version)


def _name_clash() -> Iterator[Check]:
    """Check whether another distribution, called `rtdetr`, owns the program of the same name."""
    version = installed_version("rtdetr")
    owners = {
        distribution.metadata["Name"]
        for distribution in metadata.distributions()
        for entry in distribution.entry_points
        if entry.group == "console_scripts" and entry.name == "rtdetr"
    }
    if version or len(owners) > 1:
        owned = "rtdetr" in owners
        yield Check(
            "name clash",
            "fail" if owned else "warn",
            f"the package rtdetr {version} is installed as well",
            "pip uninstall rtdetr, or run this program as: python -m rtdetr_cli",
            missing="an rtdetr program that belongs to this package alone" if owned else "",
        )
    else:
        program = shutil.which("rtdetr")
        yield Check("name clash", "ok", f"none; rtdetr is {program}" if program else "none; rtdetr is not on the PATH")


def _gpus() -> Iterator[Check]:
    if util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this torch was built without CUDA"
        yield Check("gpu", "none", f"none that torch can use{built}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16: fp16 with loss scaling is used"
        yield Check(f"gpu {index}", "ok", f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {bf16}")


def _providers() -> Iterator[Check]:
    if util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    names = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    yield Check("onnxruntime providers", "ok", ", ".join(names))


def _memory() -> Iterator[Check]:
    import psutil

    total, free = psutil.virtual_memory().total, free_bytes(None)
    low = "less than 2 GiB of memory is free: close other programs, or train with --batch 1 --workers 0"
    yield _space("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", low if free < LOW_MEMORY else "")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = free_bytes(shared)
        low = (
            "loader workers pass images through shared memory: start the container with --shm-size=2g, or train with "
            "--workers 0"
        )
        yield _space("shared memory", f"{free / GIB:.1f} GiB free in {shared}", low if free < LOW_SHARED_MEMORY else "")


def _disk(out: Path) -> Check:
    folder = nearest_existing(out)
    free = free_bytes(folder)
    result = f"{free / GIB:.1f} GiB free under {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{result}, not writable", missing=f"write access to {folder}")
    low = "an r18 run takes about 0.6 GiB (best.safetensors and two checkpoints)"
    return _space("disk", result, low if free < LOW_DISK else "")


def _space(name: str, result: str, warning: str) -> Check:
    return Check(name, "warn" if warning else "ok", result, warning)

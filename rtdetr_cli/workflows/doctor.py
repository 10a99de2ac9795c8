"""What this machine has: packages, devices, disk, shared memory, and what is known to hurt.

Each check is small and stands alone; none of them changes anything.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

# Packages the main job needs, and what each is for.
NEEDED = {
    "torch": "the network",
    "torchvision": "antialiased resizing on the device",
    "numpy": "arrays",
    "pydantic": "presets",
    "pillow": "reading images",
    "albumentations": "augmentation",
    "hotcoco": "metrics (pycocotools stands in, without error analysis)",
    "pycocotools": "metrics, the oracle",
    "onnx": "export",
    "onnxruntime": "the export gate and fast prediction",
    "safetensors": "model files",
}
OPTIONAL = {
    "openvino": "export --openvino; fastest on Intel and AMD processors",
    "tensorrt": "export --trt-fp16",
    "tensorboard": "train --log tensorboard",
    "wandb": "train --log wandb",
    "mlflow": "train --log mlflow",
    "supervision": "Detections.to_supervision()",
}
# TensorRT releases with threads about wrong results for this family; the export gate decides, this only warns.
TENSORRT_CAUTION = {"8.5": "half precision gave wrong boxes for some detectors of this family", "8.6": "likewise"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `state` is `ok`, `warn`, `fail` or `none` (absent and optional)."""

    name: str
    state: str
    found: str
    advice: str = ""


def inspect_machine(out: Path) -> list[Check]:
    """Look at everything that a run meets later.

    Args:
        out: a folder on the disk that runs would be written to.
    """
    return [
        *_python(),
        *_packages(),
        *_name_clash(),
        *_processor(),
        *_cuda(),
        *_providers(),
        *_memory(),
        *_disk(out),
    ]


def installed(package: str) -> str:
    """Return the installed version of a package, or an empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _python() -> Iterator[Check]:
    version = platform.python_version()
    yield Check(
        "python", "ok" if sys.version_info >= (3, 11) else "fail", f"{version} on {platform.platform(terse=True)}"
    )
    yield Check("rtdetr-cli", "ok", installed("rtdetr-cli") or "from a checkout that is not installed")


def _packages() -> Iterator[Check]:
    for package, purpose in NEEDED.items():
        version = installed(package)
        if version:
            yield Check(package, "ok", version)
        else:
            yield Check(package, "fail", "not installed", f"pip install {package}  ({purpose})")
    for package, purpose in OPTIONAL.items():
        version = installed(package) or (package == "mlflow" and installed("mlflow-skinny")) or ""
        caution = ""
        if package == "tensorrt":
            caution = TENSORRT_CAUTION.get(".".join(version.split(".")[:2]), "")
        yield Check(
            package, "warn" if caution else "ok" if version else "none", version or f"not installed: {purpose}", caution
        )


def _name_clash() -> Iterator[Check]:
    """Another distribution is called `rtdetr`; it may own the program of the same name."""
    foreign = installed("rtdetr")
    program = shutil.which("rtdetr")
    owners = [
        d.metadata["Name"]
        for d in metadata.distributions()
        if any(e.group == "console_scripts" and e.name == "rtdetr" for e in d.entry_points)
    ]
    if foreign or len(set(owners)) > 1:
        yield Check(
            "name clash",
            "fail" if "rtdetr" in owners else "warn",
            f"the package rtdetr {foreign} is installed too",
            "pip uninstall rtdetr, or call this one as: python -m rtdetr_cli",
        )
    else:
        yield Check("name clash", "ok", f"none; rtdetr is {program}" if program else "none; rtdetr is not on the PATH")


def _processor() -> Iterator[Check]:
    flags = ""
    with contextlib.suppress(OSError):  # not a Linux: the extensions stay unnamed
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    extensions = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "avx2": "AVX2"}
    wide = [name for flag, name in extensions.items() if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("processor", "ok", f"{cores} cores" + (f", {', '.join(wide)}" if wide else ""))


def _cuda() -> Iterator[Check]:
    if util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Check(
            "gpu",
            "none",
            "none that torch can use" + ("" if built else "; this torch was built without CUDA"),
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16, fp16 with scaling is used"
        yield Check(
            f"gpu {index}", "ok", f"{properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {bf16}"
        )


def _providers() -> Iterator[Check]:
    if util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    names = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    yield Check("onnxruntime runs on", "ok", ", ".join(names))


def _memory() -> Iterator[Check]:
    import psutil

    from rtdetr_cli.machine import free_bytes

    total, free = psutil.virtual_memory().total, free_bytes(None)
    low = free < 2 * 2**30
    yield Check(
        "memory",
        "warn" if low else "ok",
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        "less than 2 GiB is free: close something, or train with --batch 1 --workers 0" if low else "",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        low = free < 256 * 2**20
        yield Check(
            "shared memory",
            "warn" if low else "ok",
            f"{free / 2**30:.1f} GiB free in /dev/shm",
            "loader workers pass images through it: start the container with --shm-size=2g, or train with --workers 0"
            if low
            else "",
        )


def _disk(out: Path) -> Iterator[Check]:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    low = free < 2 * 2**30
    yield Check(
        "disk",
        "fail" if not writable else "warn" if low else "ok",
        f"{free / 2**30:.1f} GiB free under {folder}" + ("" if writable else ", not writable"),
        "an r18 run keeps about 0.6 GiB (best.safetensors and two checkpoints)" if low else "",
    )

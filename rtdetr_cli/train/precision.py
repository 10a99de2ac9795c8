"""Which arithmetic the network runs in. Matching, losses, master weights and the moving average stay float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rtdetr_cli.errors import EnvironmentProblem

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Precision:
    """The arithmetic chosen: `fp32`, `bf16` or `fp16`, its torch type (None for float32), and the reason."""

    name: str
    dtype: torch.dtype | None
    reason: str


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """Turn `auto`, `fp32`, `bf16` or `fp16` into what a device can do.

    Raises:
        EnvironmentProblem: float16 on a CPU, where neither scaling nor speed is to be had.
    """
    if wanted == "auto":
        name, reason = _best(device)
    else:
        name, reason = wanted, "--precision"
    if name == "fp16" and device.type != "cuda":
        raise EnvironmentProblem(
            f"--precision fp16 needs a CUDA device, not {device.type}",
            hint="--precision bf16 or fp32",
            code="precision",
        )
    return Precision(name, DTYPES[name], reason)


def _best(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return "bf16", "native on this GPU"
        return "fp16", "this GPU has no bf16; with loss scaling"
    if device.type == "cpu" and (found := _cpu_bf16()):
        return "bf16", f"native: {found}"
    return "fp32", f"no native bf16 on this {device.type}"


def _cpu_bf16() -> str:
    """Return the instructions that multiply bf16 on this processor, or an empty string."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return "AMX" if "amx_bf16" in flags else "AVX512-BF16" if "avx512_bf16" in flags else ""

"""Which arithmetic the network runs in. Matching, losses, master weights and the moving average stay float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.machine import cpu_flags

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Precision:
    """The chosen arithmetic: `fp32`, `bf16` or `fp16`, its torch type (None for float32), and the reason."""

    name: str
    dtype: torch.dtype | None
    reason: str


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """Turn `auto`, `fp32`, `bf16` or `fp16` into what a device can do.

    Raises:
        EnvironmentProblem: float16 without CUDA: there is no loss scaling, and it would not be faster.
    """
    name, reason = _best(device) if wanted == "auto" else (wanted, "--precision")
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
    if device.type == "cpu":
        for flag, instructions in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
            if flag in cpu_flags():
                return "bf16", f"native: {instructions}"
    return "fp32", f"no native bf16 on this {device.type}"

"""The precision that is chosen on each kind of machine."""

from __future__ import annotations

import pytest
import torch

from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.train import precision
from rtdetr_cli.train.precision import choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "capability", "instructions", "name"),
    [
        (GPU, (8, 0), "", "bf16"),  # Ampere and later
        (GPU, (9, 0), "", "bf16"),
        (GPU, (7, 5), "amx_bf16", "fp16"),  # the processor does not matter
        (GPU, (6, 1), "", "fp16"),
        (CPU, (9, 0), "amx_bf16", "bf16"),
        (CPU, (9, 0), "avx512_bf16", "bf16"),
        (CPU, (9, 0), "", "fp32"),
        (torch.device("mps"), (9, 0), "amx_bf16", "fp32"),
    ],
)
def test_auto(
    device: torch.device, capability: tuple[int, int], instructions: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision, "cpu_flags", lambda: {instructions})
    chosen = choose_precision("auto", device)
    assert chosen.name == name
    assert chosen.dtype == precision.DTYPES[name]
    assert chosen.reason


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_float16_needs_a_gpu(device: torch.device) -> None:
    with pytest.raises(EnvironmentProblem, match="--precision fp16 needs a CUDA device"):
        choose_precision("fp16", device)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_requested_precision_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_flags", set)
    assert choose_precision(name, CPU) == precision.Precision(name, precision.DTYPES[name], "--precision")

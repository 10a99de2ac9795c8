"""A very small run, which takes about a second: its settings, and a comparison of what two of them leave."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, object] = {
    "width": 8,
    "hidden_dim": 16,
    "encoder_ffn": 16,
    "heads": 2,
    "decoder_dim": 16,
    "decoder_ffn": 16,
    "decoder_layers": 2,
    "eval_layers": 2,
    "num_points": "[1,1,1]",
    "queries": 12,
    "denoising": 8,
}
SETS = (*(f"model.{name}={value}" for name, value in SIZES.items()), "plots=false")
FLAGS = (
    *("--preset", "tiny", "--imgsz", "64", "--effective-batch", "8", "--workers", "0", "--device", "cpu"),
    *(word for one in SETS for word in ("--set", one)),
)


def equal(a: Any, b: Any) -> bool:
    """Compare two states with tensors bit for bit."""
    import torch

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)

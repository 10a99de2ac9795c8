"""What a tensor in a model file may be, and the identity of a model: a hash of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from rtdetr_cli.documents import shown
from rtdetr_cli.errors import ModelError

MAX_BYTES = 1 << 30
"""Of one tensor; the largest preset has half of that in all."""

_TYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def check_tensors(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse tensors that are not plain arrays of numbers.

    Raises:
        ModelError: one is sparse, without data, of an unsupported type, or too large.
    """
    for name, tensor in tensors.items():
        problem = ""
        if tensor.dtype not in _TYPE_NAMES:
            problem = f"has the unsupported type {str(tensor.dtype).removeprefix('torch.')}"
        elif tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            problem = "is not a plain array"
        elif tensor.nbytes > MAX_BYTES:  # a small file can hold a tensor that repeats one number
            problem = "is too large"
        if problem:
            raise ModelError(f"{source} cannot be loaded: {shown(name)} {problem}", code="model-damaged")


def tensors_identity(tensors: Mapping[str, Tensor]) -> str:
    """Return the identity of a model: the sha256 of its CPU tensors' names, types, shapes and bytes.

    It does not cover the header, so new thresholds do not make a new model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{_TYPE_NAMES[tensor.dtype]}\0{','.join(map(str, tensor.shape))}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

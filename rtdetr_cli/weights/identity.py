"""The identity of a model: a hash of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_TYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def tensors_identity(tensors: Mapping[str, Tensor]) -> str:
    """Return the identity of a model: the sha256 of its CPU tensors' names, types, shapes and bytes.

    It does not cover the header, so new thresholds do not make a new model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{_TYPE_NAMES[tensor.dtype]}\0{','.join(map(str, tensor.shape))}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

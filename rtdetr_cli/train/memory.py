"""Fitting a step into memory: cutting the effective batch into micro-batches, and finding how large they may be.

The loss normalizer and the denoising noise belong to the effective batch, so cutting it changes the gradient by
rounding only. (With batch norms that are trained, it also changes what they average over.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.machine import free_bytes as host_free_bytes

# The rest of the free memory is left for the loader, the evaluation and fragmentation.
SHARE_OF_FREE = 0.6
# Peak bytes of forward and backward over bytes saved for backward, measured with every preset.
PEAK_OVER_SAVED = 1.6


def micro_batches(total: int, micro: int) -> list[slice]:
    """Cut `total` rows into slices of at most `micro` rows, as evenly as possible."""
    parts = np.array_split(np.arange(total), -(-total // max(1, micro)))
    return [slice(int(rows[0]), int(rows[-1]) + 1) for rows in parts]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def halve(micro: int, *, where: str) -> int:
    """Return half the micro-batch, rounded up.

    Raises:
        RtdetrError: it is one image already.
    """
    if micro <= 1:
        raise RtdetrError(
            f"one image does not fit into the memory of {where}",
            hint="use a smaller --imgsz, --freeze backbone, or a smaller preset",
            code="out-of-memory",
        )
    return -(-micro // 2)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host_free_bytes(None)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory on a CUDA device, or the resident memory of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def saved_bytes(forward: Callable[[], object]) -> int:
    """Return the bytes that one forward pass saves for its backward pass; parameters are not counted."""
    bytes_by_address: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            bytes_by_address[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = forward()  # kept alive, so that no address is used twice
    del outputs
    return sum(bytes_by_address.values())


def fitting_micro_batch(
    effective: int, *, bytes_for_one: int, free: int, attempt: Callable[[int], None] | None = None, where: str = ""
) -> int:
    """Return the largest micro-batch that fits.

    Args:
        effective: the effective batch, an upper bound.
        bytes_for_one: bytes that one image saves for its backward pass, at the largest scale.
        free: bytes free on the device.
        attempt: runs the largest step of so many images, and raises an out-of-memory error if it does not fit. None on
            a CPU, where the kernel kills a process that takes too much instead of refusing the allocation.
        where: the device, for the error.
    """
    room = SHARE_OF_FREE * free / (PEAK_OVER_SAVED * max(1, bytes_for_one))
    micro = max(1, min(effective, int(room)))
    # Only the number of passes counts: 16 images in passes of at most 5 take 4 passes, as do passes of 4.
    micro = -(-effective // -(-effective // micro))
    while attempt is not None:
        try:
            attempt(micro)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            micro = halve(micro, where=where)
    return micro

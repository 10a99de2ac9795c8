"""Fitting a step into memory: cutting the effective batch into micro-batches, and finding how large they may be.

The effective batch is what the mathematics sees: loss normaliser, denoising plan and noise belong to it, so that
cutting it changes the gradient by rounding only (with live batch norms it also changes what they average over).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.machine import free_bytes as host_free_bytes

# Of what is free: the rest is left for the loader, the evaluation and fragmentation.
SHARE_OF_FREE = 0.6
# Bytes at the peak of forward and backward over bytes saved for backward, seen with every preset.
PEAK_OVER_SAVED = 1.6


def micro_batches(total: int, micro: int) -> list[slice]:
    """Cut `total` rows into slices of at most `micro`, as even as can be."""
    parts = -(-total // max(1, micro))
    base, more = divmod(total, parts)
    slices, start = [], 0
    for part in range(parts):
        stop = start + base + (part < more)
        slices.append(slice(start, stop))
        start = stop
    return slices


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on whatever device, from every other error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in said or "can't allocate memory" in said or "cannot allocate memory" in said
    )


def halve(micro: int, *, where: str) -> int:
    """Return half the micro-batch.

    Raises:
        RtdetrError: it is one image already.
    """
    if micro <= 1:
        raise _too_small(where)
    return -(-micro // 2)


@contextmanager
def one_image(*, where: str) -> Iterator[None]:
    """Do something with a single image.

    Raises:
        RtdetrError: it does not fit.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _too_small(where) from error


def _too_small(where: str) -> RtdetrError:
    return RtdetrError(
        f"one image does not fit into the memory of {where}",
        hint="a smaller --imgsz, --freeze backbone, or a smaller preset",
        code="out-of-memory",
    )


def release(device: torch.device) -> None:
    """Give back what the allocator keeps, after an error."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a training step may still take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_free_bytes(None)


def saved_bytes(forward: Callable[[], object]) -> int:
    """Return the bytes that one forward pass keeps for its backward pass; parameters are not counted."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = forward()
    del kept
    return sum(seen.values())


def fitting_micro_batch(
    effective: int, *, bytes_for_one: int, free: int, attempt: Callable[[int], None] | None = None, where: str = ""
) -> int:
    """Return the largest micro-batch that fits.

    Args:
        effective: the effective batch, which is never exceeded.
        bytes_for_one: what one image keeps for its backward pass, at the largest scale.
        free: bytes free on the device.
        attempt: runs a worst-case step of so many images; raises an out-of-memory error if it does not fit. On a
            CPU there is none: the kernel ends a process that asks for too much, it does not say no.
        where: the device, for the error.
    """
    room = SHARE_OF_FREE * free / (PEAK_OVER_SAVED * max(1, bytes_for_one))
    micro = max(1, min(effective, int(room)))
    # 16 as 6+5+5 takes as many passes as 8+8 takes fewer: only the number of passes counts.
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


def peak_bytes(device: torch.device) -> int:
    """Return the peak of memory on a CUDA device, or this process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)

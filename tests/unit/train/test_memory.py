"""Cutting the effective batch into micro-batches, and finding the largest that fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.train.memory import fitting_micro_batch, halve, is_out_of_memory, micro_batches, saved_bytes


@pytest.mark.parametrize(
    ("total", "micro", "sizes"),
    [(16, 16, [16]), (16, 8, [8, 8]), (16, 6, [6, 5, 5]), (16, 1, [1] * 16), (3, 8, [3]), (7, 2, [2, 2, 2, 1])],
)
def test_micro_batches_are_even_and_cover_the_batch(total: int, micro: int, sizes: list[int]) -> None:
    rows = micro_batches(total, micro)
    assert [r.stop - r.start for r in rows] == sizes
    assert [i for r in rows for i in range(total)[r]] == list(range(total))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, full: bool) -> None:
    assert is_out_of_memory(error) is full


def test_a_failed_allocation_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_halving_ends_with_an_error_at_one_image() -> None:
    sizes = [16]
    while sizes[-1] > 1:
        sizes.append(halve(sizes[-1], where="cpu"))
    assert sizes == [16, 8, 4, 2, 1]
    with pytest.raises(RtdetrError, match="one image does not fit") as caught:
        halve(1, where="cuda:0")
    assert caught.value.exit_code == 1
    assert "--imgsz" in caught.value.hint


def test_saved_bytes_counts_each_tensor_once() -> None:
    layer = nn.Linear(100, 100, bias=False)
    x = torch.randn(50, 100, requires_grad=True)
    # x is saved by the product, the output by relu and by the square: two tensors of 20,000 bytes.
    assert saved_bytes(lambda: layer(x).relu().square()) == 2 * 50 * 100 * 4


def test_the_micro_batch_that_fits() -> None:
    gib = 2**30
    assert fitting_micro_batch(16, bytes_for_one=gib // 100, free=80 * gib) == 16
    assert fitting_micro_batch(16, bytes_for_one=gib, free=15 * gib) == 4, "5 fit, but 4 take no more passes"
    assert fitting_micro_batch(16, bytes_for_one=100 * gib, free=gib) == 1


def test_the_estimate_is_tried_and_halved_if_it_does_not_fit() -> None:
    tried = []

    def attempt(micro: int) -> None:
        tried.append(micro)
        if micro > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fitting_micro_batch(16, bytes_for_one=1, free=2**40, attempt=attempt) == 2
    assert tried == [16, 8, 4, 2]


def test_other_errors_of_an_attempt_are_raised() -> None:
    def attempt(micro: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fitting_micro_batch(4, bytes_for_one=1, free=2**40, attempt=attempt)

"""Training batches: uint8 images and their boxes, the same for any number of worker processes.

torch's DataLoader loads the batches of an endless sequence of (epoch, index), so the first batches of an epoch are
loaded while the epoch before it is evaluated. A batch is passed as numpy arrays through a pipe: tensors would need a
file descriptor each, and space in `/dev/shm`, which is small in containers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from rtdetr_cli.batches.cache import ImageCache
from rtdetr_cli.batches.examples import Example, ExampleLoader
from rtdetr_cli.errors import DataError, EnvironmentProblem, RtdetrError
from rtdetr_cli.machine import free_bytes, keep_freed_memory

Position = tuple[int, int]  # epoch, and index of a batch in it


@dataclass(frozen=True)
class Batch:
    """B images with their boxes."""

    images: Tensor  # (B, 3, H, W) uint8 RGB
    boxes_cxcywh: tuple[Tensor, ...]  # B times (N, 4) float32, from 0 to 1
    labels: tuple[Tensor, ...]  # B times (N,) int64, contiguous
    image_indices: tuple[int, ...]  # in the dataset
    replaced: tuple[tuple[int, str], ...] = ()  # unreadable images that others stand in for, and what is wrong


class TrainLoader:
    """Loads any number of epochs in full batches, with persistent worker processes, or in this process with none.

    Args:
        examples: loads one batch; the training loop cuts it into micro-batches.
        workers: number of processes.
        cache: `none`, or `ram` or `disk` to keep decoded images there.
        cache_budget: bytes for the cache; None for half of the free memory or disk space.
        pin_memory: put images into page-locked memory, so that copying them overlaps with the GPU's work.

    Raises:
        DataError: the dataset has no images.
        EnvironmentProblem: the cache is not supported on this system.
        RtdetrError: there is not enough memory.
    """

    def __init__(
        self,
        examples: ExampleLoader,
        *,
        workers: int,
        cache: str = "none",
        cache_budget: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        dataset, batch_size, imgsz = examples.dataset, examples.batch_size, examples.imgsz
        if not len(dataset):
            raise DataError(f"{dataset.name}: the {dataset.split} split has no images to train on")
        batch_bytes = batch_size * 3 * imgsz[0] * imgsz[1]
        if 2 * batch_bytes > free_bytes(None):
            raise RtdetrError(
                f"not enough memory for a batch of {batch_size} images of {imgsz[0]}x{imgsz[1]} "
                f"({batch_bytes / 2**30:.1f} GiB)",
                hint="use a smaller --effective-batch or --imgsz, or fewer --workers",
                code="no-memory",
            )
        self._cache: ImageCache | None = None
        if cache != "none":
            if os.name != "posix":
                raise EnvironmentProblem("the image cache is not supported on this system", hint="--cache none")
            largest = 4 * int(dataset.sizes_wh.astype(np.int64).prod(1).sum())  # 3 channels, at scales 1, 1/2, ...
            regions = max(workers, 1)
            self._cache = ImageCache(len(dataset), kind=cache, regions=regions, budget=cache_budget, largest=largest)
        self._examples = replace(examples, cache=self._cache)
        self._positions = _Positions(len(self))
        self._loader: DataLoader[_Loaded | RtdetrError] | None
        with _any_number_of_workers():
            self._loader = DataLoader(
                _Batches(self._examples),
                sampler=self._positions,
                batch_size=None,
                num_workers=workers,
                worker_init_fn=_prepare_worker if workers else None,
                persistent_workers=workers > 0,
                pin_memory=pin_memory and torch.cuda.is_available(),
                # A forked process starts at once, needs little memory and doesn't run the user's program again.
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
                generator=torch.Generator(),  # each iterator draws a seed for its workers, which nothing uses
            )
        self._stream: Iterator[_Loaded | RtdetrError] | None = None
        self._next: Position | None = None  # what the stream gives next
        self._epochs_begun = 0
        self._failure: RtdetrError | None = None

    def __len__(self) -> int:
        """Return the number of batches in an epoch; every image is used at least once."""
        return len(self._examples)

    def epoch(self, epoch: int, *, start: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch, from index `start` on.

        Raises:
            DataError: too many images in a row cannot be read.
            RtdetrError: a worker process was killed.
        """
        self._epochs_begun += 1
        return self._batches(epoch, start, self._epochs_begun)

    def _batches(self, epoch: int, start: int, number: int) -> Generator[Batch, None, None]:
        for index in range(start, len(self)):
            if number != self._epochs_begun:
                raise RuntimeError("another epoch was begun; call `epoch` again with `start` to continue this one")
            yield self._load((epoch, index))

    def _load(self, position: Position) -> Batch:
        if self._failure is not None:
            raise self._failure
        if self._loader is None:
            raise RuntimeError("the loader has been closed")
        try:
            with _errors_of_workers():
                if self._stream is None or self._next != position:
                    self._stream = self._stream_from(self._loader, position)
                self._next = None
                loaded = next(self._stream)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            self._failure = RtdetrError(
                "a worker process of the loader was killed, most likely because memory ran out",
                hint="use fewer --workers, or --cache none",
                code="loader-killed",
            )
            raise self._failure from error
        if isinstance(loaded, RtdetrError):
            raise loaded
        self._next = self._positions.after(position)
        for example in loaded.examples:
            if example.stored is not None and self._cache is not None:
                self._cache.publish(example.stored)
        return loaded.batch()

    def start(self) -> None:
        """Start the workers and load the first batches of epoch 0, which a resumed run drops.

        A forked process keeps the memory that its parent has at that time, so this comes before there is a network.
        """
        if self._loader is not None:
            with _errors_of_workers():
                self._stream = self._stream_from(self._loader, (0, 0))

    def _stream_from(self, loader: DataLoader[Any], position: Position) -> Iterator[_Loaded | RtdetrError]:
        self._positions.start = self._next = position
        with _any_number_of_workers():
            return iter(loader)

    def close(self) -> None:
        """Stop the workers and free their memory; the loader cannot be used afterwards."""
        self._stream = self._loader = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Positions(Sampler[Position]):
    """The positions of all batches from `start` on, epoch after epoch without end."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.start: Position = (0, 0)

    def after(self, position: Position) -> Position:
        epoch, index = position
        return (epoch, index + 1) if index + 1 < self.batches else (epoch + 1, 0)

    def __iter__(self) -> Iterator[Position]:
        position = self.start
        while True:
            yield position
            position = self.after(position)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A batch on its way from a worker; the DataLoader calls `pin_memory`, and leaves an unknown type as it is."""

    images: NDArray[np.uint8] | Tensor
    examples: list[Example]

    def pin_memory(self) -> _Loaded:
        return _Loaded(torch.as_tensor(self.images).pin_memory(), self.examples)

    def batch(self) -> Batch:
        return Batch(
            torch.as_tensor(self.images),
            tuple(torch.from_numpy(example.boxes_cxcywh) for example in self.examples),
            tuple(torch.from_numpy(example.labels) for example in self.examples),
            tuple(example.image for example in self.examples),
            tuple(replaced for example in self.examples for replaced in example.replaced),
        )


class _Batches(Dataset["_Loaded | RtdetrError"]):
    """Batches by position; an error is returned, since the DataLoader would lose its hint."""

    def __init__(self, examples: ExampleLoader) -> None:
        self.examples = examples

    def __getitem__(self, position: Position) -> _Loaded | RtdetrError:
        try:
            return _Loaded(*self.examples.load(*position))
        except RtdetrError as error:
            return error


def _prepare_worker(number: int) -> None:
    """Set up a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which stops its workers
    warnings.simplefilter("ignore")  # `rtdetr validate` reports problems of images
    import cv2

    cv2.setNumThreads(0)  # one core per worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    keep_freed_memory()
    worker = get_worker_info()
    assert worker is not None
    assert isinstance(worker.dataset, _Batches)
    if worker.dataset.examples.cache is not None:
        worker.dataset.examples.cache.region = number


def _exit_with_parent() -> None:
    """Wait for the end of the training process; torch's own check would still wait for somebody to read the results."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """Keep torch from warning about more workers than cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


@contextlib.contextmanager
def _errors_of_workers() -> Iterator[None]:
    """Raise an error at once when a worker ends within this block, and only then.

    torch's handler of SIGCHLD, which this replaces, raises it anywhere: perhaps in the middle of saving a checkpoint,
    when the system shuts down. Without a handler, this process could wait forever for the rest of a batch.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, lambda number, frame: _error_if_any_worker_fails())
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)

"""Training batches: uint8 images and their boxes, the same for any number of worker processes.

Every random draw depends on (seed, epoch, position in the epoch), so a batch depends only on (seed, epoch, index), not
on the number of workers, on how many ranks share it, or on what was loaded before. A resumed run gets the same batches.

The worker processes (see `worker`) are not torch's: each batch is divided among all of them, so that the first batch
of an epoch is ready sooner and few batches need to be in progress, and pixels are passed in one fixed block of shared
memory instead of one file descriptor per tensor.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtdetr_cli.batches.cache import ImageCache, SharedBlock, SharedRecords
from rtdetr_cli.batches.worker import Example, ExampleLoader, Result, Task, WorkerSetup, epoch_order, send
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, EnvironmentProblem, RtdetrError
from rtdetr_cli.images.augment import Augmentation
from rtdetr_cli.machine import free_bytes

_WORKER_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rtdetr_cli.batches.worker import main; main()"
)
_EXIT_TIMEOUT_S = 5.0
CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # By default the C library maps and unmaps the megabytes of every image, and a quarter of the time is spent on
    # clearing pages in the kernel. With these settings it keeps up to this much memory for the next image.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
"""Environment variables that are added for the workers; glibc reads them at startup, other systems ignore them."""


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

    Step k uses the images from `k * batch_size * world_size` on in the epoch's order, and each rank a contiguous part
    of them: together the ranks see the batch of a single process. Crowd boxes are left out.

    Args:
        batch_size: images of this rank per optimizer step; the training loop cuts them into micro-batches.
        cache: `none`, or `ram` or `disk` to keep decoded images there.
        cache_budget: bytes for the cache; None for half of the free memory or disk space.
        pin_memory: put images into page-locked memory, so that copying them overlaps with the GPU's work.

    Raises:
        DataError: the dataset has no images.
        EnvironmentProblem: worker processes are not supported on this system.
        RtdetrError: there is not enough memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        imgsz: tuple[int, int],
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        workers: int,
        cache: str = "none",
        cache_budget: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if not len(dataset):
            raise DataError(f"{dataset.name}: the {dataset.split} split has no images to train on")
        if workers and os.name != "posix":
            raise EnvironmentProblem("worker processes need a POSIX system", hint="--workers 0")
        self._images, self._batch, self._seed = len(dataset), batch_size, seed
        self._rank, self._world = rank, world_size
        self._pin = pin_memory and torch.cuda.is_available()
        self._shape = (batch_size, 3, *imgsz)
        batch_bytes = math.prod(self._shape)
        if 2 * batch_bytes > free_bytes(None):
            raise _no_memory(f"a batch of {batch_size} images of {imgsz[0]}x{imgsz[1]}", batch_bytes)
        records = SharedRecords(dataset)
        self._cache: ImageCache | None = None
        if cache != "none":
            largest = 4 * int(dataset.sizes_wh.astype(np.int64).prod(1).sum())  # 3 channels, at scales 1, 1/2, ...
            regions = max(workers, 1)
            self._cache = ImageCache(len(dataset), kind=cache, regions=regions, budget=cache_budget, largest=largest)
        self._examples = ExampleLoader(records, augmentation, seed, self._cache)
        self._pool = _WorkerPool(records, augmentation, seed, self._shape, self._cache, workers) if workers else None

    def __len__(self) -> int:
        """Return the number of batches in an epoch; every image is used at least once."""
        return math.ceil(self._images / (self._batch * self._world))

    def epoch(self, epoch: int, *, strong: bool, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from index `start` on.

        The order and the augmentation depend on the number of the `epoch`; `strong` switches the strong augmentations.

        Raises:
            DataError: too many images in a row cannot be read.
            RtdetrError: a worker process was killed.
        """
        tasks = (self._task(epoch, index, strong=strong) for index in range(start, len(self)))
        if self._pool is None:
            return map(self._load, tasks)
        return self._load_in_workers(self._pool, tasks)

    def close(self) -> None:
        """Stop the workers and free their memory; the loader cannot be used afterwards."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _task(self, epoch: int, index: int, *, strong: bool) -> Task:
        """Return this rank's part of a batch as one task."""
        first = (index * self._world + self._rank) * self._batch
        positions = range(first, first + self._batch)
        order = epoch_order(self._seed, epoch, self._images)
        # The last batch is filled up from the start of the same order.
        images = tuple(int(order[p % self._images]) for p in positions)
        return Task(0, 0, epoch, strong, tuple(range(self._batch)), tuple(positions), images)

    def _load(self, task: Task) -> Batch:
        """Load a batch in this process."""
        images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pin)
        examples = self._examples.load(task, images.numpy())
        for example in examples:
            if example.stored is not None and self._cache is not None:
                self._cache.publish(example.stored)
        return _batch(images, examples)

    def _load_in_workers(self, pool: _WorkerPool, tasks: Iterator[Task]) -> Iterator[Batch]:
        epoch = pool.begin_epoch()
        for task in tasks:
            pool.submit(task)
            if pool.full:
                break
        while pool.pending:
            pixels, examples = pool.collect()
            images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pin)
            images.numpy()[...] = pixels
            following = next(tasks, None)
            if following is not None:
                pool.submit(following)
            yield _batch(images, examples)
            if pool.epochs_begun != epoch:
                raise RuntimeError("another epoch was begun; call `epoch` again with `start` to continue this one")


def _batch(images: Tensor, examples: list[Example]) -> Batch:
    return Batch(
        images,
        tuple(torch.from_numpy(example.boxes_cxcywh) for example in examples),
        tuple(torch.from_numpy(example.labels) for example in examples),
        tuple(example.image for example in examples),
        tuple(replaced for example in examples for replaced in example.replaced),
    )


@dataclass
class _Pending:
    """A batch in progress: the slot of its pixels, its examples once loaded, and how many tasks have not returned."""

    slot: int
    examples: list[Example | None]
    parts_left: int
    failure: Exception | None = None


def _no_memory(purpose: str, size: int) -> RtdetrError:
    return RtdetrError(
        f"not enough memory for {purpose} ({size / 2**30:.1f} GiB)",
        hint="use a smaller --effective-batch or --imgsz, or fewer --workers",
        code="no-memory",
    )


class _WorkerPool:
    """Worker processes that load each batch together, and the batches in progress."""

    def __init__(
        self,
        records: SharedRecords,
        augmentation: Augmentation,
        seed: int,
        shape: tuple[int, int, int, int],
        cache: ImageCache | None,
        workers: int,
    ) -> None:
        # Enough batches that every worker always has a next image, and at least two for steps of uneven duration.
        depth = max(2, -(-3 * workers // shape[0]))
        self._shape = (depth, *shape)
        slots = SharedBlock(int(np.prod(self._shape)))
        if not slots.reserve(0, slots.size):
            raise _no_memory(f"{depth} batches of {shape[0]} images in progress", slots.size)
        self._slots = slots.array(np.uint8, self._shape)
        self._free = deque(range(depth))
        self._cache = cache
        self._next_worker = itertools.cycle(range(workers))
        self._next_ticket = itertools.count()
        self._tickets: dict[int, tuple[_Pending, tuple[int, ...]]] = {}
        self._death: RtdetrError | None = None
        self.epochs_begun = 0
        self.pending: deque[_Pending] = deque()
        self._results: queue.SimpleQueue[tuple[int, Result | None]] = queue.SimpleQueue()
        blocks = [records.block, slots, *(cache.blocks if cache is not None else ())]
        self._children: list[subprocess.Popen[bytes]] = []
        threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _terminate, self._children, threads)
        environment = os.environ | CHILD_ENVIRONMENT
        for number in range(workers):
            child = subprocess.Popen(
                [sys.executable, "-c", _WORKER_CODE, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                pass_fds=[block.fd for block in blocks],
                start_new_session=True,  # so that Ctrl-C reaches the training process only
            )
            self._children.append(child)
            thread = threading.Thread(target=_listen, args=(number, child, self._results), daemon=True)
            thread.start()
            threads.append(thread)
        for number in range(workers):
            self._send(number, WorkerSetup(records, augmentation, seed, slots, self._shape, cache, number))

    @property
    def full(self) -> bool:
        """Whether no more batches can be in progress."""
        return not self._free

    def submit(self, batch: Task) -> None:
        """Divide a batch among the workers."""
        slot = self._free.popleft()
        size = len(batch.rows)
        parts = min(size, len(self._children))
        pending = _Pending(slot, [None] * size, parts)
        self.pending.append(pending)
        for number in range(parts):
            part = slice(size * number // parts, size * (number + 1) // parts)
            ticket = next(self._next_ticket)
            rows, positions, images = batch.rows[part], batch.positions[part], batch.images[part]
            self._tickets[ticket] = (pending, rows)
            self._send(next(self._next_worker), Task(ticket, slot, batch.epoch, batch.strong, rows, positions, images))

    def collect(self) -> tuple[NDArray[np.uint8], list[Example]]:
        """Wait for the oldest batch; its pixels are valid until the next `submit`."""
        oldest = self.pending[0]
        while oldest.parts_left:
            self._receive()
        self.pending.popleft()
        self._free.append(oldest.slot)
        if oldest.failure is not None:
            raise oldest.failure
        return self._slots[oldest.slot], [example for example in oldest.examples if example is not None]

    def begin_epoch(self) -> int:
        """Discard what is left of an earlier epoch; return the number of epochs begun so far."""
        while self.pending:
            while self.pending[0].parts_left:
                self._receive()
            self._free.append(self.pending.popleft().slot)
        self.epochs_begun += 1
        return self.epochs_begun

    def close(self) -> None:
        """Stop the workers."""
        self._finalizer()

    def _send(self, number: int, value: Any) -> None:
        try:
            send(_pipe(self._children[number].stdin), value)
        except BrokenPipeError:
            raise self._death_of(number) from None
        except ValueError:
            raise RuntimeError("the loader has been closed") from None

    def _receive(self) -> None:
        """Wait for one result and add it to its batch."""
        if self._death is not None:
            raise self._death
        number, result = self._results.get()
        if result is None:
            raise self._death_of(number)
        pending, rows = self._tickets.pop(result.ticket)
        pending.parts_left -= 1
        pending.failure = result.failure or pending.failure
        for row, example in zip(rows, result.examples, strict=False):
            pending.examples[row] = example
            if example.stored is not None and self._cache is not None:
                self._cache.publish(example.stored)

    def _death_of(self, number: int) -> RtdetrError:
        """Return why a worker ended."""
        child = self._children[number]
        try:
            status = child.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it is alive, but sends data that cannot be read
            child.kill()
            status = child.wait()
        if status == -signal.SIGKILL:
            message = f"worker process {number} was killed, most likely because memory ran out"
        else:
            message = f"worker process {number} ended with status {status}"
        self._death = RtdetrError(message, hint="use fewer --workers, or --cache none", code="loader-killed")
        return self._death


def _listen(number: int, child: subprocess.Popen[bytes], results: queue.SimpleQueue[tuple[int, Result | None]]) -> None:
    """Pass on the results of a worker, and None at its end."""
    try:
        with contextlib.suppress(EOFError, OSError, ValueError, pickle.UnpicklingError):
            while True:
                results.put((number, pickle.load(_pipe(child.stdout))))
    finally:  # whatever happened, nothing must wait for a result that will not come
        results.put((number, None))


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("not a pipe")
    return stream


def _terminate(children: list[subprocess.Popen[bytes]], threads: list[threading.Thread]) -> None:
    """Stop the workers, whatever they are doing: they hold no data that could be lost."""
    for child in children:
        with contextlib.suppress(OSError):
            _pipe(child.stdin).close()
        child.terminate()
    for child in children:
        try:
            child.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for thread in threads:
        thread.join(_EXIT_TIMEOUT_S)
    for child in children:
        _pipe(child.stdout).close()

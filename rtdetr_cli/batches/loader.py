"""Batches for training: uint8 images and their boxes, the same whatever the number of processes.

Every draw is made from (seed, epoch, position in the epoch), so a batch depends on (seed, epoch, index) only: not on
the number of workers, not on how many ranks share it, not on what was loaded before. That makes a resumed run see
what the interrupted one would have.

The processes are our own (see `worker`), not torch's: each batch is divided among all of them, so the first batch of
an epoch takes a share of the time and few batches need to be under way, and pixels travel in one fixed block of
shared memory instead of a file descriptor for each tensor.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
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

from rtdetr_cli.batches.cache import CACHES, ImageCache, SharedBlock, SharedRecords
from rtdetr_cli.batches.worker import Answer, Maker, Row, Setup, Task, order_of, receive, send
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, EnvironmentProblem, RtdetrError, UsageError
from rtdetr_cli.images.augment import Augmentation
from rtdetr_cli.machine import free_bytes

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rtdetr_cli.batches.worker import main; main()"
_GOODBYE_S = 5.0
CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Images come and go by the megabyte. Left alone, the C library maps and unmaps each of them, and a quarter of
    # the time goes to the kernel's clearing of pages; so it keeps up to this much for the next one.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
"""What the processes' environment has besides ours; glibc reads it when they start, others ignore it."""


@dataclass(frozen=True)
class Batch:
    """B images with their boxes.

    Attributes:
        images: (B, 3, H, W) uint8 RGB.
        boxes_cxcywh: B tensors (N, 4) float32, shares of the sides, 0 to 1.
        labels: B tensors (N,) int64, contiguous.
        image_indices: B positions in the dataset.
        replaced: images that could not be read, as (position in the dataset, what is wrong with it); another
            image stands in for each.
    """

    images: Tensor
    boxes_cxcywh: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    image_indices: tuple[int, ...]
    replaced: tuple[tuple[int, str], ...] = ()


class TrainLoader:
    """Endless epochs of full batches, made by persistent processes.

    Args:
        dataset: what to train on; crowds are left out.
        imgsz: height and width of the network's input.
        batch_size: images of this rank in a step (the effective batch; micro-batches are cut by the loop).
        seed: of the order and of every augmentation.
        augmentation: from `load_augmentation`.
        workers: processes; 0 makes the images in this one.
        cache: `none`, or keep decoded images in `ram` or on `disk`.
        cache_budget: bytes for the cache; None for half of the free memory or disk.
        rank, world_size: step k takes images `k * batch_size * world_size` onward of the epoch's order, and each
            rank its contiguous share: together the ranks see what one process with the whole batch would.
        pin_memory: put images into page-locked memory, for copies that overlap with the GPU's work.

    Raises:
        DataError: a dataset without images.
        UsageError: an unknown cache or a size that makes no sense.
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
        if cache not in CACHES:
            raise UsageError(f"--cache {cache!r} is none of {', '.join(CACHES)}")
        if batch_size < 1 or workers < 0 or not 0 <= rank < world_size:
            raise UsageError(f"no loader has batch {batch_size}, {workers} workers and rank {rank} of {world_size}")
        if workers and os.name != "posix":
            raise EnvironmentProblem("loader processes need a POSIX system", hint="--workers 0")
        self._images = len(dataset)
        self._batch = batch_size
        self._seed = seed
        self._rank = rank
        self._world = world_size
        self._pin = pin_memory and torch.cuda.is_available()
        self._shape = (batch_size, 3, *imgsz)
        wanted = math.prod(self._shape)
        if 2 * wanted > free_bytes(None):
            raise _no_memory(f"a batch of {batch_size} images of {imgsz[0]}x{imgsz[1]}", wanted)
        self._known_order: tuple[int, NDArray[np.int64]] | None = None
        records = SharedRecords(dataset)
        self.cache = (
            ImageCache(
                len(dataset),
                kind=cache,
                regions=max(workers, 1),
                budget=cache_budget,
                largest=4 * int(dataset.sizes_wh.astype(np.int64).prod(1).sum()),  # 3 channels, at 1 and 1/2 and...
            )
            if cache != "none"
            else None
        )
        self._maker = Maker(records, augmentation, seed, self.cache)
        self._pool = _Pool(records, augmentation, seed, self._shape, self.cache, workers) if workers else None

    def __len__(self) -> int:
        """Batches in an epoch: every image comes at least once."""
        return math.ceil(self._images / (self._batch * self._world))

    def epoch(self, epoch: int, *, strong: bool, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `start` on.

        Args:
            epoch: any number; it chooses the order and the augmentation.
            strong: whether the strong operations are on.
            start: first batch, to resume inside an epoch.

        Raises:
            DataError: many images in a row cannot be read.
            RtdetrError: a loader process was killed.
        """
        jobs = (self._job(epoch, index, strong=strong) for index in range(start, len(self)))
        if self._pool is None:
            return map(self._make, jobs)
        return self._pooled(self._pool, jobs)

    def close(self) -> None:
        """End the processes and give their memory back; the loader cannot be used afterwards."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _job(self, epoch: int, index: int, *, strong: bool) -> Task:
        """Return the whole of this rank's batch as one task."""
        first = (index * self._world + self._rank) * self._batch
        positions = range(first, first + self._batch)
        order = self._order(epoch)
        # The last batch is filled from the start of the same order.
        images = tuple(int(order[p % self._images]) for p in positions)
        return Task(0, 0, epoch, strong, tuple(range(self._batch)), tuple(positions), images)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._known_order is None or self._known_order[0] != epoch:
            self._known_order = (epoch, order_of(self._seed, epoch, self._images))
        return self._known_order[1]

    def _make(self, job: Task) -> Batch:
        """Make a batch in this process."""
        images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pin)
        pixels = images.numpy()
        rows = []
        for at, position, image in zip(job.rows, job.positions, job.images, strict=True):
            row = self._maker.make(image, position, job.epoch, strong=job.strong, out=pixels[at])
            if row.stored is not None and self.cache is not None:
                self.cache.publish(row.stored)
            rows.append(row)
        return _batch(images, rows)

    def _pooled(self, pool: _Pool, jobs: Iterator[Task]) -> Iterator[Batch]:
        turn = pool.begin()
        for job in jobs:
            pool.submit(job)
            if pool.full:
                break
        while pool.pending:
            pixels, rows = pool.collect()
            images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pin)
            images.numpy()[...] = pixels
            following = next(jobs, None)
            if following is not None:
                pool.submit(following)
            yield _batch(images, rows)
            if pool.turn != turn:
                raise RuntimeError("this epoch was left for another one; begin it again with `start`")


def _batch(images: Tensor, rows: list[Row]) -> Batch:
    return Batch(
        images,
        tuple(torch.from_numpy(row.boxes_cxcywh) for row in rows),
        tuple(torch.from_numpy(row.labels) for row in rows),
        tuple(row.image for row in rows),
        tuple(bad for row in rows for bad in row.replaced),
    )


@dataclass
class _Pending:
    """A batch under way: its slot, its rows so far, and how many parts are still out."""

    slot: int
    rows: list[Row | None]
    parts: int
    failure: Exception | None = None


def _no_memory(what: str, wanted: int) -> RtdetrError:
    return RtdetrError(
        f"no memory for {what} ({wanted / 2**30:.1f} GiB)",
        hint="a smaller --effective-batch or --imgsz, or fewer --workers",
        code="no-memory",
    )


class _Pool:
    """Processes that share the making of each batch, and the batches under way."""

    def __init__(
        self,
        records: SharedRecords,
        augmentation: Augmentation,
        seed: int,
        shape: tuple[int, int, int, int],
        cache: ImageCache | None,
        workers: int,
    ) -> None:
        # Enough under way that every process always has a next image, and two batches for uneven steps.
        depth = max(2, -(-3 * workers // shape[0]))
        self._shape = (depth, *shape)
        slots = SharedBlock(int(np.prod(self._shape)))
        if not slots.reserve(0, slots.size):
            raise _no_memory(f"{depth} batches of {shape[0]} images under way", slots.size)
        self._slots = slots.array(np.uint8, self._shape)
        self._free = deque(range(depth))
        self._cache = cache
        self._next_worker = 0
        self._next_ticket = 0
        self._tickets: dict[int, tuple[_Pending, tuple[int, ...]]] = {}
        self._death: RtdetrError | None = None
        self.turn = 0
        self.pending: deque[_Pending] = deque()
        self._answers: queue.SimpleQueue[tuple[int, Answer | None]] = queue.SimpleQueue()
        blocks = [records.block, slots, *(cache.blocks if cache is not None else ())]
        self._children: list[subprocess.Popen[bytes]] = []
        threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _end, self._children, threads)
        environment = os.environ | CHILD_ENVIRONMENT
        for number in range(workers):
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                pass_fds=[block.fd for block in blocks],
                start_new_session=True,  # a keystroke for the parent is not for us
            )
            self._children.append(child)
            thread = threading.Thread(target=_listen, args=(number, child, self._answers), daemon=True)
            thread.start()
            threads.append(thread)
        for number in range(workers):
            self._tell(number, Setup(records, augmentation, seed, slots, self._shape, cache, number))

    @property
    def full(self) -> bool:
        """Whether no further batch can be under way."""
        return not self._free

    def submit(self, job: Task) -> None:
        """Divide a batch among the processes."""
        slot = self._free.popleft()
        size = len(job.rows)
        parts = min(size, len(self._children))
        pending = _Pending(slot, [None] * size, parts)
        self.pending.append(pending)
        bounds = [size * part // parts for part in range(parts + 1)]
        for first, last in itertools.pairwise(bounds):
            part = slice(first, last)
            ticket = self._next_ticket
            self._next_ticket += 1
            self._tickets[ticket] = (pending, job.rows[part])
            task = Task(ticket, slot, job.epoch, job.strong, job.rows[part], job.positions[part], job.images[part])
            self._tell(self._next_worker, task)
            self._next_worker = (self._next_worker + 1) % len(self._children)

    def collect(self) -> tuple[NDArray[np.uint8], list[Row]]:
        """Wait for the oldest batch; its pixels are valid until the next `submit`."""
        oldest = self.pending[0]
        while oldest.parts:
            self._take()
        self.pending.popleft()
        self._free.append(oldest.slot)
        if oldest.failure is not None:
            raise oldest.failure
        return self._slots[oldest.slot], [row for row in oldest.rows if row is not None]

    def begin(self) -> int:
        """Wait until nothing of an earlier epoch is under way; return the number of this turn."""
        while self.pending:
            while self.pending[0].parts:
                self._take()
            self._free.append(self.pending.popleft().slot)
        self.turn += 1
        return self.turn

    def close(self) -> None:
        """End the processes."""
        self._finalizer()

    def _tell(self, number: int, value: Any) -> None:
        try:
            send(_pipe(self._children[number].stdin), value)
        except BrokenPipeError:
            raise self._died(number) from None
        except ValueError:
            raise RuntimeError("the loader has been closed") from None

    def _take(self) -> None:
        """Wait for one answer and enter it."""
        if self._death is not None:
            raise self._death
        number, answer = self._answers.get()
        if answer is None:
            raise self._died(number)
        pending, rows = self._tickets.pop(answer.ticket)
        pending.parts -= 1
        if answer.refused is not None:
            message, hint, code = answer.refused
            pending.failure = DataError(message, hint=hint, code=code)
        elif answer.crashed:
            pending.failure = RuntimeError(f"a loader process failed:\n{answer.crashed}")
        for at, row in zip(rows, answer.rows, strict=False):
            pending.rows[at] = row
            if row.stored is not None and self._cache is not None:
                self._cache.publish(row.stored)

    def _died(self, number: int) -> RtdetrError:
        child = self._children[number]
        try:
            status = child.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:  # alive, but what it says cannot be understood
            child.kill()
            status = child.wait()
        if status == -signal.SIGKILL:
            message = f"loader process {number} was killed, most likely because memory ran out"
        else:
            message = f"loader process {number} ended with status {status}"
        self._death = RtdetrError(message, hint="fewer --workers, or --cache none", code="loader-killed")
        return self._death


def _listen(number: int, child: subprocess.Popen[bytes], answers: queue.SimpleQueue[tuple[int, Answer | None]]) -> None:
    """Pass on what a child answers, and None at its end."""
    try:
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                answers.put((number, receive(_pipe(child.stdout))))
    finally:  # whatever went wrong here, nobody may wait for an answer that will not come
        answers.put((number, None))


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("not a pipe")
    return stream


def _end(children: list[subprocess.Popen[bytes]], threads: list[threading.Thread]) -> None:
    """End the children, whatever they are at: they hold nothing that could be lost."""
    for child in children:
        with contextlib.suppress(OSError):
            _pipe(child.stdin).close()
        child.terminate()
    for child in children:
        try:
            child.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for thread in threads:
        thread.join(_GOODBYE_S)
    for child in children:
        _pipe(child.stdout).close()

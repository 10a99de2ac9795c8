"""Load and augment the images of a batch, in the training process or in a worker process.

A worker is a fresh interpreter that imports numpy, Pillow and OpenCV but never torch: it starts in a fifth of a
second instead of two, needs 60 MB, and cannot inherit a lock or a CUDA context, as a forked process can. It reads
tasks from its standard input, writes results to its standard output and pixels into shared memory, and exits at the
end of its input, so it cannot outlive the training process.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.batches.cache import CacheEntry, ImageCache, SharedBlock, SharedRecords
from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.images.augment import Augmentation, augment
from rtdetr_cli.images.decode import ImageError, opened

_MAX_SUBSTITUTES = 16


def random_generator(seed: int, epoch: int, *purpose: int) -> np.random.Generator:
    """Return the generator for one purpose in one epoch; different purposes never share a random stream."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, *purpose)))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """Return the order of the images in an epoch."""
    return random_generator(seed, epoch, 0).permutation(images)


class Task(NamedTuple):
    """Some images of one batch to load."""

    ticket: int  # repeated in the result
    slot: int  # which of the batches in progress
    epoch: int
    strong: bool  # whether the strong augmentations are on
    rows: tuple[int, ...]  # indices in the batch
    positions: tuple[int, ...]  # indices in the epoch, which with seed and epoch determine every random draw
    images: tuple[int, ...]  # indices in the dataset


@dataclass(slots=True)
class Example:
    """One image of a batch without its pixels."""

    image: int  # index in the dataset of the image that was used
    boxes_cxcywh: NDArray[np.float32]  # (N, 4)
    labels: NDArray[np.int64]  # (N,)
    replaced: list[tuple[int, str]] = field(default_factory=list)  # images that could not be read, and why
    stored: CacheEntry | None = None  # what was added to the cache


class ExampleLoader:
    """Loads and augments images; the result depends only on the image, the seed, the epoch and the position in it."""

    def __init__(
        self, records: SharedRecords, augmentation: Augmentation, seed: int, cache: ImageCache | None = None
    ) -> None:
        self._records = records
        self._augmentation = {True: augmentation, False: augmentation.without_strong()}
        self._seed = seed
        self._cache = cache

    def load(self, task: Task, out: NDArray[np.uint8]) -> list[Example]:
        """Write the images of a task into the rows of a batch `out` (B, 3, H, W).

        Raises:
            DataError: too many images in a row cannot be read.
        """
        return [
            self._load_or_replace(image, position, task.epoch, strong=task.strong, out=out[row])
            for row, position, image in zip(task.rows, task.positions, task.images, strict=True)
        ]

    def _load_or_replace(
        self, image: int, position: int, epoch: int, *, strong: bool, out: NDArray[np.uint8]
    ) -> Example:
        """Load one image; if it cannot be read, another one is drawn in its place."""
        replaced: list[tuple[int, str]] = []
        while True:
            try:
                example = self._load(image, position, epoch, strong=strong, out=out)
            except ImageError as error:
                replaced.append((image, error.message))
                if len(replaced) > _MAX_SUBSTITUTES:
                    raise DataError(
                        f"{len(replaced)} images in a row could not be read; the last one: {error.message}",
                        hint="check that the disk is still mounted; `rtdetr validate` reads every image",
                        code="images-unreadable",
                    ) from None
                rng = random_generator(self._seed, epoch, 2, position, len(replaced))
                image = int(rng.integers(len(self._records)))
            else:
                example.replaced = replaced
                return example

    def _load(self, image: int, position: int, epoch: int, *, strong: bool, out: NDArray[np.uint8]) -> Example:
        boxes, labels = self._records.boxes(image)
        path = self._records.path(image)
        rng = random_generator(self._seed, epoch, 1, position)
        if self._cache is None:
            with opened(path) as file:
                return Example(image, *augment(file, boxes, labels, self._augmentation[strong], rng, out))
        with self._cache.opened(image, path) as cached:
            result = augment(cached, boxes, labels, self._augmentation[strong], rng, out)
            return Example(image, *result, stored=cached.stored)


class Result(NamedTuple):
    """The examples of the task with that ticket, one per row, or why it failed."""

    ticket: int
    examples: Sequence[Example] = ()
    failure: Exception | None = None


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs to start; `slots` holds the batches in progress as (slots, rows, 3, H, W)."""

    records: SharedRecords
    augmentation: Augmentation
    seed: int
    slots: SharedBlock
    slots_shape: tuple[int, int, int, int, int]
    cache: ImageCache | None
    number: int


def send(stream: IO[bytes], value: Any) -> None:
    """Write one value, which `pickle.load` reads at the other end."""
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


def main() -> None:
    """Run as a worker until the training process closes the standard input."""
    warnings.simplefilter("ignore")  # `rtdetr validate` reports problems of images
    tasks = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that a library that prints doesn't corrupt the results

    for unneeded in ("torch", "huggingface_hub"):
        # Albumentations, if a user's file needs it, imports them if it can, which costs three seconds and 200 MB.
        sys.modules[unneeded] = None  # type: ignore[assignment]
    import cv2

    cv2.setNumThreads(0)  # one core per worker
    try:
        setup: WorkerSetup = pickle.load(tasks)
        if setup.cache is not None:
            setup.cache.region = setup.number
        loader = ExampleLoader(setup.records, setup.augmentation, setup.seed, setup.cache)
        slots = setup.slots.array(np.uint8, setup.slots_shape)
        while True:
            task: Task = pickle.load(tasks)
            try:
                result = Result(task.ticket, loader.load(task, slots[task.slot]))
            except RtdetrError as error:
                result = Result(task.ticket, failure=error)
            except Exception:
                failure = RuntimeError(f"a worker process failed:\n{traceback.format_exc()}")
                result = Result(task.ticket, failure=failure)
            send(results, result)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)  # flushing into the closed pipe would only print an error


if __name__ == "__main__":
    main()

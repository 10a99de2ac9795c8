"""Make the images of a batch: in the loader's own process, or in a child that does nothing else.

A child is a fresh interpreter that imports numpy, Pillow and OpenCV and never torch: it starts in a fifth of a second
where torch takes two, holds 60 MB, and cannot inherit a lock or a CUDA context from the middle of whatever the parent
was doing, as a forked one can. It reads tasks from its standard input and answers on its standard output, writes
pixels into shared memory, and ends when its input does, so it cannot outlive the parent.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.batches.cache import CacheEntry, ImageCache, SharedBlock, SharedRecords
from rtdetr_cli.errors import DataError
from rtdetr_cli.images.augment import Augmentation, augment
from rtdetr_cli.images.decode import ImageError, opened

_MOST_SUBSTITUTES = 16
_LENGTH = struct.Struct("<Q")


def generator(seed: int, epoch: int, *purpose: int) -> np.random.Generator:
    """Return the generator of one purpose of one epoch; different purposes never share a stream."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, *purpose)))


def order_of(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """Return the permutation that an epoch goes through."""
    return generator(seed, epoch, 0).permutation(images)


class Task(NamedTuple):
    """Some rows of one batch to make.

    Attributes:
        ticket: handed back with the answer.
        slot: which of the batches under way.
        epoch, strong: of the batch.
        rows: in the batch.
        positions: in the epoch; with seed and epoch they fix every draw.
        images: indices into the dataset.
    """

    ticket: int
    slot: int
    epoch: int
    strong: bool
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    images: tuple[int, ...]


@dataclass(slots=True)
class Row:
    """One image of a batch, but for its pixels.

    Attributes:
        image: the index that was used.
        boxes_cxcywh: (N, 4) float32.
        labels: (N,) int64.
        replaced: images that could not be read, and why.
        stored: what was added to the cache.
    """

    image: int
    boxes_cxcywh: NDArray[np.float32]
    labels: NDArray[np.int64]
    replaced: list[tuple[int, str]] = field(default_factory=list)
    stored: CacheEntry | None = None


class Maker:
    """Makes images of a dataset, each from (seed, epoch, position) and its index alone."""

    def __init__(
        self, records: SharedRecords, augmentation: Augmentation, seed: int, cache: ImageCache | None = None
    ) -> None:
        self._records = records
        self._augmentation = {True: augmentation, False: augmentation.without_strong()}
        self._seed = seed
        self._cache = cache

    def make(self, image: int, position: int, epoch: int, *, strong: bool, out: NDArray[np.uint8]) -> Row:
        """Write one image into `out` (3, H, W); an unreadable one is replaced by another, drawn for its position.

        Raises:
            DataError: so many images in a row cannot be read that something else is wrong.
        """
        replaced: list[tuple[int, str]] = []
        while True:
            try:
                row = self._make(image, position, epoch, strong=strong, out=out)
            except ImageError as error:
                replaced.append((image, error.message))
                if len(replaced) > _MOST_SUBSTITUTES:
                    raise DataError(
                        f"{len(replaced)} images in a row could not be read, the last because {error.message}",
                        hint="is the disk still there? `rtdetr validate` reads every image",
                        code="images-unreadable",
                    ) from None
                draws = generator(self._seed, epoch, 2, position, len(replaced))
                image = int(draws.integers(len(self._records)))
            else:
                row.replaced = replaced
                return row

    def _make(self, image: int, position: int, epoch: int, *, strong: bool, out: NDArray[np.uint8]) -> Row:
        boxes, labels = self._records.boxes(image)
        path = self._records.path(image)
        rng = generator(self._seed, epoch, 1, position)
        if self._cache is None:
            with opened(path) as file:
                return Row(image, *augment(file, boxes, labels, self._augmentation[strong], rng, out))
        with self._cache.opened(image, path) as cached:
            made = augment(cached, boxes, labels, self._augmentation[strong], rng, out)
            return Row(image, *made, stored=cached.stored)


class Answer(NamedTuple):
    """What became of a task: its rows, or why not."""

    ticket: int
    rows: tuple[Row, ...] = ()
    refused: tuple[str, str, str] | None = None  # message, hint and code of a DataError
    crashed: str = ""  # traceback of anything else


@dataclass(frozen=True, slots=True)
class Setup:
    """What a child needs to begin. `slots` holds batches as (slots, rows, 3, H, W)."""

    records: SharedRecords
    augmentation: Augmentation
    seed: int
    slots: SharedBlock
    slots_shape: tuple[int, int, int, int, int]
    cache: ImageCache | None
    number: int


def send(stream: IO[bytes], value: Any) -> None:
    """Write one value, preceded by its length."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one value; raises EOFError when the other side has gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    """Serve one parent until it closes our standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it gets the keystroke too
    warnings.simplefilter("ignore")  # what there is to say about an image, `rtdetr validate` says
    tasks = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not do it into our answers

    for unneeded in ("torch", "huggingface_hub"):
        # Albumentations, where a user's file asks for it, loads them if it can: three seconds and 200 MB each time.
        sys.modules[unneeded] = None  # type: ignore[assignment]
    import cv2

    cv2.setNumThreads(0)  # one core each: the processes are the parallelism
    try:
        setup: Setup = receive(tasks)
        if setup.cache is not None:
            setup.cache.write_to(setup.number)
        maker = Maker(setup.records, setup.augmentation, setup.seed, setup.cache)
        slots = setup.slots.array(np.uint8, setup.slots_shape)
        while True:
            task: Task = receive(tasks)
            try:
                rows = tuple(
                    maker.make(image, position, task.epoch, strong=task.strong, out=slots[task.slot, row])
                    for row, position, image in zip(task.rows, task.positions, task.images, strict=True)
                )
                answer = Answer(task.ticket, rows)
            except DataError as error:
                answer = Answer(task.ticket, refused=(error.message, error.hint, error.code))
            except Exception:  # told to the parent, which raises it
                answer = Answer(task.ticket, crashed=traceback.format_exc())
            send(answers, answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # the parent has gone; flushing into its closed pipe would only complain


if __name__ == "__main__":
    main()

"""Read images ahead of the network, in threads.

Pillow releases the interpreter's lock while it decodes and resizes, so threads are enough and no image is copied
between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.images.decode import ImageError, read_image, stretch
from rtdetr_cli.infer.sources import fetch_image
from rtdetr_cli.machine import cpu_count

ImageSource = Path | str | NDArray[np.uint8]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetched(NamedTuple):
    """An image ready for the network, or the error of one that cannot be read.

    Attributes:
        position: index of the image, or number of the video frame.
        image: (H, W, 3) uint8 of the network's size; None with an error.
        size_wh: width and height of the upright original; None with an error.
        error: why the image cannot be read.
        original: (H, W, 3) uint8 RGB, the upright original, if it was asked for.
    """

    position: int
    image: NDArray[np.uint8] | None
    size_wh: tuple[int, int] | None
    error: ImageError | None
    original: NDArray[np.uint8] | None = None


def prepare(position: int, image: NDArray[np.uint8], hw: tuple[int, int], *, keep: bool = False) -> Prefetched:
    """Stretch an upright RGB image to the network's size."""
    size_wh = (image.shape[1], image.shape[0])
    return Prefetched(position, stretch(image, hw), size_wh, None, image if keep else None)


def read_source(source: ImageSource) -> NDArray[np.uint8]:
    """Return an image from a file or a web address (a string) as upright (H, W, 3) uint8 RGB; an array as it is.

    Raises:
        ImageError: it cannot be read.
    """
    if isinstance(source, np.ndarray):
        return source
    return read_image(fetch_image(source) if isinstance(source, str) else source)


def prefetch(
    images: Sequence[ImageSource], hw: tuple[int, int], *, ahead: int | None = None, keep: bool = False
) -> Generator[Prefetched, None, None]:
    """Yield images in order, decoded and stretched ahead of use; one that cannot be read comes with its error.

    `hw` is the height and width of the network's input; `keep` yields the originals too; see `read_ahead`.
    """

    def read(job: tuple[int, ImageSource]) -> Prefetched:
        position, source = job
        try:
            return prepare(position, read_source(source), hw, keep=keep)
        except ImageError as error:
            if isinstance(source, str) and source not in error.message:  # bytes don't know where they are from
                error = ImageError(f"{source}: {error.message}", code=error.code)
            return Prefetched(position, None, None, error)

    return read_ahead(read, enumerate(images), ahead=ahead)


def read_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None, ahead: int | None = None
) -> Generator[Result, None, None]:
    """Yield `work(item)` in the order of the items; threads compute a bounded number of results ahead.

    Args:
        work: called in a thread; its exceptions are raised here, when its result is due.
        items: may be endless.
        threads: number of threads; None for one per core, at most four.
        ahead: number of results that may wait; twice the threads by default, which bounds the memory.
    """
    threads = threads or min(4, cpu_count())
    ahead = ahead or 2 * threads
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""Images decoded and stretched ahead of the network, in threads: it never waits for a file.

Pillow lets go of the interpreter's lock while it decodes and resizes, so threads are enough and nothing is copied
between processes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.images.decode import ImageError, read_image, stretch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetched(NamedTuple):
    """One image made ready, or what is wrong with it."""

    position: int  # in `paths`
    image: NDArray[np.uint8] | None  # (H, W, 3) of the network's size
    size_wh: tuple[int, int] | None  # of the upright original
    error: ImageError | None


def prefetch(paths: Sequence[Path], hw: tuple[int, int], *, threads: int | None = None) -> Iterator[Prefetched]:
    """Yield every image in order, decoded and stretched ahead of its use.

    Args:
        paths: image files; one that cannot be read comes back with its error.
        hw: height and width of the network's input.
        threads: that decode; None takes one for each core up to four.
    """

    def ready(job: tuple[int, Path]) -> Prefetched:
        index, path = job
        try:
            image = read_image(path)
        except ImageError as error:
            return Prefetched(index, None, None, error)
        return Prefetched(index, stretch(image, hw), (image.shape[1], image.shape[0]), None)

    return read_ahead(ready, enumerate(paths), threads=threads)


def read_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None, ahead: int | None = None
) -> Iterator[Result]:
    """Yield `work(item)` in the order of the items, a bounded number of them done ahead in threads.

    Args:
        work: called in a thread; what it raises is raised here, at its place in the order.
        items: taken from here as room allows, so that an endless one is fine.
        threads: how many; None takes one for each core up to four.
        ahead: results that may wait; twice the threads by default, which bounds the memory.
    """
    count = threads or min(4, os.cpu_count() or 1)
    room = ahead or 2 * count
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(count, thread_name_prefix="read-ahead")
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= room:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""Decoded images in memory that is shared with the worker processes.

`SharedBlock` is anonymous memory (or an already deleted file) that a worker inherits. It needs no space in `/dev/shm`,
which is small in containers, leaves nothing behind however the run ends, and is counted once however many processes
use it.

`ImageCache` keeps decoded images at each scale that was needed, so that an image from the cache has the same bits as
one decoded again. It fills up in the order of use; nothing is evicted, since every image of an epoch is equally
likely to come next.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.images.decode import ImageFile, divisor, opened
from rtdetr_cli.machine import free_bytes

_DIVISORS = (1, 2, 4, 8)
_WIDTH = len(_DIVISORS)  # column of the width in the cache's table; height and "scalable" follow
_ROW = _WIDTH + 3


class SharedBlock:
    """Zeroed bytes shared by this process and the child processes that inherit `fd`.

    The pages of its `size` bytes are allocated when they are written. `folder` is that of a file to use in place of
    memory. It can be pickled for a process that `multiprocessing` spawns.
    """

    def __init__(self, size: int, *, folder: Path | None = None) -> None:
        self.size = max(size, 1)
        self.in_memory = folder is None and hasattr(os, "memfd_create")
        if self.in_memory:
            self.fd = os.memfd_create("rtdetr")
        else:
            self.fd, name = tempfile.mkstemp(prefix="rtdetr-", dir=folder)
            os.unlink(name)
        os.ftruncate(self.fd, self.size)
        self._open()

    def __getstate__(self) -> tuple[Any, int, bool]:
        return reduction.DupFd(self.fd), self.size, self.in_memory

    def __setstate__(self, state: tuple[Any, int, bool]) -> None:
        duplicate, self.size, self.in_memory = state
        self.fd = duplicate.detach()
        self._open()

    def _open(self) -> None:
        self._map = mmap.mmap(self.fd, self.size)
        weakref.finalize(self, os.close, self.fd)

    def array(self, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Return a view of the block; it keeps the mapping alive."""
        return np.ndarray(shape, dtype, self._map, offset)

    def reserve(self, offset: int, size: int) -> bool:
        """Allocate the pages of a range now; return False if there is not enough space for them.

        Otherwise running out of space while writing would kill the process instead of raising an exception.
        """
        if self.in_memory and size > free_bytes(None) * 0.9:
            return False
        try:
            os.posix_fallocate(self.fd, offset, size)
        except OSError:
            return False
        return True


class CacheEntry(NamedTuple):
    """One decoded image in the cache: its index and scale, and where its pixels are."""

    image: int
    divisor: int
    offset: int
    size_wh: tuple[int, int]
    scalable: bool


class ImageCache:
    """Decoded images in shared memory or in a file, at each scale they were decoded at.

    Every process writes to its own region and reads all of them. Only the process that created the cache writes the
    table (`publish`), after the writer has reported that the pixels are stored, so that no reader ever sees an entry
    before its pixels.

    Args:
        images: number of images.
        kind: `ram` or `disk`.
        regions: number of processes that decode.
        budget: bytes for all pixels; None for half of the free space.
        largest: bytes that all pixels need at most, to avoid a file larger than necessary.
    """

    def __init__(
        self, images: int, *, kind: str, regions: int, budget: int | None = None, largest: int | None = None
    ) -> None:
        folder = _disk_folder() if kind == "disk" else None
        self.budget = free_bytes(folder) // 2 if budget is None else budget
        self._region_size = self.budget // regions if largest is None else min(self.budget // regions, largest)
        self.region = 0  # that this process writes to
        self._used = 0
        self._pixels = SharedBlock(self._region_size * regions, folder=folder)
        # offset + 1 for each scale (0: not stored), width, height, 1 + scalable (0: unknown)
        self._rows = SharedBlock(images * _ROW * 8)

    def _row(self, image: int) -> NDArray[np.int64]:
        return self._rows.array(np.int64, (_ROW,), image * _ROW * 8)

    def publish(self, entry: CacheEntry) -> None:
        """Add an entry to the table; of two entries for the same pixels the later one is used."""
        row = self._row(entry.image)
        row[_DIVISORS.index(entry.divisor)] = entry.offset + 1
        row[_WIDTH:] = (*entry.size_wh, 1 + entry.scalable)

    @contextmanager
    def opened(self, index: int, path: Path) -> Iterator[CachedImage]:
        """Open an image; its file only if the table doesn't know its size."""
        width, height, scalable = self._row(index)[_WIDTH:].tolist()
        if scalable:
            yield CachedImage(self, index, path, (width, height), scalable=scalable == 2)
        else:
            with opened(path) as file:
                yield CachedImage(self, index, path, file.size_wh, scalable=file.scalable, file=file)

    def read(self, index: int, divisor: int, size_wh: tuple[int, int]) -> Image.Image | None:
        """Return a stored image, or None."""
        offset = int(self._row(index)[_DIVISORS.index(divisor)]) - 1
        if offset < 0:
            return None
        width, height = (-(-side // divisor) for side in size_wh)
        return Image.fromarray(self._pixels.array(np.uint8, (height, width, 3), offset))

    def write(self, image: Image.Image) -> int | None:
        """Store decoded pixels in this process's region and return their offset; None if it is full."""
        size = image.width * image.height * 3
        if self._used + size > self._region_size:
            return None
        offset = self.region * self._region_size + self._used
        if not self._pixels.reserve(offset, size):
            self._used = self._region_size
            return None
        self._pixels.array(np.uint8, (image.height, image.width, 3), offset)[...] = np.asarray(image)
        self._used += size
        return offset


class CachedImage:
    """An image that is looked up in the cache before it is decoded, and stored afterwards; a `Source` for `augment`.

    `stored` is what `decode` added, for `ImageCache.publish`.
    """

    def __init__(
        self,
        cache: ImageCache,
        index: int,
        path: Path,
        size_wh: tuple[int, int],
        *,
        scalable: bool,
        file: ImageFile | None = None,
    ) -> None:
        self._cache, self._index, self._path = cache, index, path
        self._scalable, self._file = scalable, file
        self.size_wh = size_wh
        self.stored: CacheEntry | None = None

    def divisor(self, hw: tuple[int, int]) -> int:
        """Return the divisor at which the image still covers `hw`."""
        return divisor(self.size_wh, hw) if self._scalable else 1

    def decode(self, divisor: int = 1) -> Image.Image:
        """Return the image with the same bits from the cache as from the file."""
        image = self._cache.read(self._index, divisor, self.size_wh)
        if image is not None:
            return image
        if self._file is not None:
            image = self._file.decode(divisor)
        else:
            with opened(self._path) as file:
                image = file.decode(divisor)
        if image.size == tuple(-(-side // divisor) for side in self.size_wh):
            offset = self._cache.write(image)
            if offset is not None:
                self.stored = CacheEntry(self._index, divisor, offset, self.size_wh, self._scalable)
        return image


def _disk_folder() -> Path:
    """Return a folder on a disk for large temporary files; `/tmp` is often in memory."""
    if os.environ.get("TMPDIR") or not os.access("/var/tmp", os.W_OK):
        return Path(tempfile.gettempdir())
    return Path("/var/tmp")

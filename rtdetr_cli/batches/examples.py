"""Load and augment the images of a batch.

Every random draw depends on (seed, epoch, position in the epoch), so a batch depends only on (seed, epoch, index): not
on the process that loads it, on how many ranks share the epoch, or on what was loaded before.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.batches.cache import CacheEntry, ImageCache
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError
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


def balanced_order(dataset: Dataset, seed: int, epoch: int, power: float) -> NDArray[np.int64]:
    """Return an epoch of as many images, those of rare classes more often (repeat-factor sampling, LVIS)."""
    count = len(dataset)
    has = np.zeros((count, len(dataset.names)), bool)
    has[np.repeat(np.arange(count), np.diff(dataset.offsets)), dataset.labels] = True
    frequency = has.sum(0)
    factor = (frequency.max() / np.maximum(frequency, 1)) ** power
    weight = np.where(has, factor, 1.0).max(1)
    ends = np.cumsum(weight) / weight.sum() * count
    rng = random_generator(seed, epoch, 0)
    chosen = np.searchsorted(ends, np.arange(count) + rng.random(), side="right").clip(max=count - 1)
    return rng.permutation(chosen)


@dataclass(frozen=True, slots=True)
class Example:
    """One image of a batch without its pixels."""

    image: int  # index in the dataset of the image that was used
    boxes_cxcywh: NDArray[np.float32]  # (N, 4)
    labels: NDArray[np.int64]  # (N,)
    stored: CacheEntry | None  # what was added to the cache
    replaced: tuple[tuple[int, str], ...] = ()  # images that could not be read, and why


@dataclass(frozen=True, kw_only=True)
class ExampleLoader:
    """Loads the batches of one rank; crowd boxes are left out.

    Step k uses the images from `k * batch_size * world_size` on in the epoch's order, and each rank a contiguous part
    of them: together the ranks see the batch of a single process.

    Attributes:
        imgsz: height and width in pixels.
        batch_size: images of this rank per optimizer step.
        seed: of the order and of the augmentation.
        strong_until: the first epoch without the strong augmentations.
        rank: of this process among the `world_size` processes of the run.
    """

    dataset: Dataset
    imgsz: tuple[int, int]
    batch_size: int
    seed: int
    augmentation: Augmentation
    strong_until: int = sys.maxsize
    cache: ImageCache | None = None
    rank: int = 0
    world_size: int = 1
    repeat: float = 0.0

    def __len__(self) -> int:
        """Return the number of batches in an epoch; every image is used at least once."""
        return math.ceil(len(self.dataset) / (self.batch_size * self.world_size))

    def load(self, epoch: int, index: int) -> tuple[NDArray[np.uint8], list[Example]]:
        """Return the images of a batch, (B, 3, H, W), and their boxes.

        Raises:
            DataError: too many images in a row cannot be read.
        """
        images = np.empty((self.batch_size, 3, *self.imgsz), np.uint8)
        first = (index * self.world_size + self.rank) * self.batch_size
        order = epoch_order(self.seed, epoch, len(self.dataset))
        if self.repeat:
            order = balanced_order(self.dataset, self.seed, epoch, self.repeat)
        augmentation = self.augmentation if epoch < self.strong_until else self.augmentation.without_strong()
        # The last batch is filled up from the start of the same order.
        return images, [
            self._load_or_replace(int(order[position % len(order)]), position, epoch, augmentation, out)
            for position, out in zip(range(first, first + self.batch_size), images, strict=True)
        ]

    def _load_or_replace(
        self, image: int, position: int, epoch: int, augmentation: Augmentation, out: NDArray[np.uint8]
    ) -> Example:
        """Load one image; if it cannot be read, another one is drawn in its place."""
        replaced: list[tuple[int, str]] = []
        while True:
            try:
                loaded = self._load(image, random_generator(self.seed, epoch, 1, position), augmentation, out)
            except ImageError as error:
                replaced.append((image, error.message))
                if len(replaced) > _MAX_SUBSTITUTES:
                    raise DataError(
                        f"{len(replaced)} images in a row could not be read; the last one: {error.message}",
                        hint="check that the disk is still mounted; `rtdetr validate` reads every image",
                        code="images-unreadable",
                    ) from None
                rng = random_generator(self.seed, epoch, 2, position, len(replaced))
                image = int(rng.integers(len(self.dataset)))
            else:
                return Example(image, *loaded, tuple(replaced))

    def _load(
        self, image: int, rng: np.random.Generator, augmentation: Augmentation, out: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], CacheEntry | None]:
        path, truth = self.dataset.path(image), self.dataset.annotations(image)
        boxes, labels = truth.boxes_xyxy_px[~truth.crowd], truth.labels[~truth.crowd]
        if self.cache is None:
            with opened(path) as file:
                return *augment(file, boxes, labels, augmentation, rng, out), None
        with self.cache.opened(image, path) as cached:
            boxes_cxcywh, labels = augment(cached, boxes, labels, augmentation, rng, out)
            return boxes_cxcywh, labels, cached.stored

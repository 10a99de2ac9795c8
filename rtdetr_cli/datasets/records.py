"""A dataset as flat arrays, which every reader returns and everything else uses.

A forked process that touches a Python object writes to its reference count, which copies the memory page: a dataset
of lists and dicts would grow in every process until memory runs out. An array has a single reference count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Category:
    """One class of the dataset: its own id (any integer) and its name."""

    id: int
    name: str


class FlatStrings:
    """An immutable sequence of strings in two arrays, which can be shared with forked processes."""

    __slots__ = ("_bytes", "_offsets")

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(e) for e in encoded], out=self._offsets[1:])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        start, stop = self._offsets[index], self._offsets[index + 1]
        return self._bytes[start:stop].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """The boxes of one image.

    Attributes:
        boxes_xyxy_px: (N, 4) float64, pixels of the upright image, clipped to it.
        labels: (N,) int64, contiguous: the index in `Dataset.categories`.
        areas: (N,) float64, square pixels: the mask's if the dataset gives one, else width times height.
        crowd: (N,) bool; crowds are left out of training and ignored by the metrics.
        annotation_ids: (N,) int64.
    """

    boxes_xyxy_px: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """One checked split of a dataset: every box is finite, has an area and lies inside its image.

    N images, M boxes; the boxes of image i are rows `offsets[i]:offsets[i + 1]`.

    Attributes:
        name: the dataset's name, for run folders and reports.
        split: `train`, `val` or `test`.
        format: `coco`, `roboflow`, `yolo` or `voc`.
        root: the folder that relative `file_names` start from.
        categories: in the order of the contiguous labels.
        file_names: N paths, relative to `root`, or absolute if the dataset gives absolute paths.
        image_ids: (N,) int64, the dataset's ids.
        sizes_wh: (N, 2) int32, width and height in pixels of the upright image (after EXIF orientation).
        offsets: (N + 1,) int64.
        boxes_xyxy_px, labels, areas, crowd, annotation_ids: M rows, see `Annotations`.
    """

    name: str
    split: str
    format: str
    root: Path
    categories: tuple[Category, ...]
    file_names: FlatStrings
    image_ids: NDArray[np.int64]
    sizes_wh: NDArray[np.int32]
    offsets: NDArray[np.int64]
    boxes_xyxy_px: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.file_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(c.name for c in self.categories)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The dataset's category ids in label order."""
        return tuple(c.id for c in self.categories)

    def path(self, index: int) -> Path:
        """Return the path of one image."""
        return self.root / self.file_names[index]

    def annotations(self, index: int) -> Annotations:
        """Return the boxes of one image (views, not copies)."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Annotations(
            self.boxes_xyxy_px[rows], self.labels[rows], self.areas[rows], self.crowd[rows], self.annotation_ids[rows]
        )

    def subset(self, indices: Sequence[int] | NDArray[np.integer], *, split: str = "") -> Dataset:
        """Return the images at `indices`, in that order, with their boxes."""
        keep = np.asarray(indices, np.int64)
        counts = (self.offsets[1:] - self.offsets[:-1])[keep]
        offsets = np.zeros(len(keep) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in keep] or [np.zeros(0, np.int64)]
        ).astype(np.int64)
        return replace(
            self,
            split=split or self.split,
            file_names=FlatStrings([self.file_names[int(i)] for i in keep]),
            image_ids=self.image_ids[keep],
            sizes_wh=self.sizes_wh[keep],
            offsets=offsets,
            boxes_xyxy_px=self.boxes_xyxy_px[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            annotation_ids=self.annotation_ids[rows],
        )


def image_paths(images: Dataset | Sequence[Path]) -> list[Path]:
    """Return the paths of images, with labels or without."""
    return [images.path(i) for i in range(len(images))] if isinstance(images, Dataset) else list(images)


def spread(count: int, maximum: int) -> NDArray[np.int64]:
    """Return up to `maximum` positions of a list of `count`, at even distances."""
    return np.unique(np.linspace(0, count - 1, min(maximum, count)).round().astype(np.int64))


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a finding lies in the records; the report page and the repair use it.

    Attributes:
        split: name of the split; empty if the finding concerns the whole dataset.
        image: index of the image in the split; -1 for none.
        entry: index in the label file (from 0): annotation or image of a COCO list, object of a VOC file, line of a
            YOLO file; -1 for none.
        box: corners in pixels, to be drawn.
        other: split and index of the image that this one duplicates.
    """

    split: str = ""
    image: int = -1
    entry: int = -1
    box: tuple[float, float, float, float] | None = None
    other: tuple[str, int] | None = None

    @property
    def member(self) -> tuple[str, int]:
        """Split and index of the image."""
        return self.split, self.image


NOWHERE = Spot()


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem or remark about a dataset. `code` is stable; `severity` is `error`, `warning` or `info`."""

    code: str
    severity: str
    message: str
    file: str = ""
    line: int = 0
    image_id: int | str | None = None
    annotation_id: int | str | None = None
    hint: str = ""
    spot: Spot = NOWHERE


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """All splits of a dataset.

    Attributes:
        source: the path that the user gave.
        fingerprint: sha256 over categories, file names, image ids, sizes, boxes, areas; `--resume` requires the same.
        findings: warnings and infos of the checks; errors were raised.
        split_made: True if the val split was held out from train.
    """

    source: Path
    name: str
    format: str
    categories: tuple[Category, ...]
    train: Dataset | None
    val: Dataset | None
    test: Dataset | None
    fingerprint: str
    findings: tuple[Finding, ...] = ()
    split_made: bool = False

    @property
    def parts(self) -> dict[str, Dataset]:
        """The splits that exist, by name."""
        return {part.split: part for part in (self.train, self.val, self.test) if part is not None}

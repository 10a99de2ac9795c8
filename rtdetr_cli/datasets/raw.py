"""Records as a reader finds them, before any check: boxes in flat arrays, with their location in the label files."""

from __future__ import annotations

import os
from collections.abc import Container
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.archive import is_unpacked
from rtdetr_cli.datasets.findings import Findings
from rtdetr_cli.datasets.label_text import MAX_SMALL_BYTES, Oddities, read_text
from rtdetr_cli.datasets.records import Category, Spot


@dataclass(slots=True, eq=False)
class RawSplit:
    """One split as it is in the label files: boxes may be inverted, outside or not finite.

    N images and M boxes, sorted by image.

    Attributes:
        split: `train`, `val` or `test`.
        root: the folder that `file_names` are relative to.
        label_files: paths to show, relative to the dataset's folder.
        file_names: N paths; corrected if only upper and lower case differed.
        image_ids: (N,) int64.
        sizes_wh: (N, 2) int32 as declared; 0 if the labels declare none.
        declared: (N,) bool, whether the labels declare a size.
        image_labels: (N,) int32, index in `label_files`; -1 for none.
        image_lines: (N,) int32, line of the entry in its label file; 0 for none.
        image_entries: (N,) int32, index of the entry in its list; -1 for none.
        box_images: (M,) int64, index of the image, ascending.
        boxes_xyxy_px: (M, 4) float64.
        labels: (M,) int64, indices in the dataset's categories.
        areas: (M,) float64, NaN if the labels give none.
        crowd: (M,) bool.
        annotation_ids: (M,) int64.
        box_lines: (M,) int32.
        box_entries: (M,) int32.
        reported_outside: (M,) bool, boxes that the reader has already reported to extend beyond the image.
        label_names: image -> its name in the labels, if the file is named differently.
        usable: (N,) bool, False if a check found that the image cannot be used.
        normalized: True while boxes and areas are fractions of the image; `denormalize_boxes` scales them.
    """

    split: str
    root: Path
    label_files: list[str]
    file_names: list[str]
    image_ids: NDArray[np.int64]
    sizes_wh: NDArray[np.int32]
    image_labels: NDArray[np.int32]
    image_lines: NDArray[np.int32]
    image_entries: NDArray[np.int32]
    box_images: NDArray[np.int64]
    boxes_xyxy_px: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]
    box_lines: NDArray[np.int32]
    box_entries: NDArray[np.int32]
    reported_outside: NDArray[np.bool_] = field(init=False)
    normalized: bool = field(default=False, init=False)
    label_names: dict[int, str] = field(default_factory=dict, init=False)
    declared: NDArray[np.bool_] = field(init=False)
    usable: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.declared = np.all(self.sizes_wh > 0, axis=1)
        self.reported_outside = np.zeros(len(self.box_images), np.bool_)
        self.usable = np.ones(len(self.file_names), np.bool_)

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, image: int) -> Path:
        """Return the path of one image."""
        return self.root / self.file_names[image]

    def label_file(self, image: int) -> str:
        """Return the label file of one image, to show."""
        file = int(self.image_labels[image])
        return self.label_files[file] if file >= 0 else ""

    def rows(self, image: int) -> slice:
        """Return where the boxes of an image are in the arrays."""
        return slice(*np.searchsorted(self.box_images, [image, image + 1]).tolist())

    def box_spot(self, box: int) -> Spot:
        """Return where the entry of a box is."""
        x1, y1, x2, y2 = self.boxes_xyxy_px[box].tolist()
        return Spot(self.split, int(self.box_images[box]), int(self.box_entries[box]), (x1, y1, x2, y2))

    def denormalize_boxes(self) -> None:
        """Turn fractions into pixels; boxes of images of unknown size are dropped."""
        if not self.normalized:
            return
        self.normalized = False
        sizes = self.sizes_wh[self.box_images].astype(np.float64)
        self.boxes_xyxy_px = self.boxes_xyxy_px * np.concatenate([sizes, sizes], 1)
        self.areas = self.areas * sizes[:, 0] * sizes[:, 1]
        self.take_boxes(sizes[:, 0] > 0)

    def take_boxes(self, rows: NDArray[Any]) -> None:
        """Keep the boxes at these rows, a mask or indices."""
        for name in _BOX_ARRAYS:
            setattr(self, name, getattr(self, name)[rows])

    def select_images(self, images: NDArray[np.bool_], name: str) -> RawSplit:
        """Return the images where the mask is True, with their boxes, as the split `name`."""
        new_index = np.cumsum(images) - 1
        part = copy(self)
        part.split = name
        part.file_names = [f for f, selected in zip(self.file_names, images, strict=True) if selected]
        for array in _IMAGE_ARRAYS:
            setattr(part, array, getattr(self, array)[images])
        part.take_boxes(images[self.box_images])
        part.box_images = new_index[part.box_images]
        part.label_names = {int(new_index[i]): label for i, label in self.label_names.items() if images[i]}
        return part

    def sort_boxes(self) -> None:
        """Sort the boxes by image; those of one image keep their order."""
        self.take_boxes(np.argsort(self.box_images, kind="stable"))


_IMAGE_ARRAYS = ("image_ids", "sizes_wh", "image_labels", "image_lines", "image_entries", "declared", "usable")
_BOX_ARRAYS = (
    *("box_images", "boxes_xyxy_px", "labels", "areas", "crowd", "annotation_ids"),
    *("box_lines", "box_entries", "reported_outside"),
)


@dataclass(slots=True, eq=False)
class RawDataset:
    """A dataset as its label files describe it.

    Attributes:
        source: the path that the user gave.
        folder: the dataset's folder.
        roots: folders that images must lie in: `folder`, the one given with `--images`, and those that links lead to.
        label_paths: path to show -> path on disk, for every label file.
        findings: of the reader, and then of the checks.
        oddities: of the label files that were read.
        images: the folder given with `--images`.
        split_made: True if the val split was held out from train.
        contained: True for an unpacked zip file: nothing outside its folder is read.
        listings: see `list_folder`.
    """

    source: Path
    name: str
    format: str
    folder: Path
    roots: tuple[Path, ...]
    categories: tuple[Category, ...] = ()
    splits: dict[str, RawSplit] = field(default_factory=dict)
    label_paths: dict[str, Path] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    oddities: Oddities = field(default_factory=Oddities)
    images: Path | None = None
    split_made: bool = False
    contained: bool = False
    listings: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)

    def show(self, path: Path) -> str:
        """Return a path to show: relative to the dataset's folder if it lies in it."""
        inside = path != self.folder and path.is_relative_to(self.folder)
        return str(path.relative_to(self.folder) if inside else path)

    def read_label(self, path: Path, *, limit: int = MAX_SMALL_BYTES) -> tuple[str, str | None]:
        """Note a label file; return its path to show, and its text, or None with a finding if it cannot be read."""
        file = self.show(path)
        self.label_paths[file] = path
        return file, read_text(path, file, self.findings, self.oddities, limit=limit)

    def report_image(
        self, split: RawSplit, image: int, code: str, message: str, *, other: tuple[str, int] | None = None
    ) -> None:
        """Add a finding about an image, at its entry in the label file; `other` is the image that it duplicates."""
        file = split.label_file(image)
        self.findings.add(
            code,
            message,
            file=file or self.show(split.path(image)),
            line=int(split.image_lines[image]) if file else 0,
            image_id=int(split.image_ids[image]),
            spot=Spot(split.split, image, int(split.image_entries[image]), other=other),
        )

    def list_folder(self, folder: str) -> dict[str, dict[str, str]]:
        """Return lower-case name -> names that differ in upper and lower case only -> `file`, `link` or `other`.

        Each folder is read once, so that looking for a file costs no system call; one that cannot be read is empty.
        """
        if folder not in self.listings:
            listing = self.listings[folder] = {}
            with suppress(OSError, ValueError), os.scandir(folder) as entries:
                for entry in entries:
                    plain = entry.is_file(follow_symlinks=False)
                    kind = "file" if plain else "link" if entry.is_symlink() else "other"
                    listing.setdefault(entry.name.lower(), {})[entry.name] = kind
        return self.listings[folder]

    def without(self, images: Container[tuple[str, int]]) -> dict[str, RawSplit]:
        """Return the splits without some images, given by split and index, and without splits that have no other."""
        keep = {
            name: np.asarray([(name, image) not in images for image in range(len(split))], np.bool_)
            for name, split in self.splits.items()
        }
        return {name: self.splits[name].select_images(kept, name) for name, kept in keep.items() if kept.any()}

    def has_errors(self) -> bool:
        """Return whether any finding is an error."""
        return any(f.severity == "error" for f in self.findings)

    def main_file(self) -> str:
        """Return the file to show for findings that concern the whole dataset."""
        if self.source.is_file():
            return self.show(self.source)
        central = [shown for shown, path in self.label_paths.items() if path.suffix in (".json", ".yaml", ".yml")]
        return central[0] if central and self.format not in ("voc", "labelme") else str(self.source)


_NO_NAMES = frozenset(
    {"images", "labels", "annotations", "jpegimages", "data", "dataset", "datasets", "train", "val", "valid", "test"}
)
"""Names of folders that don't say which dataset it is."""


def new_dataset(form: str, source: Path, folder: Path, images: Path | None) -> RawDataset:
    """Return an empty dataset that is named like its folder, or the first one above it whose name says anything."""
    roots = (folder,) if images is None else (folder, images)
    folders = (part for part in reversed(folder.resolve().parts[1:]) if part.lower() not in _NO_NAMES)
    name = next(folders, "dataset")
    return RawDataset(source, name, form, folder, roots, images=images, contained=is_unpacked(folder))


class RawBox(NamedTuple):
    """One box for `Rows`; `beyond` means that it was already reported to extend beyond the image."""

    image: int
    box_xyxy_px: tuple[float, float, float, float]
    label: int
    line: int
    entry: int
    area: float = float("nan")
    crowd: bool = False
    annotation_id: int | None = None
    beyond: bool = False


class Rows:
    """Collects the images and boxes of one split one by one, for the formats with one label file per image."""

    def __init__(self, dataset: RawDataset, split: str) -> None:
        self.dataset, self.split = dataset, split
        self.first_id = 1 + sum(map(len, dataset.splits.values()))
        self.label_files: list[str] = []
        self.file_names: list[str] = []
        self.image_ids: list[int] = []
        self.sizes_wh: list[tuple[int, int]] = []
        self.image_labels: list[int] = []
        self.image_lines: list[int] = []
        self.boxes: list[RawBox] = []

    def add_image(
        self,
        file_name: str,
        *,
        label_file: str = "",
        line: int = 0,
        size_wh: tuple[int, int] = (0, 0),
        image_id: int | None = None,
    ) -> int:
        """Add an image and return its index; it is numbered without an id, and sides that are not positive are 0."""
        index = len(self.file_names)
        self.file_names.append(file_name)
        self.image_ids.append(self.first_id + index if image_id is None else image_id)
        self.sizes_wh.append(size_wh if all(0 < side < 1 << 31 for side in size_wh) else (0, 0))
        if label_file and self.label_files[-1:] != [label_file]:
            self.label_files.append(label_file)
        self.image_labels.append(len(self.label_files) - 1 if label_file else -1)
        self.image_lines.append(line)
        return index

    def report(self, code: str, message: str, image: int, *, entry: int = -1, file: str = "", line: int = 0) -> None:
        """Add a finding about an image or a box of it, by default in the label file that was added last."""
        file = file or self.label_files[-1]
        spot = Spot(self.split, image, entry)
        self.dataset.findings.add(code, message, file=file, line=line, image_id=self.image_ids[image], spot=spot)

    def finish(self, root: Path) -> RawSplit:
        """Add everything as flat arrays to the dataset; ids that are not unique are replaced by numbers."""
        count = len(self.file_names)
        annotation_ids = [box.annotation_id for box in self.boxes]
        if None in annotation_ids or len(set(annotation_ids)) != len(annotation_ids):
            annotation_ids = list(range(1, len(annotation_ids) + 1))
        if len(set(self.image_ids)) != count:
            self.image_ids = list(range(self.first_id, self.first_id + count))
        split = self.dataset.splits[self.split] = RawSplit(
            split=self.split,
            root=root,
            label_files=self.label_files,
            file_names=self.file_names,
            image_ids=np.asarray(self.image_ids, np.int64),
            sizes_wh=np.asarray(self.sizes_wh, np.int32).reshape(count, 2),
            image_labels=np.asarray(self.image_labels, np.int32),
            image_lines=np.asarray(self.image_lines, np.int32),
            image_entries=np.full(count, -1, np.int32),
            box_images=np.asarray([box.image for box in self.boxes], np.int64),
            boxes_xyxy_px=np.asarray([box.box_xyxy_px for box in self.boxes], np.float64).reshape(-1, 4),
            labels=np.asarray([box.label for box in self.boxes], np.int64),
            areas=np.asarray([box.area for box in self.boxes], np.float64),
            crowd=np.asarray([box.crowd for box in self.boxes], np.bool_),
            annotation_ids=np.asarray(annotation_ids, np.int64),
            box_lines=np.asarray([box.line for box in self.boxes], np.int32),
            box_entries=np.asarray([box.entry for box in self.boxes], np.int32),
        )
        split.reported_outside = np.asarray([box.beyond for box in self.boxes], np.bool_)
        split.sort_boxes()
        return split

"""Records as a reader finds them, before any check: boxes in flat arrays, with their location in the label files."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.archive import is_unpacked
from rtdetr_cli.datasets.findings import Findings, Spot
from rtdetr_cli.datasets.label_text import MAX_SMALL_BYTES, Oddities, read_text
from rtdetr_cli.datasets.records import Category


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

    def image_spot(self, image: int) -> Spot:
        """Return where the entry of an image is."""
        return Spot(self.split, image, int(self.image_entries[image]))

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
        known = sizes[:, 0] > 0
        if not known.all():
            self.keep_boxes(known)

    def keep_boxes(self, keep: NDArray[np.bool_]) -> None:
        """Drop the boxes where `keep` is False."""
        self._take_boxes(keep)

    def _take_boxes(self, rows: NDArray[Any]) -> None:
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
        part.keep_boxes(images[self.box_images])
        part.box_images = new_index[part.box_images]
        part.label_names = {int(new_index[i]): label for i, label in self.label_names.items() if images[i]}
        return part

    def sort_boxes(self) -> None:
        """Sort the boxes by image; those of one image keep their order."""
        if len(self.box_images) and (np.diff(self.box_images) < 0).any():
            self._take_boxes(np.argsort(self.box_images, kind="stable"))


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
        images: the folder given with `--images`.
        split_made: True if the val split was held out from train.
        contained: True for an unpacked zip file: nothing outside its folder is read.
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
    images: Path | None = None
    split_made: bool = False
    contained: bool = False

    def show(self, path: Path) -> str:
        """Return a path to show: relative to the dataset's folder if it lies in it."""
        try:
            shown = str(path.relative_to(self.folder))
        except ValueError:
            return str(path)
        return shown if shown != "." else str(path)

    def read_label(self, path: Path, oddities: Oddities, *, limit: int = MAX_SMALL_BYTES) -> tuple[str, str | None]:
        """Note a label file; return its path to show, and its text, or None with a finding if it cannot be read."""
        file = self.show(path)
        self.label_paths[file] = path
        return file, read_text(path, file, self.findings, oddities, limit=limit)

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


def new_dataset(name: str, form: str, source: Path, folder: Path, images: Path | None) -> RawDataset:
    """Return an empty dataset; without a name it is named like its folder, or the first one above with a real name."""
    roots = (folder,) if images is None else (folder, images)
    folders = (part for part in reversed(folder.resolve().parts[1:]) if part.lower() not in _NO_NAMES)
    name = name or next(folders, "dataset")
    contained = is_unpacked(folder)
    return RawDataset(source, name, form, folder, roots, images=images, contained=contained)


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


@dataclass(slots=True)
class Rows:
    """Collects images and boxes one by one, for the formats with one label file per image."""

    label_files: list[str] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    sizes_wh: list[tuple[int, int]] = field(default_factory=list)
    image_labels: list[int] = field(default_factory=list)
    boxes: list[RawBox] = field(default_factory=list)

    def add_image(self, file_name: str, *, image_id: int, size_wh: tuple[int, int], label_file: str) -> int:
        """Add an image and return its index; an empty `label_file` means none."""
        self.file_names.append(file_name)
        self.image_ids.append(image_id)
        self.sizes_wh.append(size_wh)
        if label_file:
            self.label_files.append(label_file)
        self.image_labels.append(len(self.label_files) - 1 if label_file else -1)
        return len(self.file_names) - 1

    def number_images(self, first_id: int) -> None:
        """Number the images from `first_id` if two of them have the same id."""
        if len(set(self.image_ids)) != len(self.image_ids):
            self.image_ids = list(range(first_id, first_id + len(self.image_ids)))

    def split(self, name: str, root: Path) -> RawSplit:
        """Return everything as flat arrays; boxes are numbered unless all have unique ids."""
        count = len(self.file_names)
        annotation_ids = [box.annotation_id for box in self.boxes]
        if None in annotation_ids or len(set(annotation_ids)) != len(annotation_ids):
            annotation_ids = list(range(1, len(annotation_ids) + 1))
        split = RawSplit(
            split=name,
            root=root,
            label_files=self.label_files,
            file_names=self.file_names,
            image_ids=np.asarray(self.image_ids, np.int64),
            sizes_wh=np.asarray(self.sizes_wh, np.int32).reshape(count, 2),
            image_labels=np.asarray(self.image_labels, np.int32),
            image_lines=np.zeros(count, np.int32),
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
        return split

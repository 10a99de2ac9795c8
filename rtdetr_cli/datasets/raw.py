"""What a reader finds before it is judged: boxes as they are written, in flat arrays, with their place in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.findings import Findings, Spot
from rtdetr_cli.datasets.records import Category


@dataclass(slots=True, eq=False)
class RawSplit:
    """One split as it is written: boxes may be inverted, outside or not finite.

    N images, M boxes, the boxes in the order of their images.

    Attributes:
        split: `train`, `val` or `test`.
        root: the folder that relative `file_names` start from.
        label_files: paths for people, relative to the dataset's folder.
        file_names: N paths; mended where only the case differs.
        image_ids: (N,) int64.
        sizes_wh: (N, 2) int32 as declared; 0 where the labels do not say.
        declared: (N,) bool, whether the labels say a size.
        image_labels: (N,) int32, position in `label_files`; -1 for none.
        image_lines: (N,) int32, line of the entry in its label file; 0 for none.
        image_entries: (N,) int32, position of the entry in its list; -1 for none.
        box_images: (M,) int64, position of the image, ascending.
        boxes_xyxy_px: (M, 4) float64.
        labels: (M,) int64, positions in the dataset's categories.
        areas: (M,) float64, NaN where the labels do not say.
        crowd: (M,) bool.
        annotation_ids: (M,) int64.
        box_lines: (M,) int32.
        box_entries: (M,) int32.
        reported_outside: (M,) bool, boxes that the reader has already called beyond the image.
        label_names: image -> its name in the labels, where the disk has another.
        usable: (N,) bool, False once a check found that the image cannot be used.
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
        """Return the label file of one image, for people."""
        position = int(self.image_labels[image])
        return self.label_files[position] if position >= 0 else ""

    def image_spot(self, image: int) -> Spot:
        """Return where one image's entry lies."""
        return Spot(self.split, image, int(self.image_entries[image]))

    def box_spot(self, box: int) -> Spot:
        """Return where one box's entry lies."""
        x1, y1, x2, y2 = self.boxes_xyxy_px[box].tolist()
        return Spot(self.split, int(self.box_images[box]), int(self.box_entries[box]), (x1, y1, x2, y2))

    def denormalize_boxes(self) -> None:
        """Turn shares into pixels; boxes of images whose size is not known are dropped."""
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
        for name in _BOX_ROWS:
            setattr(self, name, getattr(self, name)[keep])

    def sort_boxes(self) -> None:
        """Bring the boxes into the order of their images; those of one image keep theirs."""
        if len(self.box_images) and (np.diff(self.box_images) < 0).any():
            order = np.argsort(self.box_images, kind="stable")
            for name in _BOX_ROWS:
                setattr(self, name, getattr(self, name)[order])


_BOX_ROWS = (
    "box_images",
    "boxes_xyxy_px",
    "labels",
    "areas",
    "crowd",
    "annotation_ids",
    "box_lines",
    "box_entries",
    "reported_outside",
)


@dataclass(slots=True, eq=False)
class RawDataset:
    """A dataset as it is written.

    Attributes:
        source: what the user named.
        folder: the dataset's folder; images may not leave it.
        roots: real paths that images may lie under: the folder, and what the user named with `--images`.
        label_paths: every label file on disk by the path shown to people.
        findings: what reading noticed.
        split_made: True when the val part was drawn from one file by us.
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
    split_made: bool = False

    def show(self, path: Path) -> str:
        """Return a path for people: relative to the dataset's folder where it lies below it."""
        try:
            shown = str(path.relative_to(self.folder))
        except ValueError:
            return str(path)
        return shown if shown != "." else str(path)

    def has_errors(self) -> bool:
        """Return whether any finding is an error."""
        return any(f.severity == "error" for f in self.findings)

    def main_file(self) -> str:
        """Return the file, for people, that what concerns the whole dataset is found in."""
        if self.source.is_file():
            return self.show(self.source)
        central = [shown for shown, path in self.label_paths.items() if path.suffix in (".json", ".yaml", ".yml")]
        return central[0] if central and self.format != "voc" else str(self.source)


@dataclass(slots=True)
class Rows:
    """Collects images and boxes one by one, for the formats with one label file an image."""

    label_files: list[str] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    sizes_wh: list[tuple[int, int]] = field(default_factory=list)
    image_labels: list[int] = field(default_factory=list)
    box_images: list[int] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    annotation_ids: list[int | None] = field(default_factory=list)
    box_lines: list[int] = field(default_factory=list)
    box_entries: list[int] = field(default_factory=list)
    reported_outside: list[int] = field(default_factory=list)

    def add_image(self, file_name: str, *, image_id: int, size_wh: tuple[int, int], label_file: str) -> int:
        """Add an image and return its position; an empty `label_file` stands for none."""
        self.file_names.append(file_name)
        self.image_ids.append(image_id)
        self.sizes_wh.append(size_wh)
        if label_file:
            self.label_files.append(label_file)
        self.image_labels.append(len(self.label_files) - 1 if label_file else -1)
        return len(self.file_names) - 1

    def add_box(
        self,
        image: int,
        box_xyxy_px: tuple[float, float, float, float],
        label: int,
        *,
        line: int,
        entry: int,
        area: float = float("nan"),
        crowd: bool = False,
        annotation_id: int | None = None,
        beyond: bool = False,
    ) -> None:
        """Add a box; `beyond` stands for a box already called beyond the image."""
        if beyond:
            self.reported_outside.append(len(self.boxes))
        self.box_images.append(image)
        self.boxes.append(box_xyxy_px)
        self.labels.append(label)
        self.areas.append(area)
        self.crowd.append(crowd)
        self.annotation_ids.append(annotation_id)
        self.box_lines.append(line)
        self.box_entries.append(entry)

    def split(self, name: str, root: Path) -> RawSplit:
        """Return everything as flat arrays; where a box has no id of its own, all are numbered."""
        count = len(self.file_names)
        own = [i for i in self.annotation_ids if i is not None]
        if len(set(own)) != len(self.annotation_ids):
            own = list(range(1, len(self.annotation_ids) + 1))
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
            box_images=np.asarray(self.box_images, np.int64),
            boxes_xyxy_px=np.asarray(self.boxes, np.float64).reshape(-1, 4),
            labels=np.asarray(self.labels, np.int64),
            areas=np.asarray(self.areas, np.float64),
            crowd=np.asarray(self.crowd, np.bool_),
            annotation_ids=np.asarray(own, np.int64),
            box_lines=np.asarray(self.box_lines, np.int32),
            box_entries=np.asarray(self.box_entries, np.int32),
        )
        split.reported_outside[self.reported_outside] = True
        return split

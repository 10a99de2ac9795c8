"""What can be told about a dataset from its labels, folder listings and picture headers, without decoding anything.

`check_files` and `check_boxes` are what training runs; `examine` in `doctor.py` adds what needs the pixels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.data.codes import Findings, Spot
from rtdetr_cli.data.pictures import PictureError, picture_size
from rtdetr_cli.data.raw import RawDataset, RawSplit

EDGE_PX = 0.5
"""A box may reach over the edge by this much before it is said: less is rounding."""

SMALLEST_PX = 1e-3
"""Sides below this are zero."""

DUPLICATE_IOU = 0.9
EXTREME_ASPECT = 20.0
FEW_BOXES = 10
IMBALANCE = 100.0


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Listings:
    """Folder listings, each read once: whether a picture exists costs no system call of its own."""

    def __init__(self, roots: tuple[Path, ...]) -> None:
        self.roots = [os.path.realpath(r) for r in roots]
        self._folders: dict[str, tuple[dict[str, bool], dict[str, list[str]], bool]] = {}

    def contains(self, path: str) -> bool:
        """Tell whether a path, links followed, lies in one of the roots."""
        real = os.path.realpath(path)
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self.roots)

    def folder(self, folder: str) -> tuple[dict[str, bool], dict[str, list[str]], bool]:
        """Return name -> is a link, lower-case name -> names, and whether the folder lies inside."""
        known = self._folders.get(folder)
        if known is None:
            names: dict[str, bool] = {}
            lower: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        names[entry.name] = entry.is_symlink()
                        lower.setdefault(entry.name.lower(), []).append(entry.name)
            except (OSError, ValueError):
                pass
            known = self._folders[folder] = (names, lower, self.contains(folder))
        return known


def check_files(dataset: RawDataset) -> None:
    """Check that every picture is there, inside the dataset's folder and not empty; mend names of another case."""
    listings = Listings(dataset.roots)
    for split in dataset.splits.values():
        root = str(split.root)
        for picture, name in enumerate(split.file_names):
            folder, _, base = name.rpartition("/")
            if folder or name in (".", ".."):
                where = os.path.join(root, folder or name) if name[:1] != "/" else folder or "/"
            else:
                where = root
            names, lower, inside = listings.folder(where)
            code = ""
            if not inside or base in ("", ".", ".."):
                code, said = "picture-outside", f"{name} lies outside the dataset's folder"
                if inside:
                    code, said = "picture-missing", f"{name} is a folder, not a picture"
            elif base in names:
                if names[base] and not listings.contains(os.path.join(where, base)):
                    code, said = "picture-outside", f"{name} is a link that leaves the dataset's folder"
            else:
                others = lower.get(base.lower(), [])
                if len(others) == 1:
                    split.file_names[picture] = f"{folder}/{others[0]}" if folder else others[0]
                    dataset.findings.add(
                        "picture-name-case",
                        f"{name} is called {others[0]} on disk",
                        **_picture_place(dataset, split, picture),
                    )
                else:
                    code, said = "picture-missing", f"{name} is not in {dataset.show(Path(where))}"
                    if len(others) > 1:
                        said += f", which has {' and '.join(others)}"
            if code:
                split.usable[picture] = False
                dataset.findings.add(code, said, **_picture_place(dataset, split, picture))
            elif not base.isascii() and _not_utf8(split.file_names[picture]):
                dataset.findings.add(
                    "picture-name-encoding",
                    f"{name} is not a name in UTF-8",
                    **_picture_place(dataset, split, picture),
                )


def _not_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _picture_place(dataset: RawDataset, split: RawSplit, picture: int) -> dict[str, object]:
    file = split.label_file(picture)
    return {
        "file": file or dataset.show(split.path(picture)),
        "line": int(split.picture_lines[picture]) if file else 0,
        "image_id": int(split.image_ids[picture]),
        "spot": split.picture_spot(picture),
    }


def measure_pictures(dataset: RawDataset, *, threads: int | None = None, all_pictures: bool = True) -> None:
    """Read sizes from the pictures' headers and use them; say where the labels declare another.

    Args:
        dataset: gets the sizes and the findings.
        threads: how many headers are read at once.
        all_pictures: False reads only those whose size the labels do not say.
    """
    for split in dataset.splits.values():
        wanted = np.flatnonzero(split.usable if all_pictures else split.usable & ~split.declared)
        paths = [split.path(int(i)) for i in wanted]

        def measure(path: Path) -> tuple[int, int] | PictureError:
            try:
                return picture_size(path)
            except PictureError as error:
                return error

        with ThreadPoolExecutor(threads or min(16, (os.cpu_count() or 1) + 4)) as pool:
            for picture, size in zip(wanted.tolist(), pool.map(measure, paths, chunksize=64), strict=True):
                if isinstance(size, PictureError):
                    report_fault(dataset, split, picture, size)
                else:
                    report_size(dataset, split, picture, size)
        undeclared = np.flatnonzero(split.usable & ~split.declared)
        if len(undeclared) and dataset.format != "yolo":
            first = int(undeclared[0])
            more = f" and {len(undeclared) - 1} more have" if len(undeclared) > 1 else " has"
            dataset.findings.add(
                "picture-size-undeclared",
                f"{split.file_names[first]}{more} no size in the labels",
                **_picture_place(dataset, split, first),  # type: ignore[arg-type]
            )


def report_fault(dataset: RawDataset, split: RawSplit, picture: int, error: PictureError) -> None:
    """Add what is wrong with a picture that cannot be used."""
    split.usable[picture] = False
    message = error.message.replace(str(split.path(picture)), split.file_names[picture])
    dataset.findings.add(error.code, message, **_picture_place(dataset, split, picture))  # type: ignore[arg-type]


def report_size(dataset: RawDataset, split: RawSplit, picture: int, size: tuple[int, int]) -> None:
    """Take a picture's own size; say so where another was declared."""
    if split.declared[picture]:
        declared = tuple(split.sizes_wh[picture].tolist())
        if declared != size:
            name = split.file_names[picture]
            if declared == size[::-1] and _turned(split.path(picture)):
                code, said = (
                    "picture-exif-swapped",
                    f"{name} is {size[0]}x{size[1]} upright, but the labels declare it unturned as "
                    f"{declared[0]}x{declared[1]}",
                )
            else:
                code, said = (
                    "picture-size",
                    f"{name} is {size[0]}x{size[1]}, but the labels declare {declared[0]}x{declared[1]}",
                )
            dataset.findings.add(code, said, **_picture_place(dataset, split, picture))  # type: ignore[arg-type]
    split.sizes_wh[picture] = size


def _turned(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def check_boxes(dataset: RawDataset, *, imgsz: tuple[int, int] = (640, 640), queries: int = 300) -> None:
    """Judge every box, and clip or drop what is safely clipped or dropped.

    Afterwards every remaining box is finite, has an area and lies inside its picture, whatever was found.
    """
    for split in dataset.splits.values():
        _check_split(dataset, split, imgsz, queries)


def _check_split(dataset: RawDataset, split: RawSplit, imgsz: tuple[int, int], queries: int) -> None:
    boxes = split.boxes_xyxy_px
    sizes = split.sizes_wh[split.box_pictures].astype(np.float64)
    known = (sizes > 0).all(1)
    finite = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore", over="ignore"):
        wh = boxes[:, 2:] - boxes[:, :2]
        inverted = finite & (wh < -SMALLEST_PX).any(1)
        zero = finite & ~inverted & (wh < SMALLEST_PX).any(1)
        sound = finite & ~inverted & ~zero & np.isfinite(wh).all(1)
        finite &= inverted | zero | sound  # corners so far apart that their distance overflows
        low = np.clip(boxes[:, :2], 0.0, np.where(known[:, None], sizes, np.inf))
        high = np.clip(boxes[:, 2:], 0.0, np.where(known[:, None], sizes, np.inf))
        outside = sound & ((high - low) < SMALLEST_PX).any(1)
        over = np.maximum((low - boxes[:, :2]).max(1), (boxes[:, 2:] - high).max(1)) if len(boxes) else np.zeros(0)
        partly = sound & ~outside & (over > EDGE_PX)

    def add(code: str, rows: NDArray[np.bool_], say: Callable[[int], str]) -> None:
        for row in np.flatnonzero(rows).tolist():
            picture = int(split.box_pictures[row])
            dataset.findings.add(
                code,
                f"{_called(dataset, split, row)} {say(row)}",
                file=split.label_file(picture),
                line=int(split.box_lines[row]),
                image_id=int(split.image_ids[picture]),
                annotation_id=int(split.annotation_ids[row]),
                spot=split.box_spot(row),
            )

    def side(row: int) -> str:
        return f"{_px(wh[row, 0])} wide and {_px(wh[row, 1])} high"

    def size(row: int) -> str:
        return f"{int(sizes[row, 0])}x{int(sizes[row, 1])} picture"

    def corners(row: int) -> str:
        return ", ".join(_px(v) for v in boxes[row].tolist())

    add("box-not-finite", ~finite, lambda row: f"has the corners {corners(row)}")
    add("box-inverted", inverted, lambda row: f"is {side(row)}")
    add("box-zero-size", zero, lambda row: f"is {side(row)}")
    add("box-outside", outside, lambda row: f"at {corners(row)} lies wholly outside its {size(row)}")
    if dataset.format == "yolo":
        partly &= ~_beyond_one(split, sizes)  # said by the reader
    add("box-partly-outside", partly, lambda row: f"at {corners(row)} reaches over the edge of its {size(row)}")

    keep = sound & ~outside
    split.boxes_xyxy_px = np.concatenate([low, high], 1)
    all_kept = bool(keep.all())
    if not all_kept:
        split.keep_boxes(keep)
    _check_sound_boxes(dataset, split, imgsz, queries)


def _beyond_one(split: RawSplit, sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.zeros(len(split.box_pictures), np.bool_)


def _check_sound_boxes(dataset: RawDataset, split: RawSplit, imgsz: tuple[int, int], queries: int) -> None:
    pass


def _called(dataset: RawDataset, split: RawSplit, row: int) -> str:
    name = dataset.categories[int(split.labels[row])].name
    if dataset.format in ("coco", "roboflow"):
        return f"annotation {int(split.annotation_ids[row])} ({name})"
    return f"the box of {name}"


def _px(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def check_structure(dataset: RawDataset) -> None:
    """Check that the splits are there and not empty, and look at the classes over all of them."""
    findings = dataset.findings
    for name, split in dataset.splits.items():
        if not len(split):
            findings.add("split-empty", f"the split {name} has no pictures", file=_split_file(split))
    if not dataset.splits and not any(f.severity == "error" for f in findings):
        findings.add("split-missing", "no split was found", file=dataset.show(dataset.source))
    if dataset.splits and not dataset.categories:
        findings.add("category-none", "no class is named", file=dataset.show(dataset.source))


def _split_file(split: RawSplit) -> str:
    return split.label_files[0] if split.label_files else str(split.root)


def count_codes(findings: Findings) -> dict[str, int]:
    """Return how often each code was found, errors first."""
    counts = Counter(f.code for f in findings)
    return dict(counts)


__all__ = ["Listings", "Spot", "check_boxes", "check_files", "check_structure", "measure_pictures"]

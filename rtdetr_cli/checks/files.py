"""Check the image files of a dataset by folder listings and image headers, without decoding pixels."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.survey import lies_in
from rtdetr_cli.errors import DataError
from rtdetr_cli.images.decode import EXIF_SIDEWAYS, EXIF_TAG, FORMATS, ImageError, image_size
from rtdetr_cli.machine import cpu_count


@dataclass(slots=True)
class Listing:
    """The entries of one folder.

    Attributes:
        inside: whether the folder lies in the dataset, links followed.
        kinds: name -> `file`, `link` or `other`.
        by_lower_case: lower-case name -> names.
    """

    inside: bool
    kinds: dict[str, str] = field(default_factory=dict)
    by_lower_case: dict[str, list[str]] = field(default_factory=dict)

    def variants(self, name: str) -> list[str]:
        """Return the names that differ from `name` in upper and lower case only."""
        return self.by_lower_case.get(name.lower(), [])


class Listings:
    """Folder listings, each read once, so that looking for an image costs no system call."""

    def __init__(self, roots: tuple[Path, ...]) -> None:
        self._roots = [os.path.realpath(root) for root in roots]
        self._listings: dict[str, Listing] = {}

    def contains(self, path: str) -> bool:
        """Return whether a path, links followed, lies in one of the roots."""
        return lies_in(os.path.realpath(path), self._roots)

    def read(self, folder: str) -> Listing:
        """Return the listing of a folder; empty if it cannot be read."""
        listing = self._listings.get(folder)
        if listing is None:
            listing = self._listings[folder] = Listing(self.contains(folder))
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        plain = entry.is_file(follow_symlinks=False)
                        listing.kinds[entry.name] = "file" if plain else "link" if entry.is_symlink() else "other"
                        listing.by_lower_case.setdefault(entry.name.lower(), []).append(entry.name)
            except (OSError, ValueError):
                pass
        return listing


def check_files(dataset: RawDataset) -> None:
    """Check that every image is a file in the dataset's folder; correct names that differ only in case.

    Raises:
        DataError: none of the images exists.
    """
    listings, missing = Listings(dataset.roots), 0
    for split in dataset.splits.values():
        root = str(split.root)
        for image, name in enumerate(split.file_names):
            folder, _, base = name.rpartition("/")
            if name in (".", ".."):
                folder = name
            if folder:
                where = os.path.join(root, folder)
            else:
                where = "/" if name.startswith("/") else root
            listing = listings.read(where)
            variants = listing.variants(base)
            if base not in listing.kinds and len(variants) == 1 and listing.inside:
                base = variants[0]
                split.label_names[image] = name
                split.file_names[image] = f"{folder}/{base}" if folder else base
                message = f"{name} is named {base} on disk"
                dataset.findings.add("image-name-case", message, **image_location(dataset, split, image))
            problem = _file_problem(dataset, listings, where, base)
            if problem is not None:
                code, message = problem
                split.usable[image] = code == "image-elsewhere"
                missing += code == "image-missing"
                dataset.findings.add(code, f"{name} {message}", **image_location(dataset, split, image))
            elif not base.isascii() and not _is_utf8(split.file_names[image]):
                message = f"{name} is not valid UTF-8"
                dataset.findings.add("image-name-encoding", message, **image_location(dataset, split, image))
    _refuse_missing(dataset, missing)


def _refuse_missing(dataset: RawDataset, missing: int) -> None:
    count = sum(map(len, dataset.splits.values()))
    if missing > 1 and missing == count:
        first = next(f for f in dataset.findings if f.code == "image-missing")
        raise DataError(
            f"{dataset.name} has labels for {count:,} images, and none of the images exists: {first.message}",
            hint="pass the folder of the images with --images",
            code="images-missing",
        )


def _file_problem(dataset: RawDataset, listings: Listings, folder: str, name: str) -> tuple[str, str] | None:
    """Return code and message of what makes a file unusable as an image, or of one outside the folder."""
    listing = listings.read(folder)
    if dataset.contained and not listing.inside:
        return "image-outside", "is outside the dataset folder"
    if name in ("", ".", ".."):
        return "image-missing", "is a folder, not an image"
    kind = listing.kinds.get(name)
    if kind is None:
        variants = listing.variants(name)
        alternatives = f", which has {' and '.join(variants)}" if variants else ""
        return "image-missing", f"is not in {dataset.show(Path(folder))}{alternatives}"
    path = os.path.join(folder, name)
    leaves = kind == "link" and not listings.contains(path)
    if dataset.contained and leaves:
        return "image-outside", "is a link that leaves the dataset folder"
    if kind == "link" and not os.path.exists(path):
        return "image-missing", "is a broken link"
    if kind != "file" and not os.path.isfile(path):  # reading a pipe would block forever
        return "image-unreadable", "is a folder, not an image" if os.path.isdir(path) else "is not a regular file"
    if leaves or not listing.inside:
        where = "is a link to a file" if leaves and listing.inside else "is"
        return "image-elsewhere", f"{where} outside the dataset folder"
    return None


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def image_location(
    dataset: RawDataset, split: RawSplit, image: int, *, other: tuple[str, int] | None = None
) -> dict[str, Any]:
    """Return where an image's entry lies, as the arguments of `Findings.add`."""
    file = split.label_file(image)
    return {
        "file": file or dataset.show(split.path(image)),
        "line": int(split.image_lines[image]) if file else 0,
        "image_id": int(split.image_ids[image]),
        "spot": replace(split.image_spot(image), other=other),
    }


def measure_images(dataset: RawDataset, *, all_images: bool = True) -> None:
    """Read the sizes from the images' headers and use them; report where the labels declare another.

    `all_images` is False to read only the images whose labels declare no size.
    """
    for split in dataset.splits.values():
        wanted = np.flatnonzero(split.usable if all_images else split.usable & ~split.declared)
        paths = [split.path(int(i)) for i in wanted]
        with ThreadPoolExecutor(min(16, cpu_count() + 4)) as pool:
            for image, size in zip(wanted.tolist(), pool.map(measure_image, paths, chunksize=64), strict=True):
                if isinstance(size, ImageError):
                    report_unusable(dataset, split, image, size)
                else:
                    report_size(dataset, split, image, size)
        report_undeclared(dataset, split)


def measure_image(path: Path) -> tuple[int, int] | ImageError:
    """Return an image's upright width and height, or why it has none."""
    try:
        return image_size(path)
    except ImageError as error:
        return error


def report_undeclared(dataset: RawDataset, split: RawSplit) -> None:
    """Report once per split that labels declare no image sizes; YOLO labels never do."""
    if split.normalized:
        return
    undeclared = np.flatnonzero(split.usable & ~split.declared)
    if len(undeclared):
        first = int(undeclared[0])
        verb = f"and {len(undeclared) - 1} more have" if len(undeclared) > 1 else "has"
        message = f"{split.file_names[first]} {verb} no size in the labels"
        dataset.findings.add("image-size-undeclared", message, **image_location(dataset, split, first))


def report_unusable(dataset: RawDataset, split: RawSplit, image: int, error: ImageError) -> None:
    """Report an image that cannot be used, and mark it."""
    split.usable[image] = False
    message = error.message.replace(str(split.path(image)), split.file_names[image])
    dataset.findings.add(error.code, message, **image_location(dataset, split, image))


def report_size(
    dataset: RawDataset, split: RawSplit, image: int, size_wh: tuple[int, int], *, sideways: bool | None = None
) -> None:
    """Use an image's real, upright size, and report if the labels declare another.

    Args:
        dataset: gets the finding.
        split: gets the size.
        image: index in the split.
        size_wh: width and height.
        sideways: whether EXIF rotates it by 90 degrees; None looks it up if it matters.
    """
    declared = tuple(split.sizes_wh[image].tolist())
    if split.declared[image] and declared != size_wh:
        name, (width, height) = split.file_names[image], size_wh
        if declared == (height, width) and (is_sideways(split.path(image)) if sideways is None else sideways):
            code = "image-exif-swapped"
            message = f"{name} is {width}x{height} after EXIF rotation, but the labels declare {height}x{width}"
        else:
            code = "image-size"
            message = f"{name} is {width}x{height}, but the labels declare {declared[0]}x{declared[1]}"
        dataset.findings.add(code, message, **image_location(dataset, split, image))
    split.sizes_wh[image] = size_wh


def is_sideways(path: Path, *, unknown: bool = False) -> bool:
    """Return whether EXIF rotates an image by 90 degrees; `unknown` if that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.getexif().get(EXIF_TAG) in EXIF_SIDEWAYS
    except Exception:  # EXIF is untrusted binary data
        return unknown

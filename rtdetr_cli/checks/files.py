"""Check the image files of a dataset by folder listings and image headers, without decoding pixels."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from rtdetr_cli.datasets.label_text import is_utf8
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.survey import is_inside
from rtdetr_cli.errors import DataError
from rtdetr_cli.images.decode import EXIF_SIDEWAYS, EXIF_TAG, FORMATS, ImageError, image_size
from rtdetr_cli.machine import cpu_count


def check_files(dataset: RawDataset) -> None:
    """Check that every image is a file in the dataset's folder; correct names that differ only in case.

    Raises:
        DataError: none of the images exists.
    """
    is_in_dataset = cache(lambda folder: is_inside(folder, dataset.roots))
    missing = 0
    for split in dataset.splits.values():
        for image, name in enumerate(split.file_names):
            folder, base = os.path.split(os.path.join(split.root, name))
            variants = dataset.list_folder(folder).get(base.lower(), {})
            if base not in variants and len(variants) == 1 and is_in_dataset(folder):
                (on_disk,) = variants
                split.label_names[image] = name
                split.file_names[image] = name[: len(name) - len(base)] + on_disk
                base = on_disk
                dataset.report_image(split, image, "image-name-case", f"{name} is named {base} on disk")
            problem = _file_problem(dataset, folder, base, variants, inside=is_in_dataset(folder))
            if problem is not None:
                code, message = problem
                split.usable[image] = code == "image-elsewhere"
                missing += code == "image-missing"
                dataset.report_image(split, image, code, f"{name} {message}")
            elif not is_utf8(split.file_names[image]):
                dataset.report_image(split, image, "image-name-encoding", f"{name} is not valid UTF-8")
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


def _file_problem(
    dataset: RawDataset, folder: str, name: str, variants: dict[str, str], *, inside: bool
) -> tuple[str, str] | None:
    """Return code and message of what makes a file unusable as an image, or of one outside the folder."""
    if dataset.contained and not inside:
        return "image-outside", "is outside the dataset folder"
    if name in ("", ".", ".."):
        return "image-missing", "is a folder, not an image"
    kind = variants.get(name)
    if kind is None:
        alternatives = f", which has {' and '.join(variants)}" if variants else ""
        return "image-missing", f"is not in {dataset.show(Path(folder))}{alternatives}"
    path = os.path.join(folder, name)
    leaves = kind == "link" and not is_inside(path, dataset.roots)
    if dataset.contained and leaves:
        return "image-outside", "is a link that leaves the dataset folder"
    if kind == "link" and not os.path.exists(path):
        return "image-missing", "is a broken link"
    if kind != "file" and not os.path.isfile(path):  # reading a pipe would block forever
        return "image-unreadable", "is a folder, not an image" if os.path.isdir(path) else "is not a regular file"
    if leaves or not inside:
        where = "is a link to a file" if leaves and inside else "is"
        return "image-elsewhere", f"{where} outside the dataset folder"
    return None


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
                    report_unusable(dataset, split, image, size.code, size.message)
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
        dataset.report_image(split, first, "image-size-undeclared", message)


def report_unusable(dataset: RawDataset, split: RawSplit, image: int, code: str, message: str) -> None:
    """Report an image that cannot be used, and mark it."""
    split.usable[image] = False
    dataset.report_image(split, image, code, message.replace(str(split.path(image)), split.file_names[image]))


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
        dataset.report_image(split, image, code, message)
    split.sizes_wh[image] = size_wh


def is_sideways(path: Path, *, unknown: bool = False) -> bool:
    """Return whether EXIF rotates an image by 90 degrees; `unknown` if that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.getexif().get(EXIF_TAG) in EXIF_SIDEWAYS
    except Exception:  # EXIF is untrusted binary data
        return unknown

"""Decode every image of a dataset once, and report what is wrong or unusual about it."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rtdetr_cli.checks.duplicates import THUMBNAIL, Member, all_members, equal_groups, near_groups
from rtdetr_cli.checks.files import report_size, report_undeclared, report_unusable
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.images.decode import (
    EXIF_SIDEWAYS,
    EXIF_TAG,
    EXIF_TRANSPOSES,
    FORMATS,
    SUFFIXES,
    ImageError,
    exif_orientation,
    open_image,
    partly_decoded,
    upright,
)
from rtdetr_cli.machine import cpu_count

HUGE_PIXELS = 50_000_000
MAX_MISSING = 0.25
"""Fraction of its rows that a truncated image may lack to be kept."""

MIN_FRAMES_KNOWN = 5
"""Images whose declared size shows what their boxes refer to, needed to assume the same of the others."""

_MAX_THREADS = 4
"""With more workers than this, processes are faster: only decoding itself releases the interpreter's lock."""

_MIN_IMAGES_PER_PROCESS = 64
"""Images per process below which starting it costs more than it gains."""

_MODES = {
    "image-16bit": "has 16 bits per channel",
    "image-palette": "has a color palette",
    "image-cmyk": "is a CMYK image",
    "image-grey": "is grayscale",
    "image-alpha": "has transparency",
}
"""Findings about the color mode: code -> message."""


@dataclass(slots=True)
class ImageInfo:
    """What is known about one image after decoding it.

    Attributes:
        fault: code and message of what makes it unusable, or None.
        size_wh: width and height of the upright image.
        format: of the content, such as `PNG`.
        mode_codes: codes of the findings about its color mode.
        missing: fraction of the rows that a truncated image lacks, if it is to be kept.
        orientation: the EXIF value; 0 for none.
        frames: more than 1 if it is animated or has pages.
        digest: of the file's bytes.
        thumbnail: 32x32 gray values of the upright image.
    """

    fault: tuple[str, str] | None = None
    size_wh: tuple[int, int] = (0, 0)
    format: str = ""
    mode_codes: tuple[str, ...] = ()
    missing: float | None = None
    orientation: int = 0
    frames: int = 1
    digest: bytes = b""
    thumbnail: bytes = b""


def inspect_image(path: Path) -> ImageInfo:
    """Decode one image and describe it."""
    try:
        data = path.read_bytes()
    except OSError:
        return _without_details(path)
    info = ImageInfo(digest=hashlib.blake2b(data, digest_size=16).digest())
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            info.format = image.format or ""
            info.frames = getattr(image, "n_frames", 1)
            info.mode_codes = _mode_codes(image)
            orientation = info.orientation = exif_orientation(image)
            if image.format == "TIFF":  # Pillow rotates it while loading
                info.orientation = getattr(image, "tag_v2", {}).get(EXIF_TAG, 0)
            if image.mode in ("RGB", "L"):
                image.load()
                info.thumbnail = _thumbnail(image, orientation)
            else:
                info.thumbnail = _thumbnail(open_image(data), 0)
            info.size_wh = image.size[::-1] if orientation in EXIF_SIDEWAYS else image.size
    except Exception:  # `open_image` finds out what is wrong
        return _without_details(path, info.digest)
    return info


def _without_details(path: Path, digest: bytes = b"") -> ImageInfo:
    """Return the fault of an image, or its size alone if it can be decoded after all."""
    try:
        with open_image(path) as image:
            return ImageInfo(size_wh=image.size, digest=digest)
    except ImageError as error:
        return ImageInfo(fault=(error.code, error.message))


def _inspect_truncated(path: Path, info: ImageInfo) -> ImageInfo:
    """Describe an image that cannot be decoded to its end; return `info` if hardly anything is left of it."""
    try:
        with partly_decoded(path) as (image, missing):
            if missing > MAX_MISSING:
                return info
            orientation = exif_orientation(image)
            size = image.size[::-1] if orientation in EXIF_SIDEWAYS else image.size
            return ImageInfo(size_wh=size, format=image.format or "", missing=missing, orientation=orientation)
    except ImageError:
        return info


def _mode_codes(image: Image.Image) -> tuple[str, ...]:
    mode = image.mode
    found = {
        "image-16bit": mode.startswith("I") or _has_16_bits(image),
        "image-palette": mode in ("P", "PA"),
        "image-cmyk": mode == "CMYK",
        "image-grey": mode in ("L", "1", "LA") or mode.startswith("I"),
        "image-alpha": mode in ("RGBA", "LA", "PA", "La", "RGBa") or (mode == "P" and "transparency" in image.info),
    }
    return tuple(code for code, present in found.items() if present)


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether a file with several channels has 16 bits in each, which Pillow reads as eight."""
    for tile in getattr(image, "tile", ()):
        raw = tile.args if isinstance(tile.args, str) else (tile.args[0] if tile.args else "")
        if isinstance(raw, str) and ";16" in raw:
            return True
    return False


def _thumbnail(image: Image.Image, orientation: int) -> bytes:
    width, height = image.size
    small = image.reduce((max(1, width // (2 * THUMBNAIL)), max(1, height // (2 * THUMBNAIL))))
    grey = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).convert("L")
    return upright(grey, orientation).tobytes()


def check_images(
    raw: RawDataset,
    *,
    processes: bool = False,
    progress: Callable[[int, str], AbstractContextManager[Any]] | None = None,
    known: Mapping[Path, ImageInfo] | None = None,
    keep_truncated: bool = False,
) -> dict[Path, ImageInfo]:
    """Decode every image once, however often it is listed, and report what is wrong with it.

    Args:
        raw: gets the findings and the images' sizes.
        processes: use processes instead of threads where that is faster.
        progress: starts a display of so many images, whose `advance` is called for each.
        known: path -> result of an earlier check; these images are not decoded again.
        keep_truncated: describe images that decode except for their end like any other, but report them.

    Returns:
        Path -> result, for every image that is a file.
    """
    by_path = dict(known or {})
    usable = (s.path(image) for s in raw.splits.values() for image in np.flatnonzero(s.usable).tolist())
    paths = list(dict.fromkeys(path for path in usable if path not in by_path))
    with progress(len(paths), "images") if progress else nullcontext() as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings; those that matter become findings
        for path, info in zip(paths, _inspect_all(paths, processes), strict=True):
            by_path[path] = info
            if bar is not None:
                bar.advance()
    for path, info in by_path.items() if keep_truncated else ():
        if info.fault is not None and info.fault[0] == "image-truncated":
            by_path[path] = _inspect_truncated(path, info)
    for split in raw.splits.values():
        for image in np.flatnonzero(split.usable).tolist():
            _report(raw, split, image, by_path[split.path(image)])
        report_undeclared(raw, split)
    _report_ambiguous_orientations(raw, by_path)
    return by_path


def _inspect_all(paths: list[Path], processes: bool) -> Iterator[ImageInfo]:
    count = max(1, min(cpu_count(), len(paths)))
    pool: Executor
    if not processes or count <= _MAX_THREADS or len(paths) < _MIN_IMAGES_PER_PROCESS * count:
        pool = ThreadPoolExecutor(count)
    else:
        pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    with pool:
        yield from pool.map(inspect_image, paths, chunksize=16)


def _report(raw: RawDataset, split: RawSplit, image: int, info: ImageInfo) -> None:
    name = split.file_names[image]

    def add(code: str, message: str) -> None:
        raw.report_image(split, image, code, f"{name} {message}")

    if info.fault is not None:
        report_unusable(raw, split, image, *info.fault)
        return
    if info.missing is not None:
        add("image-truncated", f"is truncated: the lowest {info.missing:.0%} of the image is missing")
    report_size(raw, split, image, info.size_wh, sideways=info.orientation in EXIF_SIDEWAYS)
    if not info.format:
        return
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES.get(info.format, (suffix,)):
        add("image-extension", f"contains a {info.format} image")
    if info.orientation in EXIF_TRANSPOSES:
        add("image-exif-orientation", f"has EXIF orientation {info.orientation}")
    elif info.orientation not in (0, 1):
        add("image-exif-invalid", f"has the invalid EXIF orientation {info.orientation}")
    for code in info.mode_codes:
        add(code, _MODES[code])
    if info.frames > 1:
        add("image-animated", f"has {info.frames} frames")
    width, height = info.size_wh
    if width * height > HUGE_PIXELS:
        add("image-huge", f"is {width}x{height}")


def _label_frames(raw: RawDataset, infos: Mapping[Path, ImageInfo]) -> dict[Member, str]:
    """Return what the boxes of each image with an EXIF orientation refer to: `upright`, `stored`, or "" for unknown.

    The declared size decides, unless it is wrong or the same in both cases: an orientation of 2 to 4 keeps the size,
    and so does any orientation of a square image.
    """
    codes = {f.spot.member: f.code for f in raw.findings if f.code in ("image-exif-swapped", "image-size")}
    frames: dict[Member, str] = {}
    for name, split in raw.splits.items():
        for image in np.flatnonzero(split.usable).tolist():
            info, code = infos[split.path(image)], codes.get((name, image))
            size_differs = info.orientation in EXIF_SIDEWAYS and info.size_wh[0] != info.size_wh[1]
            if info.orientation in EXIF_TRANSPOSES:
                known = size_differs and bool(split.declared[image]) and code != "image-size"
                frames[name, image] = ("stored" if code == "image-exif-swapped" else "upright") if known else ""
    return frames


def labels_are_upright(raw: RawDataset, infos: Mapping[Path, ImageInfo]) -> bool:
    """Return whether most labels refer to the upright image, judged by enough images whose size shows it."""
    frames = Counter(_label_frames(raw, infos).values()) if infos else Counter()
    return frames["upright"] > frames["stored"] and frames["upright"] + frames["stored"] >= MIN_FRAMES_KNOWN


def _report_ambiguous_orientations(raw: RawDataset, infos: Mapping[Path, ImageInfo]) -> None:
    """If the labels of one image ignore its EXIF orientation, report the images whose labels may do so unnoticed."""
    frames = _label_frames(raw, infos)
    if "stored" not in frames.values():
        return
    assumed = "; most labels of this dataset do" if labels_are_upright(raw, infos) else ""
    for (name, image), frame in frames.items():
        if not frame:
            split = raw.splits[name]
            orientation = infos[split.path(image)].orientation
            message = (
                f"{split.file_names[image]} has EXIF orientation {orientation}, and it is unclear "
                f"whether its boxes refer to the upright image{assumed}"
            )
            raw.report_image(split, image, "image-exif-ambiguous", message)


def find_duplicates(raw: RawDataset, infos: Mapping[Path, ImageInfo]) -> tuple[list[list[Member]], list[list[Member]]]:
    """Return groups of images with the same bytes, and groups of nearly identical ones (one of each identical group).

    `infos` are from `check_images`.
    """
    members = all_members(raw)
    info = [infos.get(raw.splits[name].path(image), ImageInfo()) for name, image in members]
    identical = equal_groups(i.digest for i in info)
    copies = {index for group in identical for index in group[1:]}
    rows = [i for i in range(len(members)) if i not in copies and info[i].thumbnail]
    near: list[list[int]] = []
    if rows:
        thumbnails = np.frombuffer(b"".join(info[i].thumbnail for i in rows), np.uint8)
        near = [[rows[i] for i in group] for group in near_groups(thumbnails.reshape(-1, THUMBNAIL, THUMBNAIL))]
    return [[members[i] for i in group] for group in identical], [[members[i] for i in group] for group in near]

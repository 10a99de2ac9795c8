"""Examine a whole dataset: every label, every image to its last pixel, and what they say together."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rtdetr_cli.checks.checks import (
    Member,
    check_boxes,
    check_copies,
    check_equal_splits,
    check_files,
    check_structure,
    check_train,
    groups_by_path,
    image_place,
    measure_images,
    report_fault,
    report_size,
    report_undeclared,
)
from rtdetr_cli.checks.duplicates import THUMB, exact_groups, near_groups
from rtdetr_cli.datasets.findings import SEVERITIES, Spot
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.read import read_raw
from rtdetr_cli.datasets.records import Finding
from rtdetr_cli.images.decode import EXIF_TRANSPOSES, FORMATS, SUFFIXES, ImageError, exif_orientation, open_image

HUGE_PIXELS = 50_000_000
_MANY_CORES = 4
"""Up to here threads do: decoding releases the interpreter's lock. Beyond, its rest would hold the cores back."""

_WORTH_A_PROCESS = 64
"""Images for each process that make up for starting it."""


@dataclass(slots=True)
class Look:
    """What one image is, seen by a worker.

    Attributes:
        fault: code and message of what makes it unusable, or None.
        size_wh: upright.
        format: of the content, such as `PNG`.
        kinds: codes of what one should know about it.
        orientation: the EXIF value; 0 for none.
        frames: 1 unless it is animated or has pages.
        digest: of the file's bytes.
        thumb: 32x32 grey values, upright.
    """

    fault: tuple[str, str] | None = None
    size_wh: tuple[int, int] = (0, 0)
    format: str = ""
    kinds: tuple[str, ...] = ()
    orientation: int = 0
    frames: int = 1
    digest: bytes = b""
    thumb: bytes = b""


@dataclass(slots=True, eq=False)
class Report:
    """What the doctor found.

    Attributes:
        raw: the records; boxes are clipped and those that cannot be used are gone.
        decoded: whether the images were decoded.
        imgsz: height and width that tiny objects were judged at.
        looks: split -> what each image is; empty when they were not decoded.
    """

    raw: RawDataset
    decoded: bool
    imgsz: tuple[int, int]
    looks: dict[str, list[Look]] = field(default_factory=dict)

    @property
    def findings(self) -> Sequence[Finding]:
        """Findings in the order they were made."""
        return self.raw.findings

    @property
    def spots(self) -> Sequence[Spot]:
        """For each finding, where it lies in the records."""
        return self.raw.findings.spots

    def counts(self) -> dict[str, int]:
        """Return how many errors, warnings and infos there are."""
        found = Counter(f.severity for f in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    def by_code(self) -> dict[str, list[int]]:
        """Return code -> positions of its findings, the most severe first; errors first, then the most frequent."""
        groups: dict[str, list[int]] = defaultdict(list)
        for position, finding in enumerate(self.findings):
            groups[finding.code].append(position)
        rank = {s: i for i, s in enumerate(SEVERITIES)}
        for positions in groups.values():
            positions.sort(key=lambda position: rank[self.findings[position].severity])
        return dict(
            sorted(groups.items(), key=lambda item: (rank[self.findings[item[1][0]].severity], -len(item[1]), item[0]))
        )

    def summary(self) -> dict[str, Any]:
        """Return counts of the dataset."""
        raw = self.raw
        boxes = {
            name: np.bincount(s.labels, minlength=len(raw.categories)).tolist() if len(raw.categories) else []
            for name, s in raw.splits.items()
        }
        return {
            "name": raw.name,
            "format": raw.format,
            "source": str(raw.source),
            "pictures": sum(len(s) for s in raw.splits.values()),
            "boxes": sum(len(s.box_images) for s in raw.splits.values()),
            "classes": len(raw.categories),
            "decoded": self.decoded,
            "splits": {name: {"pictures": len(s), "boxes": len(s.box_images)} for name, s in raw.splits.items()},
            "per_class": [
                {"id": c.id, "name": c.name, "boxes": {name: counts[i] for name, counts in boxes.items()}}
                for i, c in enumerate(raw.categories)
            ],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        return {
            "dataset": self.summary(),
            "counts": self.counts(),
            "findings": [
                {
                    "code": f.code,
                    "severity": f.severity,
                    "message": f.message,
                    "file": f.file or None,
                    "line": f.line or None,
                    "image_id": f.image_id,
                    "annotation_id": f.annotation_id,
                    "hint": f.hint,
                }
                for f in self.findings
            ],
        }


def examine(
    source: Path,
    *,
    images: Path | None = None,
    imgsz: tuple[int, int] = (640, 640),
    decode: bool = True,
    workers: int | None = None,
    queries: int = 300,
    processes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Examine a dataset.

    Args:
        source: what `load_splits` takes.
        images: the folder of the images, where it cannot be guessed.
        imgsz: height and width of the network, which decide what is tiny.
        decode: False looks at labels and folder listings only, and at headers where the labels say no size.
        workers: how many images are decoded at once; the cores by default.
        queries: how many objects the network can find in an image.
        processes: on many cores, decode in processes and not in threads; they start the calling program's main module
            anew, so a script must be guarded by `if __name__ == "__main__"`.
        progress: called with the images done and all images.

    Raises:
        DataError: there is no dataset at `source`. Faults of a dataset that is there are findings.
    """
    raw = read_raw(Path(source), images=images)
    check_files(raw)
    report = Report(raw=raw, decoded=decode, imgsz=imgsz)
    if decode:
        report.looks = _look_at_all(raw, workers, processes, progress)
    else:
        measure_images(raw, all_images=False)
    check_boxes(raw, imgsz=imgsz, queries=queries)
    check_structure(raw, to_train=True)
    check_train(raw)
    if decode:
        _check_copies(raw, report.looks)
    else:
        by_path = groups_by_path(raw)
        check_copies(raw, by_path, check_equal_splits(raw, by_path))
    if set(raw.splits) == {"train"} and len(raw.splits["train"]):
        raw.findings.add(
            "split-made",
            f"there is no val split: training draws one from the {len(raw.splits['train'])} images",
            file=raw.main_file(),
        )
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Images


def look(path: str) -> Look:
    """Decode one image and tell what it is."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return _faulty(path)
    found = Look(digest=hashlib.blake2b(data, digest_size=16).digest())
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            found.format = image.format or ""
            found.frames = getattr(image, "n_frames", 1)
            found.kinds = _kinds(image)
            turn = found.orientation = exif_orientation(image)
            if image.format == "TIFF":  # Pillow turns it as it loads
                found.orientation = getattr(image, "tag_v2", {}).get(0x0112, 0)
            if image.mode in ("RGB", "L"):
                image.load()
                decoded: Image.Image = image
            else:
                decoded = open_image(data)
            size = image.size
            turned = 5 <= turn <= 8
            found.size_wh = (size[1], size[0]) if turned else size
            found.thumb = _thumb(decoded, turn if image.mode in ("RGB", "L") else 0)
    except Exception:  # `open_image` knows what each of them means
        return _faulty(path, found.digest)
    return found


def _faulty(path: str, digest: bytes = b"") -> Look:
    try:
        with open_image(Path(path)) as image:
            return Look(size_wh=image.size, digest=digest)
    except ImageError as error:
        return Look(fault=(error.code, error.message))


def _kinds(image: Image.Image) -> tuple[str, ...]:
    mode = image.mode
    kinds = []
    if mode.startswith("I") or _deep(image):
        kinds.append("image-16bit")
    if mode in ("P", "PA"):
        kinds.append("image-palette")
    if mode == "CMYK":
        kinds.append("image-cmyk")
    if mode in ("L", "1", "LA") or mode.startswith("I"):
        kinds.append("image-grey")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or (mode == "P" and "transparency" in image.info):
        kinds.append("image-alpha")
    return tuple(kinds)


def _deep(image: Image.Image) -> bool:
    """Tell whether a file of several channels has 16 bits each, which Pillow reads as eight."""
    for tile in getattr(image, "tile", ()):
        raw = tile.args if isinstance(tile.args, str) else (tile.args[0] if tile.args else "")
        if isinstance(raw, str) and ";16" in raw:
            return True
    return False


def _thumb(image: Image.Image, orientation: int) -> bytes:
    width, height = image.size
    small = image.reduce((max(1, width // (2 * THUMB)), max(1, height // (2 * THUMB))))
    grey = small.resize((THUMB, THUMB), Image.Resampling.BOX).convert("L")
    turn = EXIF_TRANSPOSES.get(orientation)
    return (grey if turn is None else grey.transpose(turn)).tobytes()


def _look_at_all(
    raw: RawDataset, workers: int | None, processes: bool, progress: Callable[[int, int], None] | None
) -> dict[str, list[Look]]:
    """Decode every image once, however often it is listed, and report what is wrong with it."""
    paths: dict[str, None] = {}
    for split in raw.splits.values():
        for image in np.flatnonzero(split.usable).tolist():
            paths[str(split.path(image))] = None
    seen: dict[str, Look] = {}
    if progress is not None:
        progress(0, len(paths))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters becomes a finding
        for path, found in zip(paths, _map(list(paths), workers, processes), strict=True):
            seen[path] = found
            if progress is not None and (len(seen) % 16 == 0 or len(seen) == len(paths)):
                progress(len(seen), len(paths))
    looks: dict[str, list[Look]] = {}
    unused = Look()
    for name, split in raw.splits.items():
        looks[name] = [seen.get(str(split.path(image)), unused) for image in range(len(split))]
        for image in np.flatnonzero(split.usable).tolist():
            _report(raw, split, image, looks[name][image])
        report_undeclared(raw, split)
    return looks


def _map(paths: list[str], workers: int | None, processes: bool) -> Iterator[Look]:
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(workers, len(paths)))
    pool: Executor
    if not processes or count <= _MANY_CORES or len(paths) < _WORTH_A_PROCESS * count:
        pool = ThreadPoolExecutor(count)
    else:
        pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    with pool:
        yield from pool.map(look, paths, chunksize=16)


def _report(raw: RawDataset, split: RawSplit, image: int, found: Look) -> None:
    name = split.file_names[image]

    def add(code: str, said: str) -> None:
        raw.findings.add(code, f"{name} {said}", **image_place(raw, split, image))

    if found.fault is not None:
        code, message = found.fault
        report_fault(raw, split, image, ImageError(message, code=code))
        return
    report_size(raw, split, image, found.size_wh, turned=5 <= found.orientation <= 8)
    if not found.format:
        return
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES.get(found.format, (suffix,)):
        add("image-extension", f"holds a {found.format}")
    if 2 <= found.orientation <= 8:
        add("image-exif-orientation", f"is turned by its EXIF orientation {found.orientation}")
    elif found.orientation not in (0, 1):
        add("image-exif-invalid", f"has an EXIF orientation that is not one ({found.orientation})")
    for kind in found.kinds:
        add(kind, _KINDS[kind])
    if found.frames > 1:
        add("image-animated", f"has {found.frames} frames")
    if found.size_wh[0] * found.size_wh[1] > HUGE_PIXELS:
        add("image-huge", f"is {found.size_wh[0]}x{found.size_wh[1]}")


_KINDS = {
    "image-16bit": "has 16 bits a channel",
    "image-palette": "has a palette",
    "image-cmyk": "is in print colours (CMYK)",
    "image-grey": "is grey",
    "image-alpha": "has transparency",
}


# ---------------------------------------------------------------------------------------------------------------------
# The same image more than once


def members_of(raw: RawDataset) -> list[Member]:
    """Return every image of every split, in order."""
    return [(name, image) for name, split in raw.splits.items() for image in range(len(split))]


def look_alikes(raw: RawDataset, looks: dict[str, list[Look]]) -> tuple[list[list[Member]], list[list[Member]]]:
    """Return groups of images with the same bytes, and groups that look nearly the same (one of each of those)."""
    members = members_of(raw)
    digests = [looks[name][image].digest for name, image in members]
    exact = exact_groups(digests)
    again = {position for group in exact for position in group[1:]}
    rows = [
        position
        for position, (name, image) in enumerate(members)
        if position not in again and len(looks[name][image].thumb) == THUMB * THUMB
    ]
    if not rows:
        return [[members[i] for i in group] for group in exact], []
    thumbs = np.stack(
        [np.frombuffer(looks[members[i][0]][members[i][1]].thumb, np.uint8).reshape(THUMB, THUMB) for i in rows]
    )
    near = near_groups(thumbs)
    return (
        [[members[i] for i in group] for group in exact],
        [[members[rows[i]] for i in group] for group in near],
    )


def _check_copies(raw: RawDataset, looks: dict[str, list[Look]]) -> None:
    exact, near = look_alikes(raw, looks)
    check_copies(raw, exact, check_equal_splits(raw, exact))
    for group in near:
        first_name, first = group[0]
        for name, image in group[1:]:
            split, origin = raw.splits[name], raw.splits[first_name]
            if name == first_name:
                code, said = "image-near-duplicate", f"looks nearly the same as {origin.file_names[first]}"
            else:
                code = "image-near-leak"
                said = f"({name}) looks nearly the same as {origin.file_names[first]} ({first_name})"
            where = image_place(raw, split, image, other=group[0])
            raw.findings.add(code, f"{split.file_names[image]} {said}", **where)

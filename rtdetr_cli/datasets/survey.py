"""List the files of a folder a few levels down, and name what they look like.

The survey decides which layout a dataset has, and says what is there when no layout fits.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rtdetr_cli.images.decode import IMAGE_SUFFIXES
from rtdetr_cli.text import counted

_MAX_DEPTH = 6
_MAX_FILES = 1_000_000
_MAX_LINKED_FILES = 10_000
_EDGE_BYTES = 1 << 16
_SAMPLED = 5
_SKIPPED = frozenset({"__MACOSX", "left-out"})
"""Folders that are not part of a dataset; a repaired copy keeps what it does not use in `left-out/`."""

_NOUNS = {"xml": "XML file", "txt": "text file", "json": "JSON file", "csv": "CSV file", "image": "image"}


@dataclass(slots=True)
class Folder:
    """The files of one folder.

    Attributes:
        path: where it is.
        parts: names of the folders from the surveyed one to this one.
        images: names of image files.
        files: lower-case suffix without its dot -> names of the other files.
    """

    path: Path
    parts: tuple[str, ...]
    images: list[str] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """Return the files with one of these suffixes."""
        return [self.path / name for suffix in suffixes for name in self.files.get(suffix, ())]


@dataclass(slots=True)
class Survey:
    """The folders below `root`, parents before children, each with its files sorted by name.

    Attributes:
        root: the folder.
        folders: all of its folders down to the sixth level, without hidden ones.
        complete: False if there were too many files to list.
    """

    root: Path
    folders: list[Folder]
    complete: bool = True

    def holds_images(self) -> bool:
        """Return whether there is any image."""
        return any(folder.images for folder in self.folders)

    def files(self, *suffixes: str) -> list[Path]:
        """Return all files with one of these suffixes."""
        return [path for folder in self.folders for path in folder.with_suffix(*suffixes)]

    def describe(self) -> str:
        """Return what is there, the most frequent first: `164 XML files in annots/ and 164 images in images/`."""
        counts: Counter[tuple[str, str]] = Counter()
        for folder in self.folders:
            where = "/".join(folder.parts)
            counts["image", where] += len(folder.images)
            for suffix, names in folder.files.items():
                counts[suffix, where] += len(names)
        found = []
        for (kind, where), count in (+counts).most_common(4):
            noun = _NOUNS.get(kind) or (f".{kind} file" if kind else "file without a suffix")
            plural = "files without a suffix" if noun == "file without a suffix" else ""
            found.append(f"{counted(count, noun, plural)}{f' in {where}/' if where else ''}")
        if len(+counts) > 4:
            found.append("others")
        return " and ".join(filter(None, [", ".join(found[:-1]), found[-1]])) if found else "no files"


def survey(root: Path) -> Survey:
    """List the files of a folder and of the folders below it; folders that links lead to count as well."""
    result = Survey(root, [])
    waiting, seen, count = [Folder(root, ())], set[str](), 0
    for position, folder in enumerate(waiting):
        real = os.path.realpath(folder.path)
        if real in seen:
            continue
        seen.add(real)
        result.folders.append(folder)
        try:
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in _SKIPPED:
                        continue
                    if entry.is_dir():
                        if len(folder.parts) < _MAX_DEPTH and (not entry.is_symlink() or _follows(entry.path, root)):
                            # Labels are listed even if there are too many images.
                            first = entry.name.lower() == "annotations"
                            below = Folder(folder.path / entry.name, (*folder.parts, entry.name))
                            waiting.insert(position + 1 if first else len(waiting), below)
                        continue
                    if is_image(entry.name):
                        folder.images.append(entry.name)
                    else:
                        suffix = os.path.splitext(entry.name)[1].lower()
                        folder.files.setdefault(suffix[1:], []).append(entry.name)
                    count += 1
                    if count > _MAX_FILES:
                        result.complete = False
                        return result
        except OSError:
            continue
        folder.images.sort()
        for names in folder.files.values():
            names.sort()
    result.folders.sort(key=lambda folder: folder.parts)
    return result


def is_image(name: str) -> bool:
    """Return whether a file counts as an image, by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _follows(link: str, root: Path) -> bool:
    return is_inside(link, (root,)) or holds_linked_images(Path(link), root)


def is_inside(path: str | Path, roots: Iterable[str | Path]) -> bool:
    """Return whether a path, links followed, lies in one of the folders."""
    real = os.path.realpath(path)
    homes = map(os.path.realpath, roots)
    return any(real == home or real.startswith(home.rstrip(os.sep) + os.sep) for home in homes)


def holds_linked_images(folder: Path, home: Path) -> bool:
    """Return whether a folder that a link in a dataset leads to may hold its images.

    It has to lie beside the dataset's folder `home`, as in public copies of COCO128 with `images -> ../images`, and to
    hold images and nothing else: a downloaded dataset must not make other files of this machine readable.
    """
    around = Path(os.path.realpath(home)).parent
    if around == Path(around.anchor) or not is_inside(folder, (around,)):
        return False
    images, waiting = 0, [(os.path.realpath(folder), 0)]
    for path, depth in waiting:
        try:
            with os.scandir(path) as entries:
                for entry in islice(entries, _MAX_LINKED_FILES):
                    if entry.is_dir(follow_symlinks=False) and depth < 2:
                        waiting.append((entry.path, depth + 1))
                    elif is_image(entry.name):
                        images += 1
                    elif not entry.name.startswith("."):
                        return False
        except OSError:
            return False
    return images > 0


def edges(path: Path) -> bytes:
    """Return the first and the last kilobytes of a file; nothing if it is not a readable file."""
    if not path.is_file():
        return b""
    try:
        with open(path, "rb") as file:
            head = file.read(_EDGE_BYTES)
            file.seek(max(0, path.stat().st_size - _EDGE_BYTES))
            return head + file.read()
    except OSError:
        return b""


_OTHER_FORMATS: tuple[tuple[str, str, str, str], ...] = (
    ("xml", r"<annotations>.*<(version|meta|image)\b", "CVAT XML", "export it from CVAT as COCO 1.0 or YOLO"),
    ("json", r'"classTitle"', "Supervisely JSON", "export it from Supervisely as COCO or Pascal VOC"),
    ("json", r'"(rectanglelabels|polygonlabels|completions)"', "Label Studio JSON", "export as COCO or YOLO"),
    ("json", r'"(_via_img_metadata|shape_attributes)"', "a VGG Image Annotator (VIA) project", "export it as COCO"),
    ("json", r'"coordinates"\s*:\s*\{', "CreateML JSON", "export the labels as COCO or YOLO"),
    ("json", r'"(data_row|DataRow ID|Labeled Data)"', "Labelbox JSON", "convert it to COCO with Labelbox's converter"),
    ("ndjson", r"", "Labelbox NDJSON", "convert it to COCO with Labelbox's converter"),
    ("jsonl", r'"file_name"', "Hugging Face metadata", "export the dataset as COCO, or with YOLO labels"),
    ("csv", r"region_shape_attributes", "a VGG Image Annotator (VIA) CSV", "export the project as COCO"),
    ("csv", r"rle|EncodedPixels", "a CSV of run-length encoded masks", "convert the masks to boxes, as COCO or CSV"),
    ("tfrecord", r"", "TFRecord", "export the dataset as COCO, YOLO or Pascal VOC instead"),
    ("record", r"", "TFRecord", "export the dataset as COCO, YOLO or Pascal VOC instead"),
    ("parquet", r"", "a Parquet table", "export the dataset as COCO, or as image files with YOLO labels"),
    ("arrow", r"", "an Arrow table", "export the dataset as COCO, or as image files with YOLO labels"),
    ("mat", r"", "MATLAB labels", "convert them to COCO, YOLO or Pascal VOC"),
    ("txt", r"^[A-Za-z_]+ [\d.]+ \d \S+( [\d.-]+){10,}", "KITTI labels", "convert them to COCO or YOLO"),
    ("txt", r"^([\d.]+ ){8}\S+ \d", "DOTA labels (rotated boxes)", "convert them to upright boxes, as COCO or YOLO"),
)
"""Suffix, pattern in the text, name and advice for formats that are not read."""

_MASK_WORDS = re.compile(r"segmentation|mask|trimap|label", re.IGNORECASE)


def other_format(found: Survey) -> tuple[str, str] | None:
    """Return the name of a format that is not read, with what to export instead; None if nothing is recognized."""
    suffixes = dict.fromkeys(suffix for suffix, *_ in _OTHER_FORMATS)
    for path in (path for suffix in suffixes for path in found.files(suffix)[:_SAMPLED]):
        if (other := other_format_of(path)) is not None:
            return f"{other[0]} ({path.relative_to(found.root)})", other[1]
    masks = [f for f in found.folders if f.parts and f.images and _MASK_WORDS.search(f.parts[-1])]
    if masks and all(name.lower().endswith(".png") for name in masks[0].images):
        return f"segmentation masks ({'/'.join(masks[0].parts)}/)", "export boxes: COCO, YOLO or Pascal VOC XML"
    with_images = [f for f in found.folders if f.images]
    if len(with_images) > 1 and not found.files("xml", "json", "csv", "txt"):
        names = ", ".join(f.parts[-1] for f in with_images[:3] if f.parts)
        return f"an image classification dataset (folders {names})", "draw boxes with an annotation tool"
    return None


def other_format_of(path: Path) -> tuple[str, str] | None:
    """Return the same for one file."""
    text = edges(path)
    for suffix, pattern, name, advice in _OTHER_FORMATS:
        if path.suffix.lower() == f".{suffix}" and re.search(pattern.encode(), text, re.MULTILINE | re.DOTALL):
            return name, advice
    return None

"""Find images by the end of a path that was written on another machine, with other folders above the dataset."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from functools import cache
from itertools import takewhile
from pathlib import Path

from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.datasets.survey import Survey, holds_linked_images, is_image, is_inside, survey
from rtdetr_cli.text import counted

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_WORD = re.compile(r"[a-z]+")
_OTHER_WORDS = frozenset(
    {
        *("image", "images", "img", "imgs", "jpegimages", "label", "labels", "annotation", "annotations", "annots"),
        *("instances", "xml", "xmls", "set", "list", "files", "data", "coco", "yolo", "voc"),
    }
)
"""Words in the name of a folder that say nothing about the split."""


def split_of(name: str) -> str | None:
    """Return the split that a name contains: `instances_val2017` is val."""
    words = _WORD.findall(name.lower())
    return next((split for split, known in SPLIT_WORDS.items() if any(word in known for word in words)), None)


def split_of_parts(parts: Iterable[str]) -> str | None:
    """Return the split that the names of folders say, the innermost first; `train_station` is no split."""
    for part in reversed(tuple(parts)):
        words = set(_WORD.findall(part.lower())) - _OTHER_WORDS
        if len(words) == 1 and (split := split_of(part)) is not None:
            return split
    return None


class ImageIndex:
    """The images below a folder, found by the longest unambiguous end of a path, or by their name if that is unique."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._by_stem: dict[str, list[tuple[str, ...]]] = {}
        for path in paths:
            parts = tuple(path.split("/"))
            self._by_stem.setdefault(_stem(parts[-1]), []).append(parts)

    def find(self, name: str, split: str = "") -> str | None:
        """Return the path of an image.

        Args:
            name: its path as the labels name it; its suffix may be missing.
            split: decides between images that are otherwise equal.
        """
        wanted = [part for part in name.lower().replace("\\", "/").split("/") if part]
        if not wanted:
            return None
        candidates = self._by_stem.get(_stem(wanted[-1]), [])
        if _stem(wanted[-1]) != wanted[-1]:
            candidates = [parts for parts in candidates if parts[-1].lower() == wanted[-1]]
        ends = [common_start(wanted[-2::-1], map(str.lower, parts[-2::-1])) for parts in candidates]
        best = [parts for parts, end in zip(candidates, ends, strict=True) if end == max(ends)]
        if len(best) > 1:
            best = [parts for parts in best if split_of_parts(parts[:-1]) == split]
        return "/".join(best[0]) if len(best) == 1 else None


def _stem(name: str) -> str:
    """Return a lower-case name without the suffix of an image."""
    return os.path.splitext(name.lower())[0] if is_image(name) else name.lower()


def common_start(a: Iterable[str], b: Iterable[str]) -> int:
    """Return how many elements two sequences have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def index_images(found: Survey) -> ImageIndex:
    """Return the index of all images of a survey, by their paths relative to its root."""
    return ImageIndex("/".join((*folder.parts, name)) for folder in found.folders for name in folder.images)


def find_moved_images(raw: RawDataset, folder: Path) -> None:
    """Replace the paths of images that don't exist by those of images in `folder` with the same end of the path."""
    index: ImageIndex | None = None
    for split in raw.splits.values():
        missing = _missing(raw, split)
        if not missing or not split.root.is_relative_to(folder):
            continue
        index = index or index_images(survey(folder))
        moved = {i: path for i in missing if (path := index.find(split.file_names[i], split.split)) is not None}
        if not moved:
            continue
        first = next(iter(moved))
        example = f"{split.file_names[first]} is {moved[first]}"
        report_moved(raw, len(moved), example, split.label_file(first), int(split.image_lines[first]))
        prefix = split.root.relative_to(folder).parts
        split.label_names |= {i: split.file_names[i] for i in moved}
        split.file_names = [moved.get(i) or os.path.join(*prefix, name) for i, name in enumerate(split.file_names)]
        split.root = folder


def report_moved(raw: RawDataset, count: int, example: str, file: str, line: int = 0) -> None:
    """Report images that were found by the end of their path."""
    message = f"names {counted(count, 'image')} by another path, found by the end of it: {example}"
    raw.findings.add("image-path-moved", message, file=file, line=line)


def _missing(raw: RawDataset, split: RawSplit) -> list[int]:
    """Return the images that are not in the folder that their path names, upper and lower case apart."""

    @cache
    def listed(folder: str) -> Collection[str]:
        path = os.path.join(split.root, folder)
        return raw.list_folder(path) if is_inside(path, raw.roots) else ()

    missing = []
    for image, name in enumerate(split.file_names):
        folder, slash, base = name.rpartition("/")
        if base.lower() not in listed(folder or slash):
            missing.append(image)
    return missing


def is_linked(raw: RawDataset, folder: Path) -> bool:
    """Return whether a folder in the dataset is a link to a folder beside the dataset that holds only images."""
    lexical = Path(os.path.normpath(folder))
    in_dataset = any(lexical.is_relative_to(os.path.normpath(root)) for root in raw.roots)
    return in_dataset and holds_linked_images(folder, raw.folder)


def may_read(raw: RawDataset, path: Path) -> bool:
    """Return whether the files below a path are read: any that the user's own labels name, but none outside a zip."""
    return not raw.contained or is_inside(path, raw.roots) or is_linked(raw, path)


def allow_linked_images(raw: RawDataset) -> None:
    """Make the folders that such links lead to roots of the dataset."""
    folders = {split.root / name.rpartition("/")[0] for split in raw.splits.values() for name in split.file_names}
    for folder in folders:
        if not is_inside(folder, raw.roots) and is_linked(raw, folder):
            raw.roots = (*raw.roots, Path(os.path.realpath(folder)))

"""Name and copy the images of a dataset that is written."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path, PurePosixPath

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.images.decode import IMAGE_SUFFIXES, usual_suffix

CONTROL = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Unicode categories that neither a line of text nor XML can hold."""


def image_names(dataset: Dataset, *, flat: bool, stems: bool, used: set[str]) -> list[str]:
    """Return a name below the split's folder for each image.

    Args:
        dataset: one split.
        flat: no subfolders, and nothing that a line of text cannot hold.
        stems: two images may not differ in their suffix alone, since they would share a label file; and each must have
            a known suffix, since other files in a folder don't count as images.
        used: names (or stems) that exist already; gets the new ones.
    """
    files = [PurePosixPath(dataset.file_names[i]) for i in range(len(dataset))]
    mixed = len({file.is_absolute() for file in files}) > 1
    common = os.path.commonpath([str(f.parent) for f in files]) if files and not mixed else ""
    result = []
    for index, file in enumerate(files):
        short = file.relative_to(common) if common and common != "." else file
        text = str(short)
        if flat or short.is_absolute() or ".." in short.parts:
            text = "__".join(part for part in short.parts if part not in ("/", ".."))
        stem, suffix = text[: len(text) - len(file.suffix)], file.suffix
        if stems and suffix.lower() not in IMAGE_SUFFIXES:
            stem, suffix = text, usual_suffix(dataset.path(index))
        if flat:
            stem = _one_line(stem)
        unique, number = stem, 2
        while (unique if stems else unique + suffix).lower() in used:
            unique, number = f"{stem}_{number}", number + 1
        used.add((unique if stems else unique + suffix).lower())
        result.append(unique + suffix)
    return result


def _one_line(name: str) -> str:
    """Return a name that fits in a line of text: bytes that are not UTF-8 become `%E4`, line breaks `_`."""
    characters = []
    for c in name.strip():
        kind = unicodedata.category(c)
        characters.append(f"%{ord(c) - 0xDC00:02X}" if kind == "Cs" else "_" if kind in CONTROL else c)
    return "".join(characters)


def copy_image(dataset: Dataset, index: int, to: Path) -> None:
    """Copy one image, with the folders it needs."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(dataset.path(index), to)

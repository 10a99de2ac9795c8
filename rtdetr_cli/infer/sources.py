"""What `predict` is given, as a list of images and videos: files, folders, patterns, and a list on stdin."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.images.decode import IMAGE_SUFFIXES

_VIDEOS = ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts"
VIDEO_SUFFIXES = frozenset(_VIDEOS.split())


@dataclass(frozen=True, slots=True)
class Source:
    """One image or video.

    Attributes:
        path: as the user gave it, or below the folder that the user gave.
        name: path without suffix, relative and unique among the sources: where its results go.
        video: True for a video.
    """

    path: Path
    name: Path
    video: bool = False


def find_sources(words: Sequence[str], listed: Iterable[str] = ()) -> list[Source]:
    """Return the images and videos that words mean, in that order, each file once.

    A word is a file, a folder (searched through, sorted by name), a pattern such as `shots/*.jpg` in quotes, or `-`
    for one path a line from `listed`. A file that is named must exist when it is the only word; among several, or in
    a list, it is kept and its reader will say what is wrong with it.

    Args:
        words: of the command line.
        listed: lines of stdin, taken when a word is `-`.

    Raises:
        DataError: nothing is there: a missing file, a folder without images, a pattern that nothing matches.
        UsageError: an address, which is not read yet.
    """
    paths: list[tuple[Path, Path]] = []  # file, base of its name
    for word in words:
        if word == "-":
            lines = [line.strip("\r\n") for line in listed]
            paths.extend((Path(line), Path(line).parent) for line in lines if line.strip())
        else:
            paths.extend(_expand(word, alone=len(words) == 1))
    if not paths:
        raise DataError("the list on stdin is empty", hint="ls images/*.jpg | rtdetr predict -", code="no-images")
    found: list[Source] = []
    seen: set[str] = set()
    taken: set[str] = set()
    for path, base in paths:
        # The same file twice (a folder and an image in it) is one image; symbolic links are taken at their word.
        key = os.path.abspath(path)
        if key in seen:
            continue
        seen.add(key)
        stem = path.relative_to(base).with_suffix("") if path.is_relative_to(base) else Path(path.stem)
        name, number = stem, 1
        while str(name).casefold() in taken:
            number += 1
            name = stem.with_name(f"{stem.name}_{number}")
        taken.add(str(name).casefold())
        found.append(Source(path, name, path.suffix.lower() in VIDEO_SUFFIXES))
    return found


def _expand(word: str, *, alone: bool) -> list[tuple[Path, Path]]:
    path = Path(word)
    if path.is_dir():
        files = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and p.is_file() and not p.name.startswith(".")
        )
        if not files:
            raise DataError(
                f"the folder {word} holds no images or videos",
                hint=f"looked for {' '.join(sorted(IMAGE_SUFFIXES))} {_VIDEOS}",
                code="no-images",
            )
        return [(p, path) for p in files]
    if path.exists():
        return [(path, path.parent)]
    if "://" in word:
        raise UsageError(f"{word} is an address, and only files are read", hint="fetch it first, then name the file")
    if glob.has_magic(word):
        matched = sorted(Path(p) for p in glob.glob(word, recursive=True) if Path(p).is_file())
        if not matched:
            raise DataError(f"the pattern {word} matches no file", hint=_pattern_hint(path), code="no-images")
        return [(p, p.parent) for p in matched]
    if alone:
        raise DataError(f"{word} does not exist", hint=_missing_hint(path), code="image-missing")
    return [(path, path.parent)]


def _pattern_hint(pattern: Path) -> str:
    """Say what lies in the folder that a pattern begins with."""
    folder = pattern.parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    where = "this folder" if folder == Path() else str(folder)
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    if found:
        return f"{where} holds {', '.join(found[:3])}" + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return f"{where} holds no images or videos; {folder / '**' / '*.jpg'} looks in the folders below it too"


def _missing_hint(path: Path) -> str:
    if path.parent.is_dir():
        return f"the folder {path.parent} is there, but no file of this name is in it"
    return f"the folder {path.parent} does not exist either"

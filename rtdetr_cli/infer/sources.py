"""Expand the sources of `predict` to images and videos: files, folders, patterns, and a list on stdin."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.images.decode import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"))
_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


@dataclass(frozen=True, slots=True)
class Source:
    """One image or video.

    Attributes:
        path: the path as given, or a path below a given folder.
        name: relative path without suffix, unique among the sources; its results get this name.
        video: whether it is a video.
    """

    path: Path
    name: Path
    video: bool = False


def find_sources(words: Sequence[str], listed: Iterable[str] = ()) -> list[Source]:
    """Return the images and videos that words stand for, in order, each file once.

    A word is a file, a folder (searched recursively, sorted by name), a quoted pattern such as `shots/*.jpg`, or `-`
    for the paths in `listed`. A single word must exist. One of several files may be missing: reading it fails later.

    Args:
        words: of the command line.
        listed: lines of stdin, used when a word is `-`.

    Raises:
        DataError: a missing file, a folder without images, or a pattern that matches no file.
        UsageError: an URL.
    """
    paths: list[tuple[Path, Path]] = []  # a file, and the folder that its name is relative to
    for word in words:
        if word == "-":
            lines = [line.strip("\r\n") for line in listed]
            paths.extend((Path(line), Path(line).parent) for line in lines if line.strip())
        else:
            paths.extend(_expand(word, alone=len(words) == 1))
    if not paths:
        raise DataError("the list on stdin is empty", hint="ls images/*.jpg | rtdetr predict -", code="no-images")
    sources: dict[str, Source] = {}
    used_names: set[str] = set()
    for path, base in paths:
        key = os.path.abspath(path)  # symbolic links are not resolved
        if key in sources:
            continue
        stem = path.relative_to(base).with_suffix("") if path.is_relative_to(base) else Path(path.stem)
        name, number = stem, 1
        while str(name).casefold() in used_names:
            number += 1
            name = stem.with_name(f"{stem.name}_{number}")
        used_names.add(str(name).casefold())
        sources[key] = Source(path, name, path.suffix.lower() in VIDEO_SUFFIXES)
    return list(sources.values())


def _is_source(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def _expand(word: str, *, alone: bool) -> list[tuple[Path, Path]]:
    path = Path(word)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _is_source(p) and p.is_file())
        if not files:
            raise DataError(
                f"the folder {word} contains no images or videos",
                hint=f"looked for {' '.join(sorted(IMAGE_SUFFIXES) + sorted(VIDEO_SUFFIXES))}",
                code="no-images",
            )
        return [(p, path) for p in files]
    if path.exists():
        return [(path, path.parent)]
    if "://" in word:
        raise UsageError(f"{word} is a URL; predict reads files only", hint="download it first, then name the file")
    if glob.has_magic(word):
        matches = sorted(Path(p) for p in glob.glob(word, recursive=True) if Path(p).is_file())
        if not matches:
            raise DataError(f"the pattern {word} matches no file", hint=_pattern_hint(path), code="no-images")
        return [(p, p.parent) for p in matches]
    if alone:
        folder = "exists, but has no such file" if path.parent.is_dir() else "does not exist either"
        raise DataError(f"{word} does not exist", hint=f"the folder {path.parent} {folder}", code="image-missing")
    return [(path, path.parent)]


def _pattern_hint(pattern: Path) -> str:
    """Return what the fixed folder at the start of a pattern contains."""
    folder = pattern.parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    name = "this folder" if folder == Path() else str(folder)
    files = sorted(p.name for p in folder.iterdir() if _is_source(p))
    if files:
        return f"{name} contains {', '.join(files[:3])}" + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return f"{name} contains no images or videos; {folder / '**' / '*.jpg'} matches in subfolders too"

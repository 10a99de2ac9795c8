"""Expand the sources of `predict` to images and videos: files, folders, patterns, web addresses, a list on stdin."""

from __future__ import annotations

import glob
import itertools
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.files import missing_path_hint
from rtdetr_cli.images.decode import IMAGE_SUFFIXES, ImageError
from rtdetr_cli.text import abbreviate

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"))
_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
_DATASET_SUFFIXES = (".zip", ".json", ".yaml", ".yml", ".csv")
URL_SECONDS = 30.0
URL_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """One image or video.

    Attributes:
        path: the path as given, or a path below a given folder; of a web address the file name at its end.
        name: relative path without suffix, unique among the sources; its results get this name.
        video: whether it is a video.
        url: the web address of an image, which is fetched when it is read.
    """

    path: Path
    name: Path
    video: bool = False
    url: str = ""

    def __str__(self) -> str:
        return self.url or str(self.path)


def find_sources(words: Sequence[str], listed: Iterable[str] = ()) -> list[Source]:
    """Return the images and videos that words stand for, in order, each file once.

    A word is a file, a folder (searched recursively, sorted by name), a quoted pattern such as `shots/*.jpg`, the web
    address of an image, or `-` for the lines in `listed`. A single word must exist. One of several files may be
    missing: reading it fails later, as for a web address.

    Raises:
        DataError: a missing file, a folder without images, or a pattern that matches no file.
        UsageError: a web address that is not of an image.
    """
    found: list[tuple[Path, Path, str]] = []  # a file, the folder that its name is relative to, and its web address
    for word in words:
        lines = [line.strip("\r\n") for line in listed] if word == "-" else [word]
        for line in filter(str.strip, lines):
            if is_url(line):
                path = _name_of_url(line)
                found.append((path, path.parent, line))
            elif word == "-":
                found.append((Path(line), Path(line).parent, ""))
            else:
                found.extend((path, base, "") for path, base in _expand(word, alone=len(words) == 1))
    if not found:
        raise DataError("the list on stdin is empty", hint="ls images/*.jpg | rtdetr predict -", code="no-images")
    sources: dict[str, Source] = {}
    used = {"classes": False}  # the list of classes is a result too
    for path, base, url in found:
        key = url or os.path.abspath(path)  # symbolic links are not resolved
        if key in sources:
            continue
        inside = path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
        stem = inside.with_suffix("") if inside.name not in ("", "..") else Path("image")
        video = path.suffix.lower() in VIDEO_SUFFIXES
        sources[key] = Source(path, _unique_name(stem, used, video=video), video, url)
    return list(sources.values())


def _unique_name(stem: Path, used: dict[str, bool], *, video: bool) -> Path:
    """Return a name as it is, or with a number that makes it different from all earlier ones.

    `used` has the earlier names, and whether each is that of a video, whose frames have names as well.
    """
    name = stem
    for number in itertools.count(2):
        folded = str(name).casefold()
        frame = re.fullmatch(r"(.*)_[0-9]{6,}", folded, re.DOTALL)
        is_frame = frame is not None and used.get(frame[1], False)
        has_frames = video and any(re.fullmatch(re.escape(folded) + "_[0-9]{6,}", other) for other in used)
        if folded not in used and not is_frame and not has_frames:
            used[folded] = video
            break
        name = stem.with_name(f"{stem.name}_{number}")
    return name


def is_url(word: str) -> bool:
    """Return whether a word is an address and not a file."""
    return "://" in word and not os.path.exists(word)


def _name_of_url(url: str) -> Path:
    """Return the file name at the end of a web address.

    Raises:
        UsageError: it is not http or https, or it ends like a video.
    """
    from urllib.parse import unquote, urlsplit

    try:
        parts = urlsplit(url)
        name = Path(PurePosixPath(unquote(parts.path)).name.replace("\0", "") or parts.hostname or "")
    except ValueError:
        parts, name = urlsplit(""), Path()
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url} is not a web address that can be read", hint="http://... or https://... of an image")
    if name.suffix.lower() in VIDEO_SUFFIXES:
        raise UsageError(f"{url} is a video: only images are read from the web", hint="download it, then pass the file")
    return name


def fetch_image(url: str, *, seconds: float = URL_SECONDS, most_bytes: int = URL_BYTES) -> bytes:
    """Download an image, within limits of the time of the whole download and of its size.

    Raises:
        ImageError: the server cannot be reached, does not answer in time, refuses, or sends too much.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from rtdetr_cli.version import __version__

    deadline = time.monotonic() + seconds
    content = bytearray()
    try:
        request = Request(url, headers={"User-Agent": f"rtdetr-cli/{__version__}"})
        with urlopen(request, timeout=seconds) as response:
            while part := response.read1(1 << 16):
                content += part
                if len(content) > most_bytes:
                    raise ImageError(f"{url} is larger than {most_bytes / 1e6:.0f} MB", code="url-too-large")
                if time.monotonic() > deadline:
                    raise TimeoutError
            missing = response.length
    except TimeoutError:
        raise ImageError(f"{url} was not received within {seconds:g} seconds", code="url-timeout") from None
    except HTTPError as error:
        error.close()
        raise ImageError(f"{url} cannot be read: HTTP {error.code} {error.reason}", code="url-refused") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ImageError(
            f"{url} cannot be read: {getattr(reason, 'strerror', None) or reason}", code="url-unreachable"
        ) from None
    if missing:
        raise ImageError(f"{url} is truncated: {missing} bytes are missing", code="url-unreachable")
    return bytes(content)


def _is_source(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def _expand(word: str, *, alone: bool) -> list[tuple[Path, Path]]:
    """Return the files that a word stands for, each with the folder that its name is relative to."""
    path = Path(word)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _is_source(p) and p.is_file())
        if not files:
            raise DataError(
                f"the folder {word} contains no images or videos",
                hint=f"supported: {' '.join(sorted(IMAGE_SUFFIXES) + sorted(VIDEO_SUFFIXES))}",
                code="no-images",
            )
        return [(p, path) for p in files]
    if path.exists():
        if alone and path.suffix.lower() in _DATASET_SUFFIXES:
            raise DataError(
                f"{word} is not an image or video",
                hint=f"datasets are for: rtdetr eval --data {word}, or rtdetr validate {word}",
                code="image-unreadable",
            )
        return [(path, path.parent)]
    if glob.has_magic(word):
        matches = sorted(Path(p) for p in glob.glob(word, recursive=True) if Path(p).is_file())
        if not matches:
            raise DataError(f"the pattern {word} matches no file", hint=_pattern_hint(path), code="no-images")
        return [(p, p.parent) for p in matches]
    if alone:
        raise DataError(f"{word} does not exist", hint=missing_path_hint(path), code="image-missing")
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
        return f"{name} contains {abbreviate(files, 3)}"
    return f"{name} contains no images or videos; {folder / '**' / '*.jpg'} matches in subfolders too"

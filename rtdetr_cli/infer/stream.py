"""Images and videos through a backend in batches: decoding runs ahead in threads, results come in order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.images.decode import ImageError, read_image, stretch
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.prefetch import read_ahead

Key = TypeVar("Key")
WHOLE, FRAMES_AMISS = 0.95, 2  # share of a video below which it is cut off, and frames that are never missed


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One image after the network.

    Attributes:
        position: in the list given, or the frame's number from 0.
        image: (H, W, 3) uint8 RGB, the upright original; None when it could not be read or was not to be kept.
        found: raw detections, or None when the image could not be read.
        error: why not.
        seconds: the image's share of the network's time.
    """

    position: int
    image: NDArray[np.uint8] | None
    found: Detections | None
    error: ImageError | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    position: int
    original: NDArray[np.uint8] | None
    stretched: NDArray[np.uint8] | None
    size_wh: tuple[int, int]
    error: ImageError | None = None


def detect_images(
    backend: Backend,
    images: Sequence[Path | NDArray[np.uint8]],
    *,
    batch: int = 1,
    keep: bool = False,
    threads: int | None = None,
) -> Generator[Seen, None, None]:
    """Run a backend over files or arrays, in order; an unreadable file comes back with its error.

    Args:
        backend: the model.
        images: paths, or upright (H, W, 3) uint8 RGB arrays.
        batch: images in one run of the network.
        keep: hand the original images back, for drawing.
        threads: that decode.
    """

    def ready(job: tuple[int, Path | NDArray[np.uint8]]) -> _Ready:
        position, source = job
        try:
            image = read_image(source) if isinstance(source, Path) else source
        except ImageError as error:
            return _Ready(position, None, None, (0, 0), error)
        return _prepare(position, image, backend.imgsz, keep)

    threads = 1 if len(images) == 1 else threads
    # Twice the batch must be able to wait, or the network would wait for the second half of each.
    jobs = read_ahead(ready, enumerate(images), threads=threads, ahead=max(4, 2 * batch))
    yield from _through(backend, jobs, batch)


def detect_frames(backend: Backend, video: Video, *, batch: int = 1, keep: bool = True) -> Generator[Seen, None, None]:
    """Run a backend over the frames of a video, in order."""

    def ready(position: int) -> _Ready | None:
        frame = video.read()
        return None if frame is None else _prepare(position, frame, backend.imgsz, keep)

    # One thread, since frames come out of a video in their order only.
    frames = read_ahead(ready, itertools.count(), threads=1, ahead=max(4, 2 * batch))
    yield from _through(backend, _until_none(frames), batch)


class Video:
    """A video file being read."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            ImageError: missing, or not a video that OpenCV decodes.
            EnvironmentProblem: OpenCV is not installed.
        """
        try:
            import cv2
        except ImportError:
            raise EnvironmentProblem(
                "videos need OpenCV, which is not installed",
                hint="pip install opencv-python-headless",
                code="package-missing",
            ) from None
        if not path.is_file():
            raise ImageError(f"{path} does not exist", code="image-missing")
        self.path = path
        log = cv2.utils.logging
        level = log.getLogLevel()
        log.setLogLevel(log.LOG_LEVEL_SILENT)  # what is wrong with the file is said below, in our words
        try:
            self._capture: Any = cv2.VideoCapture(str(path))
        finally:
            log.setLogLevel(level)
        first = self._grab()
        if first is None:
            self._capture.release()
            raise ImageError(f"{path} does not decode as a video", code="video-unreadable")
        self._first: NDArray[np.uint8] | None = first
        self.size_wh: tuple[int, int] = (first.shape[1], first.shape[0])
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.rate = rate if 0.1 <= rate <= 1000 else 25.0
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.frames = count if count > 0 else None  # what the container claims
        self.frames_read = 0
        self._position_property = cv2.CAP_PROP_POS_MSEC
        self._milliseconds = float(self._capture.get(self._position_property))  # at which the last frame stands

    def read(self) -> NDArray[np.uint8] | None:
        """Return the next frame as (H, W, 3) uint8 RGB, or None at the end."""
        first, self._first = self._first, None
        frame = first if first is not None else self._grab()
        if frame is not None:
            self.frames_read += 1
            if first is None:
                self._milliseconds = float(self._capture.get(self._position_property))
        return frame

    @property
    def ends_early(self) -> bool:
        """True when, at the end, clearly fewer frames were there than the container claims.

        Some containers only estimate their frames, from duration and rate: a whole video of varying rate has fewer,
        but its last frame stands near the end of the duration, and that of a file that was cut off does not.
        """
        if self.frames is None or self.frames - self.frames_read <= FRAMES_AMISS:
            return False
        duration = 1000 * self.frames / self.rate
        return max(self.frames_read / self.frames, self._milliseconds / duration) < WHOLE

    def _grab(self) -> NDArray[np.uint8] | None:
        there, frame = self._capture.read()
        return np.ascontiguousarray(frame[:, :, ::-1]) if there else None

    def close(self) -> None:
        """Let go of the file."""
        self._capture.release()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prepare(position: int, image: NDArray[np.uint8], hw: tuple[int, int], keep: bool) -> _Ready:
    size = (image.shape[1], image.shape[0])
    return _Ready(position, image if keep else None, stretch(image, hw), size)


def _through(backend: Backend, jobs: Iterator[_Ready], batch: int) -> Generator[Seen, None, None]:
    """Gather what is ready into batches, run them, and hand everything on in its order."""
    waiting: list[_Ready] = []

    def flush() -> Generator[Seen, None, None]:
        good = [job for job in waiting if job.stretched is not None]
        found: Iterator[Detections] = iter(())
        share = 0.0
        if good:
            start = time.perf_counter()
            images = np.stack([job.stretched for job in good if job.stretched is not None])
            found = iter(backend.run(images, np.array([job.size_wh for job in good], np.int64)))
            share = (time.perf_counter() - start) / len(good)
        for job in waiting:
            if job.error is not None:
                yield Seen(job.position, None, None, job.error)
            else:
                yield Seen(job.position, job.original, next(found), None, share)
        waiting.clear()

    try:
        for job in jobs:
            waiting.append(job)
            if sum(w.stretched is not None for w in waiting) >= batch or len(waiting) >= 4 * batch:
                yield from flush()
        yield from flush()
    finally:
        close: Callable[[], None] | None = getattr(jobs, "close", None)
        if close is not None:
            close()


def _until_none(items: Iterable[Key | None]) -> Iterator[Key]:
    try:
        for item in items:
            if item is None:
                return
            yield item
    finally:
        close: Callable[[], None] | None = getattr(items, "close", None)
        if close is not None:
            close()

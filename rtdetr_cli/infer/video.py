"""Read and write videos with OpenCV."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.documents import require_regular
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.files import atomic_write
from rtdetr_cli.images.decode import ImageError

MIN_SHARE = 0.95
"""A video of which less than this share can be read is truncated."""

MAX_MISSING_FRAMES = 2
"""A video of which no more than this number of frames is missing is complete."""


_CONTAINER = re.compile(
    rb"....(ftyp|moov|mdat|wide|free|skip)|RIFF....AVI |\x1a\x45\xdf\xa3|\x00\x00\x01[\xb3\xba]|\x30\x26\xb2\x75|FLV|"
    rb"\x47.{187}\x47|....\x47.{191}\x47",
    re.DOTALL,
)
"""How MP4, AVI, Matroska, MPEG, WMV, FLV and transport streams begin."""


def _require_container(path: Path) -> None:
    """Refuse a file that does not begin like a video: FFmpeg would take text for a list of other files to play.

    Raises:
        ImageError: it is missing, or not a video.
    """
    try:
        os.fsencode(path).decode()
        require_regular(path)
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist", code="image-missing") from None
    except UnicodeDecodeError:
        raise ImageError(f"{path} cannot be opened as a video: its name is not UTF-8; rename it") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}", code="video-unreadable") from None
    if not _CONTAINER.match(start):
        raise ImageError(f"{path} is not a video", code="video-unreadable")


class Video:
    """A video file that is being read.

    Attributes:
        size_wh: width and height of a frame in pixels.
        rate: frames per second.
        frames: the number of frames that the container states; None where it does not.
        frames_read: the number of frames read so far.
    """

    def __init__(self, path: Path) -> None:
        """Open a video.

        Raises:
            ImageError: the file is missing, or OpenCV cannot decode it.
        """
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # our own error says what is wrong with the file
        import cv2

        _require_container(path)
        log = cv2.utils.logging
        level = log.getLogLevel()
        log.setLogLevel(log.LOG_LEVEL_SILENT)
        try:
            # An absolute path is not taken for an address or for the name of a camera.
            self._capture: Any = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
        finally:
            log.setLogLevel(level)
        first = self._decode()
        if first is None:
            self._capture.release()
            raise ImageError(f"{path} does not decode as a video", code="video-unreadable")
        self._first: NDArray[np.uint8] | None = first
        self.size_wh: tuple[int, int] = (first.shape[1], first.shape[0])
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.rate = rate if 0.1 <= rate <= 1000 else 25.0
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.frames = count if count > 0 else None
        self.frames_read = 0
        self._time_property = cv2.CAP_PROP_POS_MSEC
        self._milliseconds = float(self._capture.get(self._time_property))  # time of the last frame

    def read(self) -> NDArray[np.uint8] | None:
        """Return the next frame as (H, W, 3) uint8 RGB, or None at the end."""
        first, self._first = self._first, None
        frame = first if first is not None else self._decode()
        if frame is not None:
            self.frames_read += 1
            if first is None:
                self._milliseconds = float(self._capture.get(self._time_property))
        return frame

    @property
    def truncated(self) -> bool:
        """Whether, at the end, clearly fewer frames were read than the container states.

        Some containers only estimate the number from duration and rate, so a complete video of variable rate has
        fewer frames; but its last frame is near the end of the duration, and that of a truncated file is not.
        """
        if self.frames is None or self.frames - self.frames_read <= MAX_MISSING_FRAMES:
            return False
        duration = 1000 * self.frames / self.rate
        return max(self.frames_read / self.frames, self._milliseconds / duration) < MIN_SHARE

    def _decode(self) -> NDArray[np.uint8] | None:
        success, frame = self._capture.read()
        return np.ascontiguousarray(frame[:, :, ::-1]) if success else None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()


@contextmanager
def write_video(path: Path, *, size_wh: tuple[int, int], rate: float) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Write an `.mp4`, which appears under its name when it is complete; give a function that adds one RGB frame.

    Raises:
        RtdetrError: OpenCV cannot write the file.
    """
    import cv2

    def add_frame(frame: NDArray[np.uint8]) -> None:
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    with atomic_write(path) as temporary:
        mp4 = temporary.with_suffix(".mp4")  # OpenCV chooses the container by the suffix
        writer = cv2.VideoWriter(str(mp4), cv2.VideoWriter.fourcc(*"mp4v"), rate, size_wh)
        try:
            if not writer.isOpened():
                raise RtdetrError(f"{path} cannot be written as a video", code="video-write")
            yield add_frame
            writer.release()
            mp4.replace(temporary)
        finally:
            writer.release()
            mp4.unlink(missing_ok=True)

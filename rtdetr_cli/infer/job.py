"""A whole prediction as a stream of typed events: what was found, what was drawn, what could not be read."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.images.decode import ImageError
from rtdetr_cli.images.draw import draw_boxes
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.prefetch import read_ahead
from rtdetr_cli.infer.selection import Selection
from rtdetr_cli.infer.sources import Source
from rtdetr_cli.infer.stream import Seen, Video, detect_frames, detect_images
from rtdetr_cli.infer.write import VideoFile, save_image, saved_name


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """An image, or a frame of a video, is done.

    Attributes:
        source: the image or the video.
        found: what was found and selected.
        seconds: its share of the network's time.
        frame: its number from 0; None for an image.
        best: the highest score of the wanted classes, also where it is below the threshold.
    """

    source: Source
    found: Detections
    seconds: float
    frame: int | None = None
    best: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unreadable:
    """An image or video could not be read."""

    source: Source
    error: ImageError


def predict_images(
    sources: Sequence[Source],
    backend: Backend,
    selection: Selection,
    *,
    batch: int = 1,
    draw_to: Path | None = None,
) -> Generator[Predicted | Unreadable, None, None]:
    """Predict images in their order; annotated copies are drawn and written in threads.

    Args:
        sources: images, no videos.
        backend: the model.
        selection: which rows count.
        batch: images in one run of the network.
        draw_to: folder of the annotated copies, or None for none.
    """

    def finish(seen: Seen) -> Predicted | Unreadable:
        source = sources[seen.position]
        if seen.found is None:
            return Unreadable(source, seen.error or ImageError(f"{source.path} cannot be read"))
        found = selection.apply(seen.found)
        if draw_to is not None and seen.image is not None:
            save_image(_drawn(seen, found), draw_to / saved_name(source))
        return Predicted(source, found, seen.seconds, best=selection.best(seen.found))

    seen = detect_images(backend, [s.path for s in sources], batch=batch, keep=draw_to is not None)
    with closing(seen):
        if draw_to is None:
            yield from map(finish, seen)
        else:
            yield from read_ahead(finish, seen)


def predict_video(
    source: Source,
    video: Video,
    backend: Backend,
    selection: Selection,
    *,
    batch: int = 1,
    draw_to: Path | None = None,
) -> Generator[Predicted, None, None]:
    """Predict a video frame by frame; the annotated copy gets its name when it is whole."""
    seen_frames = detect_frames(backend, video, batch=batch, keep=draw_to is not None)
    with closing(seen_frames):
        if draw_to is None:
            for seen in seen_frames:
                assert seen.found is not None
                found = selection.apply(seen.found)
                yield Predicted(source, found, seen.seconds, seen.position, selection.best(seen.found))
            return

        def draw(seen: Seen) -> tuple[Seen, Detections, NDArray[np.uint8]]:
            assert seen.found is not None
            found = selection.apply(seen.found)
            return seen, found, _drawn(seen, found)

        with VideoFile(draw_to / saved_name(source), size_wh=video.size_wh, rate=video.rate) as copy:
            for seen, found, frame in read_ahead(draw, seen_frames):
                copy.add(frame)
                assert seen.found is not None
                yield Predicted(source, found, seen.seconds, seen.position, selection.best(seen.found))


def _drawn(seen: Seen, found: Detections) -> NDArray[np.uint8]:
    assert seen.image is not None
    return draw_boxes(seen.image, found.boxes_xyxy_px, found.labels, found.names, scores=found.scores)

"""Detect objects in images and videos in batches: reading runs ahead in threads, results come in order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.images.decode import ImageError
from rtdetr_cli.infer.backend import Backend, run_checked
from rtdetr_cli.infer.detections import Detections, save_image
from rtdetr_cli.infer.prefetch import ImageSource, Prefetched, prefetch, prepare, read_ahead
from rtdetr_cli.infer.selection import Selection
from rtdetr_cli.infer.sources import Source
from rtdetr_cli.infer.video import Video, write_video
from rtdetr_cli.infer.write import saved_name


class Detected(NamedTuple):
    """What the network found in an image.

    Attributes:
        item: the image as it was read.
        detections: all rows, not yet selected; None for an image that could not be read.
        seconds: the image's share of the network's time.
    """

    item: Prefetched
    detections: Detections | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """The selected detections of an image or of a video frame.

    Attributes:
        source: the image or the video.
        detections: the selected rows.
        seconds: the image's share of the network's time.
        frame: number of the frame from 0; None for an image.
        best_score: the highest score of the requested classes, even below the threshold; None without a row.
    """

    source: Source
    detections: Detections
    seconds: float
    frame: int | None = None
    best_score: float | None = None


def detect_images(
    backend: Backend, images: Sequence[ImageSource], *, batch: int = 1, keep: bool = False
) -> Generator[Detected, None, None]:
    """Run a backend over images in order, `batch` at a time; `keep` returns the originals too."""
    ahead = max(4, 2 * batch)  # with less than two batches, the network would wait for the rest of each
    return _run_batches(backend, prefetch(images, backend.imgsz, ahead=ahead, keep=keep), batch)


def predict_images(
    sources: Sequence[Source],
    backend: Backend,
    selection: Selection,
    *,
    batch: int = 1,
    draw_to: Path | None = None,
) -> Generator[Predicted | ImageError, None, None]:
    """Predict images in order, or give the error of one that cannot be read.

    Threads draw annotated copies and write them to `draw_to`.
    """

    def finish(result: Detected) -> Predicted | ImageError:
        source = sources[result.item.position]
        if result.item.error is not None:
            return result.item.error
        predicted = _select(source, result, selection)
        if draw_to is not None:
            save_image(_draw(result, predicted), draw_to / saved_name(source))
        return predicted

    results = detect_images(backend, [s.url or s.path for s in sources], batch=batch, keep=draw_to is not None)
    with closing(results):
        yield from map(finish, results) if draw_to is None else read_ahead(finish, results)


def predict_video(
    source: Source,
    video: Video,
    backend: Backend,
    selection: Selection,
    *,
    batch: int = 1,
    draw_to: Path | None = None,
) -> Generator[Predicted, None, None]:
    """Predict a video frame by frame; the annotated copy gets its name when it is complete."""

    def read(position: int) -> Prefetched | None:
        frame = video.read()
        return None if frame is None else prepare(position, frame, backend.imgsz, keep=draw_to is not None)

    def frames() -> Generator[Prefetched, None, None]:
        # One thread, since frames can only be decoded in order.
        with closing(read_ahead(read, itertools.count(), threads=1, ahead=max(4, 2 * batch))) as items:
            while (item := next(items)) is not None:
                yield item

    def finish(result: Detected) -> tuple[Predicted, NDArray[np.uint8] | None]:
        predicted = _select(source, result, selection, frame=result.item.position)
        return predicted, None if draw_to is None else _draw(result, predicted)

    with closing(_run_batches(backend, frames(), batch)) as results:
        if draw_to is None:
            yield from (finish(result)[0] for result in results)
            return
        with write_video(draw_to / saved_name(source), size_wh=video.size_wh, rate=video.rate) as add_frame:
            for predicted, drawn in read_ahead(finish, results):
                assert drawn is not None
                add_frame(drawn)
                yield predicted


def _select(source: Source, result: Detected, selection: Selection, frame: int | None = None) -> Predicted:
    assert result.detections is not None
    selected, best = selection.apply(result.detections), selection.best_score(result.detections)
    return Predicted(source, selected, result.seconds, frame, best)


def _draw(result: Detected, predicted: Predicted) -> NDArray[np.uint8]:
    assert result.item.original is not None
    return predicted.detections.plot(result.item.original)


def _run_batches(
    backend: Backend, items: Generator[Prefetched, None, None], batch: int
) -> Generator[Detected, None, None]:
    """Collect images into batches, run them, and yield the results in order."""
    with closing(items):
        waiting: list[Prefetched] = []
        for item in items:
            waiting.append(item)
            if sum(w.error is None for w in waiting) >= batch or len(waiting) >= 4 * batch:
                yield from _run_batch(backend, waiting)
                waiting.clear()
        yield from _run_batch(backend, waiting)


def _run_batch(backend: Backend, items: Sequence[Prefetched]) -> Iterator[Detected]:
    readable = [item for item in items if item.error is None]
    detections: Iterator[Detections] = iter(())
    seconds = 0.0
    if readable:
        start = time.perf_counter()
        images = np.stack([item.image for item in readable if item.image is not None])
        detections = iter(run_checked(backend, images, np.array([item.size_wh for item in readable], np.int64)))
        seconds = (time.perf_counter() - start) / len(readable)
    for item in items:
        yield Detected(item) if item.error is not None else Detected(item, next(detections), seconds)

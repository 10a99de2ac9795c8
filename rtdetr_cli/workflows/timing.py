"""Measure the latency of a backend.

One run takes a batch from its image files to `Detections`, and is timed in three parts. Preprocessing reads and
stretches the images and converts them to the network's input, in one thread. The network is the runtime's own call;
on a GPU the clock waits for it to finish. Post-processing is the rest. Warm-up runs are not counted. The figures are
the median and the 90th percentile of single runs.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.images.decode import read_image, stretch
from rtdetr_cli.infer.backend import Backend

PARTS = ("preprocess", "network", "postprocess", "total")
MAX_IMAGES = 16  # more than one, since a single image would stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and 90th percentile of single runs, in milliseconds."""

    median: float
    p90: float


def measure(
    backend: Backend, sources: Sequence[Path | bytes], *, batch: int, warmup: int, runs: int
) -> dict[str, Spread]:
    """Measure a backend.

    Args:
        backend: opened; it is unchanged afterwards.
        sources: image files, or their bytes; the runs cycle through them.
        batch: images per run.
        warmup: runs that are not counted.
        runs: runs that are counted.

    Returns:
        `PARTS` to their spread.
    """
    supply = itertools.cycle(sources)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    with _network_clock(backend) as clock:
        for number in range(warmup + runs):
            start = time.perf_counter()
            images = [read_image(source) for source in itertools.islice(supply, batch)]
            sizes = np.array([(image.shape[1], image.shape[0]) for image in images], np.int64)
            backend.run(np.stack([stretch(image, backend.imgsz) for image in images]), sizes)
            clock.wait()
            end = time.perf_counter()
            if number >= warmup:
                seconds = (clock.start - start, clock.end - clock.start, end - clock.end, end - start)
                for part, value in zip(PARTS, seconds, strict=True):
                    times[part].append(1000 * value)
    return {part: Spread(float(np.median(t)), float(np.quantile(t, 0.9))) for part, t in times.items()}


class _Clock:
    """When the network last started and ended; `wait` waits for the device."""

    def __init__(self) -> None:
        self.start = self.end = 0.0
        self.wait: Callable[[], None] = lambda: None


@contextmanager
def _network_clock(backend: Any) -> Iterator[_Clock]:
    """Record when the backend's network starts and ends."""
    clock = _Clock()

    def begin(*_: Any) -> None:
        clock.wait()
        clock.start = time.perf_counter()

    def finish(*_: Any) -> None:
        clock.wait()
        clock.end = time.perf_counter()

    if backend.kind == "torch":
        if backend.device.type == "cuda":
            import torch

            clock.wait = lambda: torch.cuda.synchronize(backend.device)
        hooks = [backend.model.register_forward_pre_hook(begin), backend.model.register_forward_hook(finish)]
        try:
            yield clock
        finally:
            for hook in hooks:
                hook.remove()
        return

    infer = backend.infer

    def timed(feeds: Any) -> Any:
        begin()
        outputs = infer(feeds)
        finish()
        return outputs

    backend.infer = timed
    try:
        yield clock
    finally:
        backend.infer = infer


def images_to_time(dataset: Dataset | None) -> list[Path | bytes]:
    """Return images spread over the split; without one, a synthetic JPEG of 640 x 480 pixels."""
    if dataset is not None and len(dataset):
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(MAX_IMAGES, len(dataset))).astype(int))
        return [dataset.path(int(i)) for i in chosen]
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(stretch(coarse, (480, 640))).save(stream, "JPEG", quality=90)
    return [stream.getvalue()]

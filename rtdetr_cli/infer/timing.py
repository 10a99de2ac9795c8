"""Measure the latency of a backend.

One run takes a batch from its image files to `Detections`, and is timed in three parts. Preprocessing reads and
stretches the images and converts them to the network's input, in one thread. The network is the runtime's own call;
on a GPU the clock waits for it to finish. Post-processing is the rest. The figures are the median and the 90th
percentile of single runs.
"""

from __future__ import annotations

import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset, image_paths, spread
from rtdetr_cli.images.decode import read_image, stretch
from rtdetr_cli.infer.backend import Backend

PARTS = ("preprocess", "network", "postprocess", "total")
UNSTABLE = 0.2
ROUNDS = 3  # in which the networks of a comparison take turns
MAX_IMAGES = 16  # more than one, since a single image would stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and 90th percentile of single runs, in milliseconds.

    `drift` is the difference between the medians of the first and the second half of the runs, as a share of `median`.
    """

    median: float
    p90: float
    drift: float = 0.0

    @classmethod
    def of(cls, milliseconds: NDArray[np.float64]) -> Spread:
        """Return the spread of single runs, in the order in which they ran."""
        median = float(np.median(milliseconds))
        halves = [float(np.median(half)) for half in np.array_split(milliseconds, 2) if len(half)]
        return cls(median, float(np.quantile(milliseconds, 0.9)), abs(halves[0] - halves[-1]) / median)

    @property
    def unsteadiness(self) -> float:
        """How far the 90th percentile or the two halves are apart, as a share of the median."""
        return max(self.p90 / self.median - 1, self.drift)

    @property
    def unstable(self) -> bool:
        """Whether the runs differ so much that the median says little."""
        return self.unsteadiness > UNSTABLE


def measure(
    backend: Backend, sources: Sequence[Path | bytes], *, batch: int, warmup: int, runs: int
) -> dict[str, Spread]:
    """Measure a backend; return `PARTS` to their spread.

    Args:
        backend: opened; it is unchanged afterwards.
        sources: image files, or their bytes; the runs cycle through them.
        batch: images per run.
        warmup: runs that are not counted.
        runs: runs that are counted.
    """
    supply = itertools.cycle(sources)
    wait = _device_wait(backend)
    times = []
    with _network_marks(backend, wait) as marks:
        for _ in range(warmup + runs):
            marks.clear()
            start = time.perf_counter()
            images = [read_image(source) for source in itertools.islice(supply, batch)]
            sizes = np.array([(image.shape[1], image.shape[0]) for image in images], np.int64)
            backend.run(np.stack([stretch(image, backend.imgsz) for image in images]), sizes)
            wait()
            end = time.perf_counter()
            times.append((marks[0] - start, marks[-1] - marks[0], end - marks[-1], end - start))
    columns = 1000 * np.array(times[warmup:]).T
    return {part: Spread.of(column) for part, column in zip(PARTS, columns, strict=True)}


def measure_steadily(
    backend: Backend, sources: Sequence[Path | bytes], *, batch: int, warmup: int, runs: int
) -> dict[str, Spread]:
    """Measure a backend as `measure` does, a second time if the total is unstable; return the steadier result."""
    times = measure(backend, sources, batch=batch, warmup=warmup, runs=runs)
    if times["total"].unstable:
        again = measure(backend, sources, batch=batch, warmup=warmup, runs=runs)
        times = min(times, again, key=lambda result: result["total"].unsteadiness)
    return times


def latencies(backends: Sequence[Backend], sources: Sequence[Path | bytes]) -> list[float]:
    """Return the median milliseconds of one run of each network, with full batches.

    The networks take turns, so that other load on the machine slows all of them equally.
    """
    rounds = [
        [
            measure(backend, sources, batch=backend.fixed_batch or 1, warmup=2, runs=6)["network"].median
            for backend in backends
        ]
        for _ in range(ROUNDS)
    ]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _device_wait(backend: Any) -> Callable[[], None]:
    """Return a function that waits until the device has finished; the graph runtimes wait by themselves."""
    if backend.kind == "torch" and backend.device.type == "cuda":
        import torch

        return lambda: torch.cuda.synchronize(backend.device)
    return lambda: None


@contextmanager
def _network_marks(backend: Any, wait: Callable[[], None]) -> Iterator[list[float]]:
    """Append to the list when each call of the backend's network starts and ends."""
    marks: list[float] = []
    owner, name = (backend.model, "forward") if backend.kind == "torch" else (backend, "infer")
    original = getattr(owner, name)

    def timed(*inputs: Any) -> Any:
        wait()
        marks.append(time.perf_counter())
        outputs = original(*inputs)
        wait()
        marks.append(time.perf_counter())
        return outputs

    setattr(owner, name, timed)
    try:
        yield marks
    finally:
        delattr(owner, name)  # it covered the method of the class


def images_to_time(images: Dataset | Sequence[Path] | None) -> list[Path | bytes]:
    """Return some of the images, at even distances; without any, a synthetic JPEG of 640 x 480 pixels."""
    if images is not None and len(images):
        paths = image_paths(images)
        return [paths[i] for i in spread(len(paths), MAX_IMAGES)]
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(stretch(coarse, (480, 640))).save(stream, "JPEG", quality=90)
    return [stream.getvalue()]

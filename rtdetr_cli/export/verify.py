"""Verify an export: run it and its model on the same images, and compare what they detect.

A verdict has three parts. The contract: names, types and shapes of the tensors, class list and preprocessing, and on
synthetic images every row, every batch size and every position in a batch. The agreement: matched detections of the
model and of the export. The AP of both on the same images, where there are labels. Nothing in here knows a file format:
it sees two backends.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset, image_paths, spread
from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.classes import map_classes
from rtdetr_cli.evaluate.coco import coco_metrics
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.export.compare import (
    LIMITS,
    SCORE_FLOOR,
    Limits,
    Part,
    compare_detections,
    compare_headers,
    compare_rows,
    match_images,
)
from rtdetr_cli.export.synthetic import synthetic_image
from rtdetr_cli.images.decode import stretch
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.graph import first_line
from rtdetr_cli.infer.prefetch import prefetch
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import ModelHeader

MAX_IMAGES = 200
MIN_BATCH = 8  # images in a batch whose independence is checked
SMALL_BATCH = 3  # a dynamic batch is also checked at this size
SQUARE = 1000  # pixels
MAX_SINGLE_IMAGES = 8  # images that are also run alone: each costs a whole batch where the batch is fixed
BATCH_SHARE = 0.95  # of detections that must stay the same when only the other images of a batch change

Result = TypeVar("Result")
Predictions = dict[int, Detections]
"""The detections of every readable image, by its position among the verification images."""


@dataclass(frozen=True, slots=True)
class ImageRun:
    """Verification has run a model on one more image."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of verifying one export; `half` is the agreement of its float16 twin (see `export.fp16`)."""

    precision: str
    limits: Limits
    images: int
    contract: Part
    agreement: Part
    ap: Part
    half: Part | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name."""
        parts = {"contract": self.contract, "agreement": self.agreement, "half": self.half, "ap": self.ap}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def failed_parts(self) -> tuple[str, ...]:
        """Names of the parts that failed."""
        return tuple(name for name, part in self.parts.items() if part.passed is False)

    @property
    def passed(self) -> bool:
        """True when no part failed."""
        return not self.failed_parts

    @property
    def summary(self) -> str:
        """One line: the main figures of a pass, or every finding."""
        if not self.passed:
            return "; ".join(f"{name}: {finding}" for name, part in self.parts.items() for finding in part.findings)
        figures = self.agreement.figures
        text = f"{figures.get('matched', 0):.3f} matched ({figures.get('detections', 0)} detections)"
        if self.ap.passed is not None:
            text += f", AP {self.ap.figures['ap_model']:.3f} -> {self.ap.figures['ap_export']:.3f}"
        return text + f" on {counted(self.images, 'image')}"

    @property
    def weakness(self) -> str:
        """Why a pass proves little, where the model detects hardly anything; else empty."""
        best = self.agreement.figures.get("best_score", 1.0)
        if best >= SCORE_FLOOR:
            return ""
        return f"the model's best score is {best:.3f}: it detects hardly anything, so a matching export proves little"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the main figures, then the parts."""
        return {
            "passed": self.passed,
            "matched": self.agreement.figures.get("matched"),
            "ap_model": self.ap.figures.get("ap_model"),
            "ap_export": self.ap.figures.get("ap_export"),
            "precision": self.precision,
            "pictures": self.images,
            "limits": asdict(self.limits),
            **{name: part.to_json() for name, part in self.parts.items()},
        }


class Reference:
    """A model and the images that its exports are verified on. The model is run once, however many exports follow."""

    def __init__(self, backend: Backend, images: Dataset | Sequence[Path], *, max_images: int = MAX_IMAGES) -> None:
        """Choose all of the images, or `max_images` at even distances; raise DataError where there is none.

        Args:
            backend: the model, not folded, cast or otherwise changed for deployment.
            images: a split with labels, or paths of images without.
            max_images: how many to use at most.
        """
        if not len(images):
            raise DataError("there is no image to verify the export on", code="no-images")
        chosen, paths = spread(len(images), max_images), image_paths(images)
        self.backend = backend
        self.dataset = images.subset(chosen) if isinstance(images, Dataset) else None
        self.paths = [paths[i] for i in chosen]
        self._predictions: Predictions = {}
        self._synthetic: list[Detections] = []

    def predictions(self) -> Generator[ImageRun, None, Predictions]:
        """Return the model's predictions, computed on the first call; raise DataError where no image can be read."""
        if not self._predictions:
            with full_float32():
                self._predictions = yield from predict(self.backend, self.paths)
        if not self._predictions:
            raise DataError(f"none of the {len(self.paths)} verification images can be read, such as {self.paths[0]}")
        return self._predictions

    def synthetic(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[Detections]]:
        """Return the first synthetic images with the model's detections, which are computed once.

        Returns:
            images (count, H, W, 3), stretched to the model's input; the sizes before (count, 2) as width, height;
            the detections.
        """
        originals = [synthetic_image(number) for number in range(count)]
        images = np.stack([stretch(image, self.backend.imgsz) for image in originals])
        sizes = np.array([(image.shape[1], image.shape[0]) for image in originals], np.int64)
        with full_float32():
            for start in range(len(self._synthetic), count, MIN_BATCH):
                rows = slice(start, min(start + MIN_BATCH, count))
                self._synthetic += self.backend.run(images[rows], sizes[rows])
        return images, sizes, self._synthetic[:count]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Turn off TF32 (cuDNN's default on a GPU), which has 11 bits: the model is the reference."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def verify(
    candidate: Backend,
    reference: Reference,
    *,
    tol_ap: float | None = None,
    problems: Sequence[str] = (),
    half_twin: Backend | None = None,
) -> Generator[ImageRun, None, Verdict]:
    """Run the whole check of one export against its model, and return the verdict.

    Args:
        candidate: the export, opened from its file; its header states the precision, which chooses the limits. One
            that resizes in the graph is given whole images.
        reference: the model and the images.
        tol_ap: maximum AP difference, instead of the limits' own.
        problems: violations of the contract that the caller knows already, such as of `compare_interfaces`.
        half_twin: for float16, a backend that really computes in float16 (see `export.fp16`).
    """
    precision = str(candidate.header.extra.get("precision", "fp32"))
    limits = LIMITS["resized" if _takes_whole_images(candidate) and precision == "fp32" else precision]
    if tol_ap is not None:
        limits = replace(limits, tol_ap=tol_ap)
    expected = yield from reference.predictions()
    try:
        predictions = yield from predict(candidate, reference.paths)
    except Exception as error:  # each runtime raises its own kind
        contract = check_contract(candidate, reference, limits, problems)
        failed = Part(False, (f"the export does not run: {first_line(error)}",))
        return Verdict(precision, limits, len(expected), contract, failed, Part(None))
    outside = check_rows(expected, predictions, len(candidate.header.names))
    contract = check_contract(candidate, reference, limits, [*problems, *outside])
    agreement = compare_detections(list(expected.values()), list(predictions.values()), limits)
    half = None
    if half_twin is not None:
        twin = yield from predict(half_twin, reference.paths)
        half = compare_detections(list(expected.values()), list(twin.values()), limits)
    ap = compare_ap(reference, expected, predictions, candidate.header, limits)
    return Verdict(precision, limits, len(expected), contract, agreement, ap, half)


def result_of(events: Generator[object, None, Result], advance: Callable[[], None] = lambda: None) -> Result:
    """Run a generator to its end, call `advance` with each event, and return its result."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        advance()


def predict(backend: Backend, paths: Sequence[Path]) -> Generator[ImageRun, None, Predictions]:
    """Return the detections of every readable image. Images are run in full batches."""
    predictions: Predictions = {}
    whole = _takes_whole_images(backend)
    readable = (item for item in prefetch(paths, backend.imgsz, keep=whole) if item.error is None)
    while items := list(itertools.islice(readable, 1 if whole else images_per_run(backend))):
        images = [item.original if whole else item.image for item in items]
        sizes = np.array([item.size_wh for item in items], np.int64)
        detections = backend.run(np.stack(images), sizes)  # type: ignore[arg-type]
        for item, found in zip(items, detections, strict=True):
            predictions[item.position] = found
            yield ImageRun()
    return predictions


def _takes_whole_images(backend: Backend) -> bool:
    """Return whether a graph resizes by itself, and so takes one image of any size at a time."""
    return bool(backend.header.extra.get("preprocess_in_graph"))


def images_per_run(backend: Backend) -> int:
    """Return how many images to pass at once: at least `MIN_BATCH`, in full batches, so that every position is tested.

    A graph for one, two or three images gets several runs: an image's detections must not depend on the run before.
    """
    batch = backend.fixed_batch or getattr(backend, "largest_batch", None) or MIN_BATCH
    return int(batch * math.ceil(MIN_BATCH / batch))


def check_contract(candidate: Backend, reference: Reference, limits: Limits, problems: Sequence[str]) -> Part:
    """Check an export's header, rows and batches against the model's, on synthetic images."""
    count = images_per_run(candidate)
    findings = [*compare_headers(candidate.header, reference.backend.header), *problems]
    figures: dict[str, Any] = {"batch": candidate.fixed_batch or "dynamic", "probed": count}
    if candidate.imgsz == reference.backend.imgsz:  # another size is in the findings already
        images, sizes, expected = reference.synthetic(count)
        try:
            together = candidate.run(images, sizes)
        except Exception as error:  # each runtime raises its own kind
            findings.append(f"a batch of {count} does not run: {first_line(error)}")
        else:
            different, compared = compare_rows(expected, together, limits)
            findings += [*different, *check_batches(candidate, images, sizes, together, limits)]
            figures |= compared
    return Part(not findings, tuple(findings), figures)


def check_rows(expected: Predictions, predictions: Predictions, class_count: int) -> list[str]:
    """Return what is wrong with the labels and the number of rows of an export's detections."""
    findings = []
    labels = np.concatenate([d.labels for d in predictions.values()])
    outside = labels[(labels < 0) | (labels >= class_count)]
    if len(outside):
        findings.append(f"the label {outside[0]} is out of range ({class_count} classes: 0-{class_count - 1})")
    counts = [(len(predictions[i]), len(d)) for i, d in expected.items() if i in predictions]
    fewer = next(((actual, wanted) for actual, wanted in counts if actual < wanted), None)
    if fewer is not None:
        findings.append(f"the export gives {fewer[0]} detections per image, the model {fewer[1]}")
    return findings


def check_batches(
    candidate: Backend,
    images: NDArray[np.uint8],
    sizes_wh: NDArray[np.int64],
    together: Sequence[Detections],
    limits: Limits,
) -> list[str]:
    """Return what changes with the other images of a batch, and whether boxes follow the size of each image.

    Every image is run alone, in another order and in a small batch, and compared with a full batch (`together`); one
    image is repeated.
    """
    count = len(images)
    order, single_rows = np.arange(count), spread(count, MAX_SINGLE_IMAGES)

    def run(rows: NDArray[np.int64]) -> list[Detections]:
        return candidate.run(images[rows], sizes_wh[rows])

    def share(first: Sequence[Detections], second: Sequence[Detections]) -> float:
        match = match_images(first, second, limits)
        return match.matched / match.rows if match.rows else 1.0

    step = "a batch of 1"
    try:
        single = [run(np.array([row]))[0] for row in single_rows]
        step = f"a batch of {count} in another order"
        backwards = run(order[::-1])[::-1]
        step = f"one image {count} times"
        first, *repeated = run(np.zeros(count, np.int64))
        step = f"a batch of {SMALL_BATCH}"
        small = run(order[:SMALL_BATCH]) if candidate.fixed_batch is None else together[:SMALL_BATCH]
        step = f"a batch of {count} square images"
        square = candidate.run(images, np.full_like(sizes_wh, SQUARE))
    except Exception as error:  # each runtime raises its own kind
        return [f"{step} does not run: {first_line(error)}"]
    scaled = [
        replace(d, boxes_xyxy_px=(d.boxes_xyxy_px * np.tile(size, 2) / SQUARE).astype(np.float32))
        for d, size in zip(square, sizes_wh, strict=True)
    ]
    dependent = "images of a batch are not independent"
    shares = {
        f"{dependent} (one alone, and in a batch of {count})": share(single, [together[row] for row in single_rows]),
        f"{dependent} (another order)": share(together, backwards),
        f"{dependent} (a batch of {SMALL_BATCH}, and of {count})": share(small, together[:SMALL_BATCH]),
        "the boxes do not scale with the width and height of each image": share(scaled, together),
        f"one image repeated {count} times gives different detections": min(share([first], [d]) for d in repeated),
    }
    return [
        f"{problem}: only {value:.3f} of the detections stay the same"
        for problem, value in shares.items()
        if value < BATCH_SHARE
    ]


def compare_ap(
    reference: Reference, expected: Predictions, predictions: Predictions, header: ModelHeader, limits: Limits
) -> Part:
    """Compare the AP of a model and its export, where the images have labels."""
    dataset = reference.dataset
    if dataset is None:
        return Part(None, (), {"why_not": "the images have no labels"})
    if not len(dataset.labels):
        return Part(None, (), {"why_not": "none of the images has a labelled object"})
    if any((d.labels < 0).any() or (d.labels >= len(header.names)).any() for d in predictions.values()):
        return Part(None, (), {"why_not": "labels are out of range"})
    try:
        before = average_precision(dataset, expected, reference.backend.header)
        after = average_precision(dataset, predictions, header)
    except DataError as error:  # labelled with other classes than the model's
        return Part(None, (), {"why_not": error.message})
    if before is None or after is None:
        return Part(None, (), {"why_not": "AP is undefined on these images"})
    findings = []
    if abs(after - before) > limits.tol_ap:
        findings.append(f"AP changes from {before:.4f} to {after:.4f}, more than the tolerance {limits.tol_ap:g}")
    return Part(not findings, tuple(findings), {"ap_model": before, "ap_export": after, "ap_delta": after - before})


def average_precision(dataset: Dataset, predictions: Predictions, header: ModelHeader) -> float | None:
    """Return the AP of predictions, or None where it is undefined; raise DataError where no class is in common."""
    dataset = dataset.subset(list(predictions))
    table = DetectionTable.join([DetectionTable.of_image(i, d) for i, d in enumerate(predictions.values())])
    table, *_ = table.in_dataset_labels(map_classes(header.names, dataset).labels)
    return coco_metrics(dataset, table, evaluator="hotcoco").metrics["AP"]

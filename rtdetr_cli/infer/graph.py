"""What all exported graphs share: the published contract, fixed batches, half precision, and raw outputs.

Inputs are `images` (N, 3, H, W) RGB 0 to 1 and `orig_target_sizes` (N, 2) as width, height; outputs are `labels`
(N, K), `boxes` (N, K, 4) xyxy in original pixels and `scores` (N, K). Exports of RT-DETR, D-FINE and DEIM follow it.
A raw graph has `logits` (N, Q, K) and `boxes_cxcywh` (N, Q, 4) instead, which are post-processed here. A graph that
includes the preprocessing takes uint8 (N, H, W, 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.config.image_size import LARGEST
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.duplicates import gamma_word, rescore
from rtdetr_cli.weights.header import ModelHeader

IMAGES, SIZES = "images", "orig_target_sizes"
FINISHED = ("labels", "boxes", "scores")
RAW = ("logits", "boxes_cxcywh")
FOREIGN_SIZE = (640, 640)
TOP_K = 300
MAX_BATCH = 1024


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph: its numpy type and its dimensions, None where they are dynamic."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """What a runtime knows about an open graph.

    Attributes:
        header: the header in the graph's metadata; None for a foreign graph.
        inputs: in the graph's order, as `outputs`.
        max_batch: the largest batch of an engine that was built for a range.
    """

    header: ModelHeader | None
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    max_batch: int | None = None


class GraphBackend(ABC):
    """A graph in some runtime. A subclass opens it and runs one batch.

    Attributes:
        largest_batch: images that one run of the graph takes at most; None when any number will do.
    """

    kind: str
    largest_batch: int | None

    def __init__(
        self,
        path: Path,
        *,
        device: Any = "auto",
        imgsz: tuple[int, int] | None = None,
        threads: int | None = None,
        dedupe: float | None = None,
    ) -> None:
        """Open a graph; for the arguments see `open_backend`.

        Raises:
            ModelError: the file cannot be read, or the graph does not follow the contract.
            UsageError: the graph has another, fixed size, or rescores duplicates with another gamma by itself.
            EnvironmentProblem: the runtime or the device is missing.
        """
        self.path = path
        self.spec = spec = self.open(device, threads)
        inputs = {item.name: item for item in spec.inputs}
        outputs = [item.name for item in spec.outputs]
        self._finished = set(FINISHED) <= set(outputs)
        if IMAGES not in inputs or not (self._finished or set(RAW) <= set(outputs)):
            raise ModelError(
                f"{path} is not a detector that rtdetr can run: it has inputs {_list_names(inputs)} "
                f"and outputs {_list_names(outputs)}",
                hint=f"expected inputs {IMAGES}, {SIZES}; outputs {', '.join(FINISHED)}",
                code="model-foreign",
            )
        self._image_input = inputs[IMAGES]
        self._size_input = inputs.get(SIZES)
        shape = self._image_input.shape
        if len(shape) != 4:
            raise ModelError(f"{path}: the input {IMAGES} has {len(shape)} dimensions, not 4", code="model-foreign")
        self._channels_last = self._image_input.dtype == np.uint8 and shape[3] == 3
        fixed = (shape[1], shape[2]) if self._channels_last else (shape[2], shape[3])
        too_large = any(side is not None and side > LARGEST for side in fixed) or (shape[0] or 0) > MAX_BATCH
        if too_large or (not self._channels_last and shape[1] not in (3, None)):
            raise ModelError(
                f"{path}: the input {IMAGES} has the shape {'x'.join(str(n or '?') for n in shape)}, which no batch of "
                "RGB images has",
                code="model-foreign",
            )
        default = spec.header.imgsz if spec.header is not None else FOREIGN_SIZE
        self.imgsz = (fixed[0] or default[0], fixed[1] or default[1])
        if imgsz is not None and imgsz != self.imgsz:
            if None not in fixed or self._channels_last:
                raise UsageError(
                    f"--imgsz {imgsz[0]}x{imgsz[1]} does not apply to {path.name}, which has the fixed size "
                    f"{self.imgsz[0]}x{self.imgsz[1]}",
                    hint=f"rtdetr export MODEL --imgsz {imgsz[0]}x{imgsz[1]}",
                    code="size",
                )
            self.imgsz = imgsz
        header = spec.header or ModelHeader(names=(), category_ids=(), imgsz=self.imgsz, extra={"foreign": True})
        self.header = header.with_dedupe(dedupe)
        self.dedupe = self.header.dedupe_gamma
        self.dedupe_in_graph = self._finished and header.dedupe_gamma > 0
        if self.dedupe_in_graph and self.dedupe != header.dedupe_gamma:
            shown = gamma_word(self.dedupe)
            raise UsageError(
                f"--dedupe {shown} does not apply to {path.name}, which was exported with {header.dedupe_gamma:g}",
                hint=f"rtdetr export MODEL --dedupe {shown}",
                code="dedupe",
            )
        self.fixed_batch = shape[0]
        self.largest_batch = shape[0] or spec.max_batch

    @abstractmethod
    def open(self, device: Any, threads: int | None) -> GraphSpec:
        """Open `self.path` in the runtime."""

    @abstractmethod
    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run one batch; return every output, in the order of `spec`."""

    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        """Detect objects; see `Backend.run`."""
        sizes_wh = np.asarray(sizes_wh, np.int64)
        step = self.largest_batch or max(len(images), 1)
        detections: list[Detections] = []
        for start in range(0, len(images), step):
            part, sizes = images[start : start + step], sizes_wh[start : start + step]
            if self.fixed_batch is not None and len(part) < self.fixed_batch:
                filled = np.minimum(np.arange(self.fixed_batch), len(part) - 1)  # with the last image
                part, sizes = part[filled], sizes[filled]
            detections += self._run_part(part, sizes)
        return detections[: len(images)]

    def _run_part(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[Detections]:
        feeds: dict[str, NDArray[Any]] = {IMAGES: self._prepare(images)}
        if self._size_input is not None:
            feeds[SIZES] = sizes.astype(self._size_input.dtype)
        outputs = dict(zip((item.name for item in self.spec.outputs), self.infer(feeds), strict=True))
        names = FINISHED if self._finished else RAW
        self._check_outputs([outputs[name] for name in names], names, len(images))
        if self._finished:
            labels, boxes, scores = (outputs[name] for name in FINISHED)
        else:
            labels, boxes, scores = finish_raw(outputs[RAW[0]], outputs[RAW[1]], sizes)
        labels = labels.astype(np.int64, copy=False)
        with np.errstate(over="ignore"):  # a number that float32 cannot hold becomes infinite, and is not shown
            boxes, scores = boxes.astype(np.float32, copy=False), scores.astype(np.float32, copy=False)
        classes, ids = self.header.names, self.header.category_ids
        detections = [
            _sort(Detections(box, score, label, (int(width), int(height)), classes, ids))
            for label, box, score, (width, height) in zip(labels, boxes, scores, sizes, strict=True)
        ]
        if self.dedupe and not self.dedupe_in_graph:
            return [rescore(found, self.dedupe) for found in detections]
        return detections

    def _check_outputs(self, arrays: Sequence[NDArray[Any]], names: Sequence[str], count: int) -> None:
        """Check the outputs of a batch against the contract, so that what follows can rely on it.

        Raises:
            ModelError: an output is not numeric, or the shapes do not belong together.
        """
        for name, array in zip(names, arrays, strict=True):
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
                raise ModelError(f"{self.path}: the output {name} is not numeric", code="model-run")
        first, boxes = arrays[0].shape, arrays[1].shape
        rows = first[:2]
        dimensions = 2 if self._finished else 3
        fits = len(first) == dimensions and first[0] == count and boxes == (*rows, 4) and first[-1] + self._finished > 0
        if not fits or any(array.shape != rows for array in arrays[2:]):
            listed = ", ".join(f"{name} {array.shape}" for name, array in zip(names, arrays, strict=True))
            raise ModelError(
                f"{self.path}: the outputs do not fit a batch of {count}: {listed}",
                hint=f"expected {names[0]} (N, K{', C' * (not self._finished)}), {names[1]} (N, K, 4)"
                + f", {FINISHED[2]} (N, K)" * self._finished,
                code="model-run",
            )

    def _prepare(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """Return (N, H, W, 3) uint8 in the graph's own layout and type."""
        if self._channels_last:
            return np.ascontiguousarray(images)
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # N 3 H W
        if self._image_input.dtype == np.uint8:
            return planes
        scaled = planes.astype(np.float32)
        scaled /= 255
        return scaled.astype(self._image_input.dtype, copy=False)


def finish_raw(
    logits: NDArray[Any], boxes_cxcywh: NDArray[Any], sizes_wh: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Post-process raw outputs as the detector does: the best pairs of query and class, without clipping.

    Args:
        logits: (N, Q, K).
        boxes_cxcywh: (N, Q, 4), 0 to 1.
        sizes_wh: (N, 2) of the originals in pixels.

    Returns:
        labels (N, k), boxes (N, k, 4) xyxy in pixels, scores (N, k), best first; k is `TOP_K` or fewer.
    """
    batch, _, classes = logits.shape
    flat = logits.reshape(batch, -1).astype(np.float32)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :TOP_K]
    with np.errstate(over="ignore"):  # the exponential of a very negative logit is infinite, and its score 0
        scores = 1 / (1 + np.exp(-np.take_along_axis(flat, order, axis=1)))
    centres = np.take_along_axis(boxes_cxcywh.astype(np.float32), (order // classes)[..., None], axis=1)
    half = centres[..., 2:] / 2
    corners = np.concatenate([centres[..., :2] - half, centres[..., :2] + half], axis=-1)
    corners *= np.tile(sizes_wh, 2)[:, None].astype(np.float32)
    return (order % classes).astype(np.int64), corners, scores.astype(np.float32)


def _sort(detections: Detections) -> Detections:
    """Sort the rows by score, best first, if the graph has not; NaN goes last."""
    if np.all(detections.scores[:-1] >= detections.scores[1:]):
        return detections
    return detections.keep(np.argsort(-detections.scores, kind="stable"))


def first_line(error: BaseException) -> str:
    """Return the first line of a runtime's error message, which can be pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def _list_names(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (" and more" if len(listed) > 6 else "") if listed else "none"

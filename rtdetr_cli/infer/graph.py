"""What all exported graphs share: the published contract, fixed batches, half types, and the raw variant.

Inputs `images` (N, 3, H, W) RGB 0 to 1 and `orig_target_sizes` (N, 2) as width, height; outputs `labels` (N, K),
`boxes` (N, K, 4) xyxy in original pixels, `scores` (N, K). RT-DETR, D-FINE and DEIM exports of any origin keep it.
A raw graph has `logits` (N, Q, K) and `boxes_cxcywh` (N, Q, 4) instead, and is finished here. A graph that holds
the preprocessing too takes uint8 (N, H, W, 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.weights.header import ModelHeader

IMAGES, SIZES = "images", "orig_target_sizes"
FINISHED = ("labels", "boxes", "scores")
RAW = ("logits", "boxes_cxcywh")
FOREIGN_SIZE = (640, 640)
TOP_K = 300


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a graph: numpy type, and dimensions with None where the graph leaves them open."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class GraphBackend(ABC):
    """A graph in some runtime; a subclass opens it and runs one batch."""

    kind: str
    largest_batch: int | None
    """Images that one run of the graph takes at most: those of a fixed batch, or of an engine's range."""

    def __init__(
        self,
        path: Path,
        *,
        header: ModelHeader | None,
        inputs: Sequence[Port],
        outputs: Sequence[str],
        imgsz: tuple[int, int] | None,
        most: int | None = None,
    ) -> None:
        """Read the contract off the graph.

        Args:
            path: for messages.
            header: what the graph's metadata says; None for a foreign graph.
            inputs: the graph's inputs.
            outputs: names of its outputs.
            imgsz: (height, width) that the user wants; only an open graph can take another than its own.
            most: the largest batch of a dynamic graph that is built for a range.

        Raises:
            ModelError: the graph does not keep the contract.
            UsageError: the graph is fixed to another size.
        """
        ports = {port.name: port for port in inputs}
        self._finished = set(FINISHED) <= set(outputs)
        if IMAGES not in ports or not (self._finished or set(RAW) <= set(outputs)):
            raise ModelError(
                f"{path} is not a detector of the published contract: it has inputs {_listed(ports)} "
                f"and outputs {_listed(outputs)}",
                hint=f"expected: inputs {IMAGES}, {SIZES}; outputs {', '.join(FINISHED)}",
                code="model-foreign",
            )
        self._image_input = ports[IMAGES]
        self._sizes = ports.get(SIZES)
        shape = self._image_input.shape
        if len(shape) != 4:
            raise ModelError(f"{path}: the input {IMAGES} has {len(shape)} dimensions, not 4", code="model-foreign")
        self._channels_last = self._image_input.dtype == np.uint8 and shape[3] == 3
        fixed = (shape[1], shape[2]) if self._channels_last else (shape[2], shape[3])
        own = header.imgsz if header is not None else FOREIGN_SIZE
        self.imgsz = (fixed[0] or own[0], fixed[1] or own[1])
        if imgsz is not None and imgsz != self.imgsz:
            if None not in fixed or self._channels_last:
                raise UsageError(
                    f"--imgsz {imgsz[0]}x{imgsz[1]} cannot change {path.name}, which is fixed to "
                    f"{self.imgsz[0]}x{self.imgsz[1]}",
                    hint=f"rtdetr export MODEL --imgsz {imgsz[0]}x{imgsz[1]}",
                    code="size",
                )
            self.imgsz = imgsz
        self.path = path
        self.header = header or ModelHeader(names=(), category_ids=(), imgsz=self.imgsz, extra={"foreign": True})
        self.fixed_batch = shape[0]
        self.largest_batch = shape[0] or most

    @abstractmethod
    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch; return every output by name."""

    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        """Detect objects; see `Backend.run`. Cuts the batch to what the graph takes and fills up the last part."""
        count = len(images)
        step = self.largest_batch or max(count, 1)
        found: list[Detections] = []
        for start in range(0, count, step):
            part, sizes = images[start : start + step], np.asarray(sizes_wh[start : start + step], np.int64)
            real = len(part)
            if self.fixed_batch is not None and real < self.fixed_batch:
                short = self.fixed_batch - real
                part = np.concatenate([part, np.repeat(part[-1:], short, axis=0)])
                sizes = np.concatenate([sizes, np.repeat(sizes[-1:], short, axis=0)])
            found.extend(self._run_part(part, sizes)[:real])
        return found

    def _run_part(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[Detections]:
        feeds: dict[str, NDArray[Any]] = {IMAGES: self._images(images)}
        if self._sizes is not None:
            feeds[SIZES] = sizes.astype(self._sizes.dtype)
        outputs = self.infer(feeds)
        if self._finished:
            labels, boxes, scores = (outputs[name] for name in FINISHED)
        else:
            labels, boxes, scores = finish_raw(outputs[RAW[0]], outputs[RAW[1]], sizes)
        labels = labels.reshape(len(images), -1).astype(np.int64, copy=False)
        boxes = boxes.reshape(len(images), -1, 4).astype(np.float32, copy=False)
        scores = scores.reshape(len(images), -1).astype(np.float32, copy=False)
        return [
            _best_first(
                Detections(
                    box,
                    score,
                    label,
                    (int(width), int(height)),
                    self.header.names,
                    self.header.category_ids,
                )
            )
            for label, box, score, (width, height) in zip(labels, boxes, scores, sizes, strict=True)
        ]

    def _images(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """Return (N, H, W, 3) uint8 as the graph wants it."""
        if self._channels_last:
            return np.ascontiguousarray(images)
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # N 3 H W
        if self._image_input.dtype == np.uint8:
            return planes
        scaled = planes.astype(np.float32)
        scaled /= 255
        return scaled.astype(self._image_input.dtype, copy=False)


def finish_raw(
    logits: NDArray[Any], boxes_cxcywh: NDArray[Any], sizes_wh: NDArray[np.int64], top_k: int = TOP_K
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Post-process raw outputs as the detector does: flat top-k over queries and classes, no clamping.

    Args:
        logits: (N, Q, K).
        boxes_cxcywh: (N, Q, 4), 0 to 1.
        sizes_wh: (N, 2) of the originals in pixels.
        top_k: rows kept, fewer where there are fewer.

    Returns:
        labels (N, k), boxes (N, k, 4) xyxy in pixels, scores (N, k), best first.
    """
    batch, _, classes = logits.shape
    flat = logits.reshape(batch, -1).astype(np.float32)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :top_k]
    with np.errstate(over="ignore"):  # exp of a very sure "no" is infinite, and its score 0
        scores = 1 / (1 + np.exp(-np.take_along_axis(flat, order, axis=1)))
    centres = np.take_along_axis(boxes_cxcywh.astype(np.float32), (order // classes)[..., None], axis=1)
    half = centres[..., 2:] / 2
    corners = np.concatenate([centres[..., :2] - half, centres[..., :2] + half], axis=-1)
    corners *= np.tile(sizes_wh, 2)[:, None].astype(np.float32)
    return (order % classes).astype(np.int64), corners, scores.astype(np.float32)


def _best_first(found: Detections) -> Detections:
    """Sort the rows of a graph that does not; NaN scores go last."""
    if np.all(found.scores[:-1] >= found.scores[1:]):
        return found
    return found.keep(np.argsort(-found.scores, kind="stable"))


def first_line(error: BaseException) -> str:
    """Return the first line of a runtime's message, which may run over pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _listed(names: Mapping[str, Port] | Sequence[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:6]) + (" and more" if len(shown) > 6 else "") if shown else "none"

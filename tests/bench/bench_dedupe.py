"""Which rescoring of duplicates is best: `s (1 - m^gamma)`, Matrix NMS's compensation, or hard suppression?

    python tests/bench/bench_dedupe.py MODEL DATA[:SPLIT] [MODEL DATA[:SPLIT] ...]
    python tests/bench/bench_dedupe.py --crowded DIR      # write a dataset whose objects overlap, for training and val

A model detects once; every way rescores the same detections. `m` is a box's largest IoU with a better box of its
class. With compensation, a better box that is itself a duplicate counts less: the factor of a box is the smallest
`f(iou) / f(m of the better box)` over its better boxes, where f is 1 - iou (as in SOLOv2), exp(-2 iou^2), or our
1 - iou^gamma. Results are in docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.boxes import iou
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets import generate
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.classes import map_classes
from rtdetr_cli.evaluate.run import detect as detect_split
from rtdetr_cli.evaluate.run import evaluate_detections, evaluate_table
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.infer.backend import open_backend

Floats = NDArray[np.float64]
SIDE = 192


def powers(gamma: float) -> Callable[[Floats], Floats]:
    """Return the factor of an IoU: 1 for no overlap, 0 for the same box."""
    return lambda overlap: 1 - overlap**gamma


def uncompensated(f: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    """Return the factors of boxes, best first, from their IoU (N, N), which is 0 but for better boxes (rows)."""
    return lambda overlaps: f(overlaps.max(axis=0))


def compensated(f: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    """Return the same with Matrix NMS's compensation."""

    def factors(overlaps: Floats) -> Floats:
        own = np.maximum(f(overlaps.max(axis=0)), 1e-9)
        return np.minimum(f(overlaps) / own[:, None], 1).min(axis=0)

    return factors


def suppressed(limit: float) -> Callable[[Floats], Floats]:
    """Return 0 for a box that a kept, better one overlaps by more than `limit`: non-maximum suppression."""

    def factors(overlaps: Floats) -> Floats:
        kept = np.ones(len(overlaps))
        for row in range(len(kept)):
            kept[row] = not (overlaps[:, row][kept[: len(overlaps)] > 0] > limit).any()
        return kept

    return factors


WAYS: dict[str, Callable[[Floats], Floats]] = {
    "off": lambda overlaps: np.ones(len(overlaps)),
    **{f"gamma {g:g}": uncompensated(powers(g)) for g in (1, 2, 4, 8, 16, 32)},
    **{f"gamma {g:g}, compensated": compensated(powers(g)) for g in (1, 2, 4, 8, 16)},
    "exp(-2 iou^2), compensated": compensated(lambda overlap: np.exp(-2 * overlap**2)),
    **{f"suppressed above IoU {limit:g}": suppressed(limit) for limit in (0.7, 0.8, 0.9)},
}


def rescored(table: DetectionTable, way: Callable[[Floats], Floats]) -> DetectionTable:
    """Return the detections of a split, rescored image by image; the rows are by image and best first."""
    scores = table.scores.copy()
    for image in np.unique(table.image_index).tolist():
        rows = np.flatnonzero(table.image_index == image)
        boxes, labels = table.boxes_xyxy_px[rows], table.labels[rows]
        same = labels[:, None] == labels
        scores[rows] *= way(np.triu(iou(boxes[:, None], boxes) * same, k=1))
    return DetectionTable.join([DetectionTable(table.image_index, table.labels, scores, table.boxes_xyxy_px)])


def detect(model: Path, dataset: Dataset) -> DetectionTable:
    """Return a model's detections without rescoring, in the labels of the dataset."""
    backend = open_backend(model, device="cpu", dedupe=0.0)
    classes = map_classes(backend.header.names, dataset)
    return evaluate_detections(dataset, detect_split(backend, dataset), classes, seconds=0.0).table


def overlap_of_objects(dataset: Dataset) -> float:
    """Return the share of objects that overlap another of their class by an IoU above 0.5."""
    close = 0
    for first, last in zip(dataset.offsets, dataset.offsets[1:], strict=False):
        boxes, labels = dataset.boxes_xyxy_px[first:last], dataset.labels[first:last]
        overlaps = iou(boxes[:, None], boxes) * (labels[:, None] == labels) - np.eye(len(boxes))
        close += int((overlaps > 0.5).any(axis=0).sum())
    return close / max(len(dataset.labels), 1)


def crowded_image(rng: Generator) -> tuple[NDArray[np.uint8], list[tuple[float, ...]]]:
    """Paint rows of alike shapes, each covering much of the one before; return the image and the boxes."""
    canvas = generate._background(rng, (SIDE, SIDE))
    boxes = []
    for _ in range(int(rng.integers(2, 6))):
        label, size = int(rng.integers(len(generate.NAMES))), rng.uniform(24, 72)
        corner, step = rng.uniform(0, SIDE - size, 2), rng.normal(0, 1, 2)
        step *= rng.uniform(0.12, 0.5) * size / np.linalg.norm(step)
        for number in range(int(rng.integers(1, 5))):
            place = corner + number * step
            if (place < 0).any() or (place + size > SIDE).any():
                break
            outline = generate._outline(rng, label, size * rng.uniform(0.9, 1.1))
            outline += place - outline.min(0)
            generate._paint(rng, canvas, outline, hole=label == 1)
            boxes.append(generate._box(outline, (SIDE, SIDE)))
    canvas += rng.normal(0, 3, (SIDE, SIDE, 1)).astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), boxes


def write_crowded(folder: Path, counts: tuple[tuple[str, int], ...] = (("train", 400), ("val", 200))) -> None:
    """Write a COCO dataset of one class in which more than a third of the objects overlap by an IoU above 0.5."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(counts):
        document: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        document["categories"] = [{"id": 1, "name": "shape"}]
        for image, seed in enumerate(np.random.SeedSequence(0, spawn_key=(number,)).spawn(count), start=1):
            pixels, boxes = crowded_image(np.random.default_rng(seed))
            name = f"images/{split}-{image:05d}.jpg"
            Image.fromarray(pixels).save(folder / name, quality=90)
            document["images"].append({"id": image, "file_name": name, "width": SIDE, "height": SIDE})
            for x0, y0, x1, y1 in np.round(boxes, 2).reshape(-1, 4).tolist():
                box = {"bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)], "area": (x1 - x0) * (y1 - y0)}
                ids = {"id": len(document["annotations"]) + 1, "image_id": image, "category_id": 1, "iscrowd": 0}
                document["annotations"].append(ids | box)
        (folder / f"{split}.json").write_text(json.dumps(document))


def main() -> None:
    """Print AP and AP50 of every way on every model and split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="MODEL DATA[:SPLIT]")
    parser.add_argument("--crowded", type=Path, help="write the crowded dataset into this folder")
    args = parser.parse_args()
    if args.crowded is not None:
        write_crowded(args.crowded)
    for model, source in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        data, _, split = source.partition(":")
        dataset = getattr(load_splits(Path(data)), split or "val")
        table = detect(Path(model), dataset)
        close = overlap_of_objects(dataset)
        print(f"\n{model} on {source}: {len(dataset)} images, {close:.0%} of the objects overlap another", flush=True)
        for name, way in WAYS.items():
            metrics = evaluate_table(dataset, rescored(table, way)).metrics
            shown = "  ".join(f"{key} {metrics[key] or 0:.3f}" for key in ("AP", "AP50", "AP75", "AR100"))
            print(f"{name:<28}{shown}", flush=True)


if __name__ == "__main__":
    main()

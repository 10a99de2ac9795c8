"""Run a model over a split and say how good it is; the pure part takes detections made by anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, EnvironmentProblem
from rtdetr_cli.evaluate.classes import ClassMap, map_classes
from rtdetr_cli.evaluate.coco import FALLBACK_LACKS, SIZES, CocoResult, coco_metrics
from rtdetr_cli.evaluate.matching import MatchTable, match
from rtdetr_cli.evaluate.table import DetectionTable, TableBuilder
from rtdetr_cli.evaluate.thresholds import Point, best_point, points_at, score_curve
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.weights.header import Thresholds


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a set of detections is.

    Attributes:
        metrics: COCO's twelve numbers by name (`coco.METRICS`); None where the split has no such box.
        dataset: the images evaluated, without those that could not be read.
        table: every detection, in the dataset's labels.
        coco: the curves behind the numbers.
        thresholds: the model's stored thresholds in the dataset's labels, or None.
        notes: what a reader must know: classes mapped, rows dropped, nothing to find.
        unreadable: (image, reason) of those left out.
        seconds: spent on the network, and altogether; empty for detections from a file.
    """

    metrics: dict[str, float | None]
    dataset: Dataset
    table: DetectionTable
    coco: CocoResult
    thresholds: Thresholds | None = None
    notes: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def evaluator(self) -> str:
        """The evaluator that made the numbers."""
        return self.coco.evaluator

    @cached_property
    def matches(self) -> MatchTable:
        """The fate of every detection at IoU 0.5, made when first asked for."""
        return match(self.dataset, self.table)

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """A row for each class: name, category_id, boxes, AP..., and precision, recall, F1 at its best threshold.

        `sizes` has AP, AP50, precision, recall and best F1 for small, medium and large boxes.
        """
        boxes = np.bincount(self.dataset.labels[~self.dataset.crowd], minlength=len(self.dataset.categories))
        rows = []
        for label, category in enumerate(self.dataset.categories):
            figures = self.coco.per_class(label)
            rows.append(
                {
                    "name": category.name,
                    "category_id": category.id,
                    "boxes": int(boxes[label]),
                    **figures,
                    **_short_point(self._best(label, 0)),
                    "sizes": {
                        SIZES[size]: {
                            "AP": figures[("", "APs", "APm", "APl")[size]],
                            "AP50": _mean(self.coco.precision[0, :, label, size, 2]),
                            **_short_point(self._best(label, size)),
                        }
                        for size in (1, 2, 3)
                    },
                }
            )
        return rows

    def at_one(self, threshold: float) -> Point:
        """Return precision and recall over all classes at one threshold for all of them."""
        classes = len(self.dataset.categories)
        overall, _ = points_at(self.dataset, self.table, self.matches, np.full(classes, threshold))
        return replace(overall, threshold=threshold)

    @cached_property
    def best(self) -> Point:
        """The highest F1 of all classes together, at one threshold for all."""
        return self._best(None, 0)

    @cached_property
    def by_size(self) -> dict[str, dict[str, float | None]]:
        """AP, AP50, precision, recall and best F1 over all classes for small, medium and large boxes."""
        ap50 = self.coco.ap50_by_size()
        return {
            SIZES[size]: {
                "AP": self.metrics[("AP", "APs", "APm", "APl")[size]],
                "AP50": ap50[size],
                **_short_point(self._best(None, size)),
            }
            for size in (1, 2, 3)
        }

    def at_thresholds(self, thresholds: Thresholds) -> tuple[Point, list[Point]]:
        """Return precision and recall at stored thresholds: over all classes together, and for each."""
        return points_at(self.dataset, self.table, self.matches, np.array(thresholds.per_class, np.float64))

    def _best(self, label: int | None, size: int) -> Point:
        return best_point(score_curve(self.dataset, self.table, self.matches, label, size=size))

    def to_json(self) -> dict[str, Any]:
        """Return the document of `rtdetr eval --json`."""
        document: dict[str, Any] = {
            "metrics": dict(self.metrics),
            "per_class": self.per_class,
            "sizes": self.by_size,
            "best_f1": self.best.to_json(),
            "pictures": len(self.dataset),
            "boxes": int(np.count_nonzero(~self.dataset.crowd)),
            "detections": len(self.table),
            "evaluator": self.evaluator,
            "dataset": {"name": self.dataset.name, "split": self.dataset.split},
            "notes": list(self.notes),
            "unreadable": [{"file": name, "reason": reason} for name, reason in self.unreadable],
        }
        if self.seconds:
            document["seconds"] = dict(self.seconds)
        if self.thresholds is not None:
            overall, classes = self.at_thresholds(self.thresholds)
            document["at_thresholds"] = {
                "target": self.thresholds.target,
                "overall": overall.to_json(),
                "per_class": [
                    {"name": c.name, "category_id": c.id, **p.to_json()}
                    for c, p in zip(self.dataset.categories, classes, strict=True)
                ],
            }
        return document


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _short_point(point: Point) -> dict[str, float | None]:
    return {
        "precision": point.precision,
        "recall": point.recall,
        "f1": point.f1,
        "threshold": point.threshold,
    }


def metrics_from(
    dataset: Dataset,
    table: DetectionTable,
    evaluator: str = "hotcoco",
    *,
    thresholds: Thresholds | None = None,
    notes: tuple[str, ...] = (),
    unreadable: tuple[tuple[str, str], ...] = (),
    seconds: dict[str, float] | None = None,
) -> Evaluation:
    """Judge detections: the pure part of `evaluate`, also for a table joined from several processes.

    Where hotcoco is not installed pycocotools stands in, with a note on what it lacks.

    Raises:
        DataError: the split has no images.
    """
    try:
        result = coco_metrics(dataset, table, evaluator=evaluator)
    except EnvironmentProblem as problem:
        if evaluator != "hotcoco":
            raise
        result = coco_metrics(dataset, table, evaluator="pycocotools")
        notes = (*notes, f"{problem.message}: pycocotools is taken in its place; {FALLBACK_LACKS}")
    if not np.any(~dataset.crowd):
        notes = (*notes, f"the {dataset.split} split of {dataset.name} has no boxes, so AP is not defined")
    return Evaluation(
        metrics=result.metrics,
        dataset=dataset,
        table=table,
        coco=result,
        thresholds=thresholds,
        notes=notes,
        unreadable=unreadable,
        seconds=seconds or {},
    )


@dataclass(frozen=True, slots=True, eq=False)
class Detected:
    """What a model found in a split, before it is judged.

    Attributes:
        table: detections in the dataset's labels.
        unreadable: (image, reason) by position.
        not_finite: rows dropped because the network gave NaN or infinity.
        beyond: rows dropped because their label is none that the label map knows.
        network_seconds: time inside the backend.
    """

    table: DetectionTable
    unreadable: tuple[tuple[int, str], ...]
    not_finite: int
    beyond: int
    network_seconds: float

    @classmethod
    def join(cls, parts: Sequence[tuple[NDArray[np.int64], Detected]]) -> Detected:
        """Return what several processes found in shares of one split.

        Args:
            parts: for each process the positions of its images in the split, and what it found in them.
        """
        return cls(
            table=DetectionTable.join([replace(f.table, image_index=own[f.table.image_index]) for own, f in parts]),
            unreadable=tuple(sorted((int(own[i]), reason) for own, f in parts for i, reason in f.unreadable)),
            not_finite=sum(f.not_finite for _, f in parts),
            beyond=sum(f.beyond for _, f in parts),
            network_seconds=max(f.network_seconds for _, f in parts),
        )


def detect(
    backend: Backend,
    dataset: Dataset,
    *,
    batch: int = 8,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    label_map: NDArray[np.int64] | None = None,
) -> Detected:
    """Run a model over a split; images are decoded in threads while the network runs, and then dropped.

    Args:
        backend: the model.
        dataset: N images.
        batch: images in a run of the network.
        threads: that decode; None chooses.
        progress: is told how many images are done each time.
        label_map: (model classes,) the dataset's labels, -1 for none; None keeps the model's.
    """
    builder = TableBuilder(label_map)
    unreadable: list[tuple[int, str]] = []
    spent = 0.0
    for indices, images, sizes_wh, faults in _batches(backend, dataset, batch, threads):
        unreadable.extend(faults)
        if indices:
            start = time.perf_counter()
            found = backend.run(np.stack(images), np.asarray(sizes_wh, np.int64))
            spent += time.perf_counter() - start
            for index, detections in zip(indices, found, strict=True):
                builder.add(index, detections)
        if progress is not None:
            progress(len(indices) + len(faults))
    return Detected(builder.build(), tuple(unreadable), builder.not_finite, builder.beyond, spent)


def _batches(
    backend: Backend, dataset: Dataset, batch: int, threads: int | None
) -> Iterator[tuple[list[int], list[NDArray[np.uint8]], list[tuple[int, int]], list[tuple[int, str]]]]:
    """Yield (positions, stretched images, sizes, faults) of up to `batch` images."""
    from rtdetr_cli.infer.prefetch import prefetch

    indices: list[int] = []
    images: list[NDArray[np.uint8]] = []
    sizes: list[tuple[int, int]] = []
    faults: list[tuple[int, str]] = []
    paths = [dataset.path(i) for i in range(len(dataset))]
    for index, image, size_wh, error in prefetch(paths, backend.imgsz, threads=threads):
        if image is None or size_wh is None:
            faults.append((index, str(error)))
        else:
            indices.append(index)
            images.append(image)
            sizes.append(size_wh)
        if len(indices) == batch or len(faults) == batch:
            yield indices, images, sizes, faults
            indices, images, sizes, faults = [], [], [], []
    if indices or faults:
        yield indices, images, sizes, faults


def evaluate(
    backend: Backend,
    dataset: Dataset,
    *,
    batch: int = 8,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    evaluator: str = "hotcoco",
) -> Evaluation:
    """Run a model over a split and judge what it finds.

    Images that cannot be read are left out, counted and named; classes are brought together by name.

    Raises:
        DataError: the split is empty, no image can be read, or the classes have nothing in common.
    """
    if not len(dataset):
        coco_metrics(dataset, DetectionTable.empty(), evaluator=evaluator)  # says so
    classes = map_classes(backend.header.names, dataset)
    start = time.perf_counter()
    found = detect(backend, dataset, batch=batch, threads=threads, progress=progress, label_map=classes.labels)
    took = time.perf_counter() - start
    return conclude(dataset, found, classes, seconds=took, stored=backend.header.thresholds, evaluator=evaluator)


def conclude(
    dataset: Dataset,
    found: Detected,
    classes: ClassMap,
    *,
    seconds: float,
    stored: Thresholds | None = None,
    evaluator: str = "hotcoco",
) -> Evaluation:
    """Judge what was found in a whole split, by one process or joined from several.

    Args:
        dataset: the split.
        found: in all its images.
        classes: of the model and the dataset.
        seconds: that detecting took.
        stored: the model's thresholds.
        evaluator: `hotcoco` or `pycocotools`.

    Raises:
        DataError: no image could be read.
    """
    notes = list(classes.notes)
    if found.not_finite:
        notes.append(f"{found.not_finite} detections were NaN or infinite and left out: the model has diverged")
    if found.beyond:
        notes.append(
            f"{found.beyond} detections have a label beyond the dataset's {len(dataset.categories)} classes and are "
            "left out: was the model trained for another dataset?"
        )
    table, kept = found.table, dataset
    if found.unreadable:
        if len(found.unreadable) == len(dataset):
            first = found.unreadable[0][1]
            raise DataError(
                f"none of the {len(dataset)} images of {dataset.name} can be read; the first: {first}",
                hint="check where the images are: --images DIR",
                code="images-unreadable",
            )
        bad = np.array([i for i, _ in found.unreadable])
        readable = np.setdiff1d(np.arange(len(dataset)), bad)
        kept, table = dataset.subset(readable), table.of_images(readable)
        notes.append(f"{len(bad)} of {len(dataset)} images cannot be read and are left out of the evaluation")
    return metrics_from(
        kept,
        table,
        evaluator,
        thresholds=_stored(stored, classes.labels, len(dataset.categories)),
        notes=tuple(notes),
        unreadable=tuple((dataset.file_names[i], reason) for i, reason in found.unreadable),
        seconds={"network": found.network_seconds, "total": seconds},
    )


def _stored(found: Thresholds | None, labels: NDArray[np.int64] | None, classes: int) -> Thresholds | None:
    """Return a model's thresholds in the order of the dataset's classes."""
    if found is None:
        return None
    if labels is None:
        return found if len(found.per_class) == classes else None
    per_class = [found.overall] * classes
    for own, label in enumerate(labels.tolist()):
        if label >= 0:
            per_class[label] = found.per_class[own]
    return replace(found, per_class=tuple(per_class))

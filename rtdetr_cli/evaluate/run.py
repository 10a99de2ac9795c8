"""Run a model over a split and compute its metrics; detections from elsewhere start at `evaluate_table`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset, image_paths
from rtdetr_cli.errors import DataError, EnvironmentProblem
from rtdetr_cli.evaluate.classes import ClassMap, map_classes
from rtdetr_cli.evaluate.coco import PYCOCOTOOLS_LACKS, SIZES, CocoResult, coco_metrics, require_images
from rtdetr_cli.evaluate.matching import Matches, match
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.evaluate.thresholds import OperatingPoint, points_at, score_curve
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.stream import detect_images
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import Thresholds


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of a set of detections.

    Attributes:
        dataset: the images evaluated, without those that could not be read.
        table: every detection, in the dataset's labels.
        thresholds: the model's stored thresholds in the dataset's labels, or None.
        notes: what a reader must know: mapped classes, dropped detections, a split without boxes.
        unreadable: (file name, reason) of the images that were left out.
        seconds: spent in the network and in total; empty for detections from a file.
        dedupe: the gamma that duplicates were rescored with, 0 for none.
        without_dedupe: the same without rescoring; None without any, or where an exported graph rescores.
    """

    dataset: Dataset
    table: DetectionTable
    coco: CocoResult
    thresholds: Thresholds | None = None
    notes: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    dedupe: float = 0.0
    without_dedupe: Evaluation | None = None

    @property
    def metrics(self) -> dict[str, float | None]:
        """COCO's twelve numbers by name (`coco.METRICS`); None where the split has no such box."""
        return self.coco.metrics

    @property
    def rescoring(self) -> str:
        """How duplicates were rescored and the AP without it, as a sentence for pages; empty if they were not."""
        if not self.dedupe:
            return ""
        before = self.without_dedupe.metrics["AP"] if self.without_dedupe is not None else None
        without = f": without that, AP is {before:.3f}" if before is not None else ""
        return f"Duplicates are rescored (gamma {self.dedupe:g}){without}."

    @property
    def boxes(self) -> int:
        """Boxes that are not crowds."""
        return int(np.count_nonzero(~self.dataset.crowd))

    @cached_property
    def matches(self) -> Matches:
        """The outcome of every detection at IoU 0.5."""
        return match(self.dataset, self.table)

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """A row for each class: name, category_id, boxes, AP..., and precision, recall, F1 at its best threshold.

        `sizes` has AP, AP50, precision, recall and F1 at the best threshold for small, medium and large boxes.
        """
        boxes = np.bincount(self.dataset.labels[~self.dataset.crowd], minlength=len(self.dataset.categories))
        rows = []
        for label, category in enumerate(self.dataset.categories):
            metrics = self.coco.per_class(label)
            facts = {"name": category.name, "category_id": category.id, "boxes": int(boxes[label])}
            rates = self._best_point(label).rates()
            rows.append({**facts, **metrics, **rates, "sizes": self._by_size(metrics, label)})
        return rows

    @cached_property
    def by_size(self) -> dict[str, dict[str, float | None]]:
        """The same over all classes."""
        return self._by_size(self.metrics, None)

    @cached_property
    def best(self) -> OperatingPoint:
        """The highest F1 over all classes at one threshold for all."""
        return self._best_point(None)

    def _by_size(self, metrics: dict[str, float | None], label: int | None) -> dict[str, dict[str, float | None]]:
        rows = {}
        for size, name in enumerate(("APs", "APm", "APl"), start=1):
            rates = self._best_point(label, size).rates()
            rows[SIZES[size]] = {"AP": metrics[name], "AP50": self.coco.ap50(label, size), **rates}
        return rows

    def _best_point(self, label: int | None, size: int = 0) -> OperatingPoint:
        return score_curve(self.matches, label, size=size).best_point()

    def at_thresholds(self, thresholds: Thresholds) -> tuple[OperatingPoint, OperatingPoint, list[OperatingPoint]]:
        """Return the points of all classes with each at its own threshold, of all at the overall one, and of each."""
        same = np.full(len(self.dataset.categories), thresholds.overall)
        single, _ = points_at(self.matches, same)
        overall, classes = points_at(self.matches, np.array(thresholds.per_class, np.float64))
        return overall, single, classes

    def to_json(self) -> dict[str, Any]:
        """Return the document of `rtdetr eval --json`."""
        document: dict[str, Any] = {
            "metrics": dict(self.metrics),
            "per_class": self.per_class,
            "sizes": self.by_size,
            "best_f1": asdict(self.best),
            "pictures": len(self.dataset),
            "boxes": self.boxes,
            "detections": len(self.table),
            "evaluator": self.coco.evaluator,
            "dataset": {"name": self.dataset.name, "split": self.dataset.split},
            "notes": list(self.notes),
            "unreadable": [{"file": name, "reason": reason} for name, reason in self.unreadable],
        }
        before = self.without_dedupe
        document["dedupe"] = {"gamma": self.dedupe, "without": None if before is None else dict(before.metrics)}
        if self.seconds:
            document["seconds"] = dict(self.seconds)
        if self.thresholds is not None:
            overall, single, classes = self.at_thresholds(self.thresholds)
            points = zip(self.dataset.categories, classes, strict=True)
            document["at_thresholds"] = {
                "target": self.thresholds.target,
                "overall": asdict(overall),
                "one_for_all": asdict(single),
                "per_class": [{"name": c.name, "category_id": c.id, **asdict(point)} for c, point in points],
            }
        return document


def evaluate_table(
    dataset: Dataset, table: DetectionTable, evaluator: str = "hotcoco", *, notes: tuple[str, ...] = ()
) -> Evaluation:
    """Evaluate detections of any origin; raises DataError for a split without images.

    pycocotools is used where hotcoco is not installed, with a note on what it lacks.
    """
    try:
        result = coco_metrics(dataset, table, evaluator=evaluator)
    except EnvironmentProblem as problem:
        if evaluator != "hotcoco":
            raise
        result = coco_metrics(dataset, table, evaluator="pycocotools")
        notes = (*notes, f"{problem.message}: using pycocotools instead; {PYCOCOTOOLS_LACKS}")
    if dataset.crowd.all():
        notes = (*notes, f"the {dataset.split} split of {dataset.name} has no boxes, so AP is not defined")
    return Evaluation(dataset, table, result, notes=notes)


def rescore_evaluation(evaluation: Evaluation, gamma: float, overlap: NDArray[np.float64]) -> Evaluation:
    """Evaluate the same detections with the scores of duplicates lowered, given their table's `overlap_with_better`."""
    table = evaluation.table.rescored(gamma, overlap)
    result = coco_metrics(evaluation.dataset, table, evaluator=evaluation.coco.evaluator)
    return replace(evaluation, table=table, coco=result, dedupe=gamma, without_dedupe=evaluation)


@dataclass(frozen=True, slots=True, eq=False)
class SplitDetections:
    """A model's detections in a split, in the model's labels, before any is dropped.

    `unreadable` holds (position, reason) of the images that could not be read, `network_seconds` is the time inside
    the backend.
    """

    table: DetectionTable
    unreadable: tuple[tuple[int, str], ...]
    network_seconds: float

    @classmethod
    def join(cls, parts: Sequence[tuple[NDArray[np.int64], SplitDetections]]) -> SplitDetections:
        """Join the detections of processes that each ran on a share of a split, at these positions of its images."""
        tables = [replace(d.table, image_index=positions[d.table.image_index]) for positions, d in parts]
        unreadable = sorted((int(positions[i]), reason) for positions, d in parts for i, reason in d.unreadable)
        return cls(DetectionTable.join(tables), tuple(unreadable), max(d.network_seconds for _, d in parts))


def detect(
    backend: Backend, dataset: Dataset, *, batch: int = 8, progress: Callable[[int], None] | None = None
) -> SplitDetections:
    """Run a model over a split; threads decode images while the network runs.

    `progress` is called with the number of images done since the last call.
    """
    tables: list[DetectionTable] = []
    unreadable: list[tuple[int, str]] = []
    network_seconds = 0.0
    for item, detections, seconds in detect_images(backend, image_paths(dataset), batch=batch):
        network_seconds += seconds
        if detections is None:
            unreadable.append((item.position, str(item.error)))
        else:
            tables.append(DetectionTable.of_image(item.position, detections))
        if progress is not None:
            progress(1)
    return SplitDetections(DetectionTable.join(tables), tuple(unreadable), network_seconds)


def evaluate(
    backend: Backend,
    dataset: Dataset,
    *,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
    evaluator: str = "hotcoco",
) -> Evaluation:
    """Run a model over a split and evaluate its detections.

    Images that cannot be read are left out, counted and named; classes are mapped by name. Where the backend rescores
    duplicates, and not inside a graph, the evaluation without rescoring is kept as well.

    Raises:
        DataError: the split is empty, no image can be read, or no class has the same name.
    """
    require_images(dataset)
    classes = map_classes(backend.header.names, dataset)
    start = time.perf_counter()
    gamma = backend.dedupe
    if not backend.dedupe_in_graph:
        backend.dedupe = 0.0
    try:
        detections = detect(backend, dataset, batch=batch, progress=progress)
    finally:
        backend.dedupe = gamma
    seconds = time.perf_counter() - start
    evaluation = evaluate_detections(
        dataset, detections, classes, seconds=seconds, thresholds=backend.header.thresholds, evaluator=evaluator
    )
    if not gamma or backend.dedupe_in_graph:
        return replace(evaluation, dedupe=gamma)
    return rescore_evaluation(evaluation, gamma, evaluation.table.overlap_with_better())


def evaluate_detections(
    dataset: Dataset,
    detections: SplitDetections,
    classes: ClassMap,
    *,
    seconds: float,
    thresholds: Thresholds | None = None,
    evaluator: str = "hotcoco",
) -> Evaluation:
    """Evaluate a model's detections in a whole split, from one process or joined from several.

    `thresholds` are those stored in the model, and `seconds` is the time that detecting took.

    Raises:
        DataError: no image could be read.
    """
    notes = list(classes.notes)
    table, not_finite, unknown = detections.table.in_dataset_labels(classes.labels)
    if not_finite:
        notes.append(f"ignored {counted(not_finite, 'detection')} with NaN or infinite values: the model has diverged")
    if unknown:
        notes.append(
            f"ignored {counted(unknown, 'detection')} with a label beyond the dataset's "
            f"{counted(len(dataset.categories), 'class')}: was the model trained for another dataset?"
        )
    evaluated, unreadable = dataset, detections.unreadable
    if unreadable:
        if len(unreadable) == len(dataset):
            raise DataError(
                f"none of the {len(dataset)} images of {dataset.name} can be read; the first: {unreadable[0][1]}",
                hint="check where the images are: --images DIR",
                code="images-unreadable",
            )
        readable = np.setdiff1d(np.arange(len(dataset)), [i for i, _ in unreadable])
        evaluated = dataset.subset(readable)
        table = replace(table, image_index=np.searchsorted(readable, table.image_index))
        notes.append(f"{len(unreadable)} of {len(dataset)} images cannot be read and are left out")
    return replace(
        evaluate_table(evaluated, table, evaluator, notes=tuple(notes)),
        thresholds=_in_dataset_order(thresholds, classes.labels, len(dataset.categories)),
        unreadable=tuple((dataset.file_names[i], reason) for i, reason in unreadable),
        seconds={"network": detections.network_seconds, "total": seconds},
    )


def _in_dataset_order(
    thresholds: Thresholds | None, labels: NDArray[np.int64] | None, classes: int
) -> Thresholds | None:
    """Return a model's thresholds in the order of the dataset's classes; None where their number does not fit."""
    if thresholds is None:
        return None
    if labels is None:
        return thresholds if len(thresholds.per_class) == classes else None
    if len(thresholds.per_class) != len(labels):
        return None
    per_class = [thresholds.overall] * classes
    for model_label, label in enumerate(labels.tolist()):
        if label >= 0:
            per_class[label] = thresholds.per_class[model_label]
    return replace(thresholds, per_class=tuple(per_class))

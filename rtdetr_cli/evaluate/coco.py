"""The COCO metrics of flat detection arrays against a `Dataset`, without a JSON file in between.

Two evaluators give the same numbers: hotcoco (a compiled one, the default, with the error analysis built in) and
pycocotools (the reference: oracle in the tests, fallback where hotcoco is missing or misbehaves). Both are fed the
dataset's own areas and crowd marks, so that a mask's area decides what is small where the dataset gives masks.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, EnvironmentProblem, UsageError
from rtdetr_cli.evaluate.table import DetectionTable

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
EVALUATORS = ("hotcoco", "pycocotools")
SIZES = ("all", "small", "medium", "large")
# Square pixels, as COCO has them: small up to 32 x 32, large from 96 x 96.
AREA_RANGES = ((0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10))
FALLBACK_LACKS = "what fixing each kind of error would gain (TIDE) and the confusion matrix need hotcoco"


@dataclass(frozen=True, eq=False)
class CocoResult:
    """What one COCO evaluation gives.

    T 10 IoU thresholds, R 101 recall points, K classes, A sizes (`SIZES`), M detection limits (1, 10, 100).

    Attributes:
        metrics: the twelve numbers by name; None where no box of that kind exists.
        precision: (T, R, K, A, M), -1 where undefined.
        recall: (T, K, A, M), -1 where undefined.
        evaluator: which evaluator made it.
        session: hotcoco's evaluator, for its analyses; None with pycocotools.
    """

    metrics: dict[str, float | None]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    evaluator: str
    session: Any = field(default=None, repr=False)

    def per_class(self, label: int) -> dict[str, float | None]:
        """Return AP, AP50, AP75, AP by size and AR100 of one class; None where it has no such box."""
        curves = self.precision[:, :, label, :, 2]
        return {
            "AP": _mean(curves[:, :, 0]),
            "AP50": _mean(curves[0, :, 0]),
            "AP75": _mean(curves[5, :, 0]),
            "APs": _mean(curves[:, :, 1]),
            "APm": _mean(curves[:, :, 2]),
            "APl": _mean(curves[:, :, 3]),
            "AR100": _mean(self.recall[:, label, 0, 2]),
        }

    def ap50_by_size(self) -> tuple[float | None, ...]:
        """Return AP50 over all classes for each of `SIZES`."""
        return tuple(_mean(self.precision[0, :, :, size, 2]) for size in range(len(SIZES)))


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def xywh(boxes_xyxy_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N, 4) boxes as left, top, width, height."""
    boxes = np.array(boxes_xyxy_px, np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def coco_metrics(dataset: Dataset, table: DetectionTable, *, evaluator: str = "hotcoco") -> CocoResult:
    """Evaluate detections against a dataset's boxes.

    Args:
        dataset: N images and their boxes.
        table: detections in the dataset's labels; rows with NaN must have been dropped before.
        evaluator: `hotcoco` or `pycocotools`.

    Raises:
        DataError: the dataset has no images, or a detection lies outside it.
        EnvironmentProblem: the evaluator is not installed.
        UsageError: there is no such evaluator.
    """
    if not len(dataset):
        raise DataError(
            f"the {dataset.split or 'val'} split of {dataset.name} has no images, so there is nothing to evaluate",
            hint="name another split with --split, or make one: rtdetr validate DATA --resplit 0.8,0.2 --to DIR",
            code="empty-split",
        )
    if len(table) and (
        table.image_index.min() < 0
        or table.image_index.max() >= len(dataset)
        or table.labels.min() < 0
        or table.labels.max() >= len(dataset.categories)
    ):
        raise DataError("a detection names an image or class that the dataset does not have", code="detections")
    if evaluator == "hotcoco":
        return _with_hotcoco(dataset, table)
    if evaluator == "pycocotools":
        return _with_pycocotools(dataset, table)
    raise UsageError(f"there is no evaluator {evaluator!r}", hint=f"one of: {', '.join(EVALUATORS)}")


def without_crowds(dataset: Dataset) -> Dataset:
    """Return the dataset without its crowd boxes."""
    keep = ~dataset.crowd
    counts = np.bincount(np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))[keep], minlength=len(dataset))
    return replace(
        dataset,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xyxy_px=dataset.boxes_xyxy_px[keep],
        labels=dataset.labels[keep],
        areas=dataset.areas[keep],
        crowd=dataset.crowd[keep],
        annotation_ids=dataset.annotation_ids[keep],
    )


def image_numbers(dataset: Dataset) -> NDArray[np.int64]:
    """Return the number that the evaluators know each image by: 1 to N in the order of the dataset's own ids.

    Detections of equal scores rank by their image, so another order of images would be another AP.
    """
    number = np.empty(len(dataset), np.int64)
    number[np.argsort(dataset.image_ids, kind="stable")] = np.arange(1, len(dataset) + 1)
    return number


def hotcoco_session(dataset: Dataset, table: DetectionTable) -> Any:
    """Return hotcoco's evaluator after matching, for AP and for its analyses.

    Images carry `image_numbers`; classes and boxes are numbered from 1 in the order of the dataset, detections
    in the table's order: the dataset's own ids may start at 0, which the reference takes for "unmatched".
    """
    try:
        import hotcoco
    except ImportError as error:
        raise EnvironmentProblem(
            "the evaluator hotcoco is not installed", hint="pip install hotcoco, or take --evaluator pycocotools"
        ) from error
    number = image_numbers(dataset)
    images = [
        {"id": n, "width": w, "height": h} for n, (w, h) in zip(number.tolist(), dataset.sizes_wh.tolist(), strict=True)
    ]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(dataset.names)]
    truth = hotcoco.COCO.from_arrays(
        images,
        categories,
        np.repeat(number, np.diff(dataset.offsets)),
        dataset.labels + 1,
        xywh(dataset.boxes_xyxy_px),
        area=dataset.areas,
        iscrowd=dataset.crowd,
    )
    rows = np.empty((len(table), 7))
    rows[:, 0] = number[table.image_index]
    rows[:, 1:5] = xywh(table.boxes_xyxy_px)
    rows[:, 5] = table.scores
    rows[:, 6] = table.labels + 1
    session = hotcoco.COCOeval(truth, truth.load_res(rows), "bbox")
    session.evaluate()
    return session


def _with_hotcoco(dataset: Dataset, table: DetectionTable) -> CocoResult:
    session = hotcoco_session(dataset, table)
    session.accumulate()
    session.summary_lines()  # fills stats; summarize() would print
    arrays = session.eval
    return CocoResult(_named(session.stats), arrays["precision"], arrays["recall"], "hotcoco", session)


def _with_pycocotools(dataset: Dataset, table: DetectionTable) -> CocoResult:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise EnvironmentProblem(
            "the evaluator pycocotools is not installed", hint="pip install pycocotools, or take --evaluator hotcoco"
        ) from error
    number = image_numbers(dataset)
    images = [{"id": n} for n in number.tolist()]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(dataset.names)]

    def indexed(
        numbers: NDArray[np.int64],
        labels: NDArray[np.int64],
        boxes: NDArray[np.float64],
        areas: NDArray[np.float64],
        extra: list[dict[str, Any]],
    ) -> Any:
        coco = COCO()
        coco.dataset = {
            "images": images,
            "categories": categories,
            "annotations": [
                {"id": n + 1, "image_id": i, "category_id": k + 1, "bbox": b, "area": a, "iscrowd": 0, **more}
                for n, (i, k, b, a, more) in enumerate(
                    zip(numbers.tolist(), labels.tolist(), boxes.tolist(), areas.tolist(), extra, strict=True)
                )
            ],
        }
        coco.createIndex()
        return coco

    found = xywh(table.boxes_xyxy_px)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress by print
        truth = indexed(
            np.repeat(number, np.diff(dataset.offsets)),
            dataset.labels,
            xywh(dataset.boxes_xyxy_px),
            dataset.areas,
            [{"iscrowd": int(c)} for c in dataset.crowd.tolist()],
        )
        detections = indexed(
            number[table.image_index],
            table.labels,
            found,
            found[:, 2] * found[:, 3],
            [{"score": s} for s in table.scores.tolist()],
        )
        session = COCOeval(truth, detections, "bbox")
        session.evaluate()
        session.accumulate()
        session.summarize()
    return CocoResult(_named(session.stats), session.eval["precision"], session.eval["recall"], "pycocotools")


def _named(stats: Any) -> dict[str, float | None]:
    """Name the twelve numbers; the evaluators' -1 (no such box) becomes None."""
    return {name: (float(v) if v > -1 else None) for name, v in zip(METRICS, stats, strict=True)}

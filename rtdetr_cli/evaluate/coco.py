"""The COCO metrics of flat detection arrays against a `Dataset`, without a JSON file in between.

Two evaluators give the same numbers: hotcoco (compiled, the default, with an error analysis built in) and pycocotools
(the reference implementation: the oracle in the tests, and the fallback where hotcoco is not installed). Both get the
dataset's own areas and crowd flags, so that the area of a mask decides what is small where the dataset has masks.
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
# Square pixels, as COCO defines them: small up to 32 x 32, large from 96 x 96.
AREA_RANGES = ((0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10))
PYCOCOTOOLS_LACKS = "the confusion matrix and the AP gained by fixing each kind of error (TIDE) need hotcoco"


@dataclass(frozen=True, eq=False)
class CocoResult:
    """The result of one COCO evaluation.

    T 10 IoU thresholds, R 101 recall points, K classes, A sizes (`SIZES`), M detection limits (1, 10, 100).

    Attributes:
        metrics: the twelve numbers by name; None where the split has no such box.
        precision: (T, R, K, A, M), -1 where undefined.
        recall: (T, K, A, M), -1 where undefined.
        evaluator: the evaluator that was used.
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

    def ap50(self, label: int | None, size: int) -> float | None:
        """Return AP50 of one class, or of all classes (None), for boxes of one of `SIZES`."""
        return _mean(self.precision[0, :, slice(None) if label is None else label, size, 2])


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def xywh(boxes_xyxy_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N, 4) boxes as left, top, width, height."""
    boxes = np.array(boxes_xyxy_px, np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def require_images(dataset: Dataset) -> None:
    """Refuse a split without images.

    Raises:
        DataError: the split is empty.
    """
    if not len(dataset):
        raise DataError(
            f"the {dataset.split or 'val'} split of {dataset.name} has no images, so there is nothing to evaluate",
            hint="choose another split with --split, or create one: rtdetr validate DATA --resplit 0.8,0.2 --to DIR",
            code="empty-split",
        )


def coco_metrics(dataset: Dataset, table: DetectionTable, *, evaluator: str = "hotcoco") -> CocoResult:
    """Evaluate detections against a dataset's boxes.

    Args:
        dataset: N images and their boxes.
        table: detections in the dataset's labels, without NaN.
        evaluator: `hotcoco` or `pycocotools`.

    Raises:
        DataError: the dataset has no images, or a detection has an image or class outside it.
        EnvironmentProblem: the evaluator is not installed.
        UsageError: there is no such evaluator.
    """
    require_images(dataset)
    if len(table) and (
        table.image_index.min() < 0
        or table.image_index.max() >= len(dataset)
        or table.labels.min() < 0
        or table.labels.max() >= len(dataset.categories)
    ):
        raise DataError("a detection has an image or class that the dataset does not have", code="detections")
    if evaluator == "hotcoco":
        return _with_hotcoco(dataset, table)
    if evaluator == "pycocotools":
        return _with_pycocotools(dataset, table)
    raise UsageError(f"there is no evaluator {evaluator!r}", hint=f"choose one of: {', '.join(EVALUATORS)}")


def without_crowds(dataset: Dataset) -> Dataset:
    """Return the dataset without its crowd boxes."""
    keep = ~dataset.crowd
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    return replace(
        dataset,
        offsets=kept_before[dataset.offsets].astype(np.int64),
        boxes_xyxy_px=dataset.boxes_xyxy_px[keep],
        labels=dataset.labels[keep],
        areas=dataset.areas[keep],
        crowd=dataset.crowd[keep],
        annotation_ids=dataset.annotation_ids[keep],
    )


def image_numbers(dataset: Dataset) -> NDArray[np.int64]:
    """Return each image's number in the evaluators: 1 to N in the order of the dataset's own ids.

    Detections with equal scores rank by their image, so another order of images would give another AP.
    """
    number = np.empty(len(dataset), np.int64)
    number[np.argsort(dataset.image_ids, kind="stable")] = np.arange(1, len(dataset) + 1)
    return number


def hotcoco_session(dataset: Dataset, table: DetectionTable) -> Any:
    """Return hotcoco's evaluator after matching, for AP and for its analyses.

    Images carry `image_numbers`; classes and boxes are numbered from 1 in the order of the dataset, detections in the
    order of the table. The dataset's own ids may start at 0, which the evaluators read as "unmatched".
    """
    try:
        import hotcoco
    except ImportError as error:
        raise _not_installed("hotcoco", instead="pycocotools") from error
    number = image_numbers(dataset)
    sizes_wh = dataset.sizes_wh.tolist()
    truth = hotcoco.COCO.from_arrays(
        [{"id": n, "width": w, "height": h} for n, (w, h) in zip(number.tolist(), sizes_wh, strict=True)],
        _categories(dataset),
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
        raise _not_installed("pycocotools", instead="hotcoco") from error
    number = image_numbers(dataset)

    def coco_object(**columns: NDArray[Any]) -> Any:
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        coco = COCO()
        coco.dataset = {
            "images": [{"id": n} for n in number.tolist()],
            "categories": _categories(dataset),
            "annotations": [{"id": n, **dict(zip(columns, row, strict=True))} for n, row in enumerate(rows, start=1)],
        }
        coco.createIndex()
        return coco

    detection_boxes = xywh(table.boxes_xyxy_px)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = coco_object(
            image_id=np.repeat(number, np.diff(dataset.offsets)),
            category_id=dataset.labels + 1,
            bbox=xywh(dataset.boxes_xyxy_px),
            area=dataset.areas,
            iscrowd=dataset.crowd.astype(int),
        )
        detections = coco_object(
            image_id=number[table.image_index],
            category_id=table.labels + 1,
            bbox=detection_boxes,
            area=detection_boxes[:, 2] * detection_boxes[:, 3],
            iscrowd=np.zeros(len(table), int),
            score=table.scores,
        )
        session = COCOeval(truth, detections, "bbox")
        session.evaluate()
        session.accumulate()
        session.summarize()
    return CocoResult(_named(session.stats), session.eval["precision"], session.eval["recall"], "pycocotools")


def _not_installed(evaluator: str, *, instead: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the evaluator {evaluator} is not installed", hint=f"pip install {evaluator}, or use --evaluator {instead}"
    )


def _categories(dataset: Dataset) -> list[dict[str, Any]]:
    return [{"id": label + 1, "name": name} for label, name in enumerate(dataset.names)]


def _named(stats: Any) -> dict[str, float | None]:
    """Return the twelve numbers by name; the evaluators' -1 (no such box) becomes None."""
    return {name: (float(v) if v > -1 else None) for name, v in zip(METRICS, stats, strict=True)}

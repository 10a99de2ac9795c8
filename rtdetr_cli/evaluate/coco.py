"""The COCO metrics of flat detection arrays against a `Dataset`, without a JSON file in between.

Two evaluators give the same numbers: hotcoco (compiled, the default, with an error analysis built in) and pycocotools
(the reference implementation: the oracle in the tests, and the fallback where hotcoco is not installed). Both get the
dataset's own areas and crowd flags, so that the area of a mask decides what is small where the dataset has masks.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
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
PYCOCOTOOLS_LACKS = "the AP gained by fixing each kind of error (TIDE) needs hotcoco"


@dataclass(frozen=True, eq=False)
class CocoResult:
    """The result of one COCO evaluation.

    T 10 IoU thresholds, R 101 recall points, K classes, A sizes (`SIZES`), M detection limits (1, 10, 100).

    Attributes:
        metrics: the twelve numbers by name; None where the split has no such box.
        precision: (T, R, K, A, M), -1 where undefined.
        recall: (T, K, A, M), -1 where undefined.
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
    return np.hstack([boxes_xyxy_px[:, :2], boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2]])


def require_images(dataset: Dataset) -> None:
    """Raise DataError for a split without images."""
    if not len(dataset):
        raise DataError(
            f"the {dataset.split or 'val'} split of {dataset.name} has no images, so there is nothing to evaluate",
            hint="choose another split with --split, or create one: rtdetr validate DATA --resplit 0.8,0.2 --to DIR",
            code="empty-split",
        )


def coco_metrics(dataset: Dataset, table: DetectionTable, *, evaluator: str = "hotcoco") -> CocoResult:
    """Evaluate detections, in the dataset's labels and without NaN, against a dataset's boxes.

    Raises:
        DataError: the dataset has no images, or a detection has an image or class outside it.
        EnvironmentProblem: hotcoco is not installed.
        UsageError: there is no such evaluator.
    """
    require_images(dataset)
    for values, count in ((table.image_index, len(dataset)), (table.labels, len(dataset.categories))):
        if ((values < 0) | (values >= count)).any():
            raise DataError("a detection has an image or class that the dataset does not have", code="detections")
    if evaluator == "hotcoco":
        session = hotcoco_session(dataset, table)
        session.accumulate()
        session.summary_lines()  # fills stats; summarize() would print
    elif evaluator == "pycocotools":
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            session = _pycocotools_session(dataset, table)
            session.accumulate()
            session.summarize()
    else:
        raise UsageError(f"there is no evaluator {evaluator!r}", hint=f"choose one of: {', '.join(EVALUATORS)}")
    metrics = {name: float(v) if v > -1 else None for name, v in zip(METRICS, session.stats, strict=True)}
    curves = session.eval
    return CocoResult(
        metrics, curves["precision"], curves["recall"], evaluator, session if evaluator == "hotcoco" else None
    )


def image_numbers(dataset: Dataset) -> NDArray[np.int64]:
    """Return each image's number in the evaluators: 1 to N in the order of the dataset's own ids.

    Detections with equal scores rank by their image, so another order of images would give another AP. The dataset's
    own ids may start at 0, which the evaluators read as "unmatched".
    """
    number = np.empty(len(dataset), np.int64)
    number[np.argsort(dataset.image_ids, kind="stable")] = np.arange(1, len(dataset) + 1)
    return number


def _result_rows(dataset: Dataset, table: DetectionTable) -> NDArray[np.float64]:
    """Return (D, 7) image, left, top, width, height, score, class: the layout that both evaluators read."""
    images = image_numbers(dataset)[table.image_index]
    return np.column_stack([images, xywh(table.boxes_xyxy_px), table.scores, table.labels + 1])


def _images_and_categories(dataset: Dataset) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sizes = zip(image_numbers(dataset).tolist(), dataset.sizes_wh.tolist(), strict=True)
    categories = [{"id": label, "name": name} for label, name in enumerate(dataset.names, start=1)]
    return [{"id": n, "width": w, "height": h} for n, (w, h) in sizes], categories


def hotcoco_session(dataset: Dataset, table: DetectionTable) -> Any:
    """Return hotcoco's evaluator after matching, for AP and for its analyses.

    Images carry `image_numbers`; classes and boxes are numbered from 1 in the order of the dataset, detections in the
    order of the table.
    """
    try:
        import hotcoco
    except ImportError as error:
        hint = "pip install hotcoco, or use --evaluator pycocotools"
        raise EnvironmentProblem("the evaluator hotcoco is not installed", hint=hint) from error
    truth = hotcoco.COCO.from_arrays(
        *_images_and_categories(dataset),
        np.repeat(image_numbers(dataset), np.diff(dataset.offsets)),
        dataset.labels + 1,
        xywh(dataset.boxes_xyxy_px),
        area=dataset.areas,
        iscrowd=dataset.crowd,
    )
    session = hotcoco.COCOeval(truth, truth.load_res(_result_rows(dataset, table)), "bbox")
    session.evaluate()
    return session


def _pycocotools_session(dataset: Dataset, table: DetectionTable) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    columns = {
        "image_id": np.repeat(image_numbers(dataset), np.diff(dataset.offsets)),
        "category_id": dataset.labels + 1,
        "bbox": xywh(dataset.boxes_xyxy_px),
        "area": dataset.areas,
        "iscrowd": dataset.crowd.astype(int),
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    annotations = [{"id": n, **dict(zip(columns, row, strict=True))} for n, row in enumerate(rows, start=1)]
    images, categories = _images_and_categories(dataset)
    truth = COCO()
    truth.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    truth.createIndex()
    # loadRes reads the first detection, and fails without one.
    session = COCOeval(truth, truth.loadRes(_result_rows(dataset, table)) if len(table) else COCO(), "bbox")
    session.evaluate()
    return session

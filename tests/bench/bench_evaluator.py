"""Evaluate 500,000 detections on 5,000 images with hotcoco and with pycocotools, in one run.

    python tests/bench/bench_evaluator.py

Both start from the same flat arrays and return the twelve metrics and the curves by class; the metrics must agree to
1e-9, and hotcoco must be 50 times as fast. Also shows how long the rest of `rtdetr eval` takes at that size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.datasets.records import Category, Dataset, FlatStrings
from rtdetr_cli.evaluate.bootstrap import resample
from rtdetr_cli.evaluate.coco import coco_metrics
from rtdetr_cli.evaluate.error_analysis import analyze_errors
from rtdetr_cli.evaluate.run import evaluate_table
from rtdetr_cli.evaluate.table import DetectionTable

TARGET_RATIO = 50.0


def make(images: int, classes: int, detections: int, *, seed: int = 0) -> tuple[Dataset, DetectionTable]:
    """Seven boxes an image, one in a hundred a crowd; a third of the detections near a box, the rest anywhere."""
    random = np.random.default_rng(seed)
    count = 7 * images
    owner = np.sort(random.integers(0, images, count))
    labels = random.integers(0, classes, count)
    wh = np.exp(random.normal(4, 0.8, (count, 2))).clip(4, 400)
    boxes = np.concatenate([random.random((count, 2)) * (np.array([640, 480]) - wh).clip(1), wh], axis=1)
    offsets = np.searchsorted(owner, np.arange(images + 1)).astype(np.int64)
    dataset = Dataset(
        name="made",
        split="val",
        format="coco",
        root=Path(),
        categories=tuple(Category(k + 1, f"class {k}") for k in range(classes)),
        file_names=FlatStrings([f"{i}.jpg" for i in range(images)]),
        image_ids=np.arange(images),
        sizes_wh=np.tile(np.array([[640, 480]], np.int32), (images, 1)),
        offsets=offsets,
        boxes_xyxy_px=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        labels=labels,
        areas=wh[:, 0] * wh[:, 1],
        crowd=random.random(count) < 0.01,
        annotation_ids=np.arange(count),
    )
    where = np.repeat(np.arange(images), detections // images)
    boxes_in_image = np.diff(offsets)[where]
    source = np.minimum(
        offsets[where] + (random.random(len(where)) * np.maximum(boxes_in_image, 1)).astype(int), count - 1
    )
    near = (boxes_in_image > 0) & (random.random(len(where)) < 0.3)
    size = np.exp(random.normal(4, 0.8, (len(where), 2))).clip(4, 400)
    detected = np.concatenate([random.random((len(where), 2)) * 400, size], axis=1)
    detected[near] = boxes[source[near]] * (1 + random.normal(0, 0.06, (int(near.sum()), 4)))
    detected[:, 2:] = detected[:, :2] + detected[:, 2:].clip(1)
    right = near & (random.random(len(where)) < 0.9)
    detected_labels = np.where(right, labels[source], random.integers(0, classes, len(where)))
    scores = np.where(near, random.beta(3, 2, len(where)), random.beta(1, 6, len(where)))
    table = DetectionTable(where.astype(np.int64), detected_labels.astype(np.int64), scores, detected)
    return dataset, DetectionTable.join([table])


def seconds(work: Callable[[], Any], times: int) -> tuple[float, Any]:
    """Return the median of several runs, and the last result."""
    times_s, result = [], None
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        times_s.append(time.perf_counter() - start)
    return float(np.median(times_s)), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, default=500_000)
    options = parser.parse_args()
    dataset, table = make(options.images, options.classes, options.detections)
    print(f"{len(table):,} detections, {len(dataset):,} images, {len(dataset.labels):,} boxes")

    quick, ours = seconds(lambda: coco_metrics(dataset, table), 5)
    slow, reference = seconds(lambda: coco_metrics(dataset, table, evaluator="pycocotools"), 1)
    for name, value in reference.metrics.items():
        assert abs((value or 0) - (ours.metrics[name] or 0)) < 1e-9, (name, value, ours.metrics[name])
    ratio = slow / quick
    print(f"hotcoco      {quick:7.2f} s (median of 5)")
    print(f"pycocotools  {slow:7.2f} s (one run)")
    print(f"ratio        {ratio:7.1f}, target {TARGET_RATIO:.0f}")

    complete, evaluation = seconds(lambda: (e := evaluate_table(dataset, table), e.per_class, e.by_size, e.best)[0], 3)
    errors, _ = seconds(lambda: (a := analyze_errors(evaluation)).to_json() and a.gains, 1)
    interval, _ = seconds(lambda: resample(dataset, table, resamples=1000), 1)
    print(f"with precision, recall and F1 by class and size  {complete:6.2f} s")
    print(f"error analysis                                   {errors:6.2f} s")
    print(f"interval from 1000 resamples                     {interval:6.2f} s")
    print(json.dumps({"hotcoco_s": quick, "pycocotools_s": slow, "ratio": ratio, "passed": ratio >= TARGET_RATIO}))
    raise SystemExit(0 if ratio >= TARGET_RATIO else 1)


if __name__ == "__main__":
    main()

"""Images and datasets: augmentation beside torchvision v2, evaluation beside pycocotools, an epoch beside both."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.datasets.generate import generate_image
from rtdetr_cli.datasets.records import Category, Dataset, FlatStrings
from rtdetr_cli.evaluate.coco import coco_metrics
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.images.augment import RECIPE, augment
from rtdetr_cli.images.decode import opened
from rtdetr_cli.machine import keep_freed_memory
from tests.bench.speed.harness import ROOT, Comparison, Settings, Turn, run_timed

NETWORK = (640, 640)
SHARED = ROOT.parent / "shared" / "data"
VALIDATED_IMAGES, VALIDATED_BOXES = 118_000, 860_000
LINKS = 20_000  # to one file: file systems allow some tens of thousands

Case = tuple[Path, NDArray[np.float64]]  # a JPEG file and its boxes (N, 4) in pixels


def originals() -> list[tuple[Image.Image, NDArray[np.float64]]]:
    """Return images with boxes (N, 4) as shares of the sides: photographs, or generated images without them."""
    file = SHARED / "coco21" / "instances.json"
    if not file.is_file():
        made = [generate_image(np.random.default_rng(seed), (480, 640)) for seed in range(21)]
        return [(Image.fromarray(image), boxes / (640, 480, 640, 480)) for image, boxes, _ in made]
    document = json.loads(file.read_text())
    found = []
    for entry in document["images"]:
        boxes = [a["bbox"] for a in document["annotations"] if a["image_id"] == entry["id"]]
        xywh = np.array(boxes, np.float64).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        image = Image.open(file.parent / "images" / Path(entry["file_name"]).name).convert("RGB")
        found.append((image, xyxy / (entry["width"], entry["height"], entry["width"], entry["height"])))
    return found


@contextmanager
def augmentation_sides(_: Settings, *, size_wh: tuple[int, int], count: int) -> Iterator[tuple[Turn, Turn]]:
    """Give decoding and augmenting `count` JPEG files to uint8 (3, 640, 640), on one core each."""
    import cv2
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()
    pipeline = v2.Compose(
        [
            v2.RandomPhotometricDistort(p=0.5),
            v2.RandomZoomOut(fill=0),
            v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.RandomHorizontalFlip(),
            v2.Resize(list(NETWORK)),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.PILToTensor(),
        ]
    )
    out = np.empty((3, *NETWORK), np.uint8)
    turns = {"ours": 0, "theirs": 0}
    with tempfile.TemporaryDirectory() as folder:
        cases: list[Case] = []
        for number, (image, shares) in enumerate(originals()[:count]):
            path = Path(folder) / f"{number}.jpg"
            image.resize(size_wh, Image.Resampling.BICUBIC).save(path, quality=90)
            cases.append((path, shares * (*size_wh, *size_wh)))

        def ours() -> None:
            turns["ours"] += 1
            for number, (path, boxes) in enumerate(cases):
                rng = np.random.default_rng((turns["ours"], number))
                with opened(path) as file:
                    augment(file, boxes, np.zeros(len(boxes), np.int64), RECIPE, rng, out)

        def theirs() -> None:
            turns["theirs"] += 1
            torch.manual_seed(turns["theirs"])
            for path, corners in cases:
                image = Image.open(path).convert("RGB")
                boxes = tv_tensors.BoundingBoxes(
                    torch.from_numpy(corners).float(), format="XYXY", canvas_size=(image.height, image.width)
                )
                labels = torch.zeros(len(boxes), dtype=torch.int64)
                result, _ = pipeline(image, {"boxes": boxes, "labels": labels})
                assert result.shape == (3, *NETWORK)

        yield ours, theirs


def make_detections(images: int, classes: int, detections: int) -> tuple[Dataset, DetectionTable]:
    """Seven boxes an image, one in a hundred a crowd; a third of the detections near a box, the rest anywhere."""
    draw = np.random.default_rng(0)
    count = 7 * images
    owner = np.sort(draw.integers(0, images, count))
    labels = draw.integers(0, classes, count)
    wh = np.exp(draw.normal(4, 0.8, (count, 2))).clip(4, 400)
    boxes = np.concatenate([draw.random((count, 2)) * (np.array([640, 480]) - wh).clip(1), wh], axis=1)
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
        crowd=draw.random(count) < 0.01,
        annotation_ids=np.arange(count),
    )
    where = np.repeat(np.arange(images), detections // images)
    in_image = np.diff(offsets)[where]
    source = np.minimum(offsets[where] + (draw.random(len(where)) * np.maximum(in_image, 1)).astype(int), count - 1)
    near = (in_image > 0) & (draw.random(len(where)) < 0.3)
    size = np.exp(draw.normal(4, 0.8, (len(where), 2))).clip(4, 400)
    detected = np.concatenate([draw.random((len(where), 2)) * 400, size], axis=1)
    detected[near] = boxes[source[near]] * (1 + draw.normal(0, 0.06, (int(near.sum()), 4)))
    detected[:, 2:] = detected[:, :2] + detected[:, 2:].clip(1)
    right = near & (draw.random(len(where)) < 0.9)
    detected_labels = np.where(right, labels[source], draw.integers(0, classes, len(where)))
    scores = np.where(near, draw.beta(3, 2, len(where)), draw.beta(1, 6, len(where)))
    table = DetectionTable(where.astype(np.int64), detected_labels.astype(np.int64), scores, detected)
    return dataset, DetectionTable.join([table])


@contextmanager
def evaluation_sides(_: Settings, *, images: int, detections: int) -> Iterator[tuple[Turn, Turn]]:
    """Give the twelve COCO metrics of many detections; both must agree."""
    import pycocotools  # noqa: F401

    dataset, table = make_detections(images, 80, detections)
    found: dict[str, dict[str, float | None]] = {}

    def turn(evaluator: str) -> None:
        found[evaluator] = dict(coco_metrics(dataset, table, evaluator=evaluator).metrics)

    yield partial(turn, "hotcoco"), partial(turn, "pycocotools")
    for name, value in found["pycocotools"].items():
        assert abs((value or 0) - (found["hotcoco"][name] or 0)) < 1e-9, name


@contextmanager
def epoch_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give one epoch on the blood cells, each in a process of its own."""
    command = ["-m", "tests.bench.speed.epoch", "--imgsz", str(settings.imgsz), "--batch", str(settings.batch)]
    yield tuple(partial(run_timed, [*command, side], threads=settings.threads) for side in ("ours", "peers"))  # type: ignore[misc]


_TIMED = """
import sys
from contextlib import redirect_stdout
from tests.bench.speed.harness import Stopwatch
{imports}
watch = Stopwatch()
watch.start()
with redirect_stdout(sys.stderr):
    {work}
watch.stop()
"""


def make_coco_file(folder: Path) -> Path:
    """Write a JSON file of COCO's size, with areas but without masks, one entry after the other on one line."""
    path = folder / "instances.json"
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    images = []
    for i in range(VALIDATED_IMAGES):
        width, height = draw.choice([(640, 480), (480, 640), (640, 427), (500, 375)])
        name = f"{i:012d}.jpg"
        images.append({"license": 1, "file_name": name, "height": height, "width": width, "id": i})
        source = folder / f"source_{i // LINKS}.jpg"
        if not source.exists():
            Image.new("RGB", (640, 480), (i // LINKS, 90, 120)).save(source)
        os.link(source, folder / "images" / name)
    annotations = []
    for k in range(VALIDATED_BOXES):
        image = images[draw.randrange(VALIDATED_IMAGES)]
        w, h = (min(s - 1.0, draw.lognormvariate(4, 0.9)) for s in (image["width"], image["height"]))
        x, y = draw.random() * (image["width"] - w), draw.random() * (image["height"] - h)
        box = [round(v, 2) for v in (x, y, max(w, 1.0), max(h, 1.0))]
        entry = {"area": round(box[2] * box[3] * 0.7, 4), "iscrowd": 0, "image_id": image["id"], "bbox": box}
        annotations.append(entry | {"category_id": 1 + draw.randrange(80), "id": k + 1})
    categories = [{"supercategory": "thing", "id": k + 1, "name": f"class {k}"} for k in range(80)]
    document = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(document))
    return path


@contextmanager
def validate_sides(_: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give `rtdetr validate --fast` and what pycocotools takes to load the same file, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(make_coco_file(Path(folder)))
        ours = _TIMED.format(
            imports="from rtdetr_cli.cli.app import run", work=f"run(['validate', {path!r}, '--fast'])"
        )
        theirs = _TIMED.format(imports="from pycocotools.coco import COCO", work=f"COCO({path!r})")
        yield partial(run_timed, ["-c", ours]), partial(run_timed, ["-c", theirs])


COMPARISONS = (
    Comparison(
        name="augment",
        title="decoding and augmenting images of 640x480 on one core",
        peer="torchvision v2",
        aim=4.0,
        sides=partial(augmentation_sides, size_wh=(640, 480), count=21),
    ),
    Comparison(
        name="augment-12mp",
        title="decoding and augmenting images of 4000x3000 on one core",
        peer="torchvision v2",
        aim=10.0,
        sides=partial(augmentation_sides, size_wh=(4000, 3000), count=4),
        rounds=5,
    ),
    Comparison(
        name="evaluate",
        title="evaluating 100,000 detections in 1,000 images",
        peer="pycocotools",
        aim=50.0,
        sides=partial(evaluation_sides, images=1000, detections=100_000),
        rounds=3,
    ),
    Comparison(
        name="evaluate-large",
        title="evaluating 500,000 detections in 5,000 images",
        peer="pycocotools",
        aim=50.0,
        sides=partial(evaluation_sides, images=5000, detections=500_000),
        rounds=1,
        warmup=0,
        slow=True,
    ),
    Comparison(
        name="epoch",
        title="an epoch of r18 on 205 images, with loading, augmentation, moving average and evaluation",
        peer="transformers, torchvision v2 and pycocotools",
        aim=2.0,
        sides=epoch_sides,
        rounds=3,
        warmup=0,
        slow=True,
    ),
    Comparison(
        name="validate",
        title="`validate --fast` on 118,000 images",
        peer="loading them in pycocotools",
        aim=2.0,
        at_most=True,
        sides=validate_sides,
        rounds=3,
        slow=True,
    ),
)

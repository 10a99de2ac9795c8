"""One epoch of r18 on the blood cells with its evaluation, by our command's code or by the peers' parts.

    python -m tests.bench.speed.epoch ours|peers [--imgsz 320] [--batch 4]

Prints seconds, seconds of processor time and peak memory as one JSON object. The peers' parts are put together as their
documentation does: torchvision's v2 transforms in a DataLoader, RT-DETRv2 of transformers in float32 with fused AdamW,
torch's AveragedModel, and pycocotools. Both begin with the first batch and end with the metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from typing import Any

from tests.bench.speed.data import SHARED
from tests.bench.speed.harness import Stopwatch


def ours(imgsz: int, batch: int, watch: Stopwatch) -> None:
    """Train one epoch as `rtdetr train` does."""
    from rtdetr_cli.config.run import resolve_run
    from rtdetr_cli.train.events import EpochDone
    from rtdetr_cli.workflows.events import RunStarted
    from rtdetr_cli.workflows.finetune import finetune

    with tempfile.TemporaryDirectory() as folder:
        config = resolve_run(
            {
                "preset": "r18",
                "data": str(SHARED / "bccd"),
                "imgsz": (imgsz, imgsz),
                "effective_batch": batch,
                "epochs": 1,
                "weights": "none",
                "out": folder,
            },
            sets=["plots=false", "optimizer=adamw"],  # as the peers, and as from pretrained weights
        )
        for event in finetune(config):
            if isinstance(event, RunStarted):
                watch.start()
            elif isinstance(event, EpochDone):
                watch.stop()


class TorchvisionImages:
    """A dataset for torch's DataLoader, with torchvision's transforms."""

    def __init__(self, dataset: Any, imgsz: int, *, augment: bool) -> None:
        from torchvision.transforms import v2

        random = [
            v2.RandomPhotometricDistort(p=0.5),
            v2.RandomZoomOut(fill=0),
            v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.RandomHorizontalFlip(),
        ]
        last = [v2.Resize([imgsz, imgsz]), v2.SanitizeBoundingBoxes(min_size=1), v2.PILToTensor()]
        self.dataset, self.transform = dataset, v2.Compose([*random, *last] if augment else last)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        import torch
        from PIL import Image
        from torchvision import tv_tensors

        image = Image.open(self.dataset.path(index)).convert("RGB")
        truth = self.dataset.annotations(index)
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(truth.boxes_xyxy_px.astype("float32")),
            format="XYXY",
            canvas_size=(image.height, image.width),
        )
        tensor, target = self.transform(image, {"boxes": boxes, "labels": torch.from_numpy(truth.labels.copy())})
        height, width = tensor.shape[-2:]
        low, high = target["boxes"][:, :2], target["boxes"][:, 2:]
        scale = torch.tensor([width, height])
        boxes = torch.cat([(low + high) / 2 / scale, (high - low) / scale], 1)
        return tensor, {"boxes": boxes, "class_labels": target["labels"], "index": index}


def collate(examples: list[Any]) -> tuple[Any, list[Any]]:
    import torch

    return torch.stack([image for image, _ in examples]), [target for _, target in examples]


def peers(imgsz: int, batch: int, watch: Stopwatch) -> None:
    """Train one epoch with the peers' parts."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torch.utils.data import DataLoader

    from rtdetr_cli.checks.load import load_splits
    from tests.bench.speed.steps import peer_model

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    splits = load_splits(SHARED / "bccd")
    train_set, val_set = splits.train, splits.val
    assert train_set is not None
    assert val_set is not None
    model = peer_model(torch.device("cpu"))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loaders = [
        DataLoader(
            TorchvisionImages(dataset, imgsz, augment=augment),  # type: ignore[arg-type]
            batch_size=batch,
            shuffle=augment,
            num_workers=1,
            collate_fn=collate,
            persistent_workers=True,
        )
        for dataset, augment in ((train_set, True), (val_set, False))
    ]
    watch.start()
    model.train()
    for images, targets in loaders[0]:
        model(pixel_values=images / 255, labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    evaluate(average.module.eval(), loaders[1], val_set)
    watch.stop()


def evaluate(model: Any, loader: Any, val_set: Any) -> None:
    """Compute the COCO metrics of the 300 best detections of each image with pycocotools."""
    import torch
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    detections = []
    with torch.inference_mode():
        for images, targets in loader:
            outputs = model(pixel_values=images / 255)
            scores, best = outputs.logits.sigmoid().flatten(1).topk(300)
            classes = outputs.logits.shape[-1]
            for row, target in enumerate(targets):
                index = target["index"]
                scale = torch.tensor([*val_set.sizes_wh[index], *val_set.sizes_wh[index]])
                boxes = outputs.pred_boxes[row][best[row] // classes] * scale
                boxes[:, :2] -= boxes[:, 2:] / 2
                rows = zip(boxes.tolist(), scores[row].tolist(), (best[row] % classes).tolist(), strict=True)
                detections += [
                    {"image_id": index, "category_id": label, "bbox": box, "score": score} for box, score, label in rows
                ]
    annotations = []
    for image in range(len(val_set)):
        truth = val_set.annotations(image)
        for box, label, area in zip(truth.boxes_xyxy_px.tolist(), truth.labels.tolist(), truth.areas, strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": bbox}
                | {"area": float(area), "iscrowd": 0}
            )
    with contextlib.redirect_stdout(sys.stderr):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(val_set))],
            "categories": [{"id": i} for i in range(classes)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "peers"))
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    {"ours": ours, "peers": peers}[arguments.side](arguments.imgsz, arguments.batch, Stopwatch())


if __name__ == "__main__":
    main()

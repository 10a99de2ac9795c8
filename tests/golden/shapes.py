"""A very small trained detector for the export tests, and the images that it knows.

    python tests/golden/shapes.py          # trains it again, about four minutes on two cores

A randomly initialised detector is useless for parity: the scores of all tokens are nearly equal, so the selection is
all ties, and rounding decides it. This one is trained, has three classes that differ by colour alone (an export that
swaps channels must be noticed), an input that is no square, and duplicates, which its header rescores: 26 of 116 scores
above 0.1 on its 16 images fall below. Its weights are stored as float16: 0.7 MB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WEIGHTS = Path(__file__).with_name("shapes.safetensors")
NAMES = ("tomato", "leaf", "plum")
CATEGORY_IDS = (3, 7, 20)
COLOURS = ((205, 60, 50), (60, 165, 70), (75, 65, 190))
IMGSZ = (96, 128)  # height, width


def draw(rng: np.random.Generator, size_wh: tuple[int, int]) -> tuple[Image.Image, list[list[float]], list[int]]:
    """Draw ellipses and rectangles on a noisy ground; return the image, xyxy boxes in pixels, and labels."""
    width, height = size_wh
    ground = rng.integers(90, 170, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    boxes: list[list[float]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(1, 6))):
        side = float(rng.uniform(0.12, 0.4)) * height
        w, h = side * float(rng.uniform(0.7, 1.4)), side
        x, y = float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h))
        box = [x, y, x + w, y + h]
        if any(overlap(box, other) > 0.1 for other in boxes):
            continue
        label = int(rng.integers(len(NAMES)))
        colour = tuple(int(c) for c in np.clip(np.array(COLOURS[label]) + rng.integers(-25, 26, 3), 0, 255))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(box, fill=colour)
        boxes.append(box)
        labels.append(label)
    noise = rng.integers(-8, 9, (height, width, 3))
    noisy = (np.asarray(image).astype(np.int64) + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy), boxes, labels


def overlap(a: list[float], b: list[float]) -> float:
    """Return the intersection as a share of the smaller box."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def write_dataset(folder: Path, *, count: int = 16, seed: int = 7) -> Path:
    """Write images of several sizes and a COCO JSON; return the JSON."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        size_wh = ((256, 192), (320, 200), (180, 240), (128, 96))[index % 4]
        image, boxes, labels = draw(rng, size_wh)
        name = f"shapes_{index:02d}.png"
        image.save(folder / name)
        images.append({"id": index + 1, "file_name": name, "width": size_wh[0], "height": size_wh[1]})
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            w, h = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [x1, y1, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, NAMES, strict=True)]
    path = folder / "shapes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def train(steps: int, *, seed: int = 0, batch: int = 8) -> None:
    """Train the detector and store it."""
    import torch

    from rtdetr_cli.config.schema import ModelSpec
    from rtdetr_cli.images.decode import stretch
    from rtdetr_cli.model.build import build_detector
    from rtdetr_cli.model.denoising import draw_denoising
    from rtdetr_cli.train.losses import compute_losses
    from rtdetr_cli.weights.header import Dedupe, ModelHeader, Thresholds
    from rtdetr_cli.weights.load import save_model

    spec = ModelSpec(
        depth=10,
        width=12,
        hidden_dim=40,
        encoder_ffn=64,
        expansion=0.5,
        depth_mult=0.4,
        heads=4,
        decoder_dim=40,
        decoder_ffn=64,
        decoder_layers=2,
        eval_layers=2,
        num_points=(2, 3, 2),
        queries=40,
        denoising=40,
    )
    torch.manual_seed(seed)
    model = build_detector(spec, num_classes=len(NAMES))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        images: list[NDArray[np.uint8]] = []
        boxes, labels = [], []
        for _ in range(batch):
            image, xyxy, classes = draw(rng, (128, 96))
            images.append(stretch(np.asarray(image), IMGSZ))
            corners = torch.tensor(xyxy).reshape(-1, 4) / torch.tensor([128.0, 96, 128, 96])
            boxes.append(torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1))
            labels.append(torch.tensor(classes, dtype=torch.int64))
        inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        group = draw_denoising(
            boxes,
            labels,
            num_classes=len(NAMES),
            queries=spec.queries,
            num_positives=spec.denoising,
            label_noise=0.5,
            box_noise=1.0,
            generator=generator,
        )
        terms = compute_losses(model(inputs, group), boxes, labels, num_boxes=float(sum(map(len, labels))))
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(step, f"{loss.item():.3f}", flush=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.eval().state_dict().items()}
    header = ModelHeader(
        names=NAMES,
        category_ids=CATEGORY_IDS,
        imgsz=IMGSZ,
        architecture=spec.model_dump(mode="json"),
        layers=2,
        queries=spec.queries,
        thresholds=Thresholds("f1", 0.5, (0.5, 0.45, 0.55), dedupe=8.0),
        dedupe=Dedupe(8.0),
        dataset={"name": "shapes"},
    )
    save_model(WEIGHTS, state, header)


if __name__ == "__main__":
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 900)

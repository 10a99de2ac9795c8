"""One training step and one prediction of r18, beside RT-DETRv2 of the transformers library.

    python tests/bench/bench_step.py [--imgsz 320] [--batch 4] [--rounds 8] [--device cpu] [--threads 2]

Both have the sizes of r18, 80 classes, 100 denoising queries and the same images and boxes. A step is everything
from uint8 images to changed weights: scaling, forward, matching, losses, backward, clipping, AdamW; ours also moves
its average, which the other has none of. They take turns, so that whatever else the machine does hurts them alike.
Ratios are medians of the rounds' own ratios: theirs / ours, above 1 where ours is faster. Ours runs twice: in float32
as theirs does, and in the type that `--precision auto` takes on this machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.train.plan import make_plan
from rtdetr_cli.train.precision import choose_precision
from rtdetr_cli.train.step import accumulate_gradients, draw_group, to_input
from rtdetr_cli.workflows.prepare import make_learner

CLASSES = 80
BOXES = 8


def make_batch(count: int, side: int) -> Batch:
    """Return images of noise with `BOXES` boxes each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    boxes = tuple(torch.rand((BOXES, 4), generator=generator) * 0.3 + 0.2 for _ in range(count))
    labels = tuple(torch.randint(0, CLASSES, (BOXES,), generator=generator) for _ in range(count))
    return Batch(images, boxes, labels, tuple(range(count)), ())


def our_step(batch: Batch, side: int, device: torch.device, autocast: torch.dtype | None) -> Callable[[], None]:
    """Return one step of ours."""
    config = resolve_run({"preset": "r18", "imgsz": (side, side), "effective_batch": len(batch.labels)})
    plan = make_plan(config, images=1000)
    spec = config.preset.model
    torch.manual_seed(0)
    model = build_detector(spec, num_classes=CLASSES).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = make_learner(model, config, spec, plan, device, autocast)
    learner.train_mode()
    count = 0

    def step() -> None:
        nonlocal count
        group = draw_group(learner, batch, step=count, seed=0)
        _, terms = accumulate_gradients(
            learner,
            batch,
            rows=[slice(0, len(batch.labels))],
            size=(side, side),
            group=group,
            num_boxes=float(BOXES * len(batch.labels)),
        )
        learner.optimizer.step(terms.sum())
        learner.average.update(plan.ema_weight(count + 1))
        learner.optimizer.zero_grad()
        count += 1

    return step


def peer(device: torch.device) -> Any:
    """Return the detector of transformers with the sizes of r18 and random weights."""
    backbone = transformers.RTDetrResNetConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_labels=CLASSES,
        num_denoising=100,
        freeze_backbone_batch_norms=False,
    )
    torch.manual_seed(0)
    return transformers.RTDetrV2ForObjectDetection(config).to(device)


def their_step(batch: Batch, side: int, device: torch.device) -> Callable[[], None]:
    """Return one step of theirs: float32, fused AdamW, the same clipping."""
    model = peer(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    targets = [
        {"class_labels": labels.to(device), "boxes": boxes.to(device)}
        for labels, boxes in zip(batch.labels, batch.boxes_cxcywh, strict=True)
    ]

    def step() -> None:
        loss = model(pixel_values=to_input(batch.images.to(device), (side, side)), labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def predictors(image: Tensor, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return one forward pass of each, as it is used to predict: ours re-parameterised."""
    spec = resolve_run({"preset": "r18"}).preset.model
    ours = build_detector(spec, num_classes=CLASSES).eval().fuse().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = peer(device).eval()

    @torch.inference_mode()
    def predict_ours() -> None:
        ours(image)

    @torch.inference_mode()
    def predict_theirs() -> None:
        theirs(pixel_values=image)

    return {"transformers": predict_theirs, "ours": predict_ours}


def take_turns(jobs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each job by round, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def tell(title: str, seconds: dict[str, list[float]]) -> None:
    """Print medians, and ratios to the peer."""
    print(title)
    for name, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(seconds["transformers"], times, strict=True))
        print(f"  {name:<16} median {statistics.median(times) * 1000:8.1f} ms   theirs / this {ratio:5.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    batch = make_batch(arguments.batch, arguments.imgsz)
    chosen = choose_precision("auto", device)
    steps = {
        "transformers": their_step(batch, arguments.imgsz, device),
        "ours float32": our_step(batch, arguments.imgsz, device, None),
    }
    if chosen.dtype is not None:
        steps[f"ours {chosen.name}"] = our_step(batch, arguments.imgsz, device, chosen.dtype)
    where = f"{arguments.imgsz} px on {device}, {arguments.threads} threads"
    tell(f"training step, r18, batch {arguments.batch}, {where}", take_turns(steps, arguments.rounds, device))
    image = to_input(batch.images[:1].to(device), (arguments.imgsz, arguments.imgsz))
    tell(f"prediction, r18, one image, {where}", take_turns(predictors(image, device), 3 * arguments.rounds, device))


if __name__ == "__main__":
    main()

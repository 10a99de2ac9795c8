"""What only a GPU shows: idle time and host synchronizations of a step, prediction rates, and a whole epoch.

    python -m tests.bench.speed.gpu [--json FILE] [--images 512]

A step is that of r18 at 640 px with 16 images in the default precision, as it is and with backbone and encoder
compiled. The idle share is the part of a step in which no kernel runs, from torch's profiler. A synchronization is a
call that makes the host wait for the device; a step should need one, for the matching.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train.events import EpochDone
from rtdetr_cli.train.precision import choose_precision
from rtdetr_cli.workflows.finetune import finetune
from tests.bench.speed.harness import Settings, Turn, machine
from tests.bench.speed.steps import CLASSES, make_batch, our_step

STEPS = 10


def seconds(turn: Turn, count: int = STEPS) -> float:
    """Return the median seconds of a turn that ends with a synchronization, after some to warm up."""
    times = []
    for number in range(count + 3):
        began = time.perf_counter()
        turn()
        if number >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def idle_share(turn: Turn) -> float:
    """Return the share of the time in which no kernel runs."""
    turn()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(STEPS):
            turn()
        wall = time.perf_counter() - began
    busy, end = 0.0, 0.0
    kernels = [e for e in profiler.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(kernels, key=lambda e: e.time_range.start):
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    return 1 - busy / 1e6 / wall


def synchronizations(turn: Turn) -> int:
    """Return how often a turn makes the host wait, apart from the synchronization at its end."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            turn()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def compile_parts(model: RTDETR) -> None:
    """Compile what `rtdetr train --compile` compiles."""
    model.backbone.compile()
    model.encoder.compile()


def step(*, compiled: bool) -> dict[str, Any]:
    """Measure a training step."""
    device = torch.device("cuda")
    autocast = choose_precision("auto", device).dtype
    prepare = compile_parts if compiled else None
    turn = our_step(
        make_batch(16, 640), preset="r18", classes=CLASSES, device=device, autocast=autocast, prepare=prepare
    )
    took = seconds(turn)
    return {
        "seconds": took,
        "images_per_s": 16 / took,
        "idle_share": idle_share(turn),
        "synchronizations": synchronizations(turn),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def prediction(batch: int) -> dict[str, Any]:
    """Measure a forward pass of r18 at 640 px in float32 with TF32, its norms folded."""
    spec = resolve_run({"preset": "r18"}).preset.model
    model = build_detector(spec, num_classes=CLASSES).eval().fuse().to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(batch, 3, 640, 640, device="cuda").contiguous(memory_format=torch.channels_last)

    def turn() -> None:
        with torch.inference_mode():
            model(images)
        torch.cuda.synchronize()

    took = seconds(turn, 30)
    return {"seconds": took, "images_per_s": batch / took}


def epoch(images: int) -> dict[str, Any]:
    """Train two epochs of r18 at 640 px and return the images per second of the second one, with its evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        data = generate_dataset(Path(folder) / "data", train=images, val=32, imgsz=(480, 640), seed=0)
        config = resolve_run(
            {"preset": "r18", "data": str(data), "epochs": 2, "weights": "none", "out": folder},
            sets=["plots=false", "optimizer=adamw"],  # as from pretrained weights
        )
        done = [event for event in finetune(config) if isinstance(event, EpochDone)]
    return {"images_per_s": images / done[-1].seconds, "loader_share": done[-1].loader_share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    parts = {
        "step": lambda: step(compiled=False),
        "predict, batch 1": lambda: prediction(1),
        "predict, batch 8": lambda: prediction(8),
        "epoch": lambda: epoch(arguments.images),
        "step, compiled": lambda: step(compiled=True),
    }
    found: dict[str, Any] = {"machine": machine(Settings(threads=torch.get_num_threads(), device="cuda"))}
    found["gpu"] = torch.cuda.get_device_name()
    for name, part in parts.items():
        torch.cuda.reset_peak_memory_stats()
        found[name] = part()
        print(name, json.dumps(found[name]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

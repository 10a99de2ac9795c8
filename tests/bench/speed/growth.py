"""How cost grows: time and memory of a training step, of evaluation and of `validate` against what they depend on.

    python -m tests.bench.speed.growth OUT [--only NAME ...] [--rounds 3]

Writes `growth.json`, `growth.png` and `growth.md` into the folder OUT after each axis; what an earlier call measured
there is kept. Each point is a median, and the exponent is the slope of the last two points on logarithmic axes: 1 is
proportional. Seconds are those of the processor, on one core, since they suffer least from other work on the machine;
those of `workers` are on the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from rtdetr_cli.batches.examples import ExampleLoader
from rtdetr_cli.batches.loader import TrainLoader
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.evaluate.coco import coco_metrics
from rtdetr_cli.images.augment import RECIPE
from tests.bench.speed.data import make_detections
from tests.bench.speed.harness import Settings, Turn, machine, status_bytes, take_turn
from tests.bench.speed.steps import make_batch, our_step


@dataclass(frozen=True, slots=True)
class Axis:
    """One plot: what is measured, against what, at which values, and what the work of a value is."""

    name: str
    title: str
    unit: str
    values: Sequence[int]
    prepare: Callable[[int, Path], Turn]


@dataclass(frozen=True, slots=True)
class Measured:
    """The points of an axis; `memory` is how far the process grew in bytes, None where that isn't known."""

    name: str
    title: str
    unit: str
    values: Sequence[int]
    seconds: Sequence[float]
    memory: Sequence[int] | None
    exponent: float


def step(value: int, _: Path, *, what: str) -> Turn:
    """Return a step of `tiny` in float32 with one of its sizes set to `value`."""
    sizes = {"batch": 4, "side": 128, "boxes": 8, "classes": 20} | {what: value}
    batch = make_batch(sizes["batch"], sizes["side"], boxes=sizes["boxes"], classes=sizes["classes"])
    return our_step(batch, preset="tiny", classes=sizes["classes"], device=torch.device("cpu"), autocast=None)


def evaluation(value: int, _: Path, *, what: str) -> Turn:
    """Return an evaluation with one of its sizes set to `value`."""
    sizes = {"images": 500, "classes": 20, "per_image": 50} | {what: value}
    dataset, table = make_detections(sizes["images"], sizes["classes"], sizes["images"] * sizes["per_image"])
    return partial(coco_metrics, dataset, table)


def validation(value: int, folder: Path) -> Turn:
    """Return the check of a COCO file with so many images and seven boxes in each; no image is opened."""
    path = folder / f"{value}.json"
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(value)]
    annotations = [
        {"id": 7 * i + k, "image_id": i, "category_id": k % 3, "bbox": [20 + 80 * k, 30 + 50 * k, 60, 70], "area": 4200}
        for i in range(value)
        for k in range(7)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(("bolt", "screw", "washer"))]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return partial(load_splits, path, find_images=False)


def loading(value: int, folder: Path) -> Turn:
    """Return an epoch of 256 images at 320 px with so many workers."""
    data = folder / "images"
    if not data.exists():
        generate_dataset(data, train=64, val=2, imgsz=(480, 640), seed=0)
    train = load_splits(data).train
    assert train is not None
    train = train.subset(list(range(64)) * 4)
    examples = ExampleLoader(dataset=train, imgsz=(320, 320), batch_size=8, seed=0, augmentation=RECIPE)
    loader = TrainLoader(examples, workers=value)
    epochs = iter(range(1000))
    return lambda: list(loader.epoch(next(epochs)))


AXES = (
    Axis("batch", "training step", "images per batch", (1, 2, 4, 8, 16), partial(step, what="batch")),
    Axis("side", "training step", "pixels per side", (96, 128, 192, 256, 320), partial(step, what="side")),
    Axis("boxes", "training step", "boxes per image", (10, 30, 100, 300, 1000), partial(step, what="boxes")),
    Axis("classes", "training step", "classes", (3, 20, 80, 300, 1200), partial(step, what="classes")),
    Axis("workers", "loading 256 images", "workers", (1, 2, 4), loading),
    Axis("eval-images", "evaluation", "images", (250, 500, 1000, 2000), partial(evaluation, what="images")),
    Axis("eval-dets", "evaluation", "detections per image", (25, 50, 100, 200), partial(evaluation, what="per_image")),
    Axis("eval-classes", "evaluation", "classes", (3, 20, 80, 300, 1200), partial(evaluation, what="classes")),
    Axis("validate", "checking annotations", "images", (2500, 5000, 10000, 20000), validation),
)


def peak_growth(work: Turn) -> int | None:
    """Run the work and return by how much the resident memory rose at its peak; None where Linux doesn't tell."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # otherwise the work is done in memory that earlier work has freed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        work()
        return None
    before = status_bytes("VmRSS")
    work()
    return max(0, status_bytes("VmHWM") - before)


def measure(axis: Axis, rounds: int) -> Measured:
    """Measure all values of an axis, `rounds` times in turn after one turn to warm up."""
    seconds: list[list[float]] = [[] for _ in axis.values]
    memory: list[int | None] = []
    with tempfile.TemporaryDirectory() as folder:
        works = [axis.prepare(value, Path(folder)) for value in axis.values]
        for number in range(rounds + 1):
            for position, work in enumerate(works):
                if number:
                    used = take_turn(work)
                    seconds[position].append(used.wall if axis.name == "workers" else used.cpu)
                else:
                    memory.append(peak_growth(work))
    medians = [statistics.median(times) for times in seconds]
    last, before = axis.values[-1], axis.values[-2]
    return Measured(
        axis.name,
        axis.title,
        axis.unit,
        axis.values,
        medians,
        [m for m in memory if m is not None] if None not in memory and axis.name != "workers" else None,
        math.log(medians[-1] / medians[-2]) / math.log(last / before),
    )


def plot(axes: Sequence[Measured], path: Path) -> None:
    """Draw time, and memory where it is known, against each value on logarithmic axes."""
    from matplotlib.figure import Figure

    columns = 3
    figure = Figure(figsize=(12, 3.2 * -(-len(axes) // columns)), layout="constrained")
    for number, axis in enumerate(axes):
        drawn = figure.add_subplot(-(-len(axes) // columns), columns, number + 1)
        drawn.plot(axis.values, axis.seconds, "o-", color="tab:blue")
        drawn.set(xscale="log", yscale="log", xlabel=axis.unit, ylabel="seconds")
        drawn.set_xticks(axis.values, [f"{value:,}" for value in axis.values])
        drawn.minorticks_off()
        low, high = min(axis.seconds), max(axis.seconds)
        drawn.set_ylim(low / 2, high * 2)
        drawn.set_yticks([low, high], [f"{low:.2g}", f"{high:.2g}"])
        drawn.set_title(f"{axis.title}: exponent {axis.exponent:.2f}", fontsize=10)
        if axis.memory:
            twin = drawn.twinx()
            twin.plot(axis.values, [m / 2**20 for m in axis.memory], "s--", color="tab:orange", alpha=0.7)
            twin.set_ylabel("MiB", color="tab:orange")
            twin.set_ylim(bottom=0)
    figure.savefig(path)


def table(axes: Sequence[Measured]) -> str:
    """Return one row per axis."""
    lines = ["| what | against | from | to | exponent at the end |", "|---|---|---|---|---|"]
    for axis in axes:
        ends = [f"{axis.values[i]:,}: {axis.seconds[i]:.3g} s" for i in (0, -1)]
        if axis.memory:
            ends = [f"{end}, {axis.memory[i] / 2**20:.0f} MiB" for end, i in zip(ends, (0, -1), strict=True)]
        lines.append(f"| {axis.title} | {axis.unit} | {ends[0]} | {ends[1]} | {axis.exponent:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[axis.name for axis in AXES], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "growth.json"
    known = json.loads(file.read_text())["axes"] if file.exists() else []
    found = {axis["name"]: Measured(**axis) for axis in known}
    for axis in AXES:
        if arguments.only is not None and axis.name not in arguments.only:
            continue
        found[axis.name] = measure(axis, arguments.rounds)
        print(table([found[axis.name]]).splitlines()[-1], flush=True)
        measured = [found[axis.name] for axis in AXES if axis.name in found]
        facts = {"machine": machine(Settings(threads=1)), "axes": [asdict(axis) for axis in measured]}
        file.write_text(json.dumps(facts, indent=1) + "\n")
        (arguments.out / "growth.md").write_text(table(measured))
        plot(measured, arguments.out / "growth.png")


if __name__ == "__main__":
    main()

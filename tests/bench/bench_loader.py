"""Decode and recipe augmentation on one core: ours beside torchvision's v2 transforms on PIL images.

    python tests/bench/bench_loader.py [--rounds 5] [--json]

Both read the same JPEG files with the same boxes, draw from the same distributions, and end with a uint8 (3, 640, 640)
image and its boxes. Each runs in a process of its own, ours with the settings of memory that `TrainLoader` gives its
processes, and all are tied to one core. They take turns, all images at a time, and what counts is the processor
time that each has used, so other programs on the machine hurt both alike. The images are those of
`../shared/data/coco21`, brought to 640x480 and to 4000x3000; generated ones where that folder is missing.
Exits with 1 when a ratio is below its promise: 4 at 640x480, 10 at 12 megapixels.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from rtdetr_cli.batches.loader import keep_freed_memory
from rtdetr_cli.datasets.generate import generate_image
from rtdetr_cli.images.augment import RECIPE, augment
from rtdetr_cli.images.decode import opened

NETWORK = (640, 640)
SIZES = {"640x480": ((640, 480), 4.0, 21), "4000x3000": ((4000, 3000), 10.0, 6)}
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco21"

Case = tuple[Path, NDArray[np.float64]]


def originals() -> list[tuple[Image.Image, NDArray[np.float64]]]:
    """Return images with boxes (N, 4) as shares of the sides."""
    if not (SHARED / "instances.json").is_file():
        made = [generate_image(np.random.default_rng(seed), (480, 640)) for seed in range(21)]
        return [(Image.fromarray(image), boxes / (640, 480, 640, 480)) for image, boxes, _ in made]
    document = json.loads((SHARED / "instances.json").read_text())
    found = []
    for entry in document["images"]:
        boxes = [a["bbox"] for a in document["annotations"] if a["image_id"] == entry["id"]]
        xywh = np.array(boxes, np.float64).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        width, height = entry["width"], entry["height"]
        image = Image.open(SHARED / "images" / Path(entry["file_name"]).name).convert("RGB")
        found.append((image, xyxy / (width, height, width, height)))
    return found


def write_cases(folder: Path, size_wh: tuple[int, int], count: int) -> list[Case]:
    cases = []
    for number, (image, shares) in enumerate(originals()[:count]):
        path = folder / f"{size_wh[0]}-{number}.jpg"
        image.resize(size_wh, Image.Resampling.BICUBIC).save(path, quality=90)
        cases.append((path, shares * (*size_wh, *size_wh)))
    return cases


def torchvision_way() -> Callable[[Case, int], None]:
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

    def make(case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        image = Image.open(case[0]).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(case[1]).float(), format="XYXY", canvas_size=(image.height, image.width)
        )
        result, _ = pipeline(image, {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)})
        assert result.shape == (3, *NETWORK)

    return make


def our_way() -> Callable[[Case, int], None]:
    out = np.empty((3, *NETWORK), np.uint8)

    def make(case: Case, seed: int) -> None:
        with opened(case[0]) as file:
            augment(file, case[1], np.zeros(len(case[1]), np.int64), RECIPE, np.random.default_rng(seed), out)

    return make


def decode_only() -> Callable[[Case, int], None]:
    def make(case: Case, seed: int) -> None:
        with opened(case[0]) as file:
            file.decode()

    return make


WAYS = {"torchvision v2": torchvision_way, "rtdetr-cli": our_way, "full decode": decode_only}


def serve(name: str) -> None:
    """Answer each list of (case, seed) on standard input with the processor time that it took."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if name != "torchvision v2":
        keep_freed_memory()
    make = WAYS[name]()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            turn = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        begun = time.process_time()
        for case, seed in turn:
            make(case, seed)
        send(answers, time.process_time() - begun)


def send(stream: IO[bytes], value: object) -> None:
    """Write one value, which `pickle.load` reads at the other end."""
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


class Server:
    """One way in a process of its own."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--serve", name]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    def __call__(self, turn: list[tuple[Case, int]]) -> float:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        send(self.child.stdin, turn)
        return float(pickle.load(self.child.stdout))

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=sorted(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    ways = {name: Server(name) for name in WAYS}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, (size_wh, promised, count) in SIZES.items():
            cases = write_cases(Path(folder), size_wh, count)
            for way in ways.values():
                way([(cases[0], 0)])
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(arguments.rounds):
                seeded = [(case, turn * len(cases) + number) for number, case in enumerate(cases)]
                for name, way in ways.items():
                    rates[name].append(len(cases) / way(seeded))
            ratios = [b / a for a, b in zip(rates["torchvision v2"], rates["rtdetr-cli"], strict=True)]
            rows.append(
                {
                    "size": size,
                    "pictures": len(cases) * arguments.rounds,
                    **{f"{name}, images/s": statistics.harmonic_mean(rates[name]) for name in ways},
                    "ratio": statistics.harmonic_mean(rates["rtdetr-cli"])
                    / statistics.harmonic_mean(rates["torchvision v2"]),
                    "rounds": f"{min(ratios):.1f} to {max(ratios):.1f}",
                    "promised": promised,
                }
            )
    for way in ways.values():
        way.close()
    if arguments.json:
        print(json.dumps({"network": NETWORK, "rows": rows}))
    else:
        columns = list(rows[0])
        table = [columns, *[[f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]]
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        print(f"decode and recipe augmentation to {NETWORK[0]}x{NETWORK[1]}, one core, processor time")
        for line in table:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    return 0 if all(float(str(row["ratio"])) >= float(str(row["promised"])) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

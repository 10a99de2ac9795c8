"""How long the dataset doctor takes, beside what it is measured by.

    python tests/bench/bench_validate.py [--only fast|full] [--folder DIR]

`fast`: the whole command `rtdetr validate --fast` on a generated COCO-sized JSON (118,000 images, 860,000 boxes),
against the time that `pycocotools.coco.COCO` takes to load the file, both in processes of their own, each the best
of three. Wanted: at most twice the time and 4 GiB.

`full`: `examine` on 5,000 images of 640x480, against the bare decoding of the same files (Pillow, a thread for each
core, nothing kept), in turns in one process. Wanted: at least 60 % of the bare rate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

MOST_TIME, MOST_BYTES, LEAST_RATE = 2.0, 4 << 30, 0.6
IMAGES, BOXES = 118_000, 860_000
LINKS = 20_000  # hard links to one file; file systems allow some tens of thousands

_TIMED = """
import sys, time
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
# Not getrusage: a child starts with the peak of the process that made it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024, file=sys.stderr)
"""
_LOAD = "from pycocotools.coco import COCO\nstart = time.perf_counter()\nCOCO({path!r})"
_VALIDATE = "from rtdetr_cli.cli.app import run\ncode = run(['validate', {path!r}, '--fast'{flags}])"


def make_json(folder: Path) -> Path:
    """Write a file like COCO's, with areas but without masks, one entry after the other on one line."""
    path = folder / "instances.json"
    if path.exists():
        return path
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for i in range(IMAGES):
        width, height = draw.choice([(640, 480), (480, 640), (640, 427), (500, 375)])
        name = f"{i:012d}.jpg"
        images.append({"license": 1, "file_name": name, "height": height, "width": width, "id": i})
        source = folder / f"source_{i // LINKS}.jpg"
        if not source.exists():
            Image.new("RGB", (640, 480), (i // LINKS, 90, 120)).save(source)
        os.link(source, folder / "images" / name)
    annotations = []
    for k in range(BOXES):
        image = images[draw.randrange(IMAGES)]
        w, h = (min(s - 1.0, draw.lognormvariate(4, 0.9)) for s in (image["width"], image["height"]))
        x, y = draw.random() * (image["width"] - w), draw.random() * (image["height"] - h)
        box = [round(v, 2) for v in (x, y, max(w, 1.0), max(h, 1.0))]
        entry = {"area": round(box[2] * box[3] * 0.7, 4), "iscrowd": 0, "image_id": image["id"], "bbox": box}
        annotations.append(entry | {"category_id": 1 + draw.randrange(80), "id": k + 1})
    categories = [{"supercategory": "thing", "id": k + 1, "name": f"class {k}"} for k in range(80)]
    document = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(document))
    return path


def timed(work: str, repeat: int = 3) -> tuple[float, float]:
    """Return the best seconds and the largest resident memory of a process that does `work`."""
    results = []
    for _ in range(repeat):
        done = subprocess.run(
            [sys.executable, "-c", _TIMED.format(work=work)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds, memory = done.stderr.strip().splitlines()[-1].split()
        results.append((float(seconds), float(memory)))
    return min(s for s, _ in results), max(m for _, m in results)


def fast(folder: Path) -> bool:
    path = make_json(folder)
    load, load_memory = timed(_LOAD.format(path=str(path)))
    ours, memory = timed(_VALIDATE.format(path=str(path), flags=""))
    as_json, json_memory = timed(_VALIDATE.format(path=str(path), flags=", '--json'"), 1)
    print(f"{path.stat().st_size / 1e6:.0f} MB, {IMAGES:,} images, {BOXES:,} boxes")
    print(f"  pycocotools.coco.COCO     {load:6.1f} s  {load_memory / 2**30:5.2f} GiB")
    print(f"  rtdetr validate --fast    {ours:6.1f} s  {memory / 2**30:5.2f} GiB   ratio {ours / load:.2f}")
    print(f"  the same with --json      {as_json:6.1f} s  {json_memory / 2**30:5.2f} GiB")
    return ours <= MOST_TIME * load and memory <= MOST_BYTES


def make_images(folder: Path, count: int) -> Path:
    """Write `count` different JPEG files of 640x480 and their COCO file."""
    path = folder / "images.json"
    if path.exists():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        noise = np.random.default_rng(i)
        coarse = Image.fromarray(noise.integers(0, 256, (24, 32, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grain = noise.integers(-9, 10, (480, 640, 1))
        image = np.clip(np.asarray(coarse).astype(int) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{i:06d}.jpg", quality=85)
        images.append({"id": i, "file_name": f"{i:06d}.jpg", "width": 640, "height": 480})
        for k in range(7):
            box = [20 + 80 * k, 30 + 50 * k, 60, 70]
            annotations.append({"id": 7 * i + k, "image_id": i, "category_id": 1 + k % 3, "bbox": box, "area": 4200})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(("bolt", "screw", "washer"))]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def full(folder: Path, count: int) -> bool:
    from rtdetr_cli.checks.doctor import examine

    path = make_images(folder, count)
    files = sorted((folder / "images").iterdir())
    cores = len(os.sched_getaffinity(0))
    bare, ours = [], []
    for _ in range(3):
        start = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            for _done in pool.map(decode, files, chunksize=16):
                pass
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        examine(path, processes=True)
        ours.append(time.perf_counter() - start)
    share = min(bare) / min(ours)
    size = sum(f.stat().st_size for f in files) / len(files)
    print(f"{count:,} JPEG images of 640x480, {size / 1e3:.0f} kB each, {cores} cores")
    print(f"  bare decoding             {count / min(bare):6.0f} images/s")
    print(f"  examine                   {count / min(ours):6.0f} images/s   {share:.0%} of it")
    return share >= LEAST_RATE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("fast", "full"))
    parser.add_argument("--folder", type=Path, help="keeps the generated data")
    parser.add_argument("--images", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        good = True
        if arguments.only != "full":
            good &= fast(folder / "fast")
        if arguments.only != "fast":
            good &= full(folder / "full", arguments.images)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

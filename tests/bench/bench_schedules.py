"""Do schedules that scale with the run beat the published ones on a small dataset?

    python tests/bench/bench_schedules.py                      # 20 epochs of bccd's train split, three seeds
    python tests/bench/bench_schedules.py --images 100       # the same number of steps on 100 images
    python tests/bench/bench_schedules.py --seeds 0 --epochs 5 --arms official,ours

Three arms train `tiny` from the same random weights for the same number of steps: the official schedule, the official
one with its warm-up cut to 5 % of the steps, and ours. An arm is a list of `--set` words, and more can be given with
`--arm name:key=value,key=value`, which is how the defaults were chosen. Each run is a process of the command line;
results are kept in `--out`, so that a table can be grown run by run. AP is that of the moving average after the last
step on the val split: nothing is picked by it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.train.plan import Plan, make_plan

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"
ARMS = {
    "official": ["schedule=official"],
    "official-warmup": ["schedule=official", "warmup=0.05"],
    "ours": [],
}


def few_images(source: Path, folder: Path, count: int) -> Path:
    """Lay out a VOC dataset whose train split is `count` images of the source's, the val split whole."""
    for name in ("Annotations", "JPEGImages"):
        shutil.copytree(source / name, folder / name, dirs_exist_ok=True)  # links out of a dataset are refused
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    names = (source / "ImageSets" / "Main" / "train.txt").read_text().split()
    kept = sorted(random.Random(0).sample(names, count))
    (lists / "train.txt").write_text("\n".join(kept) + "\n")
    (lists / "val.txt").write_text((source / "ImageSets" / "Main" / "val.txt").read_text())
    return folder


def run(arm: str, sets: Sequence[str], seed: int, args: argparse.Namespace, data: Path, epochs: int) -> dict[str, Any]:
    """Train one arm from one seed; return its figures, from the results file if they are there already."""
    words = [*sets, *args.set, "plots=false", f"eval_every={epochs}"]
    # The plan stands for the defaults of the day: a result is never taken for that of others.
    plan = schedule(args.preset, words, epochs=epochs, images=args.images or train_images(args.data))
    facts = asdict(plan)
    key = json.dumps([args.preset, args.images, args.imgsz, seed, sorted(words), args.precision, facts])
    results = args.out / "results.jsonl"
    if results.exists():
        for line in results.read_text().splitlines():
            known = json.loads(line)
            if known["key"] == key:
                return {**known, "arm": arm}
    command = [sys.executable, "-m", "rtdetr_cli", "train", "--json", "--preset", args.preset, "--weights", "none"]
    command += ["--data", str(data), "--imgsz", str(args.imgsz), "--epochs", str(epochs), "--seed", str(seed)]
    command += ["--workers", str(args.workers), "--device", args.device, "--precision", args.precision]
    command += ["--cache", "ram", "--out", str(args.out / "runs")]
    for word in words:
        command += ["--set", word]
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}, seed {seed}: {done.stdout}{done.stderr}")
    metrics = json.loads(done.stdout)["metrics"]
    found = {
        "key": key,
        "arm": arm,
        "seed": seed,
        "AP": metrics["AP"],
        "AP50": metrics["AP50"],
        "seconds": time.monotonic() - began,
    }
    with results.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(
        f"{arm:<24} seed {seed}  AP {found['AP']:.3f}  AP50 {found['AP50']:.3f}  {found['seconds']:.0f} s", flush=True
    )
    return found


def train_images(data: Path) -> int:
    """Return how many images the train split has."""
    return len((data / "ImageSets" / "Main" / "train.txt").read_text().split())


def schedule(preset: str, words: Sequence[str], *, epochs: int, images: int) -> Plan:
    """Return the plan that a run of these settings has."""
    return make_plan(resolve_run({"preset": preset, "epochs": epochs}, sets=words), images=images)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=BCCD, help="a VOC folder")
    parser.add_argument("--images", type=int, default=0, help="of the train split; 0 for all")
    parser.add_argument("--epochs", type=int, default=20, help="of the whole train split; fewer images, more epochs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS), help="of these; empty for none")
    parser.add_argument("--arm", action="append", default=[], help="name:key=value,key=value; may come again")
    parser.add_argument("--set", action="append", default=[], help="for every arm, such as effective_batch=8")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--imgsz", type=int, default=192)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each")
    parser.add_argument("--out", type=Path, default=Path("bench-schedules"))
    return parser.parse_args()


def main() -> None:
    """Run every arm from every seed, and print the table."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    arms = {name: ARMS[name] for name in args.arms.split(",") if name}
    for word in args.arm:
        name, _, sets = word.partition(":")
        arms[name] = [s for s in sets.split(",") if s]
    total = train_images(args.data)
    batch = next((int(s.partition("=")[2]) for s in args.set if s.startswith("effective_batch=")), 16)
    data, epochs = args.data, args.epochs
    if args.images:
        data = few_images(args.data, args.out / f"images-{args.images}" / args.data.name, args.images)
        # Equal steps: what 20 epochs of the whole split are.
        epochs = round(args.epochs * -(-total // batch) / -(-args.images // batch))
    images = args.images or total
    jobs = [(arm, sets, seed) for seed in map(int, args.seeds.split(",")) for arm, sets in arms.items()]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda job: run(*job, args, data, epochs), jobs))
    plan = schedule(args.preset, args.set, epochs=epochs, images=images)
    print(f"\n{args.preset} at {args.imgsz}, {images} images, {epochs} epochs = {plan.total_steps} steps of {batch}")
    print(f"{'arm':<24} {'AP':>6} {'+-':>6} {'AP50':>6}   AP by seed")
    for arm in arms:
        aps = [f["AP"] for f in found if f["arm"] == arm]
        spread = stdev(aps) if len(aps) > 1 else 0.0
        ap50 = mean(f["AP50"] for f in found if f["arm"] == arm)
        print(f"{arm:<24} {mean(aps):6.3f} {spread:6.3f} {ap50:6.3f}   {'  '.join(f'{ap:.3f}' for ap in aps)}")
    if "ours" in arms:
        ours = mean(f["AP"] for f in found if f["arm"] == "ours")
        others = [mean(f["AP"] for f in found if f["arm"] == a) for a in ARMS if a in arms and a != "ours"]
        if others:
            margin = ours - max(others)
            print(f"ours is {'ahead of' if margin > 0 else 'BEHIND'} the official arms by {margin:+.3f}")


if __name__ == "__main__":
    main()

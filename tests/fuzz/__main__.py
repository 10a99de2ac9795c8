"""Feed the command line damaged files and odd arguments, and report every case that does not end as it should.

    python -m tests.fuzz --cases 500 --seed 1                       # all parts
    python -m tests.fuzz --part models --seed 1 --only 57           # one case again, with its output and its files

A case ends as it should if it ends within 20 seconds of its own time or of waiting, within 4 GiB, with an exit code of
the README's table, without a traceback, and without control characters on the screen. Each runs in a fork of this
process, which has imported everything already. A case depends on its seed, part and number only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

os.environ |= {"RTDETR_CLI_TRACEBACK": "1", "NO_COLOR": "1", "MPLBACKEND": "Agg", "NO_ALBUMENTATIONS_UPDATE": "1",
               "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "RTDETR_CLI_MIRROR": "http://127.0.0.1:9"}  # fmt: skip
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

SHOWN = 12  # causes of a part


def warm_up(folder: Path) -> None:
    """Import and run once what the cases need, so that each child finds it done; no thread may outlive this."""
    import albumentations  # noqa: F401
    import cv2
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import openvino  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import rtdetr_cli.workflows.finetune_discrete  # noqa: F401
    from rtdetr_cli.cli.app import build, run
    from tests.fuzz.files import MODEL, write_coco

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    build()
    threads = len(os.listdir("/proc/self/task"))
    coco, model = str(write_coco(folder / "coco")), str(MODEL)
    image, out = f"{coco}/images/train_0.jpg", str(folder / "out")
    train = f"--preset tiny --weights none --imgsz 64 --epochs 1 --workers 0 --device cpu --name r --out {folder}"
    # hotcoco starts its threads with the first evaluation; where it is not installed, pycocotools evaluates.
    sys.modules["hotcoco"] = None  # type: ignore[assignment]
    with silence():
        for words in (
            ["train", "--data", coco, *train.split()],
            ["eval", f"{folder}/r", "--data", coco],
            ["predict", image, "--weights", model, "--save-txt", "--save-coco", "--out", out],
            ["predict", image, "--weights", model, "--save-json", "--json", "--no-save"],
            ["info", model],
            ["validate", coco, "--html", f"{folder}/page.html"],
            ["validate", coco, "--convert", "yolo", "--to", f"{folder}/yolo"],
            ["validate", f"{folder}/yolo", "--json", "--fix", f"{folder}/fixed"],
        ):
            if code := run(words):
                raise SystemExit(f"{shlex.join(words)}: exit code {code}")
    for _ in range(100):
        if len(os.listdir("/proc/self/task")) <= threads:
            break
        time.sleep(0.02)  # for the threads of a pool that has been closed
    else:
        raise SystemExit("a command leaves threads behind, which a fork would lose")
    del sys.modules["hotcoco"]
    import hotcoco  # noqa: F401

    gc.collect()
    gc.freeze()  # so that a collection in a child does not copy what it shares with this process


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send what is written to stdout and stderr nowhere."""
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def main() -> int:
    """Run the cases, print counts and reproductions, and return 1 if a case failed."""
    from tests.fuzz.commands import Args, Predict, Runs
    from tests.fuzz.files import Datasets, Graphs, Models
    from tests.fuzz.forked import run_case

    parts = {part.__name__.lower(): part for part in (Datasets, Models, Graphs, Runs, Args, Predict)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600, help="number of cases, shared by the parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=parts, action="append", help="default: all")
    parser.add_argument("--only", type=int, metavar="N", help="run case N alone and print its output")
    options = parser.parse_args()
    chosen = options.part or list(parts)
    folder = Path(tempfile.mkdtemp(prefix="rtdetr-fuzz-"))
    os.environ["RTDETR_CLI_HOME"] = str(folder / "home")
    warm_up(folder / "warm")
    failed = 0
    for name in chosen:
        base = folder / name
        base.mkdir()
        part = parts[name]()
        part.prepare(base)
        numbers = range(options.cases // len(chosen)) if options.only is None else (options.only,)
        faults: Counter[str] = Counter()
        causes: defaultdict[tuple[str, str], list[tuple[int, list[str]]]] = defaultdict(list)
        slowest, began = 0.0, time.monotonic()
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_before = cpu.ru_utime + cpu.ru_stime
        for number in numbers:
            outcome = run_case(part.case, Random(f"{options.seed}/{name}/{number}"), base / "case")
            slowest = max(slowest, outcome.seconds)
            faults[outcome.fault or f"exit {outcome.code}"] += 1
            if outcome.fault:
                known = causes[outcome.fault, outcome.where]
                known.append((number, outcome.argv))
                if len(known) == 1 and options.only is None:
                    print(f"{name} {number}: {outcome.fault}: {outcome.where}", flush=True)
            if options.only is not None:
                print(
                    shlex.join(outcome.argv),
                    outcome.output,
                    outcome.fault or "as it should be",
                    base / "case",
                    sep="\n",
                )
        bad = sum(map(len, causes.values()))
        failed += bad
        counts = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()))
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = f"slowest {slowest:.1f} s, {time.monotonic() - began:.0f} s in all, "
        seconds += f"{cpu.ru_utime + cpu.ru_stime - cpu_before:.0f} s of CPU time"
        print(f"{name}: {len(numbers)} cases, {bad} failed ({counts}); {seconds}", flush=True)
        for (fault, where), cases in sorted(causes.items(), key=lambda item: -len(item[1]))[:SHOWN]:
            number, argv = cases[0]
            print(f"  {len(cases)} x {fault}: {where}\n      {shlex.join(argv)[:200]!r}")
            print(f"      python -m tests.fuzz --part {name} --seed {options.seed} --only {number}", flush=True)
    if options.only is None:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

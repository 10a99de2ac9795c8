"""Measure our speed beside the peers', taking turns, and print ratios.

    python -m tests.bench.speed [--list] [--only NAME ...] [--rounds N] [--threads 2] [--json FILE]

A figure is the median of the ratios of single rounds, so that other work on the machine hurts both sides alike; the
ratio of processor time is next to it. The peers come with `pip install -e '.[dev]'`; a comparison whose peer is not
installed is skipped and says so. ultralytics is installed in an environment of its own for each of its comparisons.
Comparisons that take minutes run only when they are named.

Tried without success: SyncBatchNorm and DistributedDataParallel (see `train.processes`), torch's elastic launcher (see
`train.launch`), `grid_sample` on channels-last maps and other kernels (see `model.cpu_sampling`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tests.bench.speed import data, programs, steps
from tests.bench.speed.harness import Settings, compare, document, table

COMPARISONS = {c.name: c for c in (*steps.COMPARISONS, *data.COMPARISONS, *programs.COMPARISONS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the comparisons")
    parser.add_argument("--only", nargs="+", choices=sorted(COMPARISONS), metavar="NAME")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison, in place of its own number")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--device", default="cpu", help="of training steps and prediction with transformers")
    parser.add_argument("--imgsz", type=int, default=320, help="of training steps")
    parser.add_argument("--batch", type=int, default=4, help="images of a training step")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.list:
        for c in COMPARISONS.values():
            print(f"{c.name:16} {c.title}, compared with {c.peer}{' (slow)' if c.slow else ''}")
        return 0
    settings = Settings(arguments.threads, arguments.device, arguments.imgsz, arguments.batch)
    chosen = arguments.only or [name for name, c in COMPARISONS.items() if not c.slow]
    results, skipped = [], {}
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results.append(compare(COMPARISONS[name], settings, arguments.rounds or COMPARISONS[name].rounds))
        except ImportError as error:
            skipped[name] = f"{error.name or error} is not installed"
        if arguments.json:  # after each, since the whole takes long
            arguments.json.write_text(json.dumps(document(results, skipped, settings), indent=1) + "\n")
    print(table(results, skipped, settings))
    return 0 if all(result.reached for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

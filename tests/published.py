"""Evaluate published weights on COCO val2017, and print our AP beside the published one. Needs a network and COCO.

    python -m tests.published --weights r18 --coco DIR

DIR holds `annotations/instances_val2017.json` and the folder `val2017`. Several names, separated by commas, are
evaluated one after another; `all` evaluates every file that was trained on COCO. The exit code is 6 when an AP is more
than `--tolerance` below the published one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rtdetr_cli import load
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.weights import hub
from rtdetr_cli.weights.catalogue import Published, catalogue, find_published

TOLERANCE = 0.003


def evaluate(entry: Published, coco: Path, device: str) -> float:
    """Fetch weights, and return their AP on the val2017 images in `coco`."""
    detector = load(hub.fetch(entry.name, notify=print), device=device)
    result = detector.evaluate(coco / "annotations" / "instances_val2017.json", images=coco / "val2017")
    return float(result.metrics["AP"] or 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the named weights one after another; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="names as in `rtdetr weights list`, or all")
    parser.add_argument("--coco", required=True, type=Path, help="folder with annotations/ and val2017/")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="AP that may be missing (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    on_coco = [e for e in catalogue().values() if e.data in ("coco", "objects365-coco")]
    failed = False
    try:
        named = on_coco if options.weights == "all" else [find_published(n) for n in options.weights.split(",")]
        print(f"{'weights':28} {'ours':>7} {'published':>10} {'difference':>11}")
        for entry in named:
            if entry not in on_coco or entry.ap is None:
                print(f"{entry.name:28} has no published AP on COCO")
                failed = True
                continue
            ap = evaluate(entry, options.coco, options.device)
            failed |= ap < entry.ap - options.tolerance
            print(f"{entry.name:28} {ap:7.4f} {entry.ap:10.3f} {ap - entry.ap:+11.4f}")
    except RtdetrError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 6 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

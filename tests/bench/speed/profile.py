"""Print where the time of a training step goes, by operator of torch.

    python -m tests.bench.speed.profile r18 [--threads 1]
    python -m tests.bench.speed.profile tiny

The steps are those of `step` and `step-tiny`: r18 at 320 px, batch 4, in float32, and `tiny` at 192 px, batch 16, in
the precision that is chosen here. Shares are of the time within the operators themselves.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.speed.steps import r18_step, tiny_step

STEPS = 3
ROWS = 15


def main() -> None:
    """Profile some steps and print the operators that take most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("r18", "tiny"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    step = r18_step() if arguments.step == "r18" else tiny_step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    operators = sorted(profiler.key_averages(), key=lambda operator: -operator.self_cpu_time_total)
    total = sum(operator.self_cpu_time_total for operator in operators)
    print(f"{total / STEPS / 1e6:.2f} s a step\n\n| operator | share | calls a step |\n|---|---|---|")
    for operator in operators[:ROWS]:
        print(f"| {operator.key} | {operator.self_cpu_time_total / total:.1%} | {operator.count // STEPS} |")


if __name__ == "__main__":
    main()

"""Discrete sampling: the published rounding, half a pixel off, against the nearest pixel. Which should be the default?

    python tests/bench/bench_rounding.py RUN [RUN...] [--seeds 0,1,2] [--epochs N]

For each run (trained with bilinear sampling): AP of its weights under both roundings without training, and after the
second stage with each rounding and each seed, from the same start and on the same batches. The difference nearest -
published comes with a paired interval: over images for one pair of models (bootstrap), and over seeds and images
together for all pairs of a run (the bootstrap draws the same images for every seed). The default changes only if
the last one excludes zero on every run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.evaluate.bootstrap import resample
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.train.events import EpochDone
from rtdetr_cli.weights.header import read_header
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.finetune_discrete import FinetuneDiscrete, plan_discrete

ROUNDINGS = ("published", "nearest")


def gap_of(pairs: list[tuple[Evaluation, Evaluation]], *, resamples: int = 1000) -> dict[str, float]:
    """Return nearest - published, mean over pairs, with its paired 95 % interval over the same images."""
    drawn = []
    for published, nearest in pairs:
        a = resample(published.dataset, published.table, resamples=resamples).overall()
        b = resample(nearest.dataset, nearest.table, resamples=resamples).overall()
        drawn.append(b - a)
    value = float(np.mean([n.metrics["AP"] - p.metrics["AP"] for p, n in pairs]))  # type: ignore[operator]
    # Seeds are drawn again too: what they differ by is part of what one does not know.
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, len(drawn), (resamples, len(drawn)))
    mixed = np.array([np.mean([drawn[i][row] for i in chosen[row]]) for row in range(resamples)])
    low, high = np.quantile(mixed, [0.025, 0.975])
    return {"value": value, "lower": 2 * value - float(high), "upper": 2 * value - float(low)}


def told(gap: dict[str, float]) -> str:
    """Return an interval as words."""
    return f"{gap['value']:+.4f} (95 %: {gap['lower']:+.4f} to {gap['upper']:+.4f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seeds = [int(word) for word in arguments.seeds.split(",")]
    document: list[dict[str, Any]] = []
    for run in arguments.runs:
        weights = run / "best.safetensors" if run.is_dir() else run
        header = read_header(weights)
        flags: dict[str, Any] = {"out": tempfile.mkdtemp(), "workers": 1}
        if arguments.epochs:
            flags["epochs"] = arguments.epochs
        untrained: dict[str, Evaluation] = {}
        stage = FinetuneDiscrete(weights, plan_discrete(weights, header, flags))
        model, loaded = load_model(weights)
        bilinear = evaluate(TorchBackend(model, loaded), stage.val).metrics["AP"]
        for rounding in ROUNDINGS:
            model.set_sampling("discrete", rounding)  # type: ignore[arg-type]
            untrained[rounding] = evaluate(TorchBackend(model, loaded), stage.val)
        before = gap_of([(untrained["published"], untrained["nearest"])])
        print(
            f"{run}: bilinear {bilinear:.4f}; untrained published {untrained['published'].metrics['AP']:.4f}, "
            f"nearest {untrained['nearest'].metrics['AP']:.4f}, difference {told(before)}",
            flush=True,
        )
        pairs: list[tuple[Evaluation, Evaluation]] = []
        for seed in seeds:
            made: list[Evaluation] = []
            for rounding in ROUNDINGS:
                config = plan_discrete(
                    weights,
                    header,
                    {**flags, "seed": seed, "name": f"{rounding}-{seed}"},
                    sets=[f"rounding={rounding}"],
                )
                stage = FinetuneDiscrete(weights, config)
                for event in stage.train():
                    if isinstance(event, EpochDone) and event.metrics is not None:
                        print(
                            f"  seed {seed} {rounding} epoch {event.epoch + 1}: AP {event.metrics['AP']:.4f}",
                            flush=True,
                        )
                made.append(evaluate(open_backend(stage.best), stage.val))
            pairs.append((made[0], made[1]))
            print(
                f"  seed {seed}: published {made[0].metrics['AP']:.4f}, nearest {made[1].metrics['AP']:.4f}, "
                f"difference {told(gap_of([pairs[-1]]))}",
                flush=True,
            )
        after = gap_of(pairs)
        print(f"{run}: after training, {len(seeds)} seeds: {told(after)}\n", flush=True)
        document.append({"run": str(run), "bilinear": bilinear, "untrained": before, "trained": after})
    sure = all(row["trained"]["lower"] > 0 for row in document)
    print("nearest is the better default" if sure else "the interval does not exclude zero everywhere: published stays")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1, default=float))


if __name__ == "__main__":
    main()

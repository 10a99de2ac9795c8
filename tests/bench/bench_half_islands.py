"""Which parts of the detector must stay float32? Rank them by the error that half precision in each one adds.

    python tests/bench/bench_half_islands.py [MODEL] [--data DATA] [--images 16]

Without a model: the small trained one of the tests, on its own images. Four tables:

1. Each module alone in half precision, everything else float32.
2. Everything in half precision but one island: what each island is worth.
3. No island at all, and all of them.
4. Room to overflow: the largest value of each module, beside half precision's 65504.

Error: mean difference of the scores of matched detections, mean 1 - IoU of their boxes, and the share that finds no
match, against the float32 model. Products add up in float32 and are rounded once, as tensor cores do.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.export.compare import LIMITS, compare_detections
from rtdetr_cli.export.fp16 import (
    ISLANDS,
    Accumulating,
    HalfTwin,
    Island,
    halve,
    module_path,
    operator_name,
    traced_program,
)
from rtdetr_cli.export.graph import DeployGraph, count_norms, deployable, example_inputs, expected_spec
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.verify import Reference, result_of
from rtdetr_cli.infer.backend import Backend
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.weights.load import load_model

Rule = Callable[[str, str], bool]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LOOSE = LIMITS["fp16"]


def golden() -> tuple[Path, Path]:
    """Return the tests' small model and a dataset that it knows."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("shapes", GOLDEN / "shapes.py")
    assert spec is not None
    assert spec.loader is not None
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    return shapes.WEIGHTS, shapes.write_dataset(Path(tempfile.mkdtemp()) / "shapes")


def groups_of(program: fx.GraphModule) -> list[str]:
    """Return the modules to rank: stages, blocks, layers and heads."""
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        parts = module_path(node).split(".")
        if node.op != "call_function" or parts[0] != "model" or len(parts) < 2:
            continue
        depth = {"backbone": 4, "encoder": 4, "decoder": 3}.get(parts[1], 3)
        if parts[1:4] == ["decoder", "decoder", "layers"]:
            depth = 6  # each part of each decoder layer
        found.setdefault(".".join(parts[:depth]))
    return list(found)


def within(path: str, group: str) -> bool:
    """Tell whether a module lies in a group."""
    return path == group or path.startswith(group + ".")


def largest_values(program: fx.GraphModule, images: Any) -> dict[str, float]:
    """Return the largest absolute value that each group gives in float32."""
    largest: dict[str, float] = {}

    class Watching(Accumulating):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and n.op == "call_function":
                path = ".".join(module_path(n).split(".")[:6]) or operator_name(n)
                largest[path] = max(largest.get(path, 0.0), float(value.abs().max()))
            return value

    Watching(program).run(*images)
    return largest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--islands-only", action="store_true", help="leave out the first and longest table")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weights, data = (arguments.model, arguments.data) if arguments.model else golden()
    splits = load_splits(data, split_single=arguments.model is not None)
    dataset = splits.val
    assert dataset is not None

    model, header = load_model(weights)
    backend = TorchBackend(model, header)
    reference = Reference(backend, dataset, max_images=arguments.images)

    def detections(backend: Backend) -> list[Detections]:
        return list(result_of(Reference(backend, reference.paths).predictions()).values())

    ours = detections(backend)
    graph = DeployGraph(deployable(model)).eval()
    count_norms(graph, example_inputs(ExportOptions(), header.imgsz, batch=1))
    inputs = example_inputs(ExportOptions(dynamic=True), header.imgsz, batch=2)
    program = traced_program(graph, inputs, dynamic=True)

    def error(single: Rule) -> dict[str, float]:
        half = halve(copy.deepcopy(program), [Island("float32", "", single)])
        twin = HalfTwin(half, expected_spec(ExportOptions(dynamic=True), header), device=backend.device)
        figures = compare_detections(ours, detections(twin), LOOSE).figures
        return {
            "score": figures["score_error"] or 0.0,
            "box": figures["box_error"] or 0.0,
            "unmatched": 1 - figures["matched"],
            "broken": figures["not_finite"],
        }

    def table(title: str, rows: dict[str, dict[str, float]]) -> None:
        print(f"\n{title}\n{'score error':>12} {'box error':>10} {'unmatched':>10}  part")
        for name, row in sorted(
            rows.items(), key=lambda item: -(item[1]["unmatched"] + item[1]["score"] + item[1]["box"])
        ):
            broken = f"  ({row['broken']:.0f} images NaN)" if row["broken"] else ""
            print(f"{row['score']:12.2e} {row['box']:10.2e} {row['unmatched']:10.2%}  {name}{broken}")

    print(f"{weights}  {len(ours)} images  {sum(int((d.scores > 0.1).sum()) for d in ours)} detections")
    groups = [] if arguments.islands_only else groups_of(program)
    alone = {
        group: error(lambda path, op, group=group: not within(path, group))  # type: ignore[misc]
        for group in groups
    }
    table("1. one module alone in half precision", alone)
    without = {
        island.name: error(lambda path, op, left=island: any(i.contains(path, op) for i in ISLANDS if i is not left))  # type: ignore[misc]
        for island in ISLANDS
    }
    table("2. everything half, without this island", without)
    both = {
        "no island": error(lambda path, op: False),
        "all islands": error(lambda path, op: any(i.contains(path, op) for i in ISLANDS)),
    }
    table("3. islands together", both)
    largest = largest_values(program, inputs)
    print("\n4. largest values, float32 (half precision ends at 65504)")
    for name, value in sorted(largest.items(), key=lambda item: -item[1])[:10]:
        print(f"{value:12.1f}  {name}")
    if arguments.json:
        document = {"alone": alone, "without_island": without, "together": both, "largest": largest}
        arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

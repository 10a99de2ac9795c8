"""One of the processes of `test_processes.py`: takes steps and saves their results.

The main process also takes each step alone, for comparison.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.train.optim import FusedOptimizer, MovingAverage, NormStatistics
from rtdetr_cli.train.processes import SINGLE_PROCESS, ProcessGroup, join_process_group
from rtdetr_cli.train.state import Learner, Progress
from rtdetr_cli.train.step import accumulate_with_retry, draw_group
from rtdetr_cli.train.sync_norm import synchronize_norms

IMAGES, CLASSES, SIDE = 4, 3, 64
SPEC = ModelSpec(
    depth=10, width=8, freeze_norm=False, hidden_dim=16, encoder_ffn=16, expansion=0.5, heads=2, decoder_dim=16,
    decoder_ffn=16, decoder_layers=2, eval_layers=2, num_points=(1, 1, 1), queries=12, denoising=8,
)  # fmt: skip


def whole_batch(boxes_in: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    boxes = [torch.rand((n, 4), generator=generator) * 0.3 + 0.2 for n in boxes_in]
    labels = [torch.randint(0, CLASSES, (n,), generator=generator) for n in boxes_in]
    return Batch(images, tuple(boxes), tuple(labels), tuple(range(IMAGES)), ())


def step(
    processes: ProcessGroup, norms: str, boxes_in: tuple[int, ...], fail_at: int, fail_rank: int
) -> dict[str, Any]:
    """Take one step with a new model; one process may run out of memory at one layer."""
    torch.manual_seed(0)
    # Float64, so that a wrong normalizer cannot hide in rounding.
    model = build_detector(SPEC, num_classes=CLASSES).double().to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(lambda module, given: (given[0].double(), *given[1:]))
    if norms == "frozen":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    learner = Learner(
        model=model,
        average=MovingAverage(model),
        optimizer=FusedOptimizer(
            [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}], clip_norm=0.1
        ),
        spec=SPEC,
        device=torch.device("cpu"),
        autocast=None,
        norms=NormStatistics(model),
        processes=processes,
        norm_sync=synchronize_norms(model, processes),
    )
    learner.train_mode()
    share = IMAGES // processes.size
    mine = slice(processes.rank * share, (processes.rank + 1) * share)
    everything = whole_batch(boxes_in)
    batch = Batch(
        everything.images[mine],
        everything.boxes_cxcywh[mine],
        everything.labels[mine],
        everything.image_indices[mine],
        (),
    )
    whole = processes.exchange_targets(batch)
    group = draw_group(learner, whole, step=3, seed=1)
    group = group.rows(whole.local_rows) if group is not None else None
    num_boxes = float(max(1, sum(len(one) for one in whole.labels)))

    calls = 0

    def run_out_of_memory(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at and processes.rank == fail_rank:
            raise MemoryError("injected")

    def watch(module: nn.Module, given: object, output: torch.Tensor) -> None:
        run_out_of_memory()
        if output.requires_grad:
            output.register_hook(run_out_of_memory)  # type: ignore[no-untyped-call]

    [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][7].register_forward_hook(watch)

    attempts = 1
    steps = accumulate_with_retry(
        learner, Progress(micro_batch=share), batch, size=(SIDE, SIDE), group=group, num_boxes=num_boxes
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            _, names, terms = end.value
            break
        attempts += 1
    totals = processes.all_reduce_gradients(learner.optimizer.parameters, terms.sum(0))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in learner.optimizer.parameters:
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    processes.check_in_sync(learner.optimizer.parameters)
    terms_by_name = dict(zip(names, totals, strict=True))
    return {"gradients": gradients, "terms": terms_by_name, "state": model.state_dict(), "attempts": attempts}


def main(out: Path, scenarios: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    processes = join_process_group("cpu")
    for number, scenario in enumerate(scenarios):
        left = {"together": step(processes, **scenario)}
        if processes.is_main:
            left["alone"] = step(SINGLE_PROCESS, **{**scenario, "fail_at": 0})
        torch.save(left, out / f"{number}-{processes.rank}.pt")
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""What a run would cost, measured without training: `rtdetr train --dry-run`."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rtdetr_cli.export.run import export_model
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train import memory
from rtdetr_cli.train.checkpoint import run_bytes
from rtdetr_cli.train.memory import peak_bytes
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.train.processes import images_per_process
from rtdetr_cli.runs import nearest_existing
from rtdetr_cli.train.state import Progress
from rtdetr_cli.train.step import accumulate_gradients, draw_group, run_largest_step
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.workflows.evaluator import Evaluator
from rtdetr_cli.workflows.prepare import Prepared, compile_parts


@dataclass(frozen=True, slots=True)
class DryReport:
    """What a run would cost, from one worst-case step, some real ones, one evaluation and one export.

    Attributes:
        micro_batch: images at once, halved until the worst step fitted.
        step_seconds: of a usual step, with the loader; worst_seconds: of one at the largest scale with most boxes.
        evaluation_seconds: of one evaluation.
        export_seconds: of one export to ONNX; export_bytes: of its file.
        total_seconds: of the whole run, without the export.
        memory_bytes: peak of the worst step; memory_total: of the device.
        disk_bytes: that the run will keep; disk_free: where it will lie.
        metrics: of the evaluation before any training.
    """

    micro_batch: int
    step_seconds: float
    worst_seconds: float
    evaluation_seconds: float
    export_seconds: float
    export_bytes: int
    total_seconds: float
    memory_bytes: int
    memory_total: int
    disk_bytes: int
    disk_free: int
    metrics: Mapping[str, float | None]


def rehearse(prepared: Prepared, micro: int) -> DryReport:
    """Run a worst-case step, a few real ones, one evaluation and one export, and work out what the run will cost.

    Raises:
        RtdetrError: what the run, or the export after it, would have ended with.
    """
    learner, settings = prepared.learner, prepared.config.settings
    if settings.compile:
        compile_parts(learner.model)
    plan = replace(prepared.plan, effective_batch=images_per_process(settings.effective_batch, prepared.processes.size))
    micro, worst = _worst_steps(prepared, plan, micro)
    peak = peak_bytes(learner.device)
    step = _real_steps(prepared, micro)
    begun = time.monotonic()
    metrics = Evaluator(prepared, Progress(micro_batch=micro), StopFlag())(learner.average.module)
    evaluation = time.monotonic() - begun
    evaluations = sum(plan.evaluates(e) for e in range(plan.epochs))
    export_seconds, export_bytes = _export(prepared) if prepared.processes.is_main else (0.0, 0)
    total = (
        torch.cuda.get_device_properties(learner.device).total_memory
        if learner.device.type == "cuda"
        else memory.free_bytes(learner.device) + peak
    )
    return DryReport(
        micro_batch=micro,
        step_seconds=step,
        worst_seconds=worst,
        evaluation_seconds=evaluation,
        export_seconds=export_seconds,
        export_bytes=export_bytes,
        total_seconds=step * plan.total_steps + evaluation * evaluations,
        memory_bytes=peak,
        memory_total=int(total),
        disk_bytes=run_bytes(learner.state_dict()),
        disk_free=shutil.disk_usage(nearest_existing(Path(settings.out))).free,
        metrics=metrics,
    )


def _worst_steps(prepared: Prepared, plan: Plan, micro: int) -> tuple[int, float]:
    """Run worst-case steps, with smaller micro-batches where memory runs out, as training would.

    Returns:
        The micro-batch that fits, and the seconds of a step with it.

    Raises:
        RtdetrError: not even one image fits.
    """
    learner, most = prepared.learner, prepared.most_boxes
    while True:
        try:
            run_largest_step(learner, plan, most_boxes=most, micro_batch=micro, parts=1)  # warms kernels up
            if learner.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(learner.device)
            begun = time.monotonic()
            run_largest_step(learner, plan, most_boxes=most, micro_batch=micro)
            return prepared.processes.min(micro), time.monotonic() - begun
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
        micro = memory.halve(micro, where=str(learner.device))


def _real_steps(prepared: Prepared, micro: int, count: int = 4) -> float:
    """Return the seconds of a step on real batches, with the loader and the optimizer; nothing is learned."""
    learner, plan, settings = prepared.learner, prepared.plan, prepared.config.settings
    learner.train_mode()
    learner.norms.save()
    learner.optimizer.set_rate(0.0)  # a step of no length: weight decay is a share of it
    batches = prepared.loader.epoch(0, strong=plan.strong_until > 0)
    times = []
    for step in range(min(count, plan.steps_per_epoch)):
        begun = time.monotonic()
        batch = next(batches)
        group = draw_group(learner, batch, step=step, seed=settings.seed)
        rows = memory.micro_batches(len(batch.labels), micro)
        size = plan.scales[len(plan.scales) // 2]
        _, terms = accumulate_gradients(learner, batch, rows=rows, size=size, group=group, num_boxes=1.0)
        learner.optimizer.step(terms.sum())
        learner.average.update(0.0)
        learner.optimizer.zero_grad()
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
        times.append(time.monotonic() - begun)
    learner.norms.restore()
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    # The first waits for the loader's processes to start.
    return min(times[1:] or times) if len(times) < 3 else sorted(times[1:])[len(times[1:]) // 2]


def _export(prepared: Prepared) -> tuple[float, int]:
    """Export what would be deployed, as it is now, to a folder that is thrown away; return seconds and bytes."""
    begun = time.monotonic()
    model = copy.deepcopy(prepared.learner.average.module).cpu()
    assert isinstance(model, RTDETR)
    with tempfile.TemporaryDirectory(prefix="rtdetr-") as folder:
        made = export_model(model, prepared.header, Path(folder), device="cpu")
        return time.monotonic() - begun, made[0].path.stat().st_size

"""What a run would cost, measured without training: `rtdetr train --dry-run`."""

from __future__ import annotations

import copy
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from rtdetr_cli.export.run import export_model
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.runs import nearest_existing
from rtdetr_cli.train import memory
from rtdetr_cli.train.checkpoint import run_bytes
from rtdetr_cli.train.plan import Plan
from rtdetr_cli.train.processes import images_per_process
from rtdetr_cli.train.state import Progress
from rtdetr_cli.train.step import accumulate_gradients, draw_group, run_largest_step
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.workflows.evaluator import Evaluator
from rtdetr_cli.workflows.events import DryRunResult
from rtdetr_cli.workflows.prepare import Prepared, compiled

REAL_STEPS = 4


def measure_run(prepared: Prepared, micro_batch: int) -> DryRunResult:
    """Make a worst-case step, a few real ones, one evaluation and one export, and estimate what the run will cost.

    Raises:
        RtdetrError: what the run, or the export after it, would have failed with.
    """
    learner, plan, settings = prepared.learner, prepared.plan, prepared.config.settings
    share = replace(plan, effective_batch=images_per_process(settings.effective_batch, prepared.processes.size))
    with compiled(learner.model, settings.compile):
        micro_batch, worst_seconds = _time_worst_step(prepared, share, micro_batch)
        peak = memory.peak_bytes(learner.device)
        step_seconds = _time_real_steps(prepared, micro_batch)
    began = time.monotonic()
    Evaluator(prepared, Progress(micro_batch=micro_batch), StopFlag())(learner.average.module)
    evaluation_seconds = time.monotonic() - began
    evaluations = sum(plan.evaluates(epoch) for epoch in range(plan.epochs))
    export_seconds, export_bytes = _time_export(prepared) if prepared.processes.is_main else (0.0, 0)
    if learner.device.type == "cuda":
        memory_total = int(torch.cuda.get_device_properties(learner.device).total_memory)
    else:
        memory_total = memory.free_bytes(learner.device) + peak
    return DryRunResult(
        micro_batch=micro_batch,
        step_seconds=step_seconds,
        worst_seconds=worst_seconds,
        evaluation_seconds=evaluation_seconds,
        export_seconds=export_seconds,
        export_bytes=export_bytes,
        total_seconds=step_seconds * plan.total_steps + evaluation_seconds * evaluations,
        memory_bytes=peak,
        memory_total=memory_total,
        disk_bytes=run_bytes(learner.state_dict()),
        disk_free=shutil.disk_usage(nearest_existing(Path(settings.out))).free,
    )


def _time_worst_step(prepared: Prepared, plan: Plan, micro_batch: int) -> tuple[int, float]:
    """Return the micro-batch that fits, halved as in training where memory runs out, and the seconds of a step."""
    learner, most_boxes = prepared.learner, prepared.most_boxes
    while True:
        try:
            run_largest_step(learner, plan, most_boxes=most_boxes, micro_batch=micro_batch, parts=1)  # loads kernels
            if learner.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(learner.device)
            began = time.monotonic()
            run_largest_step(learner, plan, most_boxes=most_boxes, micro_batch=micro_batch)
            return int(min(prepared.processes.all_gather(micro_batch))), time.monotonic() - began
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
        micro_batch = memory.halve(micro_batch, where=str(learner.device))


def _time_real_steps(prepared: Prepared, micro_batch: int) -> float:
    """Return the seconds of a step on real batches, with loader and optimizer; the weights do not change."""
    learner, plan, settings = prepared.learner, prepared.plan, prepared.config.settings
    learner.train_mode()
    learner.norms.save()
    learner.optimizer.set_rate(0.0)  # also switches weight decay off
    size = plan.scales[len(plan.scales) // 2]
    times = []
    batches = prepared.loader.epoch(0)
    for step in range(min(REAL_STEPS, plan.steps_per_epoch)):
        began = time.monotonic()
        batch = next(batches)
        group = draw_group(learner, batch, step=step, seed=settings.seed)
        rows = memory.micro_batches(len(batch.labels), micro_batch)
        _, terms = accumulate_gradients(learner, batch, rows=rows, size=size, group=group, num_boxes=1.0)
        learner.optimizer.step(terms.sum())
        learner.average.update(0.0)
        learner.optimizer.zero_grad()
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
        times.append(time.monotonic() - began)
    batches.close()
    learner.norms.restore()
    return statistics.median_high(times[1:] or times)  # the first waits for the loader's processes to start


def _time_export(prepared: Prepared) -> tuple[float, int]:
    """Export the untrained model to a temporary folder; return seconds and bytes."""
    began = time.monotonic()
    model = copy.deepcopy(prepared.learner.average.module).cpu()
    assert isinstance(model, RTDETR)
    with tempfile.TemporaryDirectory(prefix="rtdetr-") as folder:
        artefacts = export_model(model, prepared.header, Path(folder), device="cpu")
        return time.monotonic() - began, artefacts[0].path.stat().st_size

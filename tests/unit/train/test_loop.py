"""The training loop: micro-batches, out of memory, non-finite steps, signals, full disks, exact resume."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.images.decode import stretch
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train import checkpoint as checkpointing
from rtdetr_cli.train import memory
from rtdetr_cli.train import step as step_module
from rtdetr_cli.train.checkpoint import load_checkpoint
from rtdetr_cli.train.events import CheckpointSaved, EpochDone, MicroBatchReduced, RolledBack, StepDone, StepSkipped
from rtdetr_cli.train.guard import MAX_SKIPPED_IN_A_ROW
from rtdetr_cli.train.state import MAX_ROLLBACKS, Learner
from rtdetr_cli.train.step import accumulate_gradients, draw_group, draw_size, to_input
from rtdetr_cli.train.stop import Interrupted, StopFlag
from rtdetr_cli.workflows import evaluator as evaluating
from rtdetr_cli.workflows import finetune as workflow
from rtdetr_cli.workflows import prepare as preparing
from rtdetr_cli.workflows.prepare import Prepared, prepare
from tests.small import equal

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: exact comparisons need a fixed number, and one is fastest for such small networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(boxes_in: tuple[int, ...], *, side: int = 64, classes: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(5)
    count = len(boxes_in)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    boxes = tuple(torch.rand((n, 4), generator=generator) * 0.3 + 0.2 for n in boxes_in)
    labels = tuple(torch.randint(0, classes, (n,), generator=generator) for n in boxes_in)
    return Batch(images, boxes, labels, tuple(range(count)), ())


def float64(learner: Learner) -> Learner:
    """Make a learner's network float64, so that a wrong normalizer cannot hide in rounding."""
    learner.model.double()
    learner.model.register_forward_pre_hook(lambda module, given: (given[0].double(), *given[1:]))
    return learner


def freeze_norms(learner: Learner) -> None:
    for module in learner.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def gradients(learner: Learner, batch: Batch, micro: int) -> tuple[dict[str, Tensor], Tensor]:
    learner.train_mode()
    group = draw_group(learner, batch, step=3, seed=1)
    rows = memory.micro_batches(len(batch.labels), micro)
    num_boxes = float(max(1, sum(len(one) for one in batch.labels)))
    _, terms = accumulate_gradients(learner, batch, rows=rows, size=(64, 64), group=group, num_boxes=num_boxes)
    by_name = {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}
    learner.optimizer.zero_grad()
    return by_name, terms.sum(0)


# ---- the effective batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes_in", [(3, 1, 0, 6, 2, 0, 0, 4), (0,) * 8, (0, 0, 0, 0, 0, 0, 0, 260)])
def test_gradients_do_not_depend_on_the_micro_batch(small_run: Make, boxes_in: tuple[int, ...]) -> None:
    """With frozen norms, for images without boxes, a batch without boxes, and more boxes than queries."""
    learner = float64(prepare(small_run()).learner)
    freeze_norms(learner)
    batch = batch_of(boxes_in)
    whole, terms = gradients(learner, batch, 8)
    assert any(g.abs().sum() > 0 for g in whole.values())
    for micro in (4, 3, 2, 1):
        cut, cut_terms = gradients(learner, batch, micro)
        torch.testing.assert_close(cut_terms, terms, rtol=1e-9, atol=1e-9)
        assert cut.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(cut[name], expected, rtol=1e-7, atol=1e-10, msg=name)


def test_trained_norms_depend_on_the_micro_batch(small_run: Make) -> None:
    """As documented; it is also why the test above freezes the norms."""
    learner = float64(prepare(small_run()).learner)
    batch = batch_of((3, 1, 0, 6, 2, 0, 0, 4))
    whole, _ = gradients(learner, batch, 8)
    cut, _ = gradients(learner, batch, 4)
    assert any(not torch.allclose(cut[n], whole[n], rtol=1e-3) for n in whole)


class Fault:
    """Raises an error, or makes the output NaN, at chosen calls of a module in training."""

    def __init__(self, module: nn.Module, *, at: set[int], what: str, error: Exception | None = None) -> None:
        self.calls, self.at, self.what = 0, at, what
        self.error = error or torch.OutOfMemoryError("CUDA out of memory (injected)")
        self.backward_calls = 0
        self.handle = module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, given: object, output: Any) -> Any:
        if not module.training:
            return None
        self.calls += 1
        hit = self.calls in self.at
        if hit and self.what == "forward":
            raise self.error
        if self.what == "backward" and isinstance(output, Tensor):
            output.register_hook(self._backward)
        if hit and self.what == "nan":
            return output * float("nan")
        return None

    def _backward(self, gradient: Tensor) -> None:
        self.backward_calls += 1
        if self.backward_calls in self.at:
            raise self.error


def make_nan(prepared: Prepared, at: set[int]) -> Fault:
    """Make the output of the first layer NaN in these forward passes."""
    return Fault(prepared.learner.model.backbone.conv1, at=at, what="nan")


def norm_layer(prepared: Prepared) -> nn.Module:
    return [m for m in prepared.learner.model.modules() if isinstance(m, nn.BatchNorm2d)][-1]


def run(
    config: RunConfig,
    tamper: Callable[[Prepared], object] | None = None,
    stop: StopFlag | None = None,
    events: list[Any] | None = None,
) -> tuple[list[Any], dict[str, Tensor], Path]:
    """Run the whole workflow, after `tamper` has changed what was prepared; return events, weights and folder."""
    events = [] if events is None else events
    prepared_: list[Prepared] = []
    real = workflow.prepare

    def watched(*args: Any, **more: Any) -> Prepared:
        prepared = real(*args, **more)
        prepared_.append(prepared)
        if tamper is not None:
            tamper(prepared)
        return prepared

    workflow.prepare = watched
    try:
        for event in workflow.finetune(config, stop=stop):
            events.append(event)
    finally:
        workflow.prepare = real
    folder = next(r.folder for r in events if isinstance(r, workflow.RunStarted))
    assert folder is not None
    return events, tensors(prepared_[0].learner), folder


def tensors(learner: Learner) -> dict[str, Tensor]:
    state = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    return {k: v.clone() for k, v in (state | learner.average.module.state_dict()).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def of(kind: type, events: list[Any]) -> list[Any]:
    return [r for r in events if isinstance(r, kind)]


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_out_of_memory_halves_the_micro_batch_and_retries_the_same_step(small_run: Make, what: str) -> None:
    """The result equals, bit for bit, that of a run that started with the smaller micro-batch."""
    _, expected, _ = run(small_run(batch=4, name="halves"))
    events, weights, folder = run(small_run(batch=8, name="whole"), lambda p: Fault(norm_layer(p), at={1}, what=what))
    cuts = of(MicroBatchReduced, events)
    assert [(c.step, c.micro_batch_before, c.micro_batch) for c in cuts] == [(0, 8, 4)]
    assert same(weights, expected)
    assert [r.step for r in of(StepDone, events)] == list(range(6)), "no step is lost or repeated"
    assert load_checkpoint(folder)[0]["place"]["micro_batch"] == 4


def test_out_of_memory_in_several_steps(small_run: Make) -> None:
    """8 -> 4 in the second step; 4 -> 2 -> 1 in the fourth. With frozen norms the losses stay the same."""

    def tamper(prepared: Prepared) -> None:
        freeze_norms(prepared.learner)
        # Passes: step 0: 1; step 1: 2 fails, 3 4; step 2: 5 6; step 3: 7 8 fails, 9 10 11 fails, 12 to 19.
        Fault(prepared.learner.model.encoder, at={2, 8, 11}, what="forward")

    undisturbed, _, _ = run(small_run(name="a"), lambda p: freeze_norms(p.learner))
    events, _, _ = run(small_run(name="b"), tamper)
    assert [(c.step, c.micro_batch) for c in of(MicroBatchReduced, events)] == [(1, 4), (3, 2), (3, 1)]
    expected = [r.loss for r in of(StepDone, undisturbed)]
    assert [r.loss for r in of(StepDone, events)] == pytest.approx(expected, rel=1e-3)


def test_norm_statistics_of_failed_passes_are_undone(small_run: Make) -> None:
    """Otherwise the running means would count some images twice."""
    prepared: list[Prepared] = []
    _, _, _ = run(small_run(epochs=1, name="a"), prepared.append)
    alone = {k: v.clone() for k, v in prepared[0].learner.model.state_dict().items() if "num_batches" in k}

    def tamper(p: Prepared) -> None:
        prepared.append(p)
        # The last norm: every other one has seen the batch by then.
        Fault(norm_layer(p), at={3}, what="forward")

    run(small_run(epochs=1, name="b"), tamper)
    counted = prepared[1].learner.model.state_dict()
    # 3 steps of 1 pass; the third is made in 2 passes.
    for key, value in alone.items():
        assert int(value) == 3, key
        assert int(counted[key]) == 4, key


def test_other_errors_are_not_retried(small_run: Make) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run(small_run(), lambda p: Fault(norm_layer(p), at={2}, what="forward", error=RuntimeError("a bug")))


# ---- numbers ----------------------------------------------------------------------------------------------------


def test_a_non_finite_step_is_skipped_and_reported_with_its_images(small_run: Make) -> None:
    """The third step has two micro-batches, and the output of the second becomes NaN."""
    prepared: list[Prepared] = []
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}

    def tamper(p: Prepared) -> None:
        prepared.append(p)
        make_nan(p, {6})
        make = p.learner.norms.save
        calls = [0]

        def keep() -> None:
            calls[0] += 1
            if calls[0] == 3:
                before.update(tensors(p.learner))
            if calls[0] == 4:
                after.update(tensors(p.learner))
            make()

        p.learner.norms.save = keep  # type: ignore[method-assign]

    events, weights, folder = run(small_run(batch=4), tamper)
    skipped = of(StepSkipped, events)
    assert [s.step for s in skipped] == [2]
    facts = skipped[0]
    assert facts.in_a_row == 1
    assert len(facts.images) == 4, "only those of the NaN micro-batch"
    assert facts.term.startswith("loss_")
    # Nothing of the step is left in weights and running statistics.
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("model.") and "num_batches" not in k)
    assert all(torch.isfinite(v).all() for k, v in weights.items() if "anchors" not in k)
    assert len(of(StepDone, events)) == 5
    evidence = np.load(facts.evidence)
    saved = json.loads(str(evidence["facts"]))
    assert saved["pictures"] == list(facts.images)
    assert saved["term"] == facts.term
    assert saved["files"] == list(facts.files)
    assert list(facts.files) == [prepared[0].train_set.file_names[i] for i in facts.images]
    assert all(name in (folder / "train.log").read_text() for name in facts.files)
    assert evidence["images"].shape == (8, 3, 64, 64)
    assert folder in facts.evidence.parents


def test_skipped_steps_are_reported_one_step_later_and_before_the_epoch_ends(small_run: Make) -> None:
    events, _, _ = run(small_run(), lambda p: make_nan(p, {1, 6}))
    kinds = [(type(r).__name__, getattr(r, "step", None)) for r in events]
    assert kinds.index(("StepSkipped", 0)) < kinds.index(("StepDone", 1))
    assert kinds.index(("StepSkipped", 5)) < kinds.index(("EpochDone", 6))


def test_the_loss_of_an_epoch_excludes_skipped_steps(small_run: Make) -> None:
    events, _, _ = run(small_run(), lambda p: make_nan(p, {2}))
    epoch = of(EpochDone, events)[0]
    steps = [r.loss for r in of(StepDone, events) if r.epoch == 0]
    assert len(steps) == 2
    assert epoch.loss == pytest.approx(sum(steps) / 2)


def test_skipped_steps_in_a_row_roll_back_to_a_good_state_with_a_lower_rate(small_run: Make) -> None:
    """After five NaN steps in a row, the run goes back to the end of an epoch and then completes."""
    first = 4
    events, weights, folder = run(
        small_run(epochs=4),
        lambda p: make_nan(p, set(range(first, first + MAX_SKIPPED_IN_A_ROW))),
    )
    back = of(RolledBack, events)
    # The fifth is known after the ninth step has been queued. By then epoch 3 has begun, and the checkpoint at the end
    # of epoch 2 was written between skipped steps.
    assert [(b.step, b.to_step, b.rate_scale) for b in back] == [(9, 3, 0.5)]
    last = of(StepDone, events)[-1]
    assert last.step == 11
    assert all(torch.isfinite(v).all() for k, v in weights.items() if "anchors" not in k)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in rows[1:]] == ["1", "2", "3", "4"]


def test_checkpoints_saved_between_skipped_steps_keep_the_last_good_one(small_run: Make) -> None:
    """With a save after each step, two saves in a row must not push the good checkpoint out."""
    first = 5
    events, _, _ = run(
        small_run("checkpoint_steps=1", epochs=4),
        lambda p: make_nan(p, set(range(first, first + MAX_SKIPPED_IN_A_ROW))),
    )
    back = of(RolledBack, events)
    assert [b.to_step for b in back] == [4]
    assert of(StepDone, events)[-1].step == 11


def test_a_diverging_run_exits_with_code_1(small_run: Make) -> None:
    events: list[Any] = []
    with pytest.raises(RtdetrError, match="diverged") as caught:
        run(small_run(epochs=9), lambda p: make_nan(p, set(range(5, 1000))), events=events)
    assert caught.value.exit_code == 1
    assert "evidence" in caught.value.hint
    assert [b.rate_scale for b in of(RolledBack, events)] == [0.5**n for n in range(1, MAX_ROLLBACKS + 1)]
    folder = of(workflow.RunStarted, events)[0].folder
    assert 1 <= len(list((folder / "evidence").glob("*.npz"))) <= 5
    state, _ = load_checkpoint(folder)
    assert all(torch.isfinite(v).all() for k, v in state["learner"]["model"].items() if "anchors" not in k)


# ---- stopping and going on --------------------------------------------------------------------------------------


def interrupt_after(config: RunConfig, steps: int, number: int = signal.SIGTERM) -> Path:
    """Request a stop, as a signal does, after so many steps; return the folder."""
    stop = StopFlag()
    folders: list[Path] = []

    def run_until_stopped() -> None:
        for event in workflow.finetune(config, stop=stop):
            if isinstance(event, workflow.RunStarted) and event.folder is not None:
                folders.append(event.folder)
            if isinstance(event, StepDone) and event.step + 1 >= steps:
                stop.signal = number

    with pytest.raises(Interrupted) as caught:
        run_until_stopped()
    assert caught.value.exit_code == 128 + number
    return folders[0]


def finish(folder: Path) -> None:
    events = list(workflow.resume(folder))
    assert isinstance(events[-1], workflow.RunFinished)


def outputs(folder: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    state, _ = load_checkpoint(folder)
    return (folder / "best.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes(), state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(small_run: Make, precision: str) -> None:
    """Stopped within the first epoch, and after the steps of the second but before its evaluation."""
    config = {"epochs": 3, "precision": precision}
    _, _, alone = run(small_run(name="alone", **config))
    expected = outputs(alone)
    for steps in (1, 4, 6):
        folder = interrupt_after(small_run(name=f"stopped-{steps}", **config), steps)
        finish(folder)
        resumed = outputs(folder)
        assert resumed[0] == expected[0], "best.safetensors"
        assert resumed[1] == expected[1], "metrics.csv"
        for part in ("learner", "place", "generators"):
            assert equal(resumed[2][part], expected[2][part]), part


def test_metrics_rows_written_after_the_checkpoint_are_removed(small_run: Make) -> None:
    """If the machine goes down between writing the row and the checkpoint, no row may appear twice."""
    _, _, alone = run(small_run(name="alone"))
    folder = interrupt_after(small_run(name="other"), 4)
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,6,0.5,half a ro")
    finish(folder)
    assert (folder / "metrics.csv").read_bytes() == (alone / "metrics.csv").read_bytes()


def test_a_stop_during_the_evaluation_keeps_the_steps_of_the_epoch(
    small_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, alone = run(small_run(name="alone"))
    stop = StopFlag()
    real = workflow.Evaluator.__call__

    def asked(self: Any, model: nn.Module) -> Any:
        stop.signal = signal.SIGINT
        return real(self, model)

    monkeypatch.setattr(workflow.Evaluator, "__call__", asked)
    with pytest.raises(Interrupted) as caught:
        run(small_run(name="other"), stop=stop)
    assert caught.value.exit_code == 130
    monkeypatch.setattr(workflow.Evaluator, "__call__", real)
    folder = alone.parent / "other"
    state, _ = load_checkpoint(folder)
    assert (state["place"]["epoch"], state["place"]["batch"], state["place"]["step"]) == (0, 3, 3)
    finish(folder)
    assert outputs(folder)[:2] == outputs(alone)[:2]


def test_patience_survives_a_resume(small_run: Make) -> None:
    """The best score and the epochs since then come from the checkpoint."""
    config = {"epochs": 40, "patience": 2, "lr": 1e-9}
    events, _, alone = run(small_run(name="alone", **config))
    end = events[-1]
    assert end.reason == "patience"
    assert end.epochs < 40
    folder = interrupt_after(small_run(name="other", **config), 3 * (end.epochs - 1) + 1)
    finish(folder)
    assert outputs(folder)[:2] == outputs(alone)[:2]


def scores(monkeypatch: pytest.MonkeyPatch, *values: float | None) -> None:
    """Make the evaluations return these scores, in turn."""
    real, left = workflow.Evaluator.__call__, list(values)

    def scripted(self: Any, model: nn.Module) -> Any:
        metrics, evaluation = real(self, model)
        return {**metrics, "AP": left.pop(0)}, evaluation

    monkeypatch.setattr(workflow.Evaluator, "__call__", scripted)


@pytest.mark.parametrize(
    ("values", "improved", "best_epoch"),
    [
        ((0.2, 0.2, 0.2), [True, False, False], 0),
        ((0.0, 0.0, 0.1), [True, False, True], 2),
        ((0.3, 0.1, 0.2), [True, False, False], 0),
        # Without a score, the newest model counts as the best, because it has learned longest.
        ((None, None, None), [True, True, True], 2),
        ((None, 0.1, None), [True, True, False], 1),
    ],
)
def test_only_a_higher_score_is_an_improvement(
    small_run: Make,
    monkeypatch: pytest.MonkeyPatch,
    values: tuple[float | None, ...],
    improved: list[bool],
    best_epoch: int,
) -> None:
    scores(monkeypatch, *values)
    events, _, _ = run(small_run(epochs=3))
    epochs = of(EpochDone, events)
    assert [e.improved for e in epochs] == improved
    assert epochs[-1].best_epoch == best_epoch


def test_the_batch_size_of_the_evaluation_comes_from_the_run(small_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change the last bits, and a resumed run knows only the micro-batch of the checkpoint."""
    seen: list[int] = []
    real = evaluating.detect

    def watched(*args: Any, batch: int, **more: Any) -> Any:
        seen.append(batch)
        return real(*args, batch=batch, **more)

    monkeypatch.setattr(evaluating, "detect", watched)
    run(small_run(), lambda p: Fault(norm_layer(p), at={5}, what="forward"))
    assert seen == [8, 4]


def test_the_header_of_metrics_csv_is_complete_if_all_steps_of_the_first_epoch_are_skipped(small_run: Make) -> None:
    _, _, folder = run(small_run(), lambda p: make_nan(p, {1, 2, 3}))
    rows = RunFolder(folder).metrics()
    assert math.isnan(rows[0]["loss"] or 0)
    assert math.isnan(rows[0]["loss_vfl"] or 0)
    assert (rows[1]["loss_vfl"] or 0) > 0


def test_saves_within_an_epoch(small_run: Make) -> None:
    saved = of(CheckpointSaved, run(small_run("checkpoint_steps=2"))[0])
    assert [(s.reason, s.step) for s in saved] == [
        ("start", 0), ("steps", 2), ("epoch", 3), ("steps", 4), ("steps", 6), ("epoch", 6)
    ]  # fmt: skip
    saved = of(CheckpointSaved, run(small_run("checkpoint_minutes=1e-9"))[0])
    assert [(s.reason, s.step) for s in saved if s.reason == "time"] == [("time", n) for n in range(1, 7)]


# ---- the disk ---------------------------------------------------------------------------------------------------


def test_a_disk_without_room_for_the_run_is_reported_before_the_first_step(
    small_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run needs room for three checkpoints (two are kept, a third is being written) and the model."""
    config = small_run()
    prepared = prepare(config)
    one = checkpointing.bytes_of(prepared.learner.state_dict())
    free = shutil.disk_usage("/")._replace(free=2 * one + 2**21)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(RtdetrError, match="free") as caught:
        run(config)
    assert caught.value.code == "disk-full"
    assert caught.value.exit_code == 1
    assert "--out" in caught.value.hint
    assert not list(Path(config.settings.out).rglob("last.ckpt"))


@pytest.mark.parametrize("name", ["metrics.csv", "best.safetensors"])
def test_a_full_disk_at_the_end_of_an_epoch_leaves_the_last_good_checkpoint(
    small_run: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, _, alone = run(small_run(name="alone"))
    real = {"metrics.csv": RunFolder.add_metrics, "best.safetensors": workflow.save_model}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args: Any, **more: Any) -> Any:
        # The system itself refuses to write more than this.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            return real[name](*args, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    target, attribute = (RunFolder, "add_metrics") if name == "metrics.csv" else (workflow, "save_model")
    monkeypatch.setattr(target, attribute, full)
    with pytest.raises(RtdetrError, match="last good checkpoint") as caught:
        run(small_run(name="other"))
    assert caught.value.exit_code == 1
    folder = alone.parent / "other"
    assert f"rtdetr train --resume {folder}" in caught.value.hint
    assert load_checkpoint(folder)[1] == ""
    monkeypatch.setattr(target, attribute, real[name])
    finish(folder)
    assert outputs(folder)[:2] == outputs(alone)[:2]


# ---- one step ---------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the operations by which the host waits for a value from the device."""

    WORDS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = "index" in name and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for part in args
            for one in (part if isinstance(part, (list, tuple)) else ())
        )
        if by_mask or any(word in name for word in self.WORDS):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_only_for_the_matching(small_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, losses, backward, clipping, step and average transfer one tensor to the host: the matching costs."""
    learner = prepare(small_run()).learner
    learner.train_mode()
    batch = batch_of((3, 1, 0, 6))
    group = draw_group(learner, batch, step=0, seed=0)
    transfers = [0]
    real = Tensor.cpu

    def counted(self: Tensor, *args: Any, **more: Any) -> Tensor:
        transfers[0] += 1
        return real(self, *args, **more)

    monkeypatch.setattr(Tensor, "cpu", counted)
    with HostReads() as reads:
        _, terms = accumulate_gradients(learner, batch, rows=[slice(0, 4)], size=(64, 64), group=group, num_boxes=10.0)
        found_inf, _ = learner.optimizer.step(terms.sum())
        learner.norms.restore_where(found_inf)
        learner.average.update(0.1)
    assert reads.seen == []
    assert transfers == [1]


def test_resizing_on_the_device_equals_the_loader_resize() -> None:
    """Antialiased bilinear like the loader's, up to the rounding of its 8 bits."""
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    ours = to_input(torch.from_numpy(image).permute(2, 0, 1)[None], (64, 160))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    expected = stretch(image, (64, 160)).astype(np.float32)
    difference = np.abs(ours[0].permute(1, 2, 0).numpy() * 255 - expected)
    assert difference.max() <= 1.01
    assert difference.mean() < 0.5


def test_images_of_the_right_size_are_not_resized() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    assert torch.equal(to_input(images, (32, 64)), images.float() / 255)


def test_scales_are_drawn_from_seed_and_step(small_run: Make) -> None:
    plan = prepare(small_run()).plan
    plan = replace(plan, multi_scale_until=1, scales=tuple((s, s) for s in (480, 512, 640, 768, 800)))
    drawn = [draw_size(plan, epoch=0, step=s, seed=1) for s in range(300)]
    assert set(drawn) == set(plan.scales)
    assert drawn == [draw_size(plan, epoch=0, step=s, seed=1) for s in range(300)]
    assert drawn != [draw_size(plan, epoch=0, step=s, seed=2) for s in range(300)]
    assert {draw_size(plan, epoch=1, step=s, seed=1) for s in range(50)} == {(640, 640)}


def test_the_denoising_group_belongs_to_the_whole_batch(small_run: Make) -> None:
    learner = prepare(small_run()).learner
    batch = batch_of((3, 1, 0, 6))
    group, again = (draw_group(learner, batch, step=7, seed=1) for _ in range(2))
    other = draw_group(learner, batch, step=8, seed=1)
    assert torch.equal(group.boxes_unactivated, again.boxes_unactivated)
    assert not torch.equal(group.boxes_unactivated, other.boxes_unactivated)
    assert torch.equal(group.rows(slice(1, 3)).boxes_unactivated, group.boxes_unactivated[1:3])


def test_the_largest_step_changes_nothing(small_run: Make) -> None:
    prepared = prepare(small_run())
    before = tensors(prepared.learner)
    step_module.run_largest_step(prepared.learner, prepared.plan, most_boxes=40, micro_batch=4)
    assert same(before, tensors(prepared.learner))
    assert all(p.grad is None for p in prepared.learner.model.parameters())


@pytest.mark.parametrize("what", ["stem", "backbone", "encoder"])
def test_frozen_parts_do_not_change(small_run: Make, what: str) -> None:
    """Neither weights nor running statistics; everything else changes."""
    prepared: list[Prepared] = []
    before: dict[str, Tensor] = {}

    def tamper(p: Prepared) -> None:
        prepared.append(p)
        before.update({k: v.clone() for k, v in p.learner.model.state_dict().items()})

    run(small_run(epochs=1, freeze=what), tamper)
    after = prepared[0].learner.model.state_dict()
    frozen = {"stem": ("backbone.conv1.",), "backbone": ("backbone.",), "encoder": ("backbone.", "encoder.")}[what]
    for key, value in after.items():
        if key.startswith(frozen):
            assert torch.equal(value, before[key]), key
    moved = [k for k, v in after.items() if not torch.equal(v, before[k])]
    assert moved
    assert not any(k.startswith(frozen) for k in moved)


def test_multi_scale_training_of_a_rectangle(small_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set()
    real = step_module.to_input

    def watched(images: Tensor, size: tuple[int, int]) -> Tensor:
        sizes.add(size)
        return real(images, size)

    monkeypatch.setattr(step_module, "to_input", watched)
    real_plan = preparing.make_plan

    def with_scales(*args: Any, **more: Any) -> Any:
        return replace(real_plan(*args, **more), multi_scale_until=2, scales=((64, 96), (64, 128), (96, 160)))

    monkeypatch.setattr(preparing, "make_plan", with_scales)
    events, _, _ = run(small_run(imgsz=(64, 128)))
    assert len(sizes) > 1
    assert all(np.isfinite(r.loss) for r in of(StepDone, events))

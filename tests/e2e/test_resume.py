"""A run that is killed and resumed ends as the run that was left alone, bit for bit.

Runs are real processes of the command line, forked off a server that has torch loaded, so that twenty of them fit
into a test. They are killed with SIGKILL by the clock, or by themselves at a chosen call within a save.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

SETTINGS = (
    "model.width=8",
    "model.hidden_dim=16",
    "model.encoder_ffn=16",
    "model.heads=2",
    "model.decoder_dim=16",
    "model.decoder_ffn=16",
    "model.decoder_layers=2",
    "model.eval_layers=2",
    "model.num_points=[1,1,1]",
    "model.queries=12",
    "model.denoising=8",
    "plots=false",
    # Often, so that most kills fall within an epoch or within a save.
    "checkpoint_steps=2",
)


def train(arguments: list[str], log: Path, deadly: tuple[str, int] | None) -> None:
    """Be `rtdetr ARGUMENTS`, in a process of its own; `deadly` names a call that is its last one."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if deadly is not None:
        name, count = deadly
        real = getattr(os, name)
        left = [count]

        def last(*given: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **more)

        setattr(os, name, last)
    from rtdetr_cli.cli.app import run

    raise SystemExit(run(arguments))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    """Processes that start with torch loaded, on one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rtdetr_cli.workflows.finetune", "hotcoco"])
    yield context
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rtdetr_cli.datasets.generate import generate_dataset

    return generate_dataset(tmp_path_factory.mktemp("data") / "shapes", train=40, val=6, imgsz=64)


class Lab:
    """Starts, kills and resumes runs."""

    def __init__(self, server: ForkServerContext, data: Path, folder: Path, workers: int = 0) -> None:
        self.server, self.data, self.folder, self.workers = server, data, folder, workers

    def start(self, name: str, *, deadly: tuple[str, int] | None = None) -> Any:
        words = ["train", "--preset", "tiny", "--data", self.data, "--imgsz", 64, "--effective-batch", 8, "--batch", 8]
        words += ["--epochs", 4, "--workers", self.workers, "--device", "cpu", "--out", self.folder, "--name", name]
        for setting in SETTINGS:
            words += ["--set", setting]
        return self._process([str(w) for w in words], name, deadly)

    def resume(self, name: str, *, deadly: tuple[str, int] | None = None) -> Any:
        return self._process(["train", "--resume", str(self.folder / name)], name, deadly)

    def go_on(self, name: str) -> Any:
        """Resume; a run that was killed before it had written its settings is started again."""
        if (self.folder / name / "manifest.json").exists():
            return self.resume(name)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.start(name)

    def _process(self, words: list[str], name: str, deadly: tuple[str, int] | None) -> Any:
        process = self.server.Process(target=train, args=(words, self.folder / f"{name}.log", deadly))
        process.start()
        return process

    def finish(self, name: str) -> None:
        """Go on until the end."""
        process = self.go_on(name)
        process.join()
        log = (self.folder / f"{name}.log").read_text()
        finished = "is finished" in log
        assert process.exitcode == 0 or (process.exitcode == 2 and finished), log

    def tell(self, name: str) -> bool:
        """Say where a run was killed, for `pytest -s`; return whether it was during a save."""
        run = self.folder / name
        partial = (run / ".last.ckpt.partial").exists()
        where = f"last checkpoint at step {self.state(name)['place']['step']}" if self.begun(name) else "no checkpoint"
        print(f"{name}: killed, {where}{', during a save' if partial else ''}")
        return partial

    def begun(self, name: str) -> bool:
        return (self.folder / name / "last.ckpt").exists()

    def left(self, name: str) -> tuple[bytes, bytes]:
        run = self.folder / name
        return (run / "best.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()

    def state(self, name: str) -> dict[str, Any]:
        from rtdetr_cli.train.checkpoint import load_checkpoint

        return load_checkpoint(self.folder / name)[0]


@pytest.fixture(scope="module")
def lab(server: ForkServerContext, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(server, data, tmp_path_factory.mktemp("runs"))
    process = lab.start("alone")
    process.join()
    assert process.exitcode == 0, (lab.folder / "alone.log").read_text()
    return lab


def assert_equal_runs(lab: Lab, name: str) -> None:

    assert lab.left(name)[0] == lab.left("alone")[0], "best.safetensors"
    assert lab.left(name)[1] == lab.left("alone")[1], "metrics.csv"
    ours, expected = lab.state(name), lab.state("alone")
    for part in ("learner", "place", "generators", "metrics_offset", "identity"):
        assert equal(ours[part], expected[part]), part


def equal(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def wait_for_saves(lab: Lab, name: str, process: Any, count: int) -> None:
    """Wait until a process has written so many checkpoints, or is over."""
    path, seen = lab.folder / name / "last.ckpt", set()
    before = path.stat().st_mtime_ns if path.exists() else None
    while len(seen) < count and process.is_alive():
        with suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
            seen.discard(before)
        time.sleep(0.002)


def kill_by_the_clock(lab: Lab, name: str, seed: int) -> list[bool]:
    """Kill a run once or twice at random moments, then let it end; return for each kill if it was during a save."""
    clock = random.Random(seed)
    lives, told = clock.choice((1, 2)), []
    while len(told) < lives:
        process = lab.go_on(name)
        # Some saves on, not some seconds: a busy machine would be killed at its first step each time.
        wait_for_saves(lab, name, process, clock.randint(0, 8))
        time.sleep(clock.uniform(0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            told.append(lab.tell(name))
        # It was over first. A second life has little left to it; a run that was never killed is no test.
        elif told:
            break
        else:
            shutil.rmtree(lab.folder / name)
    lab.finish(name)
    assert_equal_runs(lab, name)
    return told


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_by_the_clock(lab: Lab, seed: int) -> None:
    assert kill_by_the_clock(lab, f"clock-{seed}", seed)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(lab: Lab) -> None:
    """Weights, moments, place, generators and metrics are those of the run left alone, after each."""
    told: list[bool] = []
    for seed in range(3, 40):
        told += kill_by_the_clock(lab, f"clock-{seed}", seed)
        if len(told) >= 20 and any(told):
            break
    print(f"{len(told)} kills, {sum(told)} of them during a save")
    assert len(told) >= 20
    assert any(told)


# The calls of the files that a run writes: settings, manifest, then a checkpoint each two steps, the best model and
# the row of metrics at the end of an epoch.
SAVES = [
    *(("fsync", 5), ("replace", 1), ("replace", 2), ("replace", 3), ("link", 2)),
    *(("fsync", 8), ("replace", 7), ("fsync", 15), ("replace", 9)),
]


@pytest.mark.parametrize("deadly", SAVES[:1])
def test_killed_during_a_save(lab: Lab, deadly: tuple[str, int]) -> None:
    name = "save-{}-{}".format(*deadly)
    process = lab.start(name, deadly=deadly)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (lab.folder / f"{name}.log").read_text()
    lab.finish(name)
    assert_equal_runs(lab, name)


@pytest.mark.slow
@pytest.mark.parametrize("deadly", SAVES[1:])
def test_killed_during_many_saves(lab: Lab, deadly: tuple[str, int]) -> None:
    name = "save-{}-{}".format(*deadly)
    process = lab.start(name, deadly=deadly)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if (lab.folder / name / "last.ckpt").exists():
        # And once more, in the middle of the first save of its second life.
        process = lab.resume(name, deadly=("replace", 1))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    lab.finish(name)
    assert_equal_runs(lab, name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(lab: Lab, number: int, code: int) -> None:
    name = f"signal-{int(number)}"
    process = lab.start(name)
    wait_for_saves(lab, name, process, 3)
    os.kill(process.pid, number)
    process.join()
    log = (lab.folder / f"{name}.log").read_text()
    assert process.exitcode == code, log
    assert f"rtdetr train --resume {lab.folder / name}" in log
    assert "Traceback" not in log
    lab.finish(name)
    assert_equal_runs(lab, name)


@pytest.mark.slow
def test_loader_processes_change_nothing(server: ForkServerContext, data: Path, lab: Lab) -> None:
    """Killed with two loader processes, and equal to the run that loaded in its own process."""
    other = Lab(server, data, lab.folder, workers=2)
    process = other.start("workers")
    wait_for_saves(lab, "workers", process, 4)
    process.kill()
    process.join()
    other.finish("workers")
    assert_equal_runs(lab, "workers")

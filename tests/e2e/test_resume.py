"""A run that is killed and resumed ends like an uninterrupted one, bit for bit.

Runs are processes of the command line, forked from a server that has torch loaded, so that twenty of them fit into a
test. They are killed with SIGKILL at random moments, or kill themselves at a chosen call within a save.
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

from tests.small import FLAGS, equal

# Frequent checkpoints, so that most kills fall within an epoch or a save.
SMALL = [*FLAGS, "--batch", "8", "--set", "checkpoint_steps=2"]


def train(arguments: list[str], log: Path, kill_at: tuple[str, int] | None) -> None:
    """Run `rtdetr ARGUMENTS` in this process; `kill_at` names a call of `os` that kills it, and at which count."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if kill_at is not None:
        name, count = kill_at
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
    """Return a server of processes that start with torch loaded, on one thread."""
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


class Runs:
    """Starts and resumes runs."""

    def __init__(self, server: ForkServerContext, data: Path, folder: Path, workers: int = 0) -> None:
        self.server, self.data, self.folder, self.workers = server, data, folder, workers

    def start(self, name: str, *, kill_at: tuple[str, int] | None = None) -> Any:
        words = ["train", "--data", self.data, *SMALL, "--epochs", 4, "--workers", self.workers]
        words += ["--out", self.folder, "--name", name]
        return self._process([str(w) for w in words], name, kill_at)

    def resume(self, name: str, *, kill_at: tuple[str, int] | None = None) -> Any:
        return self._process(["train", "--resume", str(self.folder / name)], name, kill_at)

    def resume_or_restart(self, name: str) -> Any:
        """Resume a run, or start it again if it was killed before it had written its settings."""
        if (self.folder / name / "manifest.json").exists():
            return self.resume(name)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.start(name)

    def _process(self, words: list[str], name: str, kill_at: tuple[str, int] | None) -> Any:
        process = self.server.Process(target=train, args=(words, self.folder / f"{name}.log", kill_at))
        process.start()
        return process

    def finish(self, name: str) -> None:
        """Resume until the end."""
        process = self.resume_or_restart(name)
        process.join()
        assert process.exitcode == 0, (self.folder / f"{name}.log").read_text()

    def report_kill(self, name: str) -> bool:
        """Print where a run was killed, for `pytest -s`; return whether it was during a save."""
        run = self.folder / name
        partial = (run / ".last.ckpt.partial").exists()
        where = (
            f"last checkpoint at step {self.state(name)['place']['step']}"
            if self.has_checkpoint(name)
            else "no checkpoint"
        )
        print(f"{name}: killed, {where}{', during a save' if partial else ''}")
        return partial

    def has_checkpoint(self, name: str) -> bool:
        return (self.folder / name / "last.ckpt").exists()

    def outputs(self, name: str) -> tuple[bytes, bytes]:
        run = self.folder / name
        return (run / "best.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()

    def state(self, name: str) -> dict[str, Any]:
        from rtdetr_cli.train.checkpoint import load_checkpoint

        return load_checkpoint(self.folder / name)[0]


@pytest.fixture(scope="module")
def runs(server: ForkServerContext, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(server, data, tmp_path_factory.mktemp("runs"))
    process = runs.start("alone")
    process.join()
    assert process.exitcode == 0, (runs.folder / "alone.log").read_text()
    return runs


def assert_equal_runs(runs: Runs, name: str) -> None:
    assert runs.outputs(name)[0] == runs.outputs("alone")[0], "best.safetensors"
    assert runs.outputs(name)[1] == runs.outputs("alone")[1], "metrics.csv"
    ours, expected = runs.state(name), runs.state("alone")
    for part in ("learner", "place", "generators", "metrics_offset", "identity"):
        assert equal(ours[part], expected[part]), part


def wait_for_saves(runs: Runs, name: str, process: Any, count: int) -> None:
    """Wait until a process has written so many checkpoints, or has ended."""
    path, seen = runs.folder / name / "last.ckpt", set()
    before = path.stat().st_mtime_ns if path.exists() else None
    while len(seen) < count and process.is_alive():
        with suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
            seen.discard(before)
        time.sleep(0.002)


def kill_at_random(runs: Runs, name: str, seed: int) -> list[bool]:
    """Kill a run once or twice at random moments, then let it end; return which kills were during a save."""
    clock = random.Random(seed)
    lives, during_save = clock.choice((1, 2)), []
    while len(during_save) < lives:
        process = runs.resume_or_restart(name)
        # Count saves and not seconds: on a busy machine, every run would be killed at its first step.
        wait_for_saves(runs, name, process, clock.randint(0, 8))
        time.sleep(clock.uniform(0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            during_save.append(runs.report_kill(name))
        # It ended first. A run that was never killed tests nothing.
        elif during_save:
            break
        else:
            shutil.rmtree(runs.folder / name)
    runs.finish(name)
    assert_equal_runs(runs, name)
    return during_save


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random(runs: Runs, seed: int) -> None:
    assert kill_at_random(runs, f"clock-{seed}", seed)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(runs: Runs) -> None:
    """Weights, moments, progress, generators and metrics equal those of an uninterrupted run."""
    during_save: list[bool] = []
    for seed in range(3, 40):
        during_save += kill_at_random(runs, f"clock-{seed}", seed)
        if len(during_save) >= 20 and any(during_save):
            break
    print(f"{len(during_save)} kills, {sum(during_save)} of them during a save")
    assert len(during_save) >= 20
    assert any(during_save)


# Calls while writing the files of a run: settings, manifest, a checkpoint every two steps, and the best model and a row
# of metrics at the end of an epoch.
SAVES = [
    *(("fsync", 5), ("replace", 1), ("replace", 2), ("replace", 3), ("link", 2)),
    *(("fsync", 8), ("replace", 7), ("fsync", 15), ("replace", 9)),
]


@pytest.mark.parametrize(
    "kill_at", [SAVES[0], *(pytest.param(save, marks=pytest.mark.slow) for save in SAVES[1:])], ids=str
)
def test_killed_during_a_save(runs: Runs, kill_at: tuple[str, int]) -> None:
    name = "save-{}-{}".format(*kill_at)
    process = runs.start(name, kill_at=kill_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (runs.folder / f"{name}.log").read_text()
    if (runs.folder / name / "last.ckpt").exists():
        # And once more during the first save after resuming.
        process = runs.resume(name, kill_at=("replace", 1))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    runs.finish(name)
    assert_equal_runs(runs, name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_prints_how_to_resume(runs: Runs, number: int, code: int) -> None:
    name = f"signal-{int(number)}"
    process = runs.start(name)
    wait_for_saves(runs, name, process, 3)
    os.kill(process.pid, number)
    process.join()
    log = (runs.folder / f"{name}.log").read_text()
    assert process.exitcode == code, log
    assert f"rtdetr train --resume {runs.folder / name}" in log
    assert "Traceback" not in log
    runs.finish(name)
    assert_equal_runs(runs, name)


@pytest.mark.slow
def test_a_run_with_loader_processes_resumes_exactly(server: ForkServerContext, data: Path, runs: Runs) -> None:
    """Killed with two loader processes, it equals a run without any."""
    other = Runs(server, data, runs.folder, workers=2)
    process = other.start("workers")
    wait_for_saves(runs, "workers", process, 4)
    process.kill()
    process.join()
    other.finish("workers")
    assert_equal_runs(runs, "workers")

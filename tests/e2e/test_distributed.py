"""Training in several processes from the command line, on CPUs: results, output, signals, crashes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rtdetr_cli.datasets.generate import generate_dataset
from tests.small import FLAGS

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [*FLAGS, "--precision", "fp32", "--effective-batch", "4"]
TIMEOUT = 240


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more}


def call(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rtdetr_cli", *map(str, arguments)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def children_of(parent: int) -> list[psutil.Process]:
    """Return the processes of a run, by rank."""
    return sorted(psutil.Process(parent).children(), key=lambda child: int(child.environ()["RANK"]))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 7 training images and 1 val image, so that the shares are uneven and one is empty."""
    return generate_dataset(tmp_path_factory.mktemp("uneven"), train=7, val=1, imgsz=64)


def start(data: Path, run: Path, *, epochs: int) -> subprocess.Popen[str]:
    """Start a run of two processes and return after its first epoch."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "rtdetr_cli", "train", "--data", str(data), *SMALL, "--device", "cpu,cpu"),
            *("--epochs", str(epochs), "--out", str(run.parent), "--name", run.name, "--set", "eval_every=1000"),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + TIMEOUT
    while not (run / "metrics.csv").is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    return process


def end(process: subprocess.Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
        child.kill()
    process.kill()
    process.communicate()


@pytest.fixture
def long_run(uneven: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run of two processes that takes long."""
    process = start(uneven, tmp_path / "runs" / "long", epochs=5000)
    yield process, tmp_path / "runs" / "long"
    end(process)


def test_two_processes_from_the_command_line(uneven: Path, tmp_path: Path) -> None:
    """With uneven shares; only one process prints, and there is one run folder."""
    run = tmp_path / "runs" / "two"
    done = call(
        *("train", "--data", uneven, *SMALL, "--device", "cpu:2", "--epochs", 2, "--out", run.parent, "--name", "two"),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run"] == str(run)
    assert "cpu x 2" in done.stderr
    assert "effective batch 4 (1 x 2 x 2)" in done.stderr
    assert len(re.findall("^epoch 2/2 ", done.stderr, re.MULTILINE)) == 1
    assert [p.name for p in run.parent.iterdir()] == ["two"]
    assert [row["epoch"] for row in metrics(run)] == ["1", "2"]
    assert (run / "best.safetensors").is_file()
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["versions"]["processes"] == "2"


def test_an_indivisible_batch_is_refused_before_anything_starts(
    uneven: Path, tmp_path: Path, rtdetr: Callable[..., Any]
) -> None:
    done = rtdetr("train", "--data", uneven, *SMALL, "--device", "cpu:3", "--out", tmp_path, code=2)
    assert done.err == (
        "error: --effective-batch 4 is not divisible by the number of processes (3)\n\nhint: --effective-batch 3 or 6\n"
    )
    assert not list(tmp_path.iterdir())


def run_on(folder: Path, devices: tuple[str, str]) -> list[list[dict[str, str]]]:
    """Run the same training on each of the devices; return their metrics."""
    data = generate_dataset(folder / "data", train=20, val=9, imgsz=64)
    runs = []
    for name, device in zip(("one", "two"), devices, strict=True):
        flags = ["--epochs", 3, "--device", device, "--batch", 4, "--out", folder / "runs", "--name", name]
        done = call("train", "--data", data, *SMALL, *flags)
        assert done.returncode == 0, done.stderr
        runs.append(metrics(folder / "runs" / name))
    return runs


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    runs = run_on(tmp_path, ("cpu", "cpu:2"))
    # Sums are computed in another order and the steps amplify the rounding, so only the first epoch is close.
    one, two = ({k: float(v) for k, v in rows[0].items() if k.startswith("loss")} for rows in runs)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert two == pytest.approx(one, rel=1e-2)
    assert [row["lr"] for row in runs[0]] == [row["lr"] for row in runs[1]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_resumes_exactly(uneven: Path, tmp_path: Path, number: signal.Signals) -> None:
    epochs = 12
    left_alone, stopped = tmp_path / "runs" / "alone", tmp_path / "runs" / "stopped"
    process = start(uneven, stopped, epochs=epochs)
    try:
        children = children_of(process.pid)
        assert len(children) == 2
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        end(process)
    assert process.returncode == 128 + number, err
    assert err.count("the checkpoint is saved") == 1
    assert f"hint: rtdetr train --resume {stopped}" in err
    assert not any(child.is_running() for child in children)
    assert len(metrics(stopped)) < epochs

    resumed = call("train", "--resume", stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert "cpu x 2" in resumed.stderr
    flags = ["--epochs", epochs, "--device", "cpu,cpu", "--out", left_alone.parent, "--name", left_alone.name]
    alone = call("train", "--data", uneven, *SMALL, *flags, "--set", "eval_every=1000")
    assert alone.returncode == 0, alone.stderr
    assert (stopped / "metrics.csv").read_bytes() == (left_alone / "metrics.csv").read_bytes()
    assert (stopped / "best.safetensors").read_bytes() == (left_alone / "best.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_process_ends_the_run(long_run: tuple[subprocess.Popen[str], Path]) -> None:
    process, _ = long_run
    children = children_of(process.pid)
    children[1].kill()
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "error: process 1 (cpu) was ended by SIGKILL" in err
    assert "Traceback" not in err
    assert not any(child.is_running() for child in children)


@pytest.mark.slow
def test_processes_end_with_their_parent(long_run: tuple[subprocess.Popen[str], Path]) -> None:
    process, run = long_run
    children = children_of(process.pid)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert (run / "last.ckpt").is_file()


@pytest.mark.slow
def test_the_error_of_one_process_is_that_of_the_run(uneven: Path, tmp_path: Path) -> None:
    """The second process fails at its third step; the other one only loses its peer."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, importlib.abc, importlib.util\n"
        "class Late(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'rtdetr_cli.workflows.finetune' or os.environ.get('RANK') != '1': return None\n"
        "        sys.meta_path.remove(self)\n"
        "        import rtdetr_cli.train.step as step\n"
        "        from rtdetr_cli.errors import DataError\n"
        "        real, calls = step.accumulate_gradients, []\n"
        "        def accumulate_gradients(*args, **more):\n"
        "            calls.append(1)\n"
        "            if len(calls) == 3: raise DataError('the images are gone', hint='look for them')\n"
        "            return real(*args, **more)\n"
        "        step.accumulate_gradients = accumulate_gradients\n"
        "        return None\n"
        "sys.meta_path.insert(0, Late())\n",
        encoding="utf-8",
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    flags = ["--device", "cpu:2", "--epochs", 9, "--out", tmp_path / "runs"]
    done = call("train", "--data", uneven, *SMALL, *flags, PYTHONPATH=path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.endswith("error: process 1 (cpu): the images are gone\n\nhint: look for them\n")


@pytest.mark.slow
def test_two_hosts_over_the_loopback(uneven: Path, tmp_path: Path) -> None:
    if shutil.which("torchrun") is None and not Path(sys.executable).with_name("torchrun").exists():
        pytest.skip("torchrun is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [
            *(str(REPOSITORY / "examples" / "two_hosts.sh"), str(uneven), *SMALL, "--device", "cpu"),
            *("--epochs", "2", "--out", str(tmp_path / "runs"), "--name", "hosts"),
        ],
        env=environment(PORT=port, PROCESSES="2", PATH=path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu x 4" in done.stderr
    assert len(re.findall("^epoch 2/2 ", done.stderr, re.MULTILINE)) == 1
    assert [row["epoch"] for row in metrics(tmp_path / "runs" / "hosts")] == ["1", "2"]


@pytest.mark.gpu
def test_two_processes_on_one_gpu(tmp_path: Path) -> None:
    """NCCL refuses to share a GPU, so gradients and norms are reduced with gloo."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    runs = run_on(tmp_path, ("0", "0,0"))
    one, two = ({k: float(v) for k, v in rows[0].items() if k.startswith("loss")} for rows in runs)
    assert two == pytest.approx(one, rel=2e-2)


@pytest.mark.gpu
def test_two_processes_on_two_gpus(uneven: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two CUDA devices")
    done = call("train", "--data", uneven, *SMALL, "--device", "0,1", "--epochs", 2, "--out", tmp_path, "--name", "two")
    assert done.returncode == 0, done.stderr
    assert "cuda x 2" in done.stderr

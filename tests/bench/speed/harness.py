"""Take turns, so that whatever else the machine does hurts both sides alike, and compare round by round."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rtdetr_cli.machine import cpu_count, cpu_name

ROOT = Path(__file__).resolve().parents[3]
Turn = Callable[[], object]  # does the work once; returns what it `Used` if this process cannot see it
PACKAGES = ("rtdetr-cli", "torch", "torchvision", "transformers", "pycocotools", "onnxruntime", "openvino", "typer")


@dataclass(frozen=True, slots=True)
class Used:
    """What one turn took: seconds on the clock, and of all processors together; bytes at its peak, 0 for unknown."""

    wall: float
    cpu: float
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the comparisons share."""

    threads: int
    device: str = "cpu"
    imgsz: int = 320
    batch: int = 4


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table.

    Attributes:
        name: for `--only`.
        title: what is done.
        peer: what it is compared with.
        aim: how many times as fast as the peer we want to be; with `at_most`, what share of its time we may take.
        at_most: show the share of the peer's time, for what is shorter by design.
        sides: makes ours and the peer's turn; on leaving, what they need is removed.
        rounds: by default.
        warmup: rounds that do not count.
        slow: takes minutes, so it runs only when it is named.
    """

    name: str
    title: str
    peer: str
    aim: float
    sides: Callable[[Settings], AbstractContextManager[tuple[Turn, Turn]]]
    at_most: bool = False
    rounds: int = 7
    warmup: int = 1
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one comparison; seconds are medians, ratios are medians of the rounds' own ratios."""

    name: str
    title: str
    peer: str
    aim: float
    at_most: bool
    rounds: int
    ours_s: float
    peer_s: float
    ratio: float
    lowest: float
    highest: float
    cpu_ratio: float
    memory_share: float | None  # our peak memory over the peer's, where it was measured
    reached: bool = field(init=False)

    def __post_init__(self) -> None:
        reached = self.ratio <= self.aim if self.at_most else self.ratio >= self.aim
        object.__setattr__(self, "reached", reached)


def take_turn(turn: Turn) -> Used:
    """Run one turn and return what it used."""
    before, began = _processor_time(), time.perf_counter()
    used = turn()
    return used if isinstance(used, Used) else Used(time.perf_counter() - began, _processor_time() - before)


def _processor_time() -> float:
    """Return the seconds of this process, which `os.times` gives in hundredths, and of its children that have ended."""
    return time.process_time() + sum(os.times()[2:4])


class Stopwatch:
    """Prints as JSON what this process and the ones that it starts use from `start` to `stop`."""

    def start(self) -> None:
        self.began, self.cpu = time.perf_counter(), self._cpu()

    def _cpu(self) -> float:
        times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return _processor_time() + sum(t.user + t.system for t in times)

    def stop(self) -> None:
        wall, cpu = time.perf_counter() - self.began, self._cpu() - self.cpu
        # Not getrusage: a child starts with the peak of the process that made it.
        memory = status_bytes("VmHWM")
        memory += sum(child.memory_full_info().uss for child in psutil.Process().children(recursive=True))
        print(json.dumps(asdict(Used(wall, cpu, memory))))


def status_bytes(key: str) -> int:
    """Return an amount of memory of this process from `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Write the files of a commit of ours into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
        yield Path(folder)


def run(command: Sequence[object], *, tree: Path = ROOT, threads: int = 0) -> str:
    """Run a Python program with the package of `tree`; see `run_program`."""
    return run_program([sys.executable, *command], folder=tree, threads=threads, PYTHONPATH=str(tree))


def run_program(command: Sequence[object], *, folder: Path, threads: int = 0, **environment: str) -> str:
    """Run a program in a folder; return its output, or raise RuntimeError if it fails."""
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads)}
    words = list(map(str, command))
    ran = subprocess.run(words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(words[:5])} failed:\n{ran.stderr[-3000:]}")
    return ran.stdout


def run_timed(command: Sequence[object], *, threads: int = 1) -> Used:
    """Run a program whose last line is that of a `Stopwatch`."""
    return Used(**json.loads(run(command, threads=threads).splitlines()[-1]))


def compare(comparison: Comparison, settings: Settings, rounds: int) -> Result:
    """Let both sides take turns, first one and then the other beginning."""
    ours: list[Used] = []
    peer: list[Used] = []
    with comparison.sides(settings) as (our_turn, their_turn):
        for number in range(comparison.warmup + rounds):
            both = [(ours, our_turn), (peer, their_turn)]
            for results, turn in both if number % 2 else reversed(both):
                used = take_turn(turn)
                if number >= comparison.warmup:
                    results.append(used)

    def ratios(measure: Callable[[Used], float]) -> Iterator[float]:
        for a, b in zip(ours, peer, strict=True):
            yield (measure(a) / max(measure(b), 1e-9)) if comparison.at_most else measure(b) / max(measure(a), 1e-9)

    wall = list(ratios(lambda used: used.wall))
    return Result(
        name=comparison.name,
        title=comparison.title,
        peer=comparison.peer,
        aim=comparison.aim,
        at_most=comparison.at_most,
        rounds=rounds,
        ours_s=statistics.median(used.wall for used in ours),
        peer_s=statistics.median(used.wall for used in peer),
        ratio=statistics.median(wall),
        lowest=min(wall),
        highest=max(wall),
        cpu_ratio=statistics.median(ratios(lambda used: used.cpu)),
        memory_share=statistics.median(a.memory / b.memory for a, b in zip(ours, peer, strict=True))
        if all(used.memory for used in (*ours, *peer))
        else None,
    )


def machine(settings: Settings) -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "-"
    return {
        "processor": cpu_name(),
        "cores": cpu_count(),
        "threads": settings.threads,
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def document(results: Sequence[Result], skipped: dict[str, str], settings: Settings) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {"machine": machine(settings), "results": [asdict(result) for result in results], "skipped": skipped}


def table(results: Sequence[Result], skipped: dict[str, str], settings: Settings) -> str:
    """Return a Markdown table, and what it was measured on."""
    lines = [
        "| what | compared with | ours | theirs | figure | rounds | processor time | aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        memory = f"; {r.memory_share:.2f} of the memory" if r.memory_share is not None else ""
        unit = " of the time" if r.at_most else " times as fast"
        aim = f"{'under' if r.at_most else ''} {r.aim:g}{'' if r.reached else ', missed'}".strip()
        figures = f"{r.ratio:.2f}{unit}{memory} | {r.lowest:.2f} to {r.highest:.2f} | {r.cpu_ratio:.2f}"
        lines.append(f"| {r.title} | {r.peer} | {r.ours_s:.3g} s | {r.peer_s:.3g} s | {figures} | {aim} |")
    lines += [f"\nskipped {name}: {reason}" for name, reason in skipped.items()]
    facts = machine(settings)
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    lines.append(
        f"\n{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, load {facts['load']}; "
        f"python {facts['python']}, {packages}"
    )
    return "\n".join(lines)

"""Run one command line in a forked child with limits on time and memory, and judge how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

CPU_SECONDS, IDLE_SECONDS = 20, 20  # other processes may slow a child down, so it is measured by its own time
MEMORY_BYTES = 4 << 30  # on top of what the parent has mapped
EXIT_CODES = {0, 1, 2, 3, 4, 5, 6, 7, 130, 143}
TRACEBACK = 99
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]")


@dataclass
class Case:
    """A command line, and what it reads from standard input."""

    argv: list[str]
    stdin: bytes = b""


@dataclass
class Outcome:
    """How a case ended; `fault` is empty if that is as it should be."""

    argv: list[str]
    code: int
    seconds: float
    fault: str = ""
    where: str = ""  # the same for all cases with one cause
    output: str = field(default="", repr=False)


def run_case(make: Callable[[Random, Path], Case], random: Random, folder: Path) -> Outcome:
    """Make a case in a child of this process and run it there, in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    work, notes = folder / "work", folder / "notes"
    work.mkdir(parents=True)
    notes.mkdir()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _run_child(make, random, work, notes)
    deadline, used = began + IDLE_SECONDS, 0.0
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            before, used = used, _cpu_seconds(child)
            if used - before < 0.05:
                os.killpg(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            deadline = time.monotonic() + IDLE_SECONDS
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it may have left behind
    argv = json.loads((notes / "argv.json").read_text()) if (notes / "argv.json").exists() else []
    return _judge(argv, ended[1], time.monotonic() - began, notes)


def _cpu_seconds(group: int) -> float:
    """Return the time that the processes of a group have used so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _run_child(make: Callable[[Random, Path], Case], random: Random, work: Path, notes: Path) -> None:
    code = TRACEBACK
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(notes / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), number)
        os.chdir(work)
        case = make(random, work)
        (notes / "argv.json").write_text(json.dumps(case.argv))
        (notes / "stdin").write_bytes(case.stdin)
        os.dup2(os.open(notes / "stdin", os.O_RDONLY), 0)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for limit, value in (
            (resource.RLIMIT_AS, mapped + MEMORY_BYTES),
            (resource.RLIMIT_CPU, CPU_SECONDS),
            (resource.RLIMIT_FSIZE, 1 << 28),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        from rtdetr_cli.cli.app import run

        code = run(case.argv)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _judge(argv: list[str], status: int, seconds: float, notes: Path) -> Outcome:
    stdout, stderr = ((notes / name).read_bytes() if (notes / name).exists() else b"" for name in ("stdout", "stderr"))
    output = (stdout[-3000:] + b"\n---- stderr\n" + stderr[-6000:]).decode("utf-8", "backslashreplace")
    code = os.waitstatus_to_exitcode(status)
    outcome = Outcome(argv, code, seconds, output=output)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        outcome.fault = "hang"
    elif code < 0:
        outcome.fault = "crash"
    elif code == TRACEBACK or b"Traceback (most recent call last)" in stderr:
        outcome.fault, outcome.where = "traceback", _cause(stderr.decode("utf-8", "replace"))
    elif code not in EXIT_CODES:
        outcome.fault = "exit code"
    elif b"out of memory" in stderr or b"not enough memory" in stderr:
        outcome.fault = "memory"
    elif control := _CONTROL.search(stdout + stderr):
        at = control.start()
        outcome.fault, outcome.where = "escape", repr((stdout + stderr)[max(0, at - 30) : at + 10])
    elif "--json" in argv and not _is_json(stdout):
        outcome.fault = "not JSON"
    outcome.where = outcome.where or (argv[0] if argv else "no command")
    return outcome


def _is_json(stdout: bytes) -> bool:
    try:
        return all(isinstance(json.loads(line), dict) for line in stdout.splitlines())
    except ValueError:
        return False


def _cause(stderr: str) -> str:
    """Return the last line of our own code in a traceback, and the exception."""
    frames = re.findall(r'File "[^"]*/(rtdetr_cli/[^"]+|tests/fuzz/[^"]+)", line (\d+)', stderr)
    lines = [
        line
        for line in stderr.strip().splitlines()
        if re.match(r"[\w.]+(Error|Exception|Fault|Interrupt|Exit)\b", line)
    ]
    where = ":".join(frames[-1]) if frames else "?"
    return f"{where} {lines[-1][:90] if lines else ''}"

"""Start the processes of a run on this host, watch over them, and end all of them when one fails.

`--device 0,1` starts this very program once for each device, with the environment that torchrun would give; a run
on several hosts is started by torchrun itself. The program that starts them makes no steps: it holds the store
where they meet, hands signals on, and says what the first that failed had to say.

A process knows that the one that started it is gone when its standard input ends; it then finishes its step, saves
and leaves, as if it had been asked to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rtdetr_cli.errors import RtdetrError

ERROR_FILE = "RTDETR_ERROR_FILE"
GRACE_SECONDS = 10.0  # for the others to end by themselves once one has failed
TAIL_LINES = 30
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class Failed(RtdetrError):
    """A process of the run failed; this carries what it said, with its exit code."""


def supervise(argv: Sequence[str], devices: Sequence[str]) -> int:
    """Run `python -m rtdetr_cli ARGV` once for each device and wait for all.

    Args:
        argv: of the command line, without the program's name; each process gets all of it.
        devices: one for each process, for messages; the process finds its own by LOCAL_RANK.

    Returns:
        0, or 130 and 143 after a signal.

    Raises:
        RtdetrError: what the first process that failed said.
    """
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, len(devices), is_master=True, wait_for_workers=False
    )
    with tempfile.TemporaryDirectory(prefix="rtdetr-") as folder:
        members = [
            _Member(rank, device, Path(folder), argv, len(devices), store.port) for rank, device in enumerate(devices)
        ]
        try:
            with _hand_on_signals(members):
                failed = _watch(members)
        finally:
            for member in members:
                member.kill()
        if failed is None:
            return 0
        if failed.code in STOPPED:
            if not members[0].said.is_file():
                return failed.code
            failed = members[0]
        raise failed.error()


class _Member:
    """One process, as its starter sees it."""

    def __init__(self, rank: int, device: str, folder: Path, argv: Sequence[str], size: int, port: int) -> None:
        self.rank, self.device = rank, device
        self.said = folder / f"error-{rank}.json"
        self.log = folder / f"stderr-{rank}.txt"
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            # The store is here, in the starter: no process has to win a race for a port.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            ERROR_FILE: str(self.said),
        }
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // size)))
        first = rank == 0
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rtdetr_cli", *argv],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=None if first else subprocess.DEVNULL,
                stderr=None if first else log,
                # Its own group: Ctrl-C in the terminal reaches the starter alone, which hands it on once.
                start_new_session=os.name == "posix",
            )
        self.code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, 128 + n for a signal; None while it runs."""
        code = self.process.poll()
        self.code = None if code is None else 128 - code if code < 0 else code
        return self.code

    def send(self, number: int) -> None:
        """Send a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it now, with whatever it has started."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.poll() is None:
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()

    def error(self) -> RtdetrError:
        """Return what it said, or how it ended."""
        where = f"process {self.rank} ({self.device})"
        if self.said.is_file():
            told = json.loads(self.said.read_text(encoding="utf-8"))
            # The first is everyone's voice: its own words need no name.
            message = told["message"] if self.rank == 0 else f"{where}: {told['message']}"
            failed = Failed(message, hint=told["hint"], code=told["code"])
            failed.exit_code = int(told["exit_code"])
            return failed
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            sys.stderr.write("\n".join(lines[-TAIL_LINES:]) + "\n")
        how = f"was ended by {_signal_name(self.code)}" if self.code and self.code > 128 else f"failed ({self.code})"
        hint = "the system ends processes that take too much memory: a smaller --batch" if self.code == 137 else ""
        return Failed(f"{where} {how}", hint=hint, code="process-failed")


def _watch(members: Sequence[_Member]) -> _Member | None:
    """Wait for all; once one has failed, give the others a moment and return it.

    The first to fail by itself counts: the others fail because of it, and say no more than that they lost a peer.
    One that was asked to stop has not failed: the first may still be saving.
    """
    failed: _Member | None = None
    until = float("inf")
    while True:
        running = [m for m in members if m.poll() is None]
        for member in members:
            if member.code and (failed is None or (_weight(member) > _weight(failed))):
                failed = member
        if failed is not None and failed.code not in STOPPED and until == float("inf"):
            until = time.monotonic() + GRACE_SECONDS
        if not running or time.monotonic() > until:
            return failed
        time.sleep(0.05)


def _weight(member: _Member) -> int:
    """Return how much a failure explains: a signal least, a lost peer little, its own words most."""
    return 0 if member.code in STOPPED else 1 if _lost_a_peer(member) else 2


def _lost_a_peer(member: _Member) -> bool:
    try:
        return bool(json.loads(member.said.read_text(encoding="utf-8"))["code"] == "peer-lost")
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _hand_on_signals(members: Sequence[_Member]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to every process; a second one ends them at once."""
    before: dict[signal.Signals, Any] = {}

    def hand_on(number: int, frame: FrameType | None) -> None:
        signal.signal(number, end)
        for member in members:
            member.send(number)

    def end(number: int, frame: FrameType | None) -> None:
        for member in members:
            member.kill()

    if threading.current_thread() is threading.main_thread():
        for asked in (signal.SIGINT, signal.SIGTERM):
            before[asked] = signal.signal(asked, hand_on)
    try:
        yield
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _signal_name(code: int | None) -> str:
    try:
        return signal.Signals((code or 0) - 128).name
    except ValueError:
        return f"signal {(code or 0) - 128}"


# ---- in the processes that were started ---------------------------------------------------------------------------


def supervised() -> bool:
    """Tell whether this process was started by `supervise`."""
    return ERROR_FILE in os.environ


def speaker() -> str:
    """Return `process 3: ` in one of several processes that torchrun started, where all speak; else nothing."""
    if supervised() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ""
    return f"process {os.environ.get('RANK', '?')}: "


def leave_word(error: RtdetrError) -> None:
    """Leave an error for the one that started this process, who says it."""
    told = {"message": error.message, "hint": error.hint, "code": error.code, "exit_code": error.exit_code}
    path = Path(os.environ[ERROR_FILE])
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(told), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        return  # the one that started us is gone, and its folder with it


def end_with_starter() -> None:
    """Ask this process to stop, as SIGTERM does, when the one that started it is gone."""

    def wait() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="starter", daemon=True).start()

"""Start the processes of a run on this host, watch them, and end all of them when one fails.

`--device 0,1` starts this program once for each device, with the environment that torchrun would give; a run on
several hosts is started by torchrun itself. The parent makes no steps: it holds the store where the processes meet,
forwards signals, and raises the error of the first process that failed.

torch's own launcher (`torch.distributed.launcher`, 2.14) was weighed and does not keep what this promises: once one
process has ended, it kills the others after 30 seconds, even if the main process is still saving; it reports the first
process that ended, which often only lost a peer; and it has no exit code for a run that was stopped.

A process notices the end of its parent by the end of its standard input. It then finishes its step, saves and exits, as
if it had been terminated.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.files import write_text
from rtdetr_cli.machine import cpu_count

ERROR_FILE = "RTDETR_ERROR_FILE"
GRACE_SECONDS = 10.0  # for the other processes to end by themselves once one has failed
TAIL_LINES = 30
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class ProcessFailed(RtdetrError):
    """A process of the run failed; this carries its message, hint, code and exit code."""


def supervise(argv: Sequence[str], devices: Sequence[str]) -> int:
    """Run `python -m rtdetr_cli ARGV` once for each device and wait for all; each finds its own by LOCAL_RANK.

    Returns:
        0, or 130 or 143 after a signal.

    Raises:
        RtdetrError: the error of the first process that failed.
    """
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, len(devices), is_master=True, wait_for_workers=False
    )
    with tempfile.TemporaryDirectory(prefix="rtdetr-") as folder:
        children = [
            _Child(rank, device, Path(folder), argv, len(devices), store.port) for rank, device in enumerate(devices)
        ]
        try:
            with _forward_signals(children):
                failed = _watch(children)
        finally:
            for child in children:
                child.kill()
        if failed is None:
            return 0
        if failed.code is not None and failed.code in STOPPED:
            if not children[0].report():
                return failed.code
            failed = children[0]
        raise failed.error()


class _Child:
    """One process, as its parent sees it."""

    def __init__(self, rank: int, device: str, folder: Path, argv: Sequence[str], size: int, port: int) -> None:
        self.rank, self.device = rank, device
        self.error_file = folder / f"error-{rank}.json"
        self.log = folder / f"stderr-{rank}.txt"
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            # The parent holds the store, so that no process has to win a race for a port.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            ERROR_FILE: str(self.error_file),
        }
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // size)))
        is_main = rank == 0
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rtdetr_cli", *argv],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=None if is_main else subprocess.DEVNULL,
                stderr=None if is_main else log,
                # Its own group: Ctrl-C in the terminal reaches the parent only, which forwards it once.
                start_new_session=os.name == "posix",
            )

    @property
    def code(self) -> int | None:
        """The exit code, 128 + n for a signal; None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def report(self) -> dict[str, Any]:
        """Return the error that it reported; empty if it reported none."""
        try:
            return dict(json.loads(self.error_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def kill(self) -> None:
        """Kill it, with all processes that it has started."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.poll() is None:
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()

    def error(self) -> RtdetrError:
        """Return the error that it reported, or else how it ended."""
        name = f"process {self.rank} ({self.device})"
        if report := self.report():
            message = report["message"] if self.rank == 0 else f"{name}: {report['message']}"
            failed = ProcessFailed(message, hint=report["hint"], code=report["code"])
            failed.exit_code = int(report["exit_code"])
            return failed
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            sys.stderr.write("\n".join(lines[-TAIL_LINES:]) + "\n")
        how = f"failed ({self.code})"
        if self.code and self.code > 128:
            with contextlib.suppress(ValueError):
                how = f"was ended by {signal.Signals(self.code - 128).name}"
        hint = "the system may have run out of memory; try a smaller --batch" if self.code == 137 else ""
        return ProcessFailed(f"{name} {how}", hint=hint, code="process-failed")


def _watch(children: Sequence[_Child]) -> _Child | None:
    """Wait for all processes; once one has failed, give the others a moment and return it.

    If several fail, the one that explains most counts: the others fail because they lose a peer. A process that was
    asked to stop has not failed, and the main process may still be saving.
    """
    failed: _Child | None = None
    deadline = float("inf")
    while True:
        running = [child for child in children if child.code is None]
        for child in children:
            if child.code and (failed is None or _explains(child) > _explains(failed)):
                failed = child
        if failed is not None and failed.code not in STOPPED and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if not running or time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def _explains(child: _Child) -> int:
    """Return how much a failure explains: a signal least, a lost peer little, an error of its own most."""
    if child.code in STOPPED:
        return 0
    return 1 if child.report().get("code") == "peer-lost" else 2


def _forward_signals(children: Sequence[_Child]) -> contextlib.AbstractContextManager[None]:
    """Forward SIGINT and SIGTERM to every process; a second one kills them."""

    def forward(number: int, before: Any) -> None:
        signal.signal(number, kill)
        for child in children:
            child.process.send_signal(number)

    def kill(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.kill()

    return handle_signals(forward)


@contextlib.contextmanager
def handle_signals(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Within this block, call `handle` for SIGINT and SIGTERM, with the signal and its handler before.

    Only the main thread can, so in another one nothing changes.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: handle(number, before[number]))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- in the processes that were started ---------------------------------------------------------------------------


def supervised() -> bool:
    """Return whether this process was started by `supervise`."""
    return ERROR_FILE in os.environ


def process_prefix() -> str:
    """Return `process 3: ` in one of several processes that torchrun started, since all of them print; else ""."""
    if supervised() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ""
    return f"process {os.environ.get('RANK', '?')}: "


def report_to_parent(error: RtdetrError) -> None:
    """Leave an error to the parent, which prints it."""
    report = {"message": error.message, "hint": error.hint, "code": error.code, "exit_code": error.exit_code}
    path = Path(os.environ[ERROR_FILE])
    if path.parent.is_dir():  # gone with the parent
        with contextlib.suppress(RtdetrError):
            write_text(path, json.dumps(report))


def stop_with_parent() -> None:
    """Send this process SIGTERM when its parent is gone."""

    def wait() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()

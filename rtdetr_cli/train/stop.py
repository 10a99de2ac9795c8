"""Stopping."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.train.processes import launched


class Interrupted(RtdetrError):
    """A signal asked for an end; the checkpoint is written. The exit code is 128 + the signal."""

    default_code = "interrupted"

    def __init__(self, number: int, *, step: int, folder: Path) -> None:
        super().__init__(
            f"{'interrupted' if number == signal.SIGINT else 'terminated'} after step {step}; the checkpoint is saved",
            hint=f"rtdetr train --resume {folder}",
        )
        self.exit_code = 128 + number


class EvaluationStopped(Exception):
    """Raised by `evaluate_model` when a signal came while it ran."""


class StopFlag:
    """Set by a signal handler, read by the loop between steps.

    Attributes:
        signal: its number; 0 for none.
        polled: somebody reads it, so that a signal need not end the process by itself.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.polled = False

    def __bool__(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Let SIGINT and SIGTERM ask for an end; a second one of either ends at once.

    So does the first, until there is a run that heeds it: nothing is lost before. But processes of one run wait for
    each other from the beginning, and only ever stop together.
    """
    flag = StopFlag()
    flag.polled = launched()
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        if flag.polled:
            flag.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.getsignal(number)
            signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

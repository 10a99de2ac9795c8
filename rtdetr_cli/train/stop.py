"""Stopping on SIGINT and SIGTERM: a flag that the loop reads between steps, and the error that ends the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.train.launch import handle_signals
from rtdetr_cli.train.processes import launched


class Interrupted(RtdetrError):
    """A signal stopped the run and its checkpoint is saved. The exit code is 128 + the signal."""

    default_code = "interrupted"

    def __init__(self, number: int, *, step: int, folder: Path) -> None:
        super().__init__(
            f"{'interrupted' if number == signal.SIGINT else 'terminated'} after step {step}; the checkpoint is saved",
            hint=f"rtdetr train --resume {folder}",
        )
        self.exit_code = 128 + number


class EvaluationStopped(Exception):
    """An evaluation gave up because a signal came."""


class StopFlag:
    """A stop request, set by a signal handler and read by the loop between steps."""

    def __init__(self) -> None:
        self.signal = 0  # its number; 0 for none
        self.polled = False  # the loop is reading the flag, so a signal need not end the process by itself

    def __bool__(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Let the first SIGINT or SIGTERM request a stop; a second one ends the process at once.

    Until the loop polls the flag, the first one ends the process too, since nothing is lost yet. The processes of one
    run are an exception: they wait for each other from the beginning and only ever stop together.
    """
    flag = StopFlag()
    flag.polled = launched()

    def request_stop(number: int, before: Any) -> None:
        signal.signal(number, before)
        if flag.polled:
            flag.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    with handle_signals(request_stop):
        yield flag

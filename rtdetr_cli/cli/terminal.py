"""What people and programs see: results on stdout, everything else on stderr.

rich is imported only where it draws: a line of text or of JSON costs nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

SCHEMA_VERSION = 1


def say(text: str) -> None:
    """Write a line for people."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """Write a warning for people."""
    say(paint("warning:", "33") + " " + text)


def complain(message: str, hint: str = "") -> None:
    """Write an error and its hint for people."""
    say(paint("error:", "31;1") + " " + message)
    if hint:
        say("\n" + paint("hint:", "36") + " " + hint)


def out(text: str) -> None:
    """Write a line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def emit_json(document: dict[str, Any]) -> None:
    """Write the result as one JSON document on one line; a number that JSON lacks becomes null."""
    text = json.dumps(finite({"schema_version": SCHEMA_VERSION, **document}), ensure_ascii=False, default=str)
    out(text.encode("utf-8", "replace").decode("utf-8"))


def finite(value: Any) -> Any:
    """Return plain JSON values, with NaN and infinities as None and numpy numbers as Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def is_terminal(stream: Any = None) -> bool:
    """Tell whether a stream (stderr by default) is a terminal that can redraw a line."""
    stream = stream or sys.stderr
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str) -> str:
    """Colour a word for a terminal; leave it alone in a pipe or under NO_COLOR."""
    if not is_terminal() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{code}m{text}\033[0m"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Write a table to stdout; columns that hold only numbers are set flush right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[show(value) for value in row] for row in rows]
    drawn = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for position, name in enumerate(columns):
        column = [row[position] for row in rows]
        numeric = bool(column) and all(isinstance(v, (int, float)) or v is None for v in column)
        drawn.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    # In a pipe nothing may be folded: programs and `grep` read whole rows.
    width = None if is_terminal(sys.stdout) else 10_000
    console = Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)
    if width is None:
        console.print(drawn)
    else:
        with console.capture() as captured:
            console.print(drawn)
        sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))
        sys.stdout.flush()


def show(value: object) -> str:
    """Return one table cell: three digits for a fraction, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


def duration(seconds: float) -> str:
    """Return a time as people say it: `41 s`, `26 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress(Protocol):
    """Something that is told how far the work has come."""

    def advance(self, n: int = 1, **facts: object) -> None:
        """Say that `n` more are done, with figures worth showing."""


class _Lines:
    """Progress in a pipe: a line every ten percent."""

    def __init__(self, total: int | None, what: str) -> None:
        self.total, self.what, self.done, self.tenth, self.start = total, what, 0, 0, time.monotonic()

    def advance(self, n: int = 1, **facts: object) -> None:
        self.done += n
        if not self.total:
            return
        tenth = min(10, 10 * self.done // self.total)
        if tenth > self.tenth and self.total >= 10:
            self.tenth = tenth
            seconds = time.monotonic() - self.start
            rate = self.done / seconds if seconds > 0 else 0.0
            told = "".join(f"  {key} {show(value)}" for key, value in facts.items())
            say(f"{self.what} {self.done}/{self.total}  {rate:.1f}/s{told}")


class _Bar:
    """Progress on a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def advance(self, n: int = 1, **facts: object) -> None:
        told = "  ".join(f"{key} {show(value)}" for key, value in facts.items())
        self.bar.update(self.task, advance=n, **({"facts": told} if told else {}))


class _TransferLines(_Lines):
    """A transfer in a pipe: a line every ten percent, in megabytes."""

    def advance(self, n: int = 1, **facts: object) -> None:
        self.done += n
        if not self.total or (tenth := min(10, 10 * self.done // self.total)) <= self.tenth:
            return
        self.tenth = tenth
        seconds = time.monotonic() - self.start
        rate = f"  {self.done / seconds / 1e6:.1f} MB/s" if seconds > 0 else ""
        say(f"{self.what}  {tenth * 10} %  {self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB{rate}")


@contextmanager
def transfer(total: int | None, what: str) -> Iterator[Progress]:
    """Show how much of a file has come, in bytes: a bar with rate and time left, or lines in a pipe."""
    if not is_terminal():
        yield _TransferLines(total, what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with bar:
        yield _Bar(bar, bar.add_task(what, total=total))


@contextmanager
def progress(total: int | None, what: str) -> Iterator[Progress]:
    """Show how far long work has come: a bar with rate and time left, or lines in a pipe."""
    if not is_terminal():
        yield _Lines(total, what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with bar:
        yield _Bar(bar, bar.add_task(what, total=total, facts=""))

"""Output of the commands: results on stdout, everything else on stderr.

rich is imported only where it draws, so that printing a line of text or JSON does not load it.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.text import json_text, printable, printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SCHEMA_VERSION = 1


def forbid_downloads(offline: bool) -> None:
    """Apply `--offline` to this process and those that it starts."""
    if offline:
        from rtdetr_cli.weights.download import OFFLINE_VARIABLE

        os.environ[OFFLINE_VARIABLE] = "1"


def command_group(help_text: str) -> typer.Typer:
    """Return an empty group of subcommands."""
    return typer.Typer(
        help=help_text,
        rich_markup_mode=None,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def say(text: str, *, label: str = "", color: str = "") -> None:
    """Write a line for people, after a colored label; control characters from files and names are escaped."""
    if label and is_terminal() and not os.environ.get("NO_COLOR"):
        label = f"\033[{color}m{label}\033[0m"
    sys.stderr.write(label + " " * bool(label) + printable_lines(text) + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """Write a warning for people."""
    say(text, label="warning:", color="33")


def complain(message: str, hint: str = "") -> None:
    """Write an error and its hint for people."""
    say(printable(message), label="error:", color="31;1")
    if hint:
        say("")
        give_hint(hint)


def fail(error: RtdetrError) -> NoReturn:
    """Write an error and exit with its code, where stdout has its one document already."""
    complain(error.message, error.hint)
    raise typer.Exit(error.exit_code)


def give_hint(text: str) -> None:
    """Write a hint for people."""
    say(text, label="hint:", color="36")


def next_step(*words: object) -> None:
    """Write the next command to run, given as separate words (quoted for the shell) or as one line."""
    command = str(words[0]) if len(words) == 1 else shlex.join(map(str, words))
    say(command, label="next:", color="36")


def out(text: str) -> None:
    """Write a line of the result; control characters from files and names are escaped."""
    sys.stdout.write(printable_lines(text) + "\n")
    sys.stdout.flush()


def emit_json(document: dict[str, Any]) -> None:
    """Write the result as one JSON document on one line; NaN and infinity become null."""
    out(json_text(finite({"schema_version": SCHEMA_VERSION, **document})))


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
    """Return whether a stream (stderr by default) is a terminal that can redraw a line."""
    stream = stream or sys.stderr
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Write a table to stdout; columns that hold only numbers are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heading = Text(printable(title)) if title else None
    drawn = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bold", pad_edge=False)
    for position, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], int | float | None) for row in rows)
        drawn.add_column(Text(printable_lines(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(printable(show(value))) for value in row))
    # Nothing may be folded in a pipe: programs and `grep` read whole rows.
    console = Console(file=sys.stdout, width=None if is_terminal(sys.stdout) else 10_000, highlight=False)
    with console.capture() as captured:
        console.print(drawn)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().split("\n")[:-1]))
    sys.stdout.flush()


def show(value: object) -> str:
    """Return one table cell: three digits for a fraction, a dash for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


def duration(seconds: float) -> str:
    """Return a duration for people: `0.4 s`, `41 s`, `26 min`, `3 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def fold(text: str, *, indent: int, first: int = 0) -> str:
    """Fold a line between words for a terminal; return it unchanged for a pipe.

    `indent` is the columns in front of each line after the first, `first` those of the first that are taken already.
    """
    text = printable(text)
    if not is_terminal():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    fill = textwrap.TextWrapper(
        width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    ).fill
    return fill(" " * first + text)[first:]


class _Lines:
    """Progress in a pipe: a line every ten percent."""

    def __init__(self, total: int | None, what: str, *, in_bytes: bool) -> None:
        self.total, self.what, self.in_bytes = total or 0, what, in_bytes
        self.done = self.tenths = 0
        self.start = time.monotonic()

    def advance(self, n: int = 1, **facts: object) -> None:
        self.done += n
        tenths = min(10, 10 * self.done // self.total) if self.total >= 10 else 0
        if tenths <= self.tenths:
            return
        self.tenths = tenths
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        if self.in_bytes:
            size = f"{self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB"
            say(f"{self.what}  {tenths * 10}%  {size}  {rate / 1e6:.1f} MB/s")
        else:
            figures = "".join(f"  {key} {show(value)}" for key, value in facts.items())
            say(f"{self.what} {self.done}/{self.total}  {rate:.1f}/s{figures}")


class _Bar:
    """Progress on a terminal."""

    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self.bar, self.task = bar, task

    def advance(self, n: int = 1, **facts: object) -> None:
        text = "  ".join(f"{key} {show(value)}" for key, value in facts.items())
        fields: dict[str, Any] = {"facts": text} if facts else {}
        self.bar.update(self.task, advance=n, **fields)


def make_bar(*, in_bytes: bool = False) -> RichProgress:
    """Return a progress bar on stderr that disappears at the end; its tasks have a field `facts`."""
    from rich import progress as rich
    from rich.console import Console

    amount = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if in_bytes else (rich.MofNCompleteColumn(),)
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        *amount,
        rich.TextColumn("{task.fields[facts]}"),
        rich.TimeRemainingColumn(compact=True),
        console=Console(file=sys.stderr, highlight=False),
        transient=True,
    )


@contextmanager
def progress(total: int | None, what: str, *, in_bytes: bool = False) -> Iterator[_Lines | _Bar]:
    """Show how far long work has come: a bar on a terminal, lines in a pipe."""
    if not is_terminal():
        yield _Lines(total, what, in_bytes=in_bytes)
        return
    with make_bar(in_bytes=in_bytes) as bar:
        yield _Bar(bar, bar.add_task(what, total=total, facts=""))


transfer = partial(progress, in_bytes=True)
"""Show how much of a file has arrived."""

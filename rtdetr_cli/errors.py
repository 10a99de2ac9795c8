"""Every error that a user may meet, as one tree.

    RtdetrError                1  runtime: output not writable, disk full, training diverged
    |- UsageError              2  unknown flag, preset or key; clash of flags; bad size
    |- DataError               3  dataset missing, malformed, or with errors
    |- ModelError              4  model or weights: missing, truncated, foreign, unsafe, wrong hash
    |- ExportError             5  an export could not be made
    |- GateError               6  a gate failed: parity, --fail-under, --max-drop
    `- EnvironmentProblem      7  missing package or device

A message is one sentence: what is wrong with which value, and where. A hint is the command or the change that
helps. `code` is stable and meant for programs; `cli/app.py` turns the whole into text, JSON and an exit code.
"""

from __future__ import annotations


class RtdetrError(Exception):
    """An error for the user: what went wrong in one sentence, and a hint that helps.

    Args:
        message: what is wrong with which value, where (`file:line` when there is one).
        hint: the command or change that mends it; empty when there is none.
        code: a stable, kebab-case name for programs; the class's own by default.
    """

    exit_code = 1
    default_code = "runtime"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code


class UsageError(RtdetrError):
    """A flag, key, preset or size that cannot be what was meant."""

    exit_code = 2
    default_code = "usage"


class DataError(RtdetrError):
    """A dataset that is missing, malformed or in error."""

    exit_code = 3
    default_code = "data"


class ModelError(RtdetrError):
    """A model or weights file that is missing, truncated, foreign, unsafe or not the one expected."""

    exit_code = 4
    default_code = "model"


class ExportError(RtdetrError):
    """An export that could not be made."""

    exit_code = 5
    default_code = "export"


class GateError(RtdetrError):
    """A gate that a result did not pass."""

    exit_code = 6
    default_code = "gate"


class EnvironmentProblem(RtdetrError):
    """A package or device that this machine lacks."""

    exit_code = 7
    default_code = "environment"

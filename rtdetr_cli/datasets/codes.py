"""The catalog of findings: severity, explanation and hint of every code, read from `codes.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

HARMS = ("boxes", "images", "leak", "labels", "none")
"""What findings cost, the worst first: boxes lost or wrong, images lost, leaks, label noise, nothing."""


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding.

    Attributes:
        code: stable, kebab-case.
        severity: `error`, `warning` or `info`.
        title: what it is, in a few words.
        explanation: what it means and why it matters for training.
        hint: what to do.
        repair: what `--fix` does; empty if it does nothing.
        harm: what it costs, one of `HARMS`.
    """

    code: str
    severity: str
    title: str
    explanation: str
    hint: str = "nothing needs to be done"
    repair: str = ""
    harm: str = "none"


_CATALOG = tomllib.loads(Path(__file__).with_name("codes.toml").read_text("utf-8"))

CODES = {code: Code(code, **fields) for code, fields in _CATALOG.items()}


def find_code(name: str) -> Code | None:
    """Return the entry of a code, also by its name in 0.1, when images were called pictures."""
    return CODES.get(name.replace("picture", "image"))

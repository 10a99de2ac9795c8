"""Each kind of error has its exit code, and the README lists them."""

from __future__ import annotations

import re
from pathlib import Path

from rtdetr_cli import errors

README = Path(__file__).resolve().parents[2] / "README.md"
CODES = {
    errors.RtdetrError: 1,
    errors.UsageError: 2,
    errors.DataError: 3,
    errors.ModelError: 4,
    errors.ExportError: 5,
    errors.GateError: 6,
    errors.EnvironmentProblem: 7,
}


def test_exit_codes() -> None:
    assert {kind: kind("x").exit_code for kind in CODES} == CODES
    listed = re.findall(r"^\| `?(\d+)`? \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(CODES.values()) <= {int(code) for code in listed}

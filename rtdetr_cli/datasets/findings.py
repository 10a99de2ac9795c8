"""Findings: what a reader or a check noticed in a dataset, and where."""

from __future__ import annotations

from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.records import NOWHERE, Finding, Spot
from rtdetr_cli.text import printable

SEVERITIES = ("error", "warning", "info")


class Findings(list[Finding]):
    """A list of findings."""

    def add(
        self,
        code: str,
        message: str,
        *,
        file: str = "",
        line: int = 0,
        image_id: int | str | None = None,
        annotation_id: int | str | None = None,
        hint: str = "",
        spot: Spot = NOWHERE,
        severity: str = "",
    ) -> None:
        """Append a finding; severity and hint default to those of the code."""
        entry = CODES[code]
        self.append(
            Finding(
                code,
                severity or entry.severity,
                printable(message),
                printable(file),
                int(line),
                printable(image_id) if isinstance(image_id, str) else image_id,
                printable(annotation_id) if isinstance(annotation_id, str) else annotation_id,
                hint or entry.hint,
                spot,
            )
        )

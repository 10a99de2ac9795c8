"""Findings: what a reader or a check noticed in a dataset, and where."""

from __future__ import annotations

from dataclasses import dataclass

from rtdetr_cli.datasets.codes import CODES
from rtdetr_cli.datasets.records import Finding
from rtdetr_cli.text import printable

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a finding lies in the records; the report page and the repair use it.

    Attributes:
        split: name of the split; empty if the finding concerns the whole dataset.
        image: index of the image in the split; -1 for none.
        entry: index in the label file (from 0): annotation or image of a COCO list, object of a VOC file, line of a
            YOLO file; -1 for none.
        box: corners in pixels, to be drawn.
        other: split and index of the image that this one duplicates.
    """

    split: str = ""
    image: int = -1
    entry: int = -1
    box: tuple[float, float, float, float] | None = None
    other: tuple[str, int] | None = None


NOWHERE = Spot()


class Findings(list[Finding]):
    """A list of findings; `spots` holds the spot of each."""

    def __init__(self) -> None:
        super().__init__()
        self.spots: list[Spot] = []

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
        finding = Finding(
            code,
            severity or entry.severity,
            printable(message),
            printable(file),
            int(line),
            printable(image_id) if isinstance(image_id, str) else image_id,
            printable(annotation_id) if isinstance(annotation_id, str) else annotation_id,
            hint or entry.hint,
        )
        self.append(finding)
        self.spots.append(spot)

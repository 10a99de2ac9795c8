"""Examine a whole dataset: files, labels, every image, splits and classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_cli.checks.boxes import check_boxes
from rtdetr_cli.checks.duplicates import check_duplicates, groups_by_path
from rtdetr_cli.checks.files import check_files, measure_images
from rtdetr_cli.checks.images import ImageInfo, check_images, find_duplicates
from rtdetr_cli.checks.structure import check_structure
from rtdetr_cli.checks.val_split import VAL_FRACTION, choose_val, report_drawn
from rtdetr_cli.datasets.codes import CODES, HARMS
from rtdetr_cli.datasets.findings import SEVERITIES
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.read import read_raw
from rtdetr_cli.datasets.records import Finding

_JSON_KEYS = ("code", "severity", "message", "file", "line", "image_id", "annotation_id", "hint")


@dataclass(slots=True, eq=False)
class Report:
    """The result of `examine`.

    Attributes:
        raw: the records; boxes are clipped, and unusable ones are gone.
        decoded: whether the images were decoded.
        imgsz: height and width of the network's input, which decide what is tiny.
        image_info: path -> result for every image that is a file; empty if the images were not decoded.
    """

    raw: RawDataset
    decoded: bool
    imgsz: tuple[int, int]
    image_info: dict[Path, ImageInfo] = field(default_factory=dict)

    @property
    def findings(self) -> Sequence[Finding]:
        """Findings in the order they were made."""
        return self.raw.findings

    def counts(self) -> dict[str, int]:
        """Return the number of errors, warnings and infos."""
        counts = Counter(f.severity for f in self.findings)
        return {severity: counts[severity] for severity in SEVERITIES}

    def by_code(self) -> dict[str, list[Finding]]:
        """Return code -> its findings, the most severe first; the codes are sorted by what they cost."""

        def rank(finding: Finding) -> int:
            return SEVERITIES.index(finding.severity)

        groups: dict[str, list[Finding]] = defaultdict(list)
        for finding in sorted(self.findings, key=rank):
            groups[finding.code].append(finding)

        def cost(code: str) -> tuple[int, int, int, str]:
            return rank(groups[code][0]), HARMS.index(CODES[code].harm), -len(groups[code]), code

        return {code: groups[code] for code in sorted(groups, key=cost)}

    def is_minor(self, code: str) -> bool:
        """Return whether findings of this code can be folded: notes, and what costs nothing."""
        severities = {f.severity for f in self.findings if f.code == code}
        return severities == {"info"} or (CODES[code].harm == "none" and "error" not in severities)

    def images_with(self, *codes: str) -> dict[tuple[str, int], Finding]:
        """Return split and position of the images that one of the codes was found for, with the last such finding."""
        return {f.spot.member: f for f in self.findings if f.code in codes and f.spot.image >= 0}

    def drop_images(self, *codes: str) -> dict[str, int]:
        """Drop the images that have a finding of these codes, and return how many of each.

        Splits without an image left go as well. Afterwards the spots of the findings no longer fit the records.
        """
        self.raw.splits = self.raw.without(self.images_with(*codes))
        return {code: len(self.images_with(code)) for code in codes}

    def summary(self) -> dict[str, Any]:
        """Return the dataset's counts; the keys are those of JSON version 1."""
        raw = self.raw
        boxes = {name: np.bincount(s.labels, minlength=len(raw.categories)).tolist() for name, s in raw.splits.items()}
        return {
            "name": raw.name,
            "format": raw.format,
            "source": str(raw.source),
            "pictures": sum(len(s) for s in raw.splits.values()),
            "boxes": sum(len(s.box_images) for s in raw.splits.values()),
            "classes": len(raw.categories),
            "decoded": self.decoded,
            "splits": {name: {"pictures": len(s), "boxes": len(s.box_images)} for name, s in raw.splits.items()},
            "per_class": [
                {"id": c.id, "name": c.name, "boxes": {name: counts[i] for name, counts in boxes.items()}}
                for i, c in enumerate(raw.categories)
            ],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        return {
            "dataset": self.summary(),
            "counts": self.counts(),
            "findings": [
                {**{key: getattr(f, key) for key in _JSON_KEYS}, "file": f.file or None, "line": f.line or None}
                for f in self.findings
            ],
        }


def examine(
    source: Path,
    *,
    images: Path | None = None,
    imgsz: tuple[int, int] = (640, 640),
    decode: bool = True,
    queries: int = 300,
    processes: bool = False,
    progress: Callable[[int, str], AbstractContextManager[Any]] | None = None,
    known: Mapping[Path, ImageInfo] | None = None,
    keep_truncated: bool = False,
) -> Report:
    """Examine a dataset.

    Args:
        source: what `load_splits` takes.
        images: the image folder, if it cannot be guessed.
        imgsz: height and width of the network's input, which decide what is tiny.
        decode: False checks only labels and folder listings, and headers of images whose labels declare no size.
        queries: objects that the model can detect in one image.
        processes: decode in processes instead of threads if there are many cores; they import the calling program's
            main module, so a script must be guarded by `if __name__ == "__main__"`.
        progress: starts a display of so many images to decode, whose `advance` is called for each.
        known: path -> result of an earlier check; these images are not decoded again.
        keep_truncated: check the boxes of images that decode except for their end too, so that `repair` keeps them.

    Raises:
        DataError: there is no dataset at `source`. Faults of an existing dataset are findings.
    """
    raw = read_raw(Path(source), images=images)
    check_files(raw)
    report = Report(raw=raw, decoded=decode, imgsz=imgsz)
    if decode:
        report.image_info = check_images(
            raw, processes=processes, progress=progress, known=known, keep_truncated=keep_truncated
        )
    else:
        measure_images(raw, all_images=False)
    check_boxes(raw, imgsz=imgsz, queries=queries)
    check_structure(raw, for_training=True)
    if decode:
        check_duplicates(raw, *find_duplicates(raw, report.image_info))
    else:
        check_duplicates(raw, groups_by_path(raw))
    if "val" not in raw.splits and len(raw.splits.get("train", ())):
        report_drawn(raw, choose_val(raw, VAL_FRACTION))
    return report

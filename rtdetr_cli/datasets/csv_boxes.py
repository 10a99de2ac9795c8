"""Read CSV files with one box per line.

The columns are found by their names, as in `filename,width,height,class,xmin,ymin,xmax,ymax` (Roboflow, TensorFlow). A
file without a header has the columns of keras-retinanet: `image,x1,y1,x2,y2,class`, the last five empty for an image
without objects.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rtdetr_cli.datasets.image_paths import ImageIndex
from rtdetr_cli.datasets.label_text import MAX_BYTES, is_valid_name
from rtdetr_cli.datasets.raw import RawBox, RawDataset, Rows
from rtdetr_cli.datasets.records import Category, Spot
from rtdetr_cli.datasets.survey import edges, is_image
from rtdetr_cli.text import whole_number

_NAMES = {
    "image": ("filename", "image", "filepath", "path", "imagepath", "imagename", "imageid", "img", "file"),
    "label": ("class", "label", "name", "category", "classname", "labelname"),
    "x1": ("xmin", "x1", "left"),
    "y1": ("ymin", "y1", "top"),
    "x2": ("xmax", "x2", "right"),
    "y2": ("ymax", "y2", "bottom"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
}
_REQUIRED = ("image", "label", "x1", "y1", "x2", "y2")
_HEADERLESS = {"image": 0, "x1": 1, "y1": 2, "x2": 3, "y2": 4, "label": 5}


@dataclass(frozen=True, slots=True)
class _Format:
    """The delimiter of a file, the position of each column, and whether the first line names the columns."""

    delimiter: str
    columns: dict[str, int]
    has_header: bool


def is_box_table(path: Path) -> bool:
    """Return whether a CSV file has the columns of a table of boxes."""
    return _format(edges(path).decode("utf-8-sig", "replace")) is not None


def _format(text: str) -> _Format | None:
    line = text.lstrip("\n").split("\n", 1)[0].strip()
    delimiter = max(",;\t", key=line.count)
    cells = [cell.strip().strip('"') for cell in line.split(delimiter)]
    words = [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in cells]
    columns = {}
    for column, names in _NAMES.items():
        position = next((words.index(name) for name in names if name in words), None)
        if position is not None:
            columns[column] = position
    if all(column in columns for column in _REQUIRED):
        return _Format(delimiter, columns, True)
    if len(cells) == 6 and is_image(cells[0]):
        is_row = not any(cells[1:]) or all(_number(cell) is not None for cell in cells[1:5])
        return _Format(delimiter, _HEADERLESS, False) if is_row else None
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _side(text: str) -> int:
    return whole_number(text, digits=9) or 0


def read_csv(dataset: RawDataset, files: dict[str, Path], index: ImageIndex, root: Path) -> None:
    """Read one table per split into `dataset`, classes sorted by name; `index` has the images below `root`."""
    numbers: dict[str, int] = {}  # by their first line
    for split, path in files.items():
        _Table(dataset, split, index, numbers).read(path, root)
    names = sorted(numbers)
    dataset.categories = tuple(Category(number, name) for number, name in enumerate(names, 1))
    labels = np.argsort([numbers[name] for name in names])
    for part in dataset.splits.values():
        part.labels = labels[part.labels]
    dataset.oddities.report(dataset.findings)


class _Table(Rows):
    """The rows of one file: its images in the order of their first line, and its boxes.

    `numbers` gets the classes; a label is the number of its class there.
    """

    def __init__(self, dataset: RawDataset, split: str, index: ImageIndex, numbers: dict[str, int]) -> None:
        super().__init__(dataset, split)
        self.index, self.numbers = index, numbers
        self.positions: dict[str, int] = {}

    def read(self, path: Path, root: Path) -> None:
        """Read a file; boxes whose corners are all from 0 to 1 are fractions of the image."""
        findings = self.dataset.findings
        self.file, text = self.dataset.read_label(path, limit=MAX_BYTES)
        form = _format(text or "")
        if form is not None:
            reader = csv.reader((text or "").split("\n"), delimiter=form.delimiter)
            try:
                for number, cells in enumerate(reader):
                    if any(cell.strip() for cell in cells) and not (number == 0 and form.has_header):
                        self._row([cell.strip() for cell in cells], form.columns, reader.line_num)
            except csv.Error as error:
                message = f"is not valid CSV: {error}"
                findings.add("file-malformed", message, file=self.file, line=reader.line_num)
        elif text is not None:
            findings.add("file-malformed", "has no columns of image, class and box", file=self.file, line=1)
        split = self.finish(root)
        boxes = split.boxes_xyxy_px
        split.normalized = bool(boxes.size and (boxes >= 0).all() and (boxes <= 1).all())

    def _row(self, cells: list[str], columns: dict[str, int], line: int) -> None:
        def report(code: str, message: str) -> None:
            spot = Spot(self.split, self.positions.get(name, -1), line - 1)
            self.dataset.findings.add(code, message, file=self.file, line=line, spot=spot)

        values = {column: cells[at] if at < len(cells) else "" for column, at in columns.items()}
        name = values["image"]
        if not is_valid_name(name):
            report("entry-malformed", f"has the image name {name[:60]!r}")
            return
        if name not in self.positions:
            size = (_side(values.get("width", "")), _side(values.get("height", "")))
            path = self.index.find(name, self.split) or name.replace("\\", "/")
            self.positions[name] = self.add_image(path, label_file=self.file, line=line, size_wh=size)
        words = [values[corner] for corner in ("x1", "y1", "x2", "y2")]
        if not any(words):
            return  # an image without objects
        corners = [_number(word) for word in words]
        if None in corners:
            wrong = words[corners.index(None)]
            report("box-not-number", f"has {wrong[:40]!r} in its box, which is not a number")
        elif not all(corner is not None and math.isfinite(corner) for corner in corners):
            report("box-not-finite", f"has the box {' '.join(words)[:80]}")
        elif not is_valid_name(values["label"]):
            report("category-unknown", "has a box without a class")
        else:
            x1, y1, x2, y2 = (corner or 0.0 for corner in corners)
            label = self.numbers.setdefault(values["label"], len(self.numbers))
            self.boxes.append(RawBox(self.positions[name], (x1, y1, x2, y2), label, line=line, entry=line - 1))

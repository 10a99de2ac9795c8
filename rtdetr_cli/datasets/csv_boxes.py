"""Read CSV files with one box per line.

The columns are found by their names, as in `filename,width,height,class,xmin,ymin,xmax,ymax` (Roboflow, TensorFlow). A
file without a header has the columns of keras-retinanet: `image,x1,y1,x2,y2,class`, the last five empty for an image
without objects.
"""

from __future__ import annotations

import csv
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.datasets.findings import Spot
from rtdetr_cli.datasets.image_paths import ImageIndex
from rtdetr_cli.datasets.label_text import MAX_BYTES, Oddities, is_valid_name
from rtdetr_cli.datasets.raw import RawBox, RawDataset, RawSplit, Rows
from rtdetr_cli.datasets.records import Category
from rtdetr_cli.datasets.survey import edges
from rtdetr_cli.images.decode import IMAGE_SUFFIXES
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
    is_image = len(cells) == 6 and os.path.splitext(cells[0])[1].lower() in IMAGE_SUFFIXES
    if is_image and (not any(cells[1:]) or all(_number(cell) is not None for cell in cells[1:5])):
        return _Format(delimiter, _HEADERLESS, False)
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
    oddities = Oddities()
    tables = {split: _Table(dataset, split, path, index, oddities) for split, path in files.items()}
    names = sorted({name for table in tables.values() for name in table.names})
    dataset.categories = tuple(Category(number, name) for number, name in enumerate(names, 1))
    first_id = 1
    for split, table in tables.items():
        dataset.splits[split] = table.to_split({name: label for label, name in enumerate(names)}, first_id, root)
        first_id += len(table.images)
    oddities.report(dataset.findings)


class _Table:
    """The rows of one file: its images in the order of their first line, and its boxes."""

    def __init__(self, dataset: RawDataset, split: str, path: Path, index: ImageIndex, oddities: Oddities) -> None:
        self.dataset, self.split, self.path, self.index = dataset, split, path, index
        self.images: dict[str, tuple[str, tuple[int, int], int]] = {}  # name -> path, declared size, line
        self.positions: dict[str, int] = {}
        self.boxes: list[tuple[str, tuple[float, float, float, float], str, int]] = []
        self.file, text = dataset.read_label(path, oddities, limit=MAX_BYTES)
        form = _format(text) if text is not None else None
        if text is not None and form is None:
            dataset.findings.add("file-malformed", "has no columns of image, class and box", file=self.file, line=1)
        elif text is not None and form is not None:
            self._read(text, form)

    @property
    def names(self) -> set[str]:
        return {name for *_, name, _ in self.boxes}

    def _read(self, text: str, form: _Format) -> None:
        reader = csv.reader(text.split("\n"), delimiter=form.delimiter)
        try:
            for number, cells in enumerate(reader):
                if any(cell.strip() for cell in cells) and not (number == 0 and form.has_header):
                    self._row([cell.strip() for cell in cells], form.columns, reader.line_num)
        except csv.Error as error:
            line = reader.line_num
            self.dataset.findings.add("file-malformed", f"is not valid CSV: {error}", file=self.file, line=line)

    def _row(self, cells: list[str], columns: dict[str, int], line: int) -> None:
        def report(code: str, message: str) -> None:
            spot = Spot(self.split, self.positions.get(name, -1), line - 1)
            self.dataset.findings.add(code, message, file=self.file, line=line, spot=spot)

        values = {column: cells[at] if at < len(cells) else "" for column, at in columns.items()}
        name = values["image"]
        if not is_valid_name(name):
            report("entry-malformed", f"has the image name {name[:60]!r}")
            return
        if name not in self.images:
            self.positions[name] = len(self.images)
            size = (_side(values.get("width", "")), _side(values.get("height", "")))
            path = self.index.find(name, self.split) or name.replace("\\", "/")
            self.images[name] = (path, size if all(size) else (0, 0), line)
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
            self.boxes.append((name, (x1, y1, x2, y2), values["label"], line))

    def to_split(self, labels: dict[str, int], first_id: int, root: Path) -> RawSplit:
        """Return the rows as arrays; boxes whose corners are all from 0 to 1 are fractions of the image."""
        rows = Rows()
        for number, (path, size, _) in enumerate(self.images.values()):
            rows.add_image(path, image_id=first_id + number, size_wh=size, label_file=self.file)
        for name, corners, label, line in self.boxes:
            rows.boxes.append(RawBox(self.positions[name], corners, labels[label], line=line, entry=line - 1))
        split = rows.split(self.split, root)
        split.label_files = [self.file]
        split.image_labels[:] = 0
        split.image_lines[:] = [line for *_, line in self.images.values()]
        split.normalized = bool(self.boxes) and all(0 <= v <= 1 for _, corners, *_ in self.boxes for v in corners)
        split.sort_boxes()
        return split

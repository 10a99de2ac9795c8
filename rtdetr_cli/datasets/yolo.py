"""Read and write YOLO: a `data.yaml`, images in folders or lists, and one text file per image.

A line is `class cx cy w h` in fractions of the image; or `class x1 y1 x2 y2 ...`, a polygon, which becomes its bounding
box; or a box with the keypoints of a pose dataset, which are ignored.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rtdetr_cli.datasets.data_yaml import DataYaml, read_yaml
from rtdetr_cli.datasets.ids_file import BoxFacts, IdsFile, image_facts, read_ids, write_ids
from rtdetr_cli.datasets.image_names import copy_image, image_names
from rtdetr_cli.datasets.image_paths import ImageIndex, index_images, may_read, report_moved, split_of_parts
from rtdetr_cli.datasets.label_text import CLASS_LISTS, is_valid_name
from rtdetr_cli.datasets.raw import RawBox, RawDataset, Rows
from rtdetr_cli.datasets.records import Category, Dataset, Spot
from rtdetr_cli.datasets.survey import edges, is_image, is_inside, survey
from rtdetr_cli.text import counted

_ROUNDING = 1e-3
_MAX_SAMPLED_FILES = 500
"""Label files that are read to find out whether there are keypoints."""

_MIN_POSE_COLUMNS = 11
_NEARLY_ALL = 0.9
_SLACK = 0.01


def read_yolo(dataset: RawDataset, path: Path) -> None:
    """Read a `data.yaml` and everything it names into `dataset`, which is named like the file if that says anything."""
    if path.stem not in ("data", "dataset"):
        dataset.name = path.stem
    config = read_yaml(dataset, path)
    if config is None:
        return
    file = dataset.show(path)
    listed = {split: _images(dataset, config, split, entries, file) for split, entries in config.splits.items()}
    read_yolo_files(dataset, config, {s: paths for s, paths in listed.items() if paths is not None}, {}, file)


def read_yolo_files(
    dataset: RawDataset,
    config: DataYaml,
    listed: dict[str, list[Path]],
    label_files: Mapping[Path, Path],
    file: str,
) -> None:
    """Read the label files of images.

    Args:
        dataset: gets categories, splits and findings.
        config: the classes, and the folder that names of images are relative to.
        listed: split -> images.
        label_files: image -> label file, where it is not the one that `label_path` gives.
        file: the file that defines the classes, to show.
    """
    numbers = sorted(config.classes, key=lambda n: config.category_ids[n])
    dataset.categories = tuple(Category(config.category_ids[n], config.classes[n]) for n in numbers)
    labels = {number: label for label, number in enumerate(numbers)}
    ids = read_ids(dataset, config.base)
    label_files = {p: label_files.get(p) or _find_label(p) for paths in listed.values() for p in paths}
    if config.keypoints is None:
        _guess_keypoints(dataset, config, list(label_files.values()), file)
    for split, paths in listed.items():
        rows = _SplitReader(dataset, split, config, labels, ids)
        for path in paths:
            rows.read_image(path, label_files[path])
        rows.finish(config.base).normalized = True
    _report_orphans(dataset)
    dataset.oddities.report(dataset.findings)


# ---- images


def _images(dataset: RawDataset, config: DataYaml, split: str, entries: list[str], file: str) -> list[Path] | None:
    """Return the images of a split, or None with a finding."""
    paths: list[Path] = []
    for entry in entries:
        where = _locate(dataset, config.base, entry)
        if where is None:
            message = f"names {split}: {entry}, which is neither a folder nor a list in {config.base}"
            dataset.findings.add("split-missing", message, file=file, spot=Spot(split))
            return None
        if where.is_dir():
            if is_inside(config.base, (where,)) and not is_inside(where, dataset.roots):
                message = f"names {split}: {entry}, which contains the dataset's folder"
                hint = "set path: to the folder that contains all splits"
                dataset.findings.add("image-outside", message, file=file, spot=Spot(split), hint=hint)
                return None
            paths += _images_below(where)
        else:
            paths += _listed(dataset, config, where)
    return paths


def _locate(dataset: RawDataset, base: Path, entry: str) -> Path | None:
    """Return the folder or list that a split names, or the longest end of its path that exists.

    Roboflow writes `../train/images` for `train/images`, and other tools the path on their own machine.
    """
    parts = [part for part in entry.replace("\\", "/").split("/") if part not in ("", ".")]
    ends = [parts[start:] for start in range(len(parts))]
    if split_of_parts(parts) is not None:  # not `images/`, where `test/images/` is wanted
        ends = [end for end in ends if split_of_parts(end) is not None]
    for candidate in (base / entry, *(base.joinpath(*end) for end in ends)):
        try:
            exists = candidate.is_dir() or (candidate.is_file() and candidate.suffix.lower() == ".txt")
            if exists and may_read(dataset, candidate):
                return candidate
        except OSError:  # a name too long for the file system
            return None
    return None


def _images_below(folder: Path) -> list[Path]:
    paths = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        paths += [Path(parent, name) for name in sorted(files) if is_image(name)]
    return paths


def _listed(dataset: RawDataset, config: DataYaml, path: Path) -> list[Path]:
    file, text = dataset.read_label(path)
    names = [line.strip() for line in (text or "").split("\n") if is_valid_name(line.strip())]
    bases = [config.base, path.parent]
    best = max(bases, key=lambda b: sum(os.path.lexists(os.path.join(b, name)) for name in names[:32]))
    index: ImageIndex | None = None
    paths, moved = [], []
    for name in names:
        path = best / name
        if not os.path.lexists(path) or not may_read(dataset, path):
            index = index or index_images(survey(config.base))
            match = index.find(name)
            if match is not None and normpath(config.base / match).lower() != normpath(path).lower():
                path = config.base / match  # a name in another case stays: `check_files` reports it
                moved.append(f"{name} is {match}")
        if may_read(dataset, path):
            paths.append(path)
        else:
            dataset.findings.add("image-outside", f"names {name}, which is outside the dataset's folder", file=file)
    if moved:
        report_moved(dataset, len(moved), moved[0], file)
    return paths


def label_path(image: Path) -> Path:
    """Return the label file of an image: the last folder called `images` becomes `labels`."""
    return _with_last(image.parent.parts, "images", "labels") / f"{image.stem}.txt"


def _find_label(image: Path) -> Path:
    """Return the label file of an image: the usual one, or the one beside the image if the usual folder is missing."""
    label, beside = label_path(image), image.parent / f"{image.stem}.txt"
    return beside if label != beside and not label.parent.is_dir() and beside.is_file() else label


def _with_last(parts: Sequence[str], name: str, new: str) -> Path:
    """Return a folder with the last part of that name replaced."""
    last = max((i for i, part in enumerate(parts) if part == name), default=-1)
    return Path(*parts[:last], new, *parts[last + 1 :]) if last >= 0 else Path(*parts)


# ---- labels


class _SplitReader(Rows):
    """Reads the label files of one split."""

    def __init__(self, dataset: RawDataset, split: str, config: DataYaml, labels: dict[int, int], ids: IdsFile) -> None:
        super().__init__(dataset, split)
        self.config, self.labels, self.ids = config, labels, ids
        self.classes_text = f"{config.file} defines {counted(len(labels), 'class')}"
        if labels:
            self.classes_text += f": {min(labels)}-{max(labels)}"

    def read_image(self, path: Path, label: Path) -> None:
        """Add an image and the boxes in its label file."""
        base = self.config.base
        name = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
        image_id, facts = self.ids.image(self.split, name)
        if label.name not in self.dataset.list_folder(str(label.parent)).get(label.name.lower(), ()):
            message = f"has no label file ({self.dataset.show(label)})"
            image = self.add_image(name, image_id=image_id)
            self.report("label-missing", message, image, file=self.dataset.show(path))
            return
        file, text = self.dataset.read_label(label)
        image = self.add_image(name, image_id=image_id, label_file=file)
        lines = [(number, line) for number, line in enumerate((text or "").split("\n")) if line.strip()]
        if len(facts) != len(lines):
            facts = [BoxFacts()] * len(lines)
        for (number, line), box_facts in zip(lines, facts, strict=True):
            self._read_line(image, line, number, box_facts)

    def _read_line(self, image: int, line: str, number: int, facts: BoxFacts) -> None:
        def report(code: str, message: str) -> None:
            self.report(code, message, image, entry=number, line=number + 1)

        words = line.split()
        values = []
        for word in words:
            try:
                values.append(float(word))
            except ValueError:
                report("box-not-number", f"has {word[:40]!r}, which is not a number")
                return
        columns, wanted = self.config.box_columns(len(values))
        if not columns:
            report("label-columns", f"has {counted(len(values), 'column')} instead of {wanted}")
            return
        values = values[:columns]
        if not all(map(math.isfinite, values)):
            report("box-not-finite", f"has the values {' '.join(words[:7])[:80]}")
            return
        label = self.labels.get(int(values[0])) if values[0].is_integer() else None
        if label is None:
            report("category-unknown", f"class index {words[0][:20]} is out of range ({self.classes_text})")
            return
        coordinates = values[1:]
        low, high = min(coordinates), max(coordinates)
        if high > 2 or low < -1:
            outlier = low if low < -1 else high
            report("label-pixels", f"has the coordinate {outlier:g}, which is not a fraction of the image")
            return
        beyond = low < -_ROUNDING or high > 1 + _ROUNDING
        if len(coordinates) == 4:
            cx, cy, w, h = coordinates
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            area = math.nan
            beyond = beyond and w >= 0 and h >= 0  # else it is reported as an inverted box
        else:
            xs, ys = coordinates[0::2], coordinates[1::2]
            box = (min(xs), min(ys), max(xs), max(ys))
            area = abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
        if beyond:
            report("label-beyond-one", f"has the coordinate {(high if high > 1 else low):g}, which is not in 0 to 1")
        area = area if math.isnan(facts.area_fraction) else facts.area_fraction
        self.boxes.append(RawBox(image, box, label, number + 1, number, area, facts.crowd, facts.annotation_id, beyond))


def _names(dataset: RawDataset, folder: Path) -> list[str]:
    return [name for names in dataset.list_folder(str(folder)).values() for name in names]


# ---- keypoints that data.yaml does not declare


def _guess_keypoints(dataset: RawDataset, config: DataYaml, label_files: list[Path], file: str) -> None:
    """Find out from the labels whether boxes are followed by keypoints, and report it."""
    sample = label_files[:: max(1, len(label_files) // _MAX_SAMPLED_FILES)]
    rows = [values for path in sample for values in _numbers(path)]
    if not rows:
        return
    columns, count = Counter(map(len, rows)).most_common(1)[0]
    if columns < _MIN_POSE_COLUMNS or count < _NEARLY_ALL * len(rows):
        return
    table = np.asarray([row for row in rows if len(row) == columns])
    each = _point_size(table)
    if not each:
        return
    config.keypoints, config.keypoints_guessed = columns - 5, True
    shape = f"kpt_shape: [{(columns - 5) // each}, {each}]"
    dataset.findings.add(
        "yolo-pose",
        f"has no kpt_shape, but label lines of {columns} columns: they are read as a class, a box and "
        f"{counted((columns - 5) // each, 'keypoint')}, which are ignored",
        file=file,
        line=1,
        hint=f"write {shape} into {file}; or kpt_shape: [0, 2] if the lines are polygons",
    )


def _numbers(label: Path) -> list[list[float]]:
    """Return the lines at the ends of a label file that are numbers; `_read_line` reports the others."""
    rows = []
    for line in edges(label).splitlines():
        with suppress(ValueError):
            rows.append([float(word) for word in line.split()])
    return [row for row in rows if row and all(map(math.isfinite, row))]


def _point_size(table: NDArray[np.float64]) -> int:
    """Return how many numbers each keypoint has (2, or 3 with its visibility); 0 if these (L, 5 + P) are polygons."""
    rest = table[:, 5:]
    if rest.shape[1] % 3 == 0 and np.isin(rest[:, 2::3], (0, 1, 2)).all():
        return 3
    if rest.shape[1] % 2:
        return 0
    points, center, size = rest.reshape(len(table), -1, 2), table[:, None, 1:3], table[:, None, 3:5]
    inside = np.all(abs(points - center) <= 0.55 * size + _SLACK, axis=2)
    unlabelled = np.all(points == 0, axis=2)
    # A small polygon passes this test too, since a corner that is taken for a width and height is large. But then it
    # lies among the other corners.
    first, last = points.min(axis=1), points.max(axis=1)
    corner = np.all(abs(table[:, 3:5] - (first + last) / 2) <= last - first, axis=1)
    return 2 if np.mean(np.all(inside | unlabelled, axis=1)) >= _NEARLY_ALL and np.mean(corner) < 0.5 else 0


# ---- files without an image


def _report_orphans(dataset: RawDataset) -> None:
    """Report label files without an image in the folders of those that have one."""
    used = {dataset.label_paths[file] for split in dataset.splits.values() for file in split.label_files}
    known = {*used, *dataset.label_paths.values()}  # a list of images may lie beside the labels
    for folder in sorted({path.parent for path in used}):
        home = _with_last(folder.parts, "labels", "images")
        images = {Path(name).stem for name in _names(dataset, home) if is_image(name)}
        for name in sorted(_names(dataset, folder)):
            unknown = name not in CLASS_LISTS and folder / name not in known
            if unknown and name.endswith(".txt") and name[:-4] not in images:
                dataset.findings.add("label-orphan", "has no image", file=dataset.show(folder / name))


# ---- writing


def write_yolo(parts: dict[str, Dataset], to: Path) -> Path:
    """Write every split as images, label files and a `data.yaml`; return what to train on."""
    dataset = next(iter(parts.values()))
    facts: dict[str, dict[str, Any]] = {}
    for split, dataset in parts.items():
        facts[split] = {}
        for index, name in enumerate(image_names(dataset, flat=False, stems=True, used=set())):
            image = to / "images" / split / name
            copy_image(dataset, index, image)
            label = label_path(image)
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(_label_lines(dataset, index), "utf-8")
            facts[split][f"images/{split}/{name}"] = image_facts(dataset, index)
    write_ids(to, facts)
    document = {
        **{split: f"images/{split}" for split in parts},
        "nc": len(dataset.categories),
        "names": [c.name for c in dataset.categories],
        "category_ids": [c.id for c in dataset.categories],
    }
    path = to / "data.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1_000_000), "utf-8")
    return path


def _label_lines(dataset: Dataset, index: int) -> str:
    width, height = dataset.sizes_wh[index].tolist()
    rows = dataset.annotations(index)
    lines = []
    for (x1, y1, x2, y2), category in zip(rows.boxes_xyxy_px.tolist(), rows.labels.tolist(), strict=True):
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{category} " + " ".join(f"{value:.10g}" for value in box) + "\n")
    return "".join(lines)

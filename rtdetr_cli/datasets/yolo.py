"""Read YOLO: a `data.yaml`, images in folders or lists, and one text file an image.

A line is `class cx cy w h` in shares of the image, or `class x1 y1 x2 y2 ...`, a polygon, which becomes its
bounding box, or a box with the keypoints of a pose dataset, which are dropped. The YAML is read as plain text values: a
class called `no` or `0101` stays what it is.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rtdetr_cli.datasets.coco import sound_name
from rtdetr_cli.datasets.findings import Findings, Spot
from rtdetr_cli.datasets.kept import Kept, KeptBox, read_kept
from rtdetr_cli.datasets.label_text import Oddities, read_text
from rtdetr_cli.datasets.raw import RawDataset, Rows
from rtdetr_cli.datasets.records import Category
from rtdetr_cli.images.decode import IMAGE_SUFFIXES
from rtdetr_cli.text import counted

_MAX_YAML_BYTES = 1 << 20
_SPLIT_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_MAX_BRACKETS = 100
_BRACKET = re.compile(r"[\[\]{}]")
_ID = re.compile(r"-?[0-9]{1,19}")
_ROUNDING = 1e-3
_NOTHING = KeptBox()
_LOOKED_AT = 500
_LOOKED_AT_CHARACTERS = 1 << 16
"""Label files, and of each the first characters, that tell whether there are keypoints."""

_FEWEST_COLUMNS = 11
_NEARLY_ALL = 0.9
_SLACK = 0.01
_CLASS_FILES = frozenset({"classes.txt", "labels.txt", "obj.names"})


class _RepeatedKey(yaml.MarkedYAMLError):
    """A key that stands twice in one mapping."""


class _Plain(yaml.BaseLoader):
    """Builds only text, lists and mappings, and refuses a key that appears twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _RepeatedKey(problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


@dataclass(slots=True)
class YoloFile:
    """What a `data.yaml` says.

    Attributes:
        base: the folder that the splits' paths start from.
        classes: class number in the label files -> name.
        category_ids: class number -> the dataset's own id; the number itself unless our writer kept another.
        splits: split -> the folders and lists it names.
        keypoints: numbers that follow each box in a pose dataset; None where nothing is said of it.
        guessed: whether the labels, not the file, say that there are keypoints.
    """

    base: Path
    classes: dict[int, str]
    category_ids: dict[int, int]
    splits: dict[str, list[str]]
    keypoints: int | None
    guessed: bool = False


def read_yolo(dataset: RawDataset, path: Path, images: Path | None) -> None:
    """Read a `data.yaml` and everything it names into `dataset`."""
    oddities = Oddities()
    shown = dataset.show(path)
    dataset.label_paths[shown] = path
    described = _read_yaml(dataset, path, shown, images, oddities)
    if described is None:
        return
    numbers = sorted(described.classes, key=lambda n: described.category_ids[n])
    dataset.categories = tuple(Category(described.category_ids[n], described.classes[n]) for n in numbers)
    labels = {number: label for label, number in enumerate(numbers)}
    kept = read_kept(dataset, described.base, oddities)
    first = 1
    label_files: set[str] = set()
    listed: dict[str, list[Path]] = {}
    for split, entries in described.splits.items():
        paths = _images(dataset, described, split, entries, shown, oddities)
        if paths is not None:
            listed[split] = paths
    if described.keypoints is None:
        _guess_keypoints(dataset, described, [path for paths in listed.values() for path in paths], shown)
    for split, paths in listed.items():
        rows = _split(dataset, described, split, paths, labels, kept, first, oddities, label_files)
        dataset.splits[split] = rows.split(split, described.base)
        dataset.splits[split].normalized = True
        first += len(paths)
    _orphans(dataset, described, label_files)
    oddities.report(dataset.findings)


# ---- data.yaml


def _read_yaml(dataset: RawDataset, path: Path, shown: str, images: Path | None, oddities: Oddities) -> YoloFile | None:
    findings = dataset.findings
    text = read_text(path, shown, findings, oddities, limit=_MAX_YAML_BYTES)
    if text is None:
        return None
    if _brackets(text) > _MAX_BRACKETS:
        findings.add("file-bounds", "is nested too deeply", file=shown, line=1)
        return None
    try:
        document = yaml.load(text, _Plain)
    except _RepeatedKey as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        findings.add("file-repeated-key", str(error.problem), file=shown, line=line)
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        findings.add("file-malformed", f"is no valid YAML: {problem}", file=shown, line=mark.line + 1 if mark else 1)
        return None
    except RecursionError:
        findings.add("file-bounds", "is nested too deeply", file=shown, line=1)
        return None
    except (ValueError, TypeError, AttributeError) as error:  # PyYAML on odd input, such as a mapping as a key
        findings.add("file-malformed", f"is no valid YAML: {error}", file=shown, line=1)
        return None
    if not isinstance(document, dict):
        findings.add("file-malformed", "holds no keys: it is not a data.yaml", file=shown, line=1)
        return None
    classes = _class_names(document, shown, text, findings)
    if classes is None:
        return None
    base = _base(dataset, document, path, shown, text, images)
    splits: dict[str, list[str]] = {}
    for split, keys in _SPLIT_KEYS.items():
        for key in keys:
            value = document.get(key)
            if value in (None, "", "null", "~"):
                continue
            entries = value if isinstance(value, list) else [value]
            if not entries or not all(isinstance(entry, str) and sound_name(entry) for entry in entries):
                findings.add(
                    "file-malformed",
                    f"says {key}: {str(value)[:60]}, which is no path and no list of paths",
                    file=shown,
                    line=_line(text, key),
                )
            else:
                splits.setdefault(split, entries)
    return YoloFile(base, classes, _category_ids(document, classes), splits, _keypoints(document))


def _brackets(text: str) -> int:
    """Return how deep brackets are nested at most; the YAML scanner takes quadratic time on deep ones."""
    depth = deepest = 0
    for mark in _BRACKET.findall(text):
        depth = depth + 1 if mark in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _class_names(document: dict[Any, Any], shown: str, text: str, findings: Findings) -> dict[int, str] | None:
    names, line = document.get("names"), _line(text, "names")
    count = _whole(document.get("nc"))
    classes: dict[int, str] = {}
    if isinstance(names, list):
        pairs: list[tuple[Any, Any]] = list(enumerate(names))
    elif isinstance(names, dict):
        pairs = list(names.items())
    elif names is None and count is not None and 0 < count <= 100_000:
        return {number: f"class_{number}" for number in range(count)}
    else:
        findings.add("category-none", "has no list of names", file=shown, line=line)
        return None
    sound = True
    for key, name in pairs:
        number = _whole(key)
        if number is None or number < 0 or not isinstance(name, str) or not sound_name(name.strip()):
            findings.add(
                "category-malformed", f"has the class {str(key)[:40]}: {str(name)[:40]!r}", file=shown, line=line
            )
            sound = False
        elif number in classes:
            findings.add("category-conflict", f"has class {number} twice", file=shown, line=line)
            sound = False
        else:
            classes[number] = name.strip()
    if count is not None and count != len(pairs):
        findings.add(
            "category-count",
            f"says nc: {count}, but names has {counted(len(pairs), 'class')}",
            file=shown,
            line=_line(text, "nc"),
        )
    if not classes and sound:
        findings.add("category-none", "has no names", file=shown, line=line)
    return classes if sound else None


def _category_ids(document: dict[Any, Any], classes: dict[int, str]) -> dict[int, int]:
    kept = document.get("category_ids")
    numbers = sorted(classes)
    if isinstance(kept, list) and len(kept) == len(numbers):
        ids = [int(value) for value in kept if isinstance(value, str) and _ID.fullmatch(value)]
        if len(set(ids)) == len(numbers) and all(-(1 << 63) <= i < 1 << 63 for i in ids):
            return dict(zip(numbers, ids, strict=True))
    return {number: number for number in numbers}


def _keypoints(document: dict[Any, Any]) -> int | None:
    shape = document.get("kpt_shape")
    if isinstance(shape, list) and len(shape) == 2:
        points, each = _whole(shape[0]), _whole(shape[1])
        if points is not None and each is not None and points < 1000 and each in (2, 3):
            return points * each
    return None


def _base(
    dataset: RawDataset, document: dict[Any, Any], path: Path, shown: str, text: str, images: Path | None
) -> Path:
    """Return the folder that the splits start from; the dataset's folder is then that one too."""
    home = path.parent
    if images is not None:
        return images
    said = document.get("path")
    if not isinstance(said, str) or said in ("", ".", "./") or not sound_name(said):
        return home
    for candidate in (home / said, Path(said)):
        # A dataset that claims the whole disk would have it searched for images.
        if candidate.is_dir() and candidate.resolve() != Path(candidate.resolve().anchor):
            dataset.roots = (*dataset.roots, candidate)
            return candidate
    dataset.findings.add(
        "yolo-path",
        f"says path: {said[:200]}, which does not exist; the folder of the file is used",
        file=shown,
        line=_line(text, "path"),
    )
    return home


def _whole(value: Any) -> int | None:
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _line(text: str, key: str) -> int:
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith(f"{key}:"):
            return number
    return 1


# ---- images


def _images(
    dataset: RawDataset, described: YoloFile, split: str, entries: list[str], shown: str, oddities: Oddities
) -> list[Path] | None:
    """Return the images of a split, or None with a finding."""
    found: list[Path] = []
    for entry in entries:
        where = _locate(described.base, entry)
        if where is None:
            dataset.findings.add(
                "split-missing",
                f"says {split}: {entry}, which is neither a folder nor a list in {described.base}",
                file=shown,
                spot=Spot(split),
            )
            return None
        if where.is_dir():
            if not _inside(dataset, where):
                dataset.findings.add(
                    "image-outside",
                    f"says {split}: {entry}, which lies outside the dataset's folder",
                    file=shown,
                    spot=Spot(split),
                    hint="set path: to the folder that holds every split",
                )
                return None
            found += _images_below(where)
        else:
            found += _listed(dataset, described, where, oddities)
    return found


def _inside(dataset: RawDataset, folder: Path) -> bool:
    real = os.path.realpath(folder)
    roots = [os.path.realpath(root) for root in dataset.roots]
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def _locate(base: Path, entry: str) -> Path | None:
    """Return the folder or list that a split names; Roboflow writes `../train/images` for `train/images`."""
    candidates = [base / entry]
    stripped = entry
    while stripped.startswith("../"):
        stripped = stripped[3:]
        candidates.append(base / stripped)
    for candidate in candidates:
        try:
            if candidate.is_dir() or (candidate.is_file() and candidate.suffix.lower() == ".txt"):
                return candidate
        except OSError:  # a name too long for the file system
            return None
    return None


def _images_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(Path(parent, name))
    return found


def _listed(dataset: RawDataset, described: YoloFile, path: Path, oddities: Oddities) -> list[Path]:
    shown = dataset.show(path)
    dataset.label_paths[shown] = path
    text = read_text(path, shown, dataset.findings, oddities)
    if text is None:
        return []
    lines = [line.strip() for line in text.split("\n")]
    names = [line for line in lines if line and sound_name(line)]
    bases = [described.base, path.parent]
    best = max(bases, key=lambda b: sum(os.path.lexists(os.path.join(b, name)) for name in names[:32]))
    return [best / name for name in names]


def label_path(image: Path) -> Path:
    """Return the label file of an image: the last folder called `images` becomes `labels`."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


# ---- labels


def _split(
    dataset: RawDataset,
    described: YoloFile,
    split: str,
    images: list[Path],
    labels: dict[int, int],
    kept: Kept,
    first_id: int,
    oddities: Oddities,
    label_files: set[str],
) -> Rows:
    rows = Rows()
    listings: dict[str, set[str]] = {}
    numbered = f"names has {counted(len(labels), 'class')}"
    if labels:
        numbered += f" ({min(labels)} to {max(labels)})"
    base = described.base
    for position, path in enumerate(images):
        try:
            name = str(path.relative_to(base))
        except ValueError:
            name = str(path)
        label = label_path(path)
        folder = str(label.parent)
        if folder not in listings:
            try:
                listings[folder] = set(os.listdir(folder))
            except OSError:
                listings[folder] = set()
        own_id, facts = kept.image(split, name)
        image_id = first_id + position if own_id is None else own_id
        if label.name not in listings[folder]:
            rows.add_image(name, image_id=image_id, size_wh=(0, 0), label_file="")
            dataset.findings.add(
                "label-missing",
                f"has no label file ({dataset.show(label)})",
                file=dataset.show(path),
                image_id=image_id,
                spot=Spot(split, position),
            )
            continue
        shown = dataset.show(label)
        label_files.add(str(label))
        dataset.label_paths[shown] = label
        image = rows.add_image(name, image_id=image_id, size_wh=(0, 0), label_file=shown)
        text = read_text(label, shown, dataset.findings, oddities)
        if text is None:
            continue
        lines = [(number, line) for number, line in enumerate(text.split("\n")) if line.strip()]
        if len(facts) != len(lines):
            facts = [_NOTHING] * len(lines)
        for count, (number, line) in enumerate(lines):
            _line_of_label(
                dataset.findings,
                rows,
                image,
                number,
                line,
                labels,
                numbered,
                described,
                facts[count],
                Spot(split, image, number),
                shown,
            )
    if len(set(rows.image_ids)) != len(rows.image_ids):
        rows.image_ids = list(range(first_id, first_id + len(rows.image_ids)))
    return rows


def _line_of_label(
    findings: Findings,
    rows: Rows,
    image: int,
    number: int,
    line: str,
    labels: dict[int, int],
    numbered: str,
    described: YoloFile,
    facts: KeptBox,
    spot: Spot,
    shown: str,
) -> None:
    where: dict[str, Any] = {
        "file": shown,
        "line": number + 1,
        "image_id": rows.image_ids[image],
        "spot": spot,
    }
    words = line.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        wrong = next(word for word in words if not _is_number(word))
        findings.add("box-not-number", f"has {wrong[:40]!r}, which is no number", **where)
        return
    keypoints = described.keypoints or 0
    if len(values) == 5 + keypoints:
        values = values[:5]
    elif described.guessed and len(values) == 5:
        pass
    elif (keypoints and not described.guessed) or len(values) < 7 or len(values) % 2 == 0:
        wanted = f"{5 + keypoints}" if keypoints and not described.guessed else "5, or a class and three points or more"
        findings.add("label-columns", f"has {counted(len(values), 'column')} in place of {wanted}", **where)
        return
    if not all(map(math.isfinite, values)):
        findings.add("box-not-finite", f"has the values {' '.join(words[:7])[:80]}", **where)
        return
    label = labels.get(int(values[0])) if values[0].is_integer() else None
    if label is None:
        findings.add("category-unknown", f"has class {words[0][:20]}, but {numbered}", **where)
        return
    shares = values[1:]
    low, high = min(shares), max(shares)
    if high > 2 or low < -1:
        findings.add("label-pixels", f"has {(low if low < -1 else high):g}, which is no share of the image", **where)
        return
    beyond = low < -_ROUNDING or high > 1 + _ROUNDING
    if len(shares) == 4:
        cx, cy, w, h = shares
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        area = float("nan")
        if w < 0 or h < 0:
            beyond = False  # said as an inverted box
    else:
        xs, ys = shares[0::2], shares[1::2]
        box = (min(xs), min(ys), max(xs), max(ys))
        area = abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
    if beyond:
        findings.add("label-beyond-one", f"has {(high if high > 1 else low):g}, beyond 0 to 1", **where)
    rows.add_box(
        image,
        box,
        label,
        line=number + 1,
        entry=number,
        area=area if math.isnan(facts.area_share) else facts.area_share,
        crowd=facts.crowd,
        annotation_id=facts.annotation_id,
        beyond=beyond,
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# ---- keypoints that nobody announced


def _guess_keypoints(dataset: RawDataset, described: YoloFile, images: list[Path], shown: str) -> None:
    """Find out from the labels whether boxes are followed by keypoints, and say so."""
    few = images[:: max(1, len(images) // _LOOKED_AT)]
    rows = [values for path in few for values in _numbers(label_path(path))]
    if not rows:
        return
    columns, count = Counter(map(len, rows)).most_common(1)[0]
    if columns < _FEWEST_COLUMNS or count < _NEARLY_ALL * len(rows):
        return
    table = np.asarray([row for row in rows if len(row) == columns])
    each = _point_size(table)
    if not each:
        return
    described.keypoints, described.guessed = columns - 5, True
    shape = f"kpt_shape: [{(columns - 5) // each}, {each}]"
    dataset.findings.add(
        "yolo-pose",
        f"has no kpt_shape, but label lines of {columns} columns: they are read as a class, a box and "
        f"{counted((columns - 5) // each, 'keypoint')}, which are dropped",
        file=shown,
        line=1,
        hint=f"write {shape} into {shown}; or kpt_shape: [0, 2] if the lines are polygons",
    )


def _numbers(label: Path) -> list[list[float]]:
    """Return the lines of a label file that are numbers; its faults are told by whoever reads it in earnest."""
    if not label.is_file():  # reading a pipe would wait for ever
        return []
    try:
        with open(label, encoding="utf-8", errors="replace") as file:
            lines = file.read(_LOOKED_AT_CHARACTERS).splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            continue
        if row and all(map(math.isfinite, row)):
            rows.append(row)
    return rows


def _point_size(table: NDArray[np.float64]) -> int:
    """Return how many numbers each keypoint behind a box has (2, or 3 with its visibility), or 0: these are polygons.

    Args:
        table: (L, 5 + P) lines of one length.
    """
    middle, size, rest = table[:, 1:3], table[:, 3:5], table[:, 5:]
    low, high = middle - size / 2, middle + size / 2
    boxes = np.all((size > 0) & (low > -_SLACK) & (high < 1 + _SLACK), axis=1)
    for each in (3, 2):
        if rest.shape[1] % each:
            continue
        points = rest.reshape(len(table), -1, each)
        # What was not labelled stands at 0, 0.
        labelled = np.any(points[..., :2] != 0, axis=2)
        room = _SLACK + 0.05 * size[:, None]
        inside = np.all((points[..., :2] >= low[:, None] - room) & (points[..., :2] <= high[:, None] + room), axis=2)
        fits = boxes & np.all(inside | ~labelled, axis=1)
        if np.mean(fits) < _NEARLY_ALL:
            continue
        if each == 3 and np.isin(points[..., 2], (0, 1, 2)).all():
            return 3
        if each == 2:
            # A small polygon passes for all that: a corner taken for a width and height is large. But it is then
            # itself among the other corners.
            first, last = points.min(axis=1), points.max(axis=1)
            room = (last - first) / 2
            corner = np.all((size >= first - room) & (size <= last + room), axis=1)
            return 2 if np.mean(corner) < 0.5 else 0
    return 0


# ---- files without an image


def _orphans(dataset: RawDataset, described: YoloFile, label_files: set[str]) -> None:
    folders = {os.path.dirname(file) for file in label_files}
    for folder in sorted(folders):
        images: set[str] | None = None
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if not name.endswith(".txt") or name in _CLASS_FILES or path in label_files:
                continue
            if images is None:
                images = _stems_of(Path(folder))
            if name[:-4] not in images:
                dataset.findings.add("label-orphan", "has no image", file=dataset.show(Path(path)))


def _stems_of(label_folder: Path) -> set[str]:
    """Return the names, without suffix, of the images whose labels lie in a folder."""
    parts = list(label_folder.parts)
    for position in range(len(parts) - 1, -1, -1):
        if parts[position] == "labels":
            parts[position] = "images"
            break
    try:
        files = os.listdir(Path(*parts))
    except OSError:
        return set()
    return {os.path.splitext(f)[0] for f in files if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES}

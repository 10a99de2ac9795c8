"""Read `data.yaml`, which describes a YOLO dataset.

Its values are read as plain text: a class called `no` or `0101` stays what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rtdetr_cli.datasets.findings import Findings
from rtdetr_cli.datasets.json_text import line_of
from rtdetr_cli.datasets.label_text import is_valid_name
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.survey import is_inside
from rtdetr_cli.text import counted, whole_number

SPLIT_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_MAX_YAML_BYTES = 1 << 20
_MAX_BRACKETS = 100
_MAX_VALUES = 1_000_000
_BRACKET = re.compile(r"[\[\]{}]")
_ID = re.compile(r"-?[0-9]{1,19}")


class _RepeatedKey(yaml.MarkedYAMLError):
    """A key that appears twice in one mapping."""


class _PlainLoader(yaml.BaseLoader):
    """Builds only text, lists and mappings, and refuses a key that appears twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys are unique."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _RepeatedKey(problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


@dataclass(slots=True)
class DataYaml:
    """The content of a `data.yaml`.

    Attributes:
        base: the folder that the paths of splits are relative to.
        classes: class number in the label files -> name.
        category_ids: class number -> the dataset's own id; the number itself unless our writer stored another.
        splits: split -> the folders and lists it names.
        keypoints: numbers that follow each box in a pose dataset; None if the file doesn't say.
        keypoints_guessed: whether that number comes from the labels and not from the file.
        file: how messages call the file that defines the classes.
    """

    base: Path
    classes: dict[int, str]
    category_ids: dict[int, int]
    splits: dict[str, list[str]]
    keypoints: int | None
    keypoints_guessed: bool = False
    file: str = "data.yaml"

    def box_columns(self, columns: int) -> tuple[int, str]:
        """Return how many columns of a label line hold its class and box or polygon; or 0, and what is wanted."""
        with_keypoints = 5 + (self.keypoints or 0)
        if columns in (with_keypoints, 5 if self.keypoints_guessed else with_keypoints):
            return 5, ""
        if self.keypoints and not self.keypoints_guessed:
            return 0, str(with_keypoints)
        polygon = columns >= 7 and columns % 2 == 1
        return (columns, "") if polygon else (0, "5, or a class and at least three points")


def read_yaml(dataset: RawDataset, path: Path) -> DataYaml | None:
    """Read a `data.yaml`; None with a finding if that is not possible."""
    findings = dataset.findings
    file, text = dataset.read_label(path, limit=_MAX_YAML_BYTES)
    if text is None:
        return None
    document = _parse(text, file, findings)
    if document is None:
        return None
    classes = _class_names(document, file, text, findings)
    if classes is None:
        return None
    base = _base(dataset, document, path, file, text)
    splits: dict[str, list[str]] = {}
    for split, keys in SPLIT_KEYS.items():
        for key in keys:
            value = document.get(key)
            if value in (None, "", "null", "~"):
                continue
            entries = value if isinstance(value, list) else [value]
            if not entries or not all(isinstance(entry, str) and is_valid_name(entry) for entry in entries):
                message = f"has {key}: {str(value)[:60]}, which is neither a path nor a list of paths"
                findings.add("file-malformed", message, file=file, line=_line(text, key))
            else:
                splits.setdefault(split, entries)
    return DataYaml(base, classes, _category_ids(document, classes), splits, _keypoints(document))


def _parse(text: str, file: str, findings: Findings) -> dict[Any, Any] | None:
    mark: yaml.Mark | None = None
    try:
        if _brackets(text) > _MAX_BRACKETS:
            raise RecursionError
        document = yaml.load(text, _PlainLoader)
        if not _is_bounded(document):
            raise RecursionError
        if isinstance(document, dict):
            return document
        code, message = "file-malformed", "contains no keys: it is not a data.yaml"
    except RecursionError:
        code, message = "file-bounds", "is nested too deeply, or its aliases repeat too much"
    except _RepeatedKey as error:
        code, message, mark = "file-repeated-key", str(error.problem), error.problem_mark
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        code, message, mark = "file-malformed", f"is not valid YAML: {problem}", getattr(error, "problem_mark", None)
    except (ValueError, TypeError, AttributeError) as error:  # PyYAML on odd input, such as a mapping as a key
        code, message = "file-malformed", f"is not valid YAML: {error}"
    findings.add(code, message, file=file, line=mark.line + 1 if mark else 1)
    return None


def _brackets(text: str) -> int:
    """Return how deep brackets are nested; the YAML scanner takes quadratic time on deep ones."""
    depth = deepest = 0
    for mark in _BRACKET.findall(text):
        depth = depth + 1 if mark in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _is_bounded(document: Any) -> bool:
    """Return whether a document is of a reasonable size when every alias is replaced by what it stands for."""
    waiting = [document]
    for _ in range(_MAX_VALUES):
        if not waiting:
            return True
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return False


def _class_names(document: dict[Any, Any], file: str, text: str, findings: Findings) -> dict[int, str] | None:
    names, line = document.get("names"), _line(text, "names")
    count = _count(document.get("nc"))
    classes: dict[int, str] = {}
    if isinstance(names, list):
        pairs: list[tuple[Any, Any]] = list(enumerate(names))
    elif isinstance(names, dict):
        pairs = list(names.items())
    elif names is None and count is not None and 0 < count <= 100_000:
        return {number: f"class_{number}" for number in range(count)}
    else:
        findings.add("category-none", "has no list of names", file=file, line=line)
        return None
    for key, name in pairs:
        number = _count(key)
        if number is None or not isinstance(name, str) or not is_valid_name(name.strip()):
            message = f"has the class {str(key)[:40]}: {str(name)[:40]!r}"
            findings.add("category-malformed", message, file=file, line=line)
        elif number in classes:
            findings.add("category-conflict", f"has class {number} twice", file=file, line=line)
        else:
            classes[number] = name.strip()
    if count is not None and count != len(pairs):
        message = f"has nc: {count}, but names has {counted(len(pairs), 'class')}"
        findings.add("category-count", message, file=file, line=_line(text, "nc"))
    if not pairs:
        findings.add("category-none", "has no names", file=file, line=line)
    return classes if len(classes) == len(pairs) else None


def _category_ids(document: dict[Any, Any], classes: dict[int, str]) -> dict[int, int]:
    stored = document.get("category_ids")
    numbers = sorted(classes)
    if isinstance(stored, list) and len(stored) == len(numbers):
        ids = [int(value) for value in stored if isinstance(value, str) and _ID.fullmatch(value)]
        if len(set(ids)) == len(numbers) and all(-(1 << 63) <= i < 1 << 63 for i in ids):
            return dict(zip(numbers, ids, strict=True))
    return {number: number for number in numbers}


def _keypoints(document: dict[Any, Any]) -> int | None:
    shape = document.get("kpt_shape")
    if isinstance(shape, list) and len(shape) == 2:
        points, each = _count(shape[0]), _count(shape[1])
        if points is not None and each is not None and points < 1000 and each in (2, 3):
            return points * each
    return None


def _base(dataset: RawDataset, document: dict[Any, Any], path: Path, file: str, text: str) -> Path:
    """Return the folder that the paths of splits are relative to; it becomes one of the dataset's roots."""
    home = path.parent
    if dataset.images is not None:
        return dataset.images
    value = document.get("path")
    if not isinstance(value, str) or value in ("", ".", "./") or not is_valid_name(value):
        return home
    named = PurePosixPath(value.replace("\\", "/")).name
    # ultralytics has the file beside the dataset's folder, and `path: ../datasets/NAME`.
    base, used = (
        (home / named, f"the folder {named} beside") if named and (home / named).is_dir() else (home, "the folder of")
    )
    for candidate in (home / value, Path(value)):
        # With the root of the disk as its folder, a dataset would search all of it for images.
        allowed = not dataset.contained or is_inside(candidate, (dataset.folder,))
        if allowed and candidate.is_dir() and candidate.resolve() != Path(candidate.resolve().anchor):
            base, used = candidate, ""
            break
    if used:
        message = f"has path: {value[:200]}, which does not exist; {used} the file is used"
        dataset.findings.add("yolo-path", message, file=file, line=_line(text, "path"))
    if base != home:
        dataset.roots = (*dataset.roots, base)
    return base


def _count(value: Any) -> int | None:
    return whole_number(str(value).strip(), digits=9)


def _line(text: str, key: str) -> int:
    match = re.search(rf"^[ \t]*{key}:", text, re.MULTILINE)
    return line_of(text, match.start()) if match else 1

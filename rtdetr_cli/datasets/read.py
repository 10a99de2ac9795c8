"""Detect the format of a dataset, and read it: COCO JSON, Roboflow folders, YOLO `data.yaml`, Pascal VOC.

Each format has a section below. Its `_find_...` function returns a `Match` if a folder looks like that format; a new
format is added by appending such a function to `_FORMATS`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rtdetr_cli.datasets.coco import read_coco
from rtdetr_cli.datasets.ids_file import IDS_FILE
from rtdetr_cli.datasets.label_text import Oddities, is_valid_name, read_text
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.voc import VocSplit, files_by_stem, listed_name, read_voc
from rtdetr_cli.datasets.yolo import read_yolo
from rtdetr_cli.errors import DataError
from rtdetr_cli.images.decode import IMAGE_SUFFIXES

ROBOFLOW_FILE = "_annotations.coco.json"
CHANGES_FILE = "changes.json"
"""The list of changes in a repaired copy."""

SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
_WORD = re.compile(r"[a-z]+")
_SUPPORTED = "a COCO JSON file, a Roboflow folder, a YOLO data.yaml or a Pascal VOC folder"
_EDGE_BYTES = 1 << 16
"""Bytes at the beginning and the end of a file that decide what it is."""


@dataclass(frozen=True, slots=True)
class Match:
    """A format that a folder looks like.

    Attributes:
        format: its name.
        evidence: the file or folder that shows it.
        read: reads the dataset; takes the image folder, or None to find it.
    """

    format: str
    evidence: Path
    read: Callable[[Path | None], RawDataset]


def read_raw(source: Path, *, images: Path | None = None) -> RawDataset:
    """Detect the format and read every split, without checking boxes or images.

    Raises:
        DataError: there is nothing at `source`, or it is not a supported dataset.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"the dataset {source} does not exist", hint="check the path", code="dataset-missing")
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images} is not a folder", hint="check the path", code="images-missing")
    if source.is_file():
        suffix = source.suffix.lower()
        if suffix == ".json":
            return _read_coco_file(source, images)
        if suffix in (".yaml", ".yml"):
            return _read_yolo_file(source, images)
        raise DataError(
            f"{source} is not {_SUPPORTED}", hint="pass the dataset's folder or its label file", code="format-unknown"
        )
    if source.name == "Annotations" and any(source.glob("*.xml")):
        return _read_voc_folder(source.parent, source, images)
    return _read_folder(source, images)


def _read_folder(folder: Path, images: Path | None) -> RawDataset:
    """Read the one dataset that a folder contains."""
    matches = [match for find in _FORMATS if (match := find(folder)) is not None]
    if not matches:
        raise DataError(
            f"{folder} does not contain a supported dataset", hint=f"pass {_SUPPORTED}", code="format-unknown"
        )
    if len(matches) > 1:
        found = " and ".join(f"{m.format} ({m.evidence.relative_to(folder) or '.'})" for m in matches)
        raise DataError(
            f"{folder} contains more than one dataset: {found}",
            hint="pass the JSON or YAML file, or the Annotations folder, of the one you want",
            code="format-ambiguous",
        )
    return matches[0].read(images)


def _new_dataset(name: str, form: str, source: Path, folder: Path, images: Path | None) -> RawDataset:
    roots = (folder,) if images is None else (folder, images)
    return RawDataset(source=source, name=name or _folder_name(folder), format=form, folder=folder, roots=roots)


def _folder_name(folder: Path) -> str:
    return folder.resolve().name or "dataset"


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the subfolders that are named like a split."""
    folders: dict[str, Path] = {}
    for split, words in _SPLIT_WORDS.items():
        for word in words:
            if (folder / word).is_dir():
                folders.setdefault(split, folder / word)
    return folders


def _split_of(name: str) -> str | None:
    """Return the split that a file name contains: `instances_val2017` is val."""
    words = _WORD.findall(name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if any(word in known for word in words)), None)


def _edges(path: Path) -> bytes:
    """Return the first and the last kilobytes of a file; nothing if it is not a readable file."""
    if not path.is_file():
        return b""
    try:
        with open(path, "rb") as file:
            head = file.read(_EDGE_BYTES)
            file.seek(max(0, path.stat().st_size - _EDGE_BYTES))
            return head + file.read()
    except OSError:
        return b""


# ---- Roboflow


def _find_roboflow(folder: Path) -> Match | None:
    """Match a folder with `_annotations.coco.json` in it, or in the folder of each split."""
    files = {s: path / ROBOFLOW_FILE for s, path in _split_folders(folder).items()} | {"": folder / ROBOFLOW_FILE}
    files = {split: path for split, path in files.items() if path.is_file()}
    if not files:
        return None
    if len(files) > 1:
        files.pop("", None)  # the splits' own files take precedence
    labels = {split or "train": path for split, path in files.items()}

    def read(images: Path | None) -> RawDataset:
        raw = _new_dataset("", "roboflow", folder, folder, images)
        read_coco(raw, {split: (path, images or path.parent) for split, path in labels.items()})
        return raw

    return Match("roboflow", folder, read)


# ---- COCO


def _find_coco(folder: Path) -> Match | None:
    """Match a folder with COCO files in it or in `annotations/`."""
    files = _coco_files(folder)
    if not files:
        return None

    def read(images: Path | None) -> RawDataset:
        raw = _new_dataset("", "coco", folder, folder, images)
        read_coco(raw, {split: (path, images or _find_images(path, split, folder)) for split, path in files.items()})
        return raw

    return Match("coco", next(iter(files.values())), read)


def _coco_files(folder: Path) -> dict[str, Path]:
    """Return the COCO files of a folder: one per split, or a single one as train."""
    for parent in (folder, folder / "annotations"):
        files = [
            path
            for path in sorted(parent.glob("*.json"))
            if path.name not in (ROBOFLOW_FILE, IDS_FILE, CHANGES_FILE) and _is_coco_json(path)
        ]
        if len(files) == 1:
            return {"train": files[0]}
        by_kind: dict[str, dict[str, Path]] = {}
        for path in files:
            split = _split_of(path.stem)
            if split is not None:
                by_kind.setdefault(_kind(path), {}).setdefault(split, path)
        complete = [kind for kind, members in by_kind.items() if "train" in members]
        if complete:
            kind = next((kind for kind in complete if "instances" in kind), complete[0])
            return {split: by_kind[kind][split] for split in SPLITS if split in by_kind[kind]}
    return {}


def _is_coco_json(path: Path) -> bool:
    """Return whether a JSON file may be COCO and not, say, a configuration or a list of results."""
    edges = _edges(path)
    return any(key in edges for key in (b'"images"', b'"annotations"', b'"categories"'))


def _kind(path: Path) -> str:
    """Return a file's name without its split: `instances_train2017` and `instances_val2017` belong together."""
    split_words = {word for known in _SPLIT_WORDS.values() for word in known}
    return " ".join(word for word in _WORD.findall(path.stem.lower()) if word not in split_words)


def _read_coco_file(path: Path, images: Path | None) -> RawDataset:
    """Read a COCO file, and the files of the other splits beside it if it is one of a set."""
    folder = path.parent
    home = folder.parent if folder.name == "annotations" and _is_dataset_folder(folder.parent) else folder
    files = {"train": path}
    split = _split_of(path.stem)
    if path.name == ROBOFLOW_FILE:
        split = _split_of(folder.name)
        siblings = _split_folders(folder.parent) if split else {}
        if sum((sibling / ROBOFLOW_FILE).is_file() for sibling in siblings.values()) > 1:
            return _read_folder(folder.parent, images)
    elif split is not None:
        siblings = {s: p for p in sorted(folder.glob("*.json")) if (s := _split_of(p.stem)) and _kind(p) == _kind(path)}
        if len(siblings) > 1 and "train" in siblings:
            siblings[split] = path
            files = {s: siblings[s] for s in SPLITS if s in siblings}
    name = path.stem if split is None and path.stem not in ("instances", "annotations", "_annotations.coco") else ""
    raw = _new_dataset(name, "coco", path, home, images)
    read_coco(raw, {s: (p, images or _find_images(p, s, home)) for s, p in files.items()})
    return raw


def _is_dataset_folder(folder: Path) -> bool:
    """Return whether the folder around `annotations/` belongs to the dataset, and is not, say, a home folder."""
    return any((folder / name).is_dir() for name in ("images", "train", "val", "train2017", "val2017", "JPEGImages"))


def _find_images(json_file: Path, split: str, home: Path) -> Path:
    """Return the folder that contains most of the first images that a COCO file names."""
    split_names = [json_file.stem.removeprefix("instances_"), *_SPLIT_WORDS[split]]
    parents = dict.fromkeys((json_file.parent, json_file.parent / "images", home, home / "images"))
    candidates = [folder for parent in parents for folder in (parent, *(parent / name for name in split_names))]
    names = _first_names(json_file)
    best, most = json_file.parent, 0
    for folder in dict.fromkeys(candidates):
        count = sum(os.path.lexists(folder / name) for name in names) if folder.is_dir() else 0
        if count > most:
            best, most = folder, count
    if not most and (home / "images").is_dir():
        return home / "images"
    return best


def _first_names(json_file: Path) -> list[str]:
    """Return up to 32 of the file names in a COCO file, without parsing it."""
    try:
        with open(json_file, "rb") as file:
            text = file.read(1 << 18)
            if b'"file_name"' not in text:  # in some files the annotations come first
                file.seek(0)
                text = file.read(1 << 28)
    except OSError:
        return []
    names: list[str] = []
    for match in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text):
        try:
            name = json.loads(match.group(1))
        except ValueError:
            continue
        if name and "\0" not in name and len(name) < 4096:
            names.append(os.fsdecode(name.encode("utf-8", "replace")))
        if len(names) >= 32:
            break
    return names


# ---- YOLO


def _find_yolo(folder: Path) -> Match | None:
    """Match a folder with a `data.yaml`, or with a single YAML file that looks like one."""
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            files = [folder / name]
            break
    else:
        files = [p for p in sorted(folder.glob("*.y*ml")) if p.suffix in (".yaml", ".yml") and _is_yolo_yaml(p)]
    if len(files) != 1:
        return None
    return Match("yolo", files[0], lambda images: _read_yolo_file(files[0], images, source=folder))


def _is_yolo_yaml(path: Path) -> bool:
    edges = _edges(path)
    return re.search(rb"^names\s*:", edges, re.MULTILINE) is not None and b"train" in edges


def _read_yolo_file(path: Path, images: Path | None, *, source: Path | None = None) -> RawDataset:
    name = path.stem if path.stem not in ("data", "dataset") else ""
    raw = _new_dataset(name, "yolo", source or path, path.parent, images)
    read_yolo(raw, path, images)
    return raw


# ---- Pascal VOC


def _find_voc(folder: Path) -> Match | None:
    """Match a folder with `Annotations/`, here or in `VOCdevkit/VOC2007`, or with XML files in each split's folder."""
    for candidate in (folder, *sorted(folder.glob("VOC2*")), *sorted(folder.glob("VOCdevkit/VOC2*"))):
        annotations = candidate / "Annotations"
        if annotations.is_dir() and ((candidate / "ImageSets" / "Main").is_dir() or any(annotations.glob("*.xml"))):
            break
    else:
        if not any(any(path.glob("*.xml")) for path in _split_folders(folder).values()):
            return None
        candidate = folder
    return Match("voc", candidate, lambda images: _read_voc_folder(candidate, folder, images))


def _read_voc_folder(folder: Path, source: Path, images: Path | None) -> RawDataset:
    raw = _new_dataset("", "voc", source, folder, images)
    read_voc(raw, _voc_splits(raw, folder, images))
    return raw


def _voc_splits(raw: RawDataset, folder: Path, images: Path | None) -> dict[str, VocSplit]:
    """Return the splits: those of `ImageSets/Main/`, the folders of the splits, or all images as train."""
    xml_folder = folder / "Annotations"
    if not xml_folder.is_dir():  # one folder per split, with images and XML files in it
        return {split: _voc_split(path, images or path) for split, path in _split_folders(folder).items()}
    image_folder = images or next(
        (folder / name for name in ("JPEGImages", "images", "Images") if (folder / name).is_dir()), folder
    )
    whole = _voc_split(xml_folder, image_folder)
    splits: dict[str, VocSplit] = {}
    lists = folder / "ImageSets" / "Main"
    oddities = Oddities()
    trainval = {} if (lists / "train.txt").is_file() else {"train": lists / "trainval.txt"}
    for split, path in {**{s: lists / f"{s}.txt" for s in SPLITS}, **trainval}.items():
        if not path.is_file():
            continue
        shown = raw.show(path)
        raw.label_paths[shown] = path
        text = read_text(path, shown, raw.findings, oddities)
        names = []
        for number, line in enumerate((text or "").split("\n"), 1):
            name = listed_name(line, whole.xml_files)
            if is_valid_name(name):
                names.append(name)
            elif name:
                raw.findings.add("file-malformed", f"has the name {name[:40]!r}", file=shown, line=number)
        splits[split] = replace(whole, names=names)
    oddities.report(raw.findings)
    return splits or {"train": whole}


def _voc_split(xml_folder: Path, image_folder: Path) -> VocSplit:
    """Return all images of a folder as a split."""
    images = files_by_stem(image_folder, IMAGE_SUFFIXES)
    xml_files = {stem: xml_folder / name for stem, name in files_by_stem(xml_folder, (".xml",)).items()}
    return VocSplit(list(images), xml_folder, image_folder, xml_files, images)


_FORMATS = (_find_yolo, _find_roboflow, _find_voc, _find_coco)

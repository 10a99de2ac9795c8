"""Find out what a dataset is, and read it: COCO JSON, Roboflow folders, YOLO `data.yaml`, Pascal VOC."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from rtdetr_cli.datasets.coco import read_coco, sound_name
from rtdetr_cli.datasets.kept import IDS_FILE
from rtdetr_cli.datasets.label_text import Oddities, read_text
from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.voc import VocSplit, is_image, listed_name, read_voc
from rtdetr_cli.datasets.yolo import read_yolo
from rtdetr_cli.errors import DataError

ROBOFLOW_FILE = "_annotations.coco.json"
SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
_WORD = re.compile(r"[a-z]+")
_FORMATS = "a COCO JSON file, a Roboflow folder, a YOLO data.yaml or a Pascal VOC folder"


# ---------------------------------------------------------------------------------------------------------------------
# What is it?


def read_raw(source: Path, *, images: Path | None = None) -> RawDataset:
    """Detect the format and read every split, without judging boxes or images.

    Raises:
        DataError: there is nothing there, or it is no dataset that is known.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"the dataset {source} does not exist", hint="check the path", code="dataset-missing")
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images} is not a folder", hint="check the path", code="images-missing")
    if source.is_file():
        suffix = source.suffix.lower()
        if suffix == ".json":
            return _coco_file(source, images)
        if suffix in (".yaml", ".yml"):
            return _yolo_file(source, images)
        raise DataError(f"{source} is not {_FORMATS}", hint="name the folder or its label file", code="format-unknown")
    if source.name == "Annotations" and any(source.glob("*.xml")):
        return _voc(source.parent, source, images)
    return _folder(source, images)


def _voc(folder: Path, source: Path, images: Path | None) -> RawDataset:
    raw = RawDataset(source=source, name=_name(folder), format="voc", folder=folder, roots=_roots(folder, images))
    read_voc(raw, _voc_splits(raw, folder, images))
    return raw


def _folder(folder: Path, images: Path | None) -> RawDataset:
    found: list[tuple[str, Path]] = []
    yaml_file = _yaml_of(folder)
    if yaml_file is not None:
        found.append(("yolo", yaml_file))
    roboflow = {split: path for split, path in _split_folders(folder).items() if (path / ROBOFLOW_FILE).is_file()}
    if roboflow or (folder / ROBOFLOW_FILE).is_file():
        found.append(("roboflow", folder))
    voc = _voc_folder(folder)
    if voc is not None:
        found.append(("voc", voc))
    coco = _coco_files(folder)
    if coco:
        found.append(("coco", next(iter(coco.values()))))
    if not found:
        raise DataError(
            f"{folder} holds no dataset that is known",
            hint=f"name {_FORMATS}",
            code="format-unknown",
        )
    if len(found) > 1:
        kinds = " and ".join(f"{kind} ({path.relative_to(folder) or '.'})" for kind, path in found)
        raise DataError(
            f"{folder} holds more than one dataset: {kinds}",
            hint="name the JSON or YAML file, or the folder Annotations, of the one that is meant",
            code="format-ambiguous",
        )
    kind = found[0][0]
    if yaml_file is not None:
        return _yolo_file(yaml_file, images, source=folder)
    if voc is not None:
        return _voc(voc, folder, images)
    roots = _roots(folder, images)
    raw = RawDataset(source=folder, name=_name(folder), format=kind, folder=folder, roots=roots)
    if kind == "roboflow":
        files = {s: (p / ROBOFLOW_FILE, images or p) for s, p in roboflow.items()}
        if not files:
            files = {"train": (folder / ROBOFLOW_FILE, images or folder)}
        read_coco(raw, files)
    else:
        read_coco(raw, {s: (p, images or _images_of(p, s, folder)) for s, p in coco.items()})
    return raw


def _roots(folder: Path, images: Path | None) -> tuple[Path, ...]:
    return (folder,) if images is None else (folder, images)


def _name(folder: Path) -> str:
    return folder.resolve().name or "dataset"


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the subfolders that are named like a split."""
    found: dict[str, Path] = {}
    for split, words in _SPLIT_WORDS.items():
        for word in words:
            if (folder / word).is_dir():
                found.setdefault(split, folder / word)
    return found


def _split_of(name: str) -> str | None:
    """Return which split a file name speaks of: `instances_val2017` is val."""
    words = _WORD.findall(name.lower())
    for split, known in _SPLIT_WORDS.items():
        if any(word in known for word in words):
            return split
    return None


# ---- COCO


def _coco_file(path: Path, images: Path | None) -> RawDataset:
    folder = path.parent
    home = folder.parent if folder.name == "annotations" and _dataset_like(folder.parent) else folder
    files = {"train": path}
    split = _split_of(path.stem)
    if path.name == ROBOFLOW_FILE:
        split = _split_of(folder.name)
        siblings = _split_folders(folder.parent) if split else {}
        if split and len([p for p in siblings.values() if (p / ROBOFLOW_FILE).is_file()]) > 1:
            return _folder(folder.parent, images)
    elif split is not None:
        siblings = {s: p for p in sorted(folder.glob("*.json")) if (s := _split_of(p.stem)) and _kind(p) == _kind(path)}
        if len(siblings) > 1 and "train" in siblings:
            files = {s: siblings[s] for s in SPLITS if s in siblings} | {split: path}
            files = {s: files[s] for s in SPLITS if s in files}
    name = path.stem if split is None and path.stem not in ("instances", "annotations", "_annotations.coco") else ""
    raw = RawDataset(source=path, name=name or _name(home), format="coco", folder=home, roots=_roots(home, images))
    read_coco(raw, {s: (p, images or _images_of(p, s, home)) for s, p in files.items()})
    return raw


def _dataset_like(folder: Path) -> bool:
    """Tell whether a folder around `annotations/` looks like the dataset's own, and not like a home folder."""
    return any((folder / name).is_dir() for name in ("images", "train", "val", "train2017", "val2017", "JPEGImages"))


def _kind(path: Path) -> str:
    """Return a file's name without its split: `instances_train2017` and `instances_val2017` belong together."""
    words = _WORD.findall(path.stem.lower())
    split_words = {w for known in _SPLIT_WORDS.values() for w in known}
    return " ".join(w for w in words if w not in split_words)


def _coco_files(folder: Path) -> dict[str, Path]:
    """Return the COCO files of a folder: one for each split, or a lone one as train."""
    for place_ in (folder, folder / "annotations"):
        files = [
            p for p in sorted(place_.glob("*.json")) if p.name not in (ROBOFLOW_FILE, IDS_FILE) and _looks_like_coco(p)
        ]
        if len(files) == 1:
            return {"train": files[0]}
        kinds: dict[str, dict[str, Path]] = {}
        for path in files:
            split = _split_of(path.stem)
            if split is not None:
                kinds.setdefault(_kind(path), {}).setdefault(split, path)
        complete = [k for k, members in kinds.items() if "train" in members]
        if complete:
            kind = next((k for k in complete if "instances" in k), complete[0])
            return {s: kinds[kind][s] for s in SPLITS if s in kinds[kind]}
    return {}


def _looks_like_coco(path: Path) -> bool:
    """Tell whether a JSON file may be COCO, by its first and last kilobytes: configurations and results are not."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            tail = file.read()
    except OSError:
        return False
    both = head + tail
    return any(key in both for key in (b'"images"', b'"annotations"', b'"categories"'))


def _images_of(json_file: Path, split: str, home: Path) -> Path:
    """Return the folder that holds most of the first images a COCO file names."""
    stem_words = [json_file.stem.removeprefix("instances_"), *_SPLIT_WORDS[split]]
    folders: list[Path] = []
    for base in dict.fromkeys((json_file.parent, json_file.parent / "images", home, home / "images")):
        folders += [base, *(base / word for word in stem_words)]
    folders = [f for f in dict.fromkeys(folders) if f.is_dir()]
    names = _first_names(json_file)
    best, most = json_file.parent, 0
    for folder in folders:
        count = sum(os.path.lexists(folder / name) for name in names)
        if count > most:
            best, most = folder, count
    if not most and (home / "images").is_dir():
        return home / "images"
    return best


def _first_names(json_file: Path) -> list[str]:
    """Return some of the file names of a COCO file, without parsing it."""
    try:
        with open(json_file, "rb") as file:
            parts = [file.read(1 << 18)]
            if b'"file_name"' not in parts[0]:  # annotations come first in some files
                file.seek(0)
                parts = [file.read(1 << 28)]
    except OSError:
        return []
    names = []
    for match in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', parts[0]):
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


def _yolo_file(path: Path, images: Path | None, *, source: Path | None = None) -> RawDataset:
    home = path.parent
    name = path.stem if path.stem not in ("data", "dataset") else _name(home)
    raw = RawDataset(source=source or path, name=name, format="yolo", folder=home, roots=_roots(home, images))
    read_yolo(raw, path, images)
    return raw


def _yaml_of(folder: Path) -> Path | None:
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            return folder / name
    files = [p for p in sorted(folder.glob("*.y*ml")) if p.suffix in (".yaml", ".yml") and _looks_like_yolo(p)]
    return files[0] if len(files) == 1 else None


def _looks_like_yolo(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return False
    return re.search(rb"^names\s*:", head, re.MULTILINE) is not None and b"train" in head


# ---- VOC


def _voc_folder(folder: Path) -> Path | None:
    """Return the folder that holds `Annotations/`, here or below `VOCdevkit/VOC2007`."""
    candidates = [folder, *sorted(folder.glob("VOC2*")), *sorted(folder.glob("VOCdevkit/VOC2*"))]
    for candidate in candidates:
        annotations = candidate / "Annotations"
        if annotations.is_dir() and ((candidate / "ImageSets" / "Main").is_dir() or any(annotations.glob("*.xml"))):
            return candidate
    if any(any(path.glob("*.xml")) for path in _split_folders(folder).values()):
        return folder
    return None


def _voc_splits(raw: RawDataset, folder: Path, images: Path | None) -> dict[str, VocSplit]:
    xml_folder = folder / "Annotations"
    if not xml_folder.is_dir():  # a folder for each split, with images and XML side by side
        return {
            split: VocSplit(None, _image_stems(images or path), path, images or path)
            for split, path in _split_folders(folder).items()
        }
    image_folder = images or next(
        (folder / name for name in ("JPEGImages", "images", "Images") if (folder / name).is_dir()), folder
    )
    splits: dict[str, VocSplit] = {}
    lists = folder / "ImageSets" / "Main"
    stems = {file.stem for file in xml_folder.iterdir()}
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
            name = listed_name(line, stems)
            if sound_name(name):
                names.append(name)
            elif name:
                raw.findings.add("file-malformed", f"has the name {name[:40]!r}", file=shown, line=number)
        splits[split] = VocSplit(path, names, xml_folder, image_folder)
    oddities.report(raw.findings)
    if not splits:
        splits["train"] = VocSplit(None, _image_stems(image_folder), xml_folder, image_folder)
    return splits


def _image_stems(folder: Path) -> list[str]:
    try:
        return sorted({os.path.splitext(name)[0] for name in os.listdir(folder) if is_image(name)})
    except OSError:
        return []

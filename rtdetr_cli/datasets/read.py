"""Detect the format of a dataset, and read it.

A folder in the usual layout of a format is recognized at once: each format has a section below, whose `_find_...`
function returns a `Match`. Any other folder is surveyed, and its label files are read wherever they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rtdetr_cli.datasets.any_layout import read_any_layout, read_csv_file
from rtdetr_cli.datasets.archive import unpack
from rtdetr_cli.datasets.coco import read_coco
from rtdetr_cli.datasets.coco_files import (
    ROBOFLOW_FILE,
    SPLITS,
    choose_coco_files,
    coco_kind,
    find_image_folder,
    is_coco_json,
)
from rtdetr_cli.datasets.image_paths import SPLIT_WORDS, allow_linked_images, find_moved_images, split_of
from rtdetr_cli.datasets.layouts import datasets_below, is_yolo_yaml, label_kinds
from rtdetr_cli.datasets.raw import RawDataset, new_dataset
from rtdetr_cli.datasets.survey import other_format_of, survey
from rtdetr_cli.datasets.yolo import read_yolo
from rtdetr_cli.errors import DataError
from rtdetr_cli.files import missing_path_hint

MAX_LISTED = 5
_SUPPORTED = "a COCO JSON file, a YOLO data.yaml, a CSV file, a zip file or the folder of a dataset"


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
        raise DataError(f"the dataset {source} does not exist", hint=missing_path_hint(source), code="dataset-missing")
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images} is not a folder", hint="check the path", code="images-missing")
    raw = _read_file(source, images) if source.is_file() else _read_folder(source, images)
    allow_linked_images(raw)
    if raw.format in ("coco", "roboflow"):
        find_moved_images(raw, images or raw.folder)
    return raw


def _read_file(source: Path, images: Path | None) -> RawDataset:
    suffix = source.suffix.lower()
    other = None if suffix == ".json" and is_coco_json(source) else other_format_of(source)
    if other is not None:
        raise DataError(f"{source} looks like {other[0]}, which is not read", hint=other[1], code="format-unknown")
    if suffix == ".zip":
        folder = unpack(source)
        raw = _read_folder(folder, images)
        raw.source = source
        message = f"{source} is read from {folder}, where it was unpacked, and which is removed when it is not used"
        raw.findings.add("dataset-unpacked", message, file=str(source))
        return raw
    if suffix == ".json":
        return _read_coco_file(source, images)
    if suffix in (".yaml", ".yml"):
        return _read_yolo_file(source, images)
    if suffix == ".csv":
        return read_csv_file(source, images)
    raise DataError(
        f"{source} is not {_SUPPORTED}", hint="pass the dataset's folder or its label file", code="format-unknown"
    )


def _read_folder(folder: Path, images: Path | None) -> RawDataset:
    """Read the one dataset that a folder contains."""
    if folder.name == "Annotations" and (voc := _find_voc(folder.parent)) is not None:
        return voc.read(images)
    matches = _matches(folder)
    if len(matches) > 1:
        evidence = " and ".join(f"{m.format} ({m.evidence.relative_to(folder) or '.'})" for m in matches)
        raise DataError(
            f"{folder} contains more than one dataset: {evidence}",
            hint="pass the JSON or YAML file, or the Annotations folder, of the one you want",
            code="format-ambiguous",
        )
    if matches:
        return matches[0].read(images)
    found = survey(folder)
    if not found.complete:
        raise DataError(
            f"{folder} has more than a million files, and none of the usual layouts of a dataset",
            hint="pass the label file, and the folder of the images with --images",
            code="format-unknown",
        )
    inner = datasets_below(found)
    if len(inner) == 1:
        return _read_folder(inner[0], images)
    if inner:
        names = ", ".join(str(path.relative_to(folder)) for path in inner[:MAX_LISTED])
        more = f" and {len(inner) - MAX_LISTED:,} more" if len(inner) > MAX_LISTED else ""
        raise DataError(
            f"{folder} contains {len(inner)} datasets: {names}{more}",
            hint=f"pass one of them, such as {inner[0]}",
            code="format-ambiguous",
        )
    archives = found.files("zip")
    if len(archives) == 1 and not label_kinds(found.folders) and not any(f.images for f in found.folders):
        return _read_file(archives[0], images)
    return read_any_layout(folder, found, images)


def _matches(folder: Path) -> list[Match]:
    return [match for find in _FORMATS if (match := find(folder)) is not None]


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the subfolders that are named like a split."""
    folders: dict[str, Path] = {}
    for split, words in SPLIT_WORDS.items():
        for word in words:
            if (folder / word).is_dir():
                folders.setdefault(split, folder / word)
    return folders


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
        raw = new_dataset("", "roboflow", folder, folder, images)
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
        raw = new_dataset("", "coco", folder, folder, images)
        read_coco(
            raw, {split: (path, images or find_image_folder(path, split, folder)) for split, path in files.items()}
        )
        return raw

    return Match("coco", next(iter(files.values())), read)


def _coco_files(folder: Path) -> dict[str, Path]:
    """Return the COCO files of a folder: one per split, or a single one as train."""
    for parent in (folder, folder / "annotations"):
        files = choose_coco_files([path for path in sorted(parent.glob("*.json")) if is_coco_json(path)], parent)
        if files:
            return files
    return {}


def _read_coco_file(path: Path, images: Path | None) -> RawDataset:
    """Read a COCO file, and the files of the other splits beside it if it is one of a set."""
    folder = path.parent
    home = folder.parent if folder.name == "annotations" and _is_dataset_folder(folder.parent) else folder
    files = {"train": path}
    split = split_of(path.stem)
    if path.name == ROBOFLOW_FILE:
        split = split_of(folder.name)
        siblings = _split_folders(folder.parent) if split else {}
        if sum((sibling / ROBOFLOW_FILE).is_file() for sibling in siblings.values()) > 1:
            return _read_folder(folder.parent, images)
    elif split is not None:
        siblings = {
            s: p for p in sorted(folder.glob("*.json")) if (s := split_of(p.stem)) and coco_kind(p) == coco_kind(path)
        }
        if len(siblings) > 1 and "train" in siblings:
            siblings[split] = path
            files = {s: siblings[s] for s in SPLITS if s in siblings}
    name = path.stem if split is None and path.stem not in ("instances", "annotations", "_annotations.coco") else ""
    raw = new_dataset(name, "coco", path, home, images)
    read_coco(raw, {s: (p, images or find_image_folder(p, s, home)) for s, p in files.items()})
    return raw


def _is_dataset_folder(folder: Path) -> bool:
    """Return whether the folder around `annotations/` belongs to the dataset, and is not, say, a home folder."""
    return any((folder / name).is_dir() for name in ("images", "train", "val", "train2017", "val2017", "JPEGImages"))


# ---- YOLO


def _find_yolo(folder: Path) -> Match | None:
    """Match a folder with a `data.yaml`, or with a single YAML file that looks like one."""
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            files = [folder / name]
            break
    else:
        files = [p for p in sorted(folder.glob("*.y*ml")) if p.suffix in (".yaml", ".yml") and is_yolo_yaml(p)]
    if len(files) != 1:
        return None
    return Match("yolo", files[0], lambda images: _read_yolo_file(files[0], images, source=folder))


def _read_yolo_file(path: Path, images: Path | None, *, source: Path | None = None) -> RawDataset:
    name = path.stem if path.stem not in ("data", "dataset") else ""
    raw = new_dataset(name, "yolo", source or path, path.parent, images)
    read_yolo(raw, path, images)
    return raw


# ---- Pascal VOC


def _find_voc(folder: Path) -> Match | None:
    """Match a folder with XML files in `Annotations/`."""
    if not any((folder / "Annotations").glob("*.xml")):
        return None
    return Match("voc", folder, lambda images: read_any_layout(folder, survey(folder), images, kind="voc"))


_FORMATS = (_find_yolo, _find_roboflow, _find_voc, _find_coco)

"""Find the dataset in what the user names, and read it.

A folder is surveyed, and its label files are read wherever they lie. Those in the usual place of their format decide if
there are any: a `data.yaml` in the folder, COCO files in it or in `annotations/`, XML files in `Annotations/`.
"""

from __future__ import annotations

from pathlib import Path

from rtdetr_cli.datasets.any_layout import read_any_layout, read_csv_file
from rtdetr_cli.datasets.archive import unpack
from rtdetr_cli.datasets.coco import read_coco
from rtdetr_cli.datasets.coco_files import ROBOFLOW_FILE, choose_coco_files, coco_kind, is_coco_json
from rtdetr_cli.datasets.image_paths import allow_linked_images, find_moved_images, split_of
from rtdetr_cli.datasets.layouts import datasets_below, label_kinds, usual_kinds
from rtdetr_cli.datasets.raw import RawDataset, new_dataset
from rtdetr_cli.datasets.survey import other_format_of, survey
from rtdetr_cli.datasets.yolo import read_yolo
from rtdetr_cli.errors import DataError
from rtdetr_cli.files import missing_path_hint
from rtdetr_cli.text import abbreviate

MAX_LISTED = 5
_SUPPORTED = "a COCO JSON file, a YOLO data.yaml, a CSV file, a zip file or the folder of a dataset"


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
        raw = new_dataset("yolo", source, source.parent, images)
        read_yolo(raw, source)
        return raw
    if suffix == ".csv":
        return read_csv_file(source, images)
    raise DataError(
        f"{source} is not {_SUPPORTED}", hint="pass the dataset's folder or its label file", code="format-unknown"
    )


def _read_folder(folder: Path, images: Path | None) -> RawDataset:
    """Read the one dataset that a folder contains."""
    found = survey(folder)
    kinds = label_kinds(found.folders)
    usual = usual_kinds(kinds, found)
    if usual and (found.complete or "voc" not in usual):
        return read_any_layout(folder, found, images, usual)
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
        names = abbreviate([str(path.relative_to(folder)) for path in inner], MAX_LISTED)
        raise DataError(
            f"{folder} contains {len(inner)} datasets: {names}",
            hint=f"pass one of them, such as {inner[0]}",
            code="format-ambiguous",
        )
    archives = found.files("zip")
    if len(archives) == 1 and not kinds and not found.holds_images():
        return _read_file(archives[0], images)
    return read_any_layout(folder, found, images, kinds)


def _read_coco_file(path: Path, images: Path | None) -> RawDataset:
    """Read a COCO file, and the files of the other splits beside it if it is one of a set."""
    folder = path.parent
    home = folder.parent if folder.name == "annotations" and _is_dataset_folder(folder.parent) else folder
    files = {"train": path}
    split = split_of(path.stem)
    if path.name == ROBOFLOW_FILE:
        split = split_of(folder.name)
        if split is not None and len(list(folder.parent.glob(f"*/{ROBOFLOW_FILE}"))) > 1:
            return _read_folder(folder.parent, images)
    elif split is not None:
        siblings = [p for p in sorted(folder.glob("*.json")) if coco_kind(p) == coco_kind(path)]
        files = choose_coco_files([path, *siblings], folder) or files
    raw = new_dataset("coco", path, home, images)
    if split is None and path.stem not in ("instances", "annotations", "_annotations.coco"):
        raw.name = path.stem
    read_coco(raw, files)
    return raw


def _is_dataset_folder(folder: Path) -> bool:
    """Return whether the folder around `annotations/` belongs to the dataset, and is not, say, a home folder."""
    return any((folder / name).is_dir() for name in ("images", "train", "val", "train2017", "val2017", "JPEGImages"))

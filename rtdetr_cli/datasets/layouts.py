"""Pair images with label files wherever they are, and find out which split each pair belongs to.

This is for datasets whose folders don't have the names that their format prescribes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rtdetr_cli.datasets.coco_files import ROBOFLOW_FILE, is_coco_json
from rtdetr_cli.datasets.csv_boxes import is_box_table
from rtdetr_cli.datasets.image_paths import SPLIT_WORDS, ImageIndex, common_start, split_of, split_of_parts
from rtdetr_cli.datasets.label_text import CLASS_LISTS, MAX_SMALL_BYTES, is_valid_name
from rtdetr_cli.datasets.survey import Folder, Survey, edges
from rtdetr_cli.errors import DataError

DATA_YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_MASKS = re.compile(r"segmentation|mask|trimap|depth", re.IGNORECASE)
_CLASS = re.compile(rb"\d+(\.0*)?")
_NUMBER = re.compile(rb"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_COLUMN = re.compile(r"\s+(-1|0|1)$")
"""The second column in a list of Pascal VOC: whether a class is present."""

_SAMPLED = 8
_MAX_COCO_FILES = 50
"""Folders with more JSON files than that have one per image."""


@dataclass(slots=True)
class Layout:
    """The images of a dataset and their label files.

    Attributes:
        root: the folder that images are relative to.
        splits: split -> images, or names in a list of images that belong to none.
        labels: image -> label file.
        orphans: label files without an image.
        lists: the lists of images that the splits come from, if any.
        unlisted: images with a label file that are in none of these lists.
    """

    root: Path
    splits: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    orphans: list[Path] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


def label_kinds(folders: Iterable[Folder]) -> dict[str, list[Path]]:
    """Return format -> label files, for the formats that the files of some folders look like."""
    kinds: dict[str, list[Path]] = {}
    for folder in folders:
        texts = [path for path in folder.with_suffix("txt") if path.name not in CLASS_LISTS]
        tables = folder.with_suffix("json")
        found = {
            "voc": folder.with_suffix("xml") if _any(folder.with_suffix("xml"), rb"<annotation[\s>]") else [],
            "yolo": texts if _is_yolo(texts) else [],
            "labelme": tables if _any(tables, rb'"shapes"\s*:') else [],
            "coco": [path for path in tables if _is_coco(path, folder)] if len(tables) <= _MAX_COCO_FILES else [],
            "yaml": [path for path in folder.with_suffix("yaml", "yml") if _is_yolo_yaml(path, folder)],
            "csv": [path for path in folder.with_suffix("csv") if is_box_table(path)],
        }
        for kind, paths in found.items():
            if paths:
                kinds.setdefault(kind, []).extend(paths)
    return kinds


def usual_kinds(kinds: dict[str, list[Path]], found: Survey) -> dict[str, list[Path]]:
    """Return the formats that have label files in the usual place of their format."""
    root = found.root
    places = {
        "yaml": (root,),
        "coco": (root, root / "annotations"),
        "voc": (root / "Annotations",),
    }
    return {
        kind: files
        for kind, files in kinds.items()
        if any(
            path.parent in places.get(kind, ())
            or (path.name == ROBOFLOW_FILE and path.parent.parent == root and split_of(path.parent.name))
            for path in files
        )
    }


def _is_yolo_yaml(path: Path, folder: Folder) -> bool:
    """Return whether a YAML file looks like a `data.yaml`, or is called so."""
    text = edges(path)
    return (not folder.parts and path.name in DATA_YAMLS) or (
        re.search(rb"^names\s*:", text, re.MULTILINE) is not None and b"train" in text
    )


def datasets_below(found: Survey) -> list[Path]:
    """Return the folders in a surveyed folder that are datasets of their own; empty if it is one dataset."""
    datasets: list[Path] = []
    rest: list[Folder] = []
    for top in sorted({folder.parts[:1] for folder in found.folders}):
        folders = [folder for folder in found.folders if folder.parts[:1] == top]
        if top and split_of_parts(top) is None and _is_dataset(folders):
            datasets.append(found.root.joinpath(*top))
        else:
            rest += folders
    alone = len(datasets) > 1 and not label_kinds(rest)
    return datasets if alone or not any(_holds_images(folder) for folder in rest) else []


def _is_dataset(folders: list[Folder]) -> bool:
    """Return whether folders hold images, and labels in other folders than the images or for all images at once."""
    homes = {folder.path for folder in folders if _holds_images(folder)}
    kinds = label_kinds(folders) if homes else {}
    whole = any(kind in kinds for kind in ("coco", "yaml", "csv"))
    return whole or any(path.parent not in homes for paths in kinds.values() for path in paths)


def _holds_images(folder: Folder) -> bool:
    return bool(folder.images) and not any(_MASKS.search(part) for part in folder.parts[-1:])


def _sample(paths: list[Path]) -> list[Path]:
    return paths[:: max(1, len(paths) // _SAMPLED)]


def _any(paths: list[Path], pattern: bytes) -> bool:
    return any(re.search(pattern, edges(path)) for path in _sample(paths))


def _is_coco(path: Path, folder: Folder) -> bool:
    """Return whether a JSON file is COCO; in the usual folders a broken one will do."""
    if folder.parts in ((), ("annotations",)):
        return is_coco_json(path)
    text = edges(path)
    complete = b'"images"' in text and (b'"annotations"' in text or b'"categories"' in text)
    return path.name == ROBOFLOW_FILE or (complete and is_coco_json(path))


def _is_yolo(paths: list[Path]) -> bool:
    """Return whether most of the files that are not empty begin with a class number and four numbers."""
    first_lines = [text.split(b"\n", 1)[0] for path in _sample(paths) if (text := edges(path).strip())]
    return 2 * sum(map(_is_yolo_line, first_lines)) > len(first_lines)


def _is_yolo_line(line: bytes) -> bool:
    first, *rest = line.split() or [b""]
    return _CLASS.fullmatch(first) is not None and len(rest) >= 4 and all(map(_NUMBER.fullmatch, rest))


# ---- pairs


def pair_files(found: Survey, images: Survey, label_files: list[Path], lists: dict[str, Path]) -> Layout:
    """Pair label files with the images of the same name: in the same folder, or else in the nearest one.

    Images without a label file count if they lie beside one that has a label file.

    Args:
        found: the folder of the label files.
        images: the folder of the images.
        label_files: those of one format.
        lists: split -> list of images; others are found by their names, such as `train.txt`.

    Raises:
        DataError: two folders hold labels of the same images.
    """
    layout = Layout(images.root)
    label_folders: dict[Path, dict[str, Path]] = {}
    for path in label_files:
        label_folders.setdefault(path.parent, {}).setdefault(path.stem, path)
    image_names = [{os.path.splitext(name)[0]: name for name in reversed(f.images)} for f in images.folders]
    paired: set[Path] = set()
    used: set[int] = set()
    for folder, number in _rank_folders(found, images, label_folders, image_names):
        labels, where = label_folders[folder], images.folders[number]
        clash: Counter[Path] = Counter()
        for stem, path in labels.items():
            if stem not in image_names[number] or path in paired:
                continue
            image = "/".join((*where.parts, image_names[number][stem]))
            if image in layout.labels:
                clash[layout.labels[image].parent] += 1
                continue
            layout.labels[image] = path
            paired.add(path)
            used.add(number)
        for other, count in clash.items():
            if 2 * count > len(labels):
                names = " and ".join(str(path.relative_to(found.root)) for path in sorted((other, folder)))
                raise DataError(
                    f"{found.root} has two folders with labels of the same images: {names}",
                    hint=f"pass the one you want, such as {min(other, folder)}",
                    code="format-ambiguous",
                )
    layout.orphans = sorted(set(label_files) - paired)
    paths = [
        "/".join((*images.folders[number].parts, name))
        for number in sorted(used)
        for name in sorted(image_names[number].values())
    ]
    _assign_splits(layout, found, paths, lists)
    return layout


def _rank_folders(
    found: Survey, images: Survey, label_folders: dict[Path, dict[str, Path]], image_names: list[dict[str, str]]
) -> list[tuple[Path, int]]:
    """Return the folders of labels and of images (as a number) that have names in common, the nearest first."""
    holders: dict[str, list[int]] = {}
    for number, names in enumerate(image_names):
        for stem in names:
            holders.setdefault(stem, []).append(number)
    matches = []
    for folder, labels in label_folders.items():
        parts = folder.relative_to(found.root).parts
        counts = Counter(number for stem in labels for number in holders.get(stem, ()))
        for number, count in counts.items():
            rank = _distance(parts, images.folders[number].parts)
            if rank is not None:
                matches.append((*rank, -count, folder, number))
    return [(folder, number) for *_, folder, number in sorted(matches)]


def _distance(labels: tuple[str, ...], images: tuple[str, ...]) -> tuple[bool, int] | None:
    """Rank a folder of images for a folder of labels, the lowest first; None if they belong to different splits."""
    split, other = split_of_parts(labels), split_of_parts(images)
    if split and other and split != other:
        return None
    common = common_start(labels, images)
    ends = sum(a == b for a, b in zip(labels[:common:-1], images[:common:-1], strict=False))
    return bool(images and _MASKS.search(images[-1])), len(labels) + len(images) - 2 * common - 2 * ends


# ---- splits


def _assign_splits(layout: Layout, found: Survey, paths: list[str], lists: dict[str, Path]) -> None:
    """Assign images to splits by lists of images, or else by the names of their folders or their labels' folders."""
    index = ImageIndex(paths)
    orphans = {path.stem: path for path in layout.orphans}
    label_files = set(layout.labels.values())
    texts = [(folder.path, name) for folder in found.folders for name in folder.files.get("txt", ())]
    texts.sort(key=lambda text: text[0].name != "Main")  # VOC has lists for other tasks beside `ImageSets/Main/`
    named = [(split, home / name) for home, name in texts if (split := split_of_parts([os.path.splitext(name)[0]]))]
    trainval = [("train", home / name) for home, name in texts if name.lower() == "trainval.txt"]
    for split, path in [*lists.items(), *named, *trainval]:
        if split not in layout.splits and path not in label_files:
            names = [(line, _COLUMN.sub("", line)) for line in read_list(path)]
            matched = [index.find(line, split) or index.find(name, split) for line, name in names]
            known = sum(match is not None or name in orphans for match, (_, name) in zip(matched, names, strict=True))
            if 2 * known > len(names) or path.parent.name == "Main":
                layout.splits[split] = [match or name for match, (_, name) in zip(matched, names, strict=True)]
                layout.lists.append(path)
                for (_, name), image in zip(names, layout.splits[split], strict=True):
                    if image not in layout.labels and name in orphans:  # its image is missing, or in another case
                        layout.labels[image] = orphans.pop(name)
    layout.orphans = sorted(orphans.values())
    if layout.splits:
        layout.splits = {split: layout.splits[split] for split in SPLIT_WORDS if split in layout.splits}
        layout.unlisted = sorted(layout.labels.keys() - {name for names in layout.splits.values() for name in names})
        return
    splits: dict[str, list[str]] = {split: [] for split in SPLIT_WORDS}
    for image in paths:
        split = split_of_parts(image.split("/")[:-1])
        if split is None and image in layout.labels:
            split = split_of_parts(layout.labels[image].parent.relative_to(found.root).parts)
        splits[split or "train"].append(image)
    layout.splits = {split: images for split, images in splits.items() if images}


def read_list(path: Path) -> list[str]:
    """Return the lines of a list of images."""
    if not path.is_file() or path.stat().st_size > MAX_SMALL_BYTES:
        return []
    lines = path.read_bytes().decode("utf-8-sig", "replace").splitlines()
    return [line.strip() for line in lines if line.strip() and is_valid_name(line.strip())]

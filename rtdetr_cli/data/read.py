"""Find out what a dataset is, and read it: COCO JSON, Roboflow folders, YOLO `data.yaml`, Pascal VOC."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from rtdetr_cli.data.checks import (
    check_boxes,
    check_copies,
    check_equal_splits,
    check_files,
    check_structure,
    groups_by_path,
    measure_pictures,
)
from rtdetr_cli.data.coco import read_coco, sound_name
from rtdetr_cli.data.fingerprint import fingerprint
from rtdetr_cli.data.kept import IDS_FILE
from rtdetr_cli.data.raw import RawDataset, RawSplit
from rtdetr_cli.data.records import Dataset, Finding, FlatStrings, Splits
from rtdetr_cli.data.text import Oddities, read_text
from rtdetr_cli.data.voc import VocSplit, is_picture, listed_name, read_voc
from rtdetr_cli.data.yolo import read_yolo
from rtdetr_cli.errors import DataError

ROBOFLOW_FILE = "_annotations.coco.json"
SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
_WORD = re.compile(r"[a-z]+")
_FORMATS = "a COCO JSON file, a Roboflow folder, a YOLO data.yaml or a Pascal VOC folder"


# ---------------------------------------------------------------------------------------------------------------------
# The readers' one entrance


def load_splits(
    source: Path,
    *,
    images: Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    split_single: bool = True,
    headers: bool = True,
    pictures: bool = True,
) -> Splits:
    """Read a dataset, check its annotations, and return its splits as flat arrays.

    Args:
        source: a COCO JSON file, a `data.yaml`, or a folder in any known layout.
        images: the folder of the pictures, where it cannot be guessed.
        val_fraction: share of the pictures that is drawn as `val` where the dataset has no such split.
        seed: of that draw.
        split_single: False takes a dataset without a val split whole, as `val`: what evaluation of one file wants.
        headers: False trusts declared sizes in place of reading them from the pictures.
        pictures: False does not even look for the pictures: what judging detections from a file wants.

    Raises:
        DataError: the dataset cannot be found or read, or a check found an error; all of them are counted, the first
            few told.
    """
    raw = read_raw(source, images=images)
    if pictures:
        check_files(raw)
    measure_pictures(raw, all_pictures=headers and pictures)
    check_boxes(raw)
    check_structure(raw)
    if split_single:
        draw_val(raw, val_fraction, seed)
    elif set(raw.splits) == {"train"}:
        raw.splits = {"val": raw.splits["train"]}
        raw.splits["val"].split = "val"
    groups = groups_by_path(raw)
    check_copies(raw, groups, check_equal_splits(raw, groups))
    refuse_errors(raw)
    return to_splits(raw)


def refuse_errors(raw: RawDataset) -> None:
    """Raise a DataError that tells the first errors, if there are any."""
    errors = [f for f in raw.findings if f.severity == "error"]
    if not errors:
        return
    shown = [place(f) for f in errors[:5]]
    if len(errors) == 1:
        message = shown[0]
    else:
        message = f"{raw.name} has {len(errors):,} errors: " + "; ".join(shown)
        if len(errors) > len(shown):
            message += f"; and {len(errors) - len(shown)} more"
    raise DataError(message, hint=f"rtdetr validate {raw.source}", code=errors[0].code)


def place(finding: Finding) -> str:
    """Return a finding as one sentence with its place in front."""
    where = f"{finding.file}:{finding.line}" if finding.file and finding.line else finding.file
    if where and finding.message.startswith(f"{where} "):
        return finding.message
    return f"{where} {finding.message}" if where else finding.message


def to_splits(raw: RawDataset) -> Splits:
    """Return checked records as flat arrays."""
    datasets = {name: _dataset(raw, split) for name, split in raw.splits.items()}
    return Splits(
        source=raw.source,
        name=raw.name,
        format=raw.format,
        categories=raw.categories,
        train=datasets.get("train"),
        val=datasets.get("val"),
        test=datasets.get("test"),
        fingerprint=fingerprint(datasets),
        findings=tuple(raw.findings),
        split_made=raw.split_made,
    )


def _dataset(raw: RawDataset, split: RawSplit) -> Dataset:
    count = len(split)
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(split.box_pictures, minlength=count), out=offsets[1:])
    boxes = split.boxes_xyxy_px
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = np.where(np.isfinite(split.areas) & (split.areas > 0), split.areas, sides[:, 0] * sides[:, 1])
    return Dataset(
        name=raw.name,
        split=split.split,
        format=raw.format,
        root=split.root,
        categories=raw.categories,
        file_names=FlatStrings(split.file_names),
        image_ids=split.image_ids,
        sizes_wh=split.sizes_wh,
        offsets=offsets,
        boxes_xyxy_px=boxes,
        labels=split.labels,
        areas=areas,
        crowd=split.crowd,
        annotation_ids=split.annotation_ids,
    )


def draw_val(raw: RawDataset, val_fraction: float, seed: int) -> None:
    """Draw a val split by picture from a dataset that has only train."""
    if set(raw.splits) != {"train"} or len(raw.splits["train"]) < 2:
        return
    whole = raw.splits["train"]
    count = min(len(whole) - 1, max(1, round(val_fraction * len(whole))))
    # By file name, not by position: the draw survives a file whose entries were written in another order.
    order = np.argsort(np.asarray(whole.file_names, object), kind="stable")
    drawn = np.zeros(len(whole), np.bool_)
    drawn[order[np.random.default_rng(seed).permutation(len(whole))[:count]]] = True
    raw.splits = {"train": take(whole, ~drawn, "train"), "val": take(whole, drawn, "val")}
    raw.split_made = True
    raw.findings.add(
        "split-made",
        f"there is no val split: {count} of {len(whole)} pictures were drawn for it (seed {seed})",
        file=raw.main_file(),
    )


def take(split: RawSplit, pictures: np.typing.NDArray[np.bool_], name: str) -> RawSplit:
    """Return the chosen pictures of a split, with their boxes."""
    position = np.cumsum(pictures) - 1
    boxes = pictures[split.box_pictures]
    part = RawSplit(
        split=name,
        root=split.root,
        label_files=split.label_files,
        file_names=[f for f, chosen in zip(split.file_names, pictures, strict=True) if chosen],
        image_ids=split.image_ids[pictures],
        sizes_wh=split.sizes_wh[pictures],
        picture_labels=split.picture_labels[pictures],
        picture_lines=split.picture_lines[pictures],
        picture_entries=split.picture_entries[pictures],
        box_pictures=position[split.box_pictures[boxes]],
        boxes_xyxy_px=split.boxes_xyxy_px[boxes],
        labels=split.labels[boxes],
        areas=split.areas[boxes],
        crowd=split.crowd[boxes],
        annotation_ids=split.annotation_ids[boxes],
        box_lines=split.box_lines[boxes],
        box_entries=split.box_entries[boxes],
    )
    part.shares, part.said_beyond = split.shares, split.said_beyond[boxes]
    part.declared, part.usable = split.declared[pictures], split.usable[pictures]
    return part


# ---------------------------------------------------------------------------------------------------------------------
# What is it?


def read_raw(source: Path, *, images: Path | None = None) -> RawDataset:
    """Detect the format and read every split, without judging boxes or pictures.

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
        read_coco(raw, {s: (p, images or _pictures_of(p, s, folder)) for s, p in coco.items()})
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
    read_coco(raw, {s: (p, images or _pictures_of(p, s, home)) for s, p in files.items()})
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


def _pictures_of(json_file: Path, split: str, home: Path) -> Path:
    """Return the folder that holds most of the first pictures a COCO file names."""
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
    if not xml_folder.is_dir():  # a folder for each split, with pictures and XML side by side
        return {
            split: VocSplit(None, _picture_stems(images or path), path, images or path)
            for split, path in _split_folders(folder).items()
        }
    pictures = images or next(
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
        splits[split] = VocSplit(path, names, xml_folder, pictures)
    oddities.report(raw.findings)
    if not splits:
        splits["train"] = VocSplit(None, _picture_stems(pictures), xml_folder, pictures)
    return splits


def _picture_stems(folder: Path) -> list[str]:
    try:
        return sorted({os.path.splitext(name)[0] for name in os.listdir(folder) if is_picture(name)})
    except OSError:
        return []

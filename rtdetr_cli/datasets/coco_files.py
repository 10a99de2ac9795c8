"""Find out which COCO files belong together, and where their images are."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from rtdetr_cli.datasets.ids_file import IDS_FILE
from rtdetr_cli.datasets.image_paths import SPLIT_WORDS, split_of, split_of_parts
from rtdetr_cli.datasets.survey import edges, other_format_of

ROBOFLOW_FILE = "_annotations.coco.json"
CHANGES_FILE = "changes.json"
"""The list of changes in a repaired copy."""

SPLITS = ("train", "val", "test")
_WORD = re.compile(r"[a-z]+")


def is_coco_json(path: Path) -> bool:
    """Return whether a JSON file may be COCO and not, say, a configuration or a list of results."""
    if path.name in (IDS_FILE, CHANGES_FILE):
        return False
    text = edges(path)
    named = b'"images"' in text or b'"annotations"' in text  # Label Studio's notes.json has only categories
    return named and (b'"bbox"' in text or other_format_of(path) is None)


def choose_coco_files(files: list[Path], root: Path) -> dict[str, Path]:
    """Return split -> file for the COCO files below a folder: a single one as train, or a set that has a train file.

    Roboflow's files lie in the folder of their split, and need no train file.
    """
    if len(files) == 1:
        split = split_of(files[0].parent.name) if files[0].name == ROBOFLOW_FILE and files[0].parent != root else None
        return {split or "train": files[0]}
    by_kind: dict[str, dict[str, Path]] = {}
    for path in files:
        split = split_of(path.stem) or split_of_parts(path.parent.relative_to(root).parts)
        if split is not None:
            by_kind.setdefault(coco_kind(path), {}).setdefault(split, path)
    roboflow = coco_kind(Path(ROBOFLOW_FILE))
    complete = [kind for kind, members in by_kind.items() if "train" in members or kind == roboflow]
    if not complete:
        return {}
    kind = next((kind for kind in complete if "instances" in kind), complete[0])
    return {split: by_kind[kind][split] for split in SPLITS if split in by_kind[kind]}


def coco_kind(path: Path) -> str:
    """Return a file's name without its split: `instances_train2017` and `instances_val2017` belong together."""
    split_words = {word for known in SPLIT_WORDS.values() for word in known}
    return " ".join(word for word in _WORD.findall(path.stem.lower()) if word not in split_words)


def find_image_folder(json_file: Path, split: str, home: Path) -> Path:
    """Return the folder that contains most of the first images that a COCO file names."""
    split_names = [json_file.stem.removeprefix("instances_"), *SPLIT_WORDS[split]]
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

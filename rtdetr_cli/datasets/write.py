"""Write a checked dataset as COCO, YOLO or Pascal VOC, images included.

YOLO and VOC have no place for ids, areas and crowds. These go into a file beside the labels (see `ids_file`), so that a
dataset comes back with every id, name and box.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

from rtdetr_cli.datasets.coco import write_coco
from rtdetr_cli.datasets.image_names import CONTROL
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.datasets.voc import write_voc
from rtdetr_cli.datasets.yolo import write_yolo
from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.files import whole_folder

_WRITERS: dict[str, Callable[[dict[str, Dataset], Path], Path]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
}


def write_dataset(parts: dict[str, Dataset], form: str, to: Path) -> Path:
    """Write every split below `to` and return what to train on.

    Args:
        parts: split -> its images and boxes.
        form: `coco`, `yolo` or `voc`.
        to: a folder that is new or empty.

    Raises:
        DataError: a class name cannot be written in that format.
        RtdetrError: the folder cannot be written.
    """
    _check_names([c.name for c in next(iter(parts.values())).categories], form)
    try:
        with whole_folder(to) as folder:
            data = _WRITERS[form](parts, folder)
        return to / data.relative_to(folder)
    except OSError as error:
        raise RtdetrError(f"{to} cannot be written: {error.strerror or error}", code="output") from error


def _check_names(names: list[str], form: str) -> None:
    if form == "voc" and len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"two categories are called {twice!r}, and VOC identifies categories by name", hint="--convert coco"
        )
    for name in names:
        # XML 1.0 has no control characters and no U+FFFE or U+FFFF, and both readers strip spaces around a name.
        odd = any(unicodedata.category(c) in CONTROL or c in "\ufffe\uffff" for c in name)
        if form != "coco" and (odd or name != name.strip()):
            raise DataError(f"the class name {name!r} cannot be written as {form}", hint="--convert coco")

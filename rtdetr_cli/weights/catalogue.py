"""The catalogue of published checkpoints, read from `catalogue.toml`."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from rtdetr_cli.config.presets import load_preset
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import ModelError
from rtdetr_cli.text import counted, suggest

MIRROR_VARIABLE = "RTDETR_CLI_MIRROR"
RELEASES = "https://github.com/lyuwenyu/storage/releases/download"

Data = Literal["coco", "objects365", "objects365-coco", "imagenet"]
_CLASSES: Mapping[str, tuple[int, ...]] = {"coco": (80,), "objects365-coco": (80,), "objects365": (365, 366)}


@dataclass(frozen=True, slots=True)
class Published:
    """A published file: what it holds, where it is, and its size and hash where they are publicly known."""

    name: str  # as in `rtdetr weights list`
    file: str
    preset: str
    data: Data  # what it was trained on; a backbone for imagenet
    ap: float | None = None  # published, from 0 to 1
    version: Literal["v1", "v2"] = "v2"
    sampling: Literal["bilinear", "discrete"] = "bilinear"
    points: int = 4  # sampling points per scale
    release: str = "v0.1"
    license: str = ""
    bytes: int = 0
    sha256: str = ""

    @property
    def url(self) -> str:
        """Address of the file: on the mirror when one is set, else in the official release."""
        mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
        return f"{mirror}/{self.file}" if mirror else f"{RELEASES}/{self.release}/{self.file}"

    @property
    def is_backbone(self) -> bool:
        """Whether the file holds only a backbone."""
        return self.data == "imagenet"

    @property
    def classes(self) -> tuple[int, ...]:
        """The numbers of classes that the file may have."""
        return _CLASSES.get(self.data, ())

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return load_preset(self.preset).model.model_copy(update={"num_points": (self.points,) * 3})

    @property
    def description(self) -> str:
        """What the file is, in words."""
        if self.is_backbone:
            return f"{self.preset} backbone, ImageNet"
        kind = [self.preset]
        kind += ["RT-DETR v1"] if self.version == "v1" else []
        kind += [self.sampling] if self.sampling == "discrete" else []
        kind += [f"with {counted(self.points, 'sampling point')} a scale"] if self.points != 4 else []
        data = {"coco": "COCO", "objects365": "Objects365", "objects365-coco": "Objects365, then COCO"}[self.data]
        return f"{' '.join(kind)}, {data}" + (f", AP {self.ap:.3f}" if self.ap else "")


@cache
def catalogue() -> Mapping[str, Published]:
    """Return every published file by its name."""
    document = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text("utf-8"))
    common = {"license": document["license"]}
    return {name: Published(name=name, **common, **entry) for name, entry in document["files"].items()}


def find_by_file(file: str) -> Published | None:
    """Return the entry of a file name, or None."""
    return next((entry for entry in catalogue().values() if entry.file == file), None)


def find_published(name: str) -> Published:
    """Return the entry of a name such as `r18-discrete`, or of a file name.

    Raises:
        ModelError: no such file was published.
    """
    entry = catalogue().get(name) or find_by_file(name)
    if entry is None:
        known = [*catalogue(), *(e.file for e in catalogue().values())]
        message = f"there are no published weights {name}{suggest(name, known)}"
        raise ModelError(message, hint="rtdetr weights list", code="weights-unknown")
    return entry

"""The folder of one run: what lies in it, and who may write it when."""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import RtdetrError, UsageError
from rtdetr_cli.train.checkpoint import CHECKPOINT, PREVIOUS, sync_folder

BEST = "best.safetensors"
CONFIG = "config.toml"
MANIFEST = "manifest.json"
METRICS = "metrics.csv"
LOG = "train.log"
DIGESTS = ".images"


class RunFolder:
    """One run on disk: `config.toml`, `manifest.json`, `metrics.csv`, `train.log`, weights and evidence.

    `metrics.csv` holds nothing that depends on the clock, so that two runs of the same settings write the same bytes;
    times and memory go to `train.log`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told_of_log = False

    @classmethod
    def create(cls, out: Path, *, name: str, stem: str) -> RunFolder:
        """Make a new folder: `out/name`, or `out/stem-NN` with the next free number.

        Raises:
            UsageError: a run of that name exists.
            RtdetrError: the folder cannot be made or written.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            if name:
                path = out / name
                refuse_existing(out, name)
                path.mkdir(parents=True)
            else:
                path = _numbered(out, re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run")
            probe = path / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RtdetrError(
                f"the output folder {out} cannot be written: {error.strerror or error}",
                hint="--out DIR names another",
                code="not-writable",
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of a run that was begun.

        Raises:
            UsageError: it is no run.
        """
        if not path.is_dir():
            raise UsageError(
                f"the run {path} does not exist", hint="--resume takes a folder of runs/", code="run-missing"
            )
        if (path / CONFIG).is_file() and not (path / MANIFEST).is_file():
            raise UsageError(
                f"the run {path} was killed before it began: it has {CONFIG}, but no {MANIFEST}",
                hint=f"rtdetr train --config {path / CONFIG} --name {path.name}-again starts it again",
                code="run-missing",
            )
        if {p.name for p in path.iterdir()} <= {".probe", f".{CONFIG}.partial"}:
            raise UsageError(
                f"{path} is empty: the run was killed before it began",
                hint=f"rm -r {path}, then the same command as before: rtdetr train --data DATA ...",
                code="run-missing",
            )
        if not (path / CONFIG).is_file():
            raise UsageError(
                f"{path} is not a run of rtdetr train: it has no {CONFIG}",
                hint="rtdetr train --weights FILE starts a new run from a model file",
                code="run-missing",
            )
        return cls(path)

    @property
    def best(self) -> Path:
        """The model to deploy."""
        return self.path / BEST

    @property
    def checkpoint(self) -> Path:
        """The file to resume from."""
        return self.path / CHECKPOINT

    @property
    def untrained(self) -> bool:
        """True where the run was killed before its first checkpoint: it has its settings, and nothing came of them."""
        return not any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS, METRICS, BEST))

    def write(self, name: str, text: str) -> Path:
        """Write a small text file whole: aside, synced, renamed."""
        partial, final = self.path / f".{name}.partial", self.path / name
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
        sync_folder(self.path)
        return final

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write `manifest.json`."""
        self.write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, default=str) + "\n")

    def manifest(self) -> dict[str, Any]:
        """Read `manifest.json`."""
        found: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        return found

    # ---- digests of the images ------------------------------------------------------------------------------

    def write_digests(self, digests: NDArray[np.uint64]) -> None:
        """Keep a number for each image, by which a changed one can be named; without them the run is as good."""
        with suppress(OSError):
            (self.path / DIGESTS).write_bytes(digests.astype("<u8").tobytes())

    def digests(self) -> NDArray[np.uint64] | None:
        """Read what `write_digests` kept; None where it is not there, or not whole."""
        try:
            found = (self.path / DIGESTS).read_bytes()
        except OSError:
            return None
        return np.frombuffer(found, "<u8").astype(np.uint64) if len(found) % 8 == 0 else None

    # ---- metrics.csv ------------------------------------------------------------------------------------------

    def metrics_offset(self) -> int:
        """Return the length of `metrics.csv` in bytes."""
        path = self.path / METRICS
        return path.stat().st_size if path.exists() else 0

    def truncate_metrics(self, offset: int) -> None:
        """Take back every row after `offset`: the epochs that are going to be run again."""
        path = self.path / METRICS
        if path.exists() and path.stat().st_size > offset:
            with path.open("r+b") as file:
                file.truncate(offset)
                file.flush()
                os.fsync(file.fileno())

    def add_metrics(self, row: Mapping[str, float | int | None]) -> None:
        """Append one epoch; the first row makes the heading, later ones follow it."""
        path = self.path / METRICS
        heading = self._heading()
        with path.open("a", encoding="utf-8", newline="") as file:
            if not heading:
                heading = list(row)
                file.write(",".join(heading) + "\n")
            file.write(",".join(_cell(row.get(key)) for key in heading) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, float | None]]:
        """Read `metrics.csv`: a row for each epoch, None where there is no value."""
        path = self.path / METRICS
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]

    def _heading(self) -> list[str]:
        path = self.path / METRICS
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as file:
            first = file.readline().rstrip("\n")
        return first.split(",") if first else []

    # ---- train.log --------------------------------------------------------------------------------------------

    def log(self, line: str) -> str:
        """Append a line, with the time, to `train.log`.

        Returns:
            What a person should be told, since the line could not be written: the first time, else "". A line is no
            reason to end a run; what the run cannot do without is its checkpoint, which says so itself.
        """
        path = self.path / LOG
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        except OSError as error:
            if self._told_of_log:
                return ""
            self._told_of_log = True
            return f"{path} cannot be written: {error.strerror or error}; the run goes on without it"
        return ""


def nearest(path: Path) -> Path:
    """Return a path, or the nearest of the folders above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def refuse_existing(out: Path, name: str) -> None:
    """Refuse a name that is taken, or is no name of a folder.

    Raises:
        UsageError: so it is.
    """
    if Path(name).name != name or name in (".", ".."):
        raise UsageError(f"--name {name} is not the name of a folder", hint="--out DIR says where it lies")
    if (out / name).exists():
        raise UsageError(
            f"the run {out / name} exists",
            hint=f"another --name, or rtdetr train --resume {out / name}",
            code="run-exists",
        )


def _numbered(out: Path, stem: str) -> Path:
    taken = [int(m[1]) for p in out.iterdir() if (m := re.fullmatch(rf"{re.escape(stem)}-(\d+)", p.name))]
    number = max(taken, default=0) + 1
    while True:
        path = out / f"{stem}-{number:02d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _cell(value: float | int | None) -> str:
    return "" if value is None else repr(value)

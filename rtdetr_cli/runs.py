"""The run folder: the names of its files, what they record, and which of several runs is the newest.

Only this module names the files of a run. Nothing here needs torch, so that a command can find its model first.

A run records the command line, dataset, machine and plan in `manifest.json`, and why it finished. Runs of version 0.1
recorded only in `train.log` that they finished; this is understood as well.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rtdetr_cli import documents as doc
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.files import missing_path_hint, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

BEST = "best.safetensors"
CHECKPOINT = "last.ckpt"
PREVIOUS_CHECKPOINT = ".last.ckpt.previous"
PARTIAL_CHECKPOINT = ".last.ckpt.partial"
CONFIG = "config.toml"
MANIFEST = "manifest.json"
LARGEST_NUMBER = 1e12  # in metrics.csv; a larger one was not written by a run, and no plot has room for it
METRICS = "metrics.csv"
LOG = "train.log"
LOCK = ".lock"
IMAGE_DIGESTS = ".images"
VAL_IMAGES = "val_images.json"
REPORT = "report.html"
PLOTS = "plots"
EVENTS = "events"
EXPORT = "export"
DISCRETE_RESULT = "discrete.json"

FINISHED_IN_LOG = re.compile(r"  finished \((\w+)\)")  # of version 0.1


class RunFolder:
    """One run on disk.

    `metrics.csv` holds nothing that depends on the clock, so that two runs of the same settings write the same bytes;
    times and memory go to `train.log`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / BEST  # the model to deploy
        self.checkpoint = path / CHECKPOINT  # the file to resume from
        self.config = path / CONFIG  # the resolved settings, as TOML
        self.report = path / REPORT
        self._log_failed = False

    @classmethod
    def create(cls, out: Path, *, name: str, stem: str) -> RunFolder:
        """Make a new folder: `out/name`, or `out/stem-NN` with the next free number.

        Raises:
            UsageError: a run of that name exists.
            RtdetrError: the folder cannot be made.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            if name:
                path = out / name
                refuse_existing(out, name)
                path.mkdir(parents=True)
            else:
                path = make_numbered(out, re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run")
        except OSError as error:
            raise RtdetrError(
                f"cannot write to the output folder {out}: {error.strerror or error}",
                hint="choose another folder with --out DIR",
                code="not-writable",
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of a run that was started.

        Raises:
            UsageError: the folder is not a run.
            ModelError: its `manifest.json` is damaged.
        """
        if not path.is_dir():
            problem, hint = f"the run {path} does not exist", missing_path_hint(path)
        elif (path / CONFIG).is_file() and (path / MANIFEST).is_file():
            run = cls(path)
            try:
                _checked_manifest(doc.parse_json(doc.read_bounded(path / MANIFEST)))
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise run.damaged(MANIFEST, str(reason)) from error
            return run
        elif (path / CONFIG).is_file():
            problem = f"the run {path} was killed before it started: it has a {CONFIG} but no {MANIFEST}"
            hint = f"rtdetr train --config {path / CONFIG} --name {path.name}-again starts it again"
        elif all(p.name == LOCK or p.name.startswith(f".{CONFIG}.") for p in path.iterdir()):
            problem = f"{path} is empty: the run was killed before it started"
            hint = f"rm -r {path}, then repeat the first command: rtdetr train --data DATA ..."
        else:
            problem = f"{path} is not a run of rtdetr train: it has no {CONFIG}"
            hint = "rtdetr train --weights FILE starts a new run from a model file"
        raise UsageError(problem, hint=hint, code="run-missing")

    def write(self, name: str, text: str) -> None:
        """Write a small text file atomically."""
        write_text(self.path / name, text)

    # ---- manifest.json ------------------------------------------------------------------------------------------

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write `manifest.json`."""
        # ASCII, since the name of a file can hold bytes that are not UTF-8.
        self.write(MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")

    def manifest(self) -> dict[str, Any]:
        """Read `manifest.json`; empty where there is none, or where it is damaged."""
        return _read_json(self.path / MANIFEST, _checked_manifest) or {}

    def damaged(self, name: str, reason: str) -> ModelError:
        """Return an error that says which file of the run cannot be read, and what is still usable."""
        return ModelError(f"{self.path / name} is damaged: {reason}", hint=self.usable(), code="run-damaged")

    def usable(self) -> str:
        """Return as a hint what is still usable of a damaged run."""
        if not self.best.is_file():
            return "start it again: rtdetr train --data DATA ..."
        return f"{self.best} is still usable: rtdetr train --weights {self.best} --data DATA starts a new run from it"

    def mark_finished(self, reason: str) -> None:
        """Record that the run is over; `reason` is `done` or `patience`."""
        self.write_manifest({**self.manifest(), "finished": reason, "ended": timestamp()})

    # ---- state --------------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """True once there is something to resume."""
        return (self.path / MANIFEST).is_file() or self.checkpoint.is_file()

    @property
    def untrained(self) -> bool:
        """True for a run that was killed before its first checkpoint."""
        return not any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS_CHECKPOINT, METRICS, BEST))

    @property
    def finished(self) -> str:
        """Why the run ended, `done` or `patience`; empty if it has not."""
        manifest = self.manifest()
        if "finished" in manifest:
            return str(manifest["finished"] or "")
        match = FINISHED_IN_LOG.search(_read_text(self.path / LOG))
        return match[1] if match else ""

    @property
    def is_old(self) -> bool:
        """True for a run of version 0.1."""
        return "finished" not in self.manifest()

    def refuse_old(self) -> None:
        """Refuse to resume an interrupted run of version 0.1, whose checkpoints identify the dataset differently.

        Raises:
            UsageError: it is one.
        """
        if self.is_old and not self.finished:
            version = self.manifest().get("versions", {}).get("rtdetr-cli", "0.1")
            raise UsageError(
                f"the run {self.path} was started by rtdetr-cli {version}, and this version cannot resume it",
                hint=f"rtdetr train --weights {self.path} --data DATA starts a new run from its best model",
                code="run-version",
            )

    def caveat(self) -> str:
        """Return why this run's model should not be chosen silently; empty if there is no reason."""
        manifest = self.manifest()
        if ((self.path / LOG).is_file() or "finished" in manifest) and not self.finished:
            epochs = manifest.get("plan", {}).get("epochs")
            done = max(0, len(_read_text(self.path / METRICS).splitlines()) - 1)  # without the heading
            return "unfinished" + (f", epoch {done}" if done else "") + (f" of {epochs}" if done and epochs else "")
        result = _read_json(self.path / DISCRETE_RESULT, _table) or {}
        if result.get("passed", True):
            return ""
        drop, limit = result.get("drop"), result.get("max_drop")
        if isinstance(drop, (int, float)) and isinstance(limit, (int, float)) and drop > limit:
            return f"its discrete sampling lost {drop:.3f} AP, more than --max-drop {limit:g}"
        return "an export of finetune-discrete failed verification"

    @property
    def age(self) -> tuple[float, int]:
        """When the run started, in seconds, and when its model was written, which calibrating does again."""
        written = self.best.stat().st_mtime_ns
        try:
            return datetime.fromisoformat(str(self.manifest().get("started"))).timestamp(), written
        except ValueError:
            return written / 1e9, written

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training this run until the block ends or this process dies.

        Raises:
            UsageError: another process is training the run.
        """
        from filelock import FileLock, Timeout

        path = self.path / LOCK
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            holder = _read_text(path).strip() or "another process"
            raise UsageError(
                f"the run {self.path} is being trained by {holder}",
                hint="wait for that process to end, or stop it",
                code="run-locked",
            ) from None
        try:
            with suppress(OSError):
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            yield
        finally:
            lock.release()

    def write_val_images(self, names: Iterable[str]) -> None:
        """Store which images the run held out of a dataset without a val split."""
        self.write(VAL_IMAGES, json.dumps(list(names), indent=0) + "\n")

    def val_images(self) -> Sequence[str] | None:
        """Read what `write_val_images` stored; None where the dataset had a val split of its own."""
        return _read_json(self.path / VAL_IMAGES, doc.sequence(doc.string, longest=10_000_000))

    def write_digests(self, digests: NDArray[np.uint64]) -> None:
        """Store a digest of each image, to report which ones have changed; a failure to write them is ignored."""
        with suppress(OSError):
            (self.path / IMAGE_DIGESTS).write_bytes(digests.astype("<u8").tobytes())

    def digests(self) -> NDArray[np.uint64] | None:
        """Read what `write_digests` stored; None where the file is missing or incomplete."""
        import numpy as np

        try:
            return np.frombuffer(doc.read_bounded(self.path / IMAGE_DIGESTS), "<u8").astype(np.uint64)
        except (OSError, ValueError):
            return None

    # ---- metrics.csv --------------------------------------------------------------------------------------------

    def metrics_offset(self) -> int:
        """Return the length of `metrics.csv` in bytes."""
        path = self.path / METRICS
        return path.stat().st_size if path.exists() else 0

    def truncate_metrics(self, offset: int) -> None:
        """Remove every row after `offset`: the epochs that are going to be trained again."""
        if self.metrics_offset() > offset:
            with (self.path / METRICS).open("r+b") as file:
                file.truncate(offset)
                file.flush()
                os.fsync(file.fileno())

    def add_metrics(self, row: Mapping[str, float | int | None]) -> None:
        """Append one epoch; the keys of the first row are the heading."""
        heading = _read_text(self.path / METRICS).partition("\n")[0]
        columns = heading.split(",") if heading else list(row)
        with (self.path / METRICS).open("a", encoding="utf-8", newline="") as file:
            if not heading:
                file.write(",".join(columns) + "\n")
            values = [row.get(column) for column in columns]
            file.write(",".join("" if value is None else repr(value) for value in values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, float | None]]:
        """Read `metrics.csv`: one row per epoch, None where there is no value; a row without an epoch is left out."""
        heading, *lines = (_read_text(self.path / METRICS) or "\n").splitlines()
        columns = heading.split(",")
        rows = [dict(zip(columns, map(_number, line.split(",")), strict=False)) for line in lines]
        return [row for row in rows if (epoch := row.get("epoch")) and epoch > 0 and epoch.is_integer()]

    # ---- train.log ----------------------------------------------------------------------------------------------

    def log(self, line: str) -> str:
        """Append a line, with the time, to `train.log`; return a warning the first time that this fails, else ""."""
        path = self.path / LOG
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # names of files
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        except OSError as error:
            if self._log_failed:
                return ""
            self._log_failed = True
            return f"cannot write {path}: {error.strerror or error}; training continues without it"
        return ""


def find_runs(folder: Path) -> list[RunFolder]:
    """Return the runs in a folder that hold a model to deploy, newest last."""
    runs = [RunFolder(best.parent) for best in folder.glob(f"*/{BEST}")] if folder.is_dir() else []
    return sorted(runs, key=lambda run: (*run.age, run.path.name))


def settings_file(model: Path) -> Path | None:
    """Return the settings of the run that a model file belongs to, also from its `export/` folder."""
    return next((f / CONFIG for f in (model.parent, model.parent.parent) if (f / CONFIG).is_file()), None)


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def refuse_existing(out: Path, name: str) -> None:
    """Refuse a name that is taken or is not a folder name.

    Raises:
        UsageError: the name cannot be used.
    """
    if Path(name).name != name or name in (".", ".."):
        hint = "--out DIR sets the folder that holds the runs"
        raise UsageError(f"--name {name} is not a valid folder name", hint=hint)
    if (out / name).exists():
        raise UsageError(
            f"the run {out / name} already exists",
            hint=f"choose another --name, or rtdetr train --resume {out / name}",
            code="run-exists",
        )


def timestamp() -> str:
    """Return the local time as ISO 8601, in whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def next_name(out: Path, stem: str) -> str:
    """Return `stem-NN` with a number above those in use."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    taken = [int(m[1]) for name in names if (m := re.fullmatch(rf"{re.escape(stem)}-(\d+)", name))]
    return f"{stem}-{max(taken, default=0) + 1:02d}"


def make_numbered(out: Path, stem: str) -> Path:
    """Make and return a new folder `stem-NN` in an existing one."""
    while True:
        path = out / next_name(out, stem)
        with suppress(FileExistsError):  # another process took the name just now
            path.mkdir()
            return path


def _read_text(path: Path) -> str:
    try:
        return doc.read_bounded(path).decode("utf-8", "replace")
    except OSError:
        return ""


def _read_json(path: Path, read: doc.Reader[T]) -> T | None:
    """Read a document; None where there is none, or where it is damaged."""
    with suppress(OSError, ValueError):
        return read(doc.parse_json(doc.read_bounded(path)))
    return None


def _checked_manifest(document: Any) -> dict[str, Any]:
    return _table(document) | doc.read_fields(document, _MANIFEST)


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return None if LARGEST_NUMBER < abs(number) < math.inf else number


_table = doc.table(lambda value: value)
_MANIFEST: dict[str, doc.Reader[Any]] = {
    "started": doc.string,
    "finished": doc.optional(doc.one_of("", "done", "patience")),
    "versions": doc.table(doc.string),
    "dataset": _table,
    "weights": doc.string,
    "precision": doc.string,
    "micro_batch": doc.optional(doc.integer(1, 1 << 20)),
    "identity": doc.optional(doc.table(_table)),
    "plan": _table,
}
"""The fields that are read again, with what they may be; a run of version 0.1 has fewer."""

"""A file that holds everything a run needs to go on, and that is either whole or not there.

Layout: one line of magic and version, one line with the payload's sha256 and length, the payload (`torch.save` of
plain containers and tensors, read with `weights_only`). It is written aside, synced, renamed over the old one, and
the folder is synced; the old one stays as a hidden file until the next save. A kill at any moment leaves a whole
file, and one that was damaged afterwards is noticed when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from rtdetr_cli.errors import ModelError, RtdetrError
from rtdetr_cli.runs import CHECKPOINT, PARTIAL_CHECKPOINT, PREVIOUS_CHECKPOINT

MAGIC = b"rtdetr-checkpoint 1\n"
SEAL_BYTES = 64 + 1 + 20 + 1


class _Sealing:
    """A file object for `torch.save` that hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.length += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep_previous: bool = False) -> Path:
    """Write `last.ckpt`; the one before it is kept aside.

    Args:
        folder: the run's.
        state: plain containers, numbers, strings and tensors.
        keep_previous: what is called `last.ckpt` now is no good state: it goes, and the one before it stays.

    Raises:
        RtdetrError: the disk is full or the folder cannot be written; the last good checkpoint is untouched.
    """
    partial, final, previous = folder / PARTIAL_CHECKPOINT, folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT
    with explain_write_failure(folder, "the checkpoint"):
        try:
            _write_sealed(partial, state)
        except (OSError, RuntimeError):
            partial.unlink(missing_ok=True)
            raise
        if final.exists() and not (keep_previous and previous.exists()):
            # A link, not a rename: at no moment is there no file called last.ckpt.
            previous.unlink(missing_ok=True)
            try:
                os.link(final, previous)
            except OSError:
                shutil.copyfile(final, previous)
        os.replace(partial, final)
        sync_folder(folder)
    return final


def _write_sealed(path: Path, state: dict[str, Any]) -> None:
    _check_room(path.parent, bytes_of(state))
    with path.open("wb") as file:
        file.write(MAGIC + b" " * (SEAL_BYTES - 1) + b"\n")
        sealing = _Sealing(file)
        torch.save(state, sealing)  # type: ignore[arg-type]
        file.seek(len(MAGIC))
        file.write(f"{sealing.digest.hexdigest()} {sealing.length:20d}\n".encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def explain_write_failure(folder: Path, what: str) -> Iterator[None]:
    """Say of a file of the run that cannot be written what is left, and how to go on.

    Args:
        folder: the run's.
        what: is being written, for the message.

    Raises:
        RtdetrError: in place of whatever error the system gave.
    """
    try:
        yield
    except (OSError, RuntimeError, RtdetrError) as error:
        # torch.save and others wrap what the file object raised; the cause says what it was.
        cause = _os_error_behind(error)
        if cause is None:
            raise
        final = folder / CHECKPOINT
        left = f"the last good checkpoint in {folder} is untouched" if final.exists() else "no checkpoint was there yet"
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RtdetrError(
            f"{what} could not be written: {'the disk is full' if full else cause.strerror or cause}; {left}",
            hint=f"free some space, then rtdetr train --resume {folder}" if final.exists() else "",
            code="disk-full" if full else "not-writable",
        ) from error


def run_bytes(learner_state: dict[str, Any]) -> int:
    """Return the bytes that a run takes: two checkpoints, a third while it is written, and the model."""
    return 3 * bytes_of(learner_state) + bytes_of(learner_state["average"])


def has_room(wanted: int, free: int) -> bool:
    """Tell whether so many bytes can be kept where so many are free."""
    return free >= wanted * 1.05 + 2**20


def require_room(folder: Path, wanted: int) -> None:
    """Refuse to begin a run that the disk cannot hold.

    Raises:
        RtdetrError: it names both sizes.
    """
    free = shutil.disk_usage(folder).free
    if not has_room(wanted, free):
        raise RtdetrError(
            f"a run keeps {wanted / 1e9:.2f} GB in {folder}, and {free / 1e9:.2f} GB are free",
            hint="free some space, or --out DIR names another disk",
            code="disk-full",
        )


def _os_error_behind(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def bytes_of(value: Any) -> int:
    """Return about how many bytes containers and tensors take in a file."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(bytes_of(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_of(v) for v in value)
    return 64


def _check_room(folder: Path, wanted: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        OSError: ENOSPC.
    """
    if not has_room(wanted, shutil.disk_usage(folder).free):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """Read `last.ckpt`, or the one before it where that is damaged.

    Returns:
        The state with all tensors on the CPU, and a warning ("" for none).

    Raises:
        ModelError: neither can be read.
    """
    problems = []
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} does not exist")
            continue
        try:
            state = read_checkpoint(path)
        except ModelError as error:
            problems.append(error.message)
            continue
        return state, "" if not problems else f"{problems[0]}: going on from the checkpoint before it"
    raise ModelError(
        "; ".join(problems[:1] if len(problems) == 2 and "does not exist" in problems[1] else problems),
        hint="a run can be resumed once it has written last.ckpt; rtdetr train --weights starts from a model file",
        code="checkpoint-damaged" if (folder / CHECKPOINT).exists() else "checkpoint-missing",
    )


def load_rollback_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint whose last step was taken; where there is none, simply the newest.

    A run that skips step after step may have come to the end of an epoch, and saved, before that was known.
    """
    newest, _ = load_checkpoint(folder)
    if newest["place"]["in_a_row"] and (folder / PREVIOUS_CHECKPOINT).is_file():
        try:
            before = read_checkpoint(folder / PREVIOUS_CHECKPOINT)
        except ModelError:
            return newest
        if not before["place"]["in_a_row"]:
            return before
    return newest


def promote_previous(folder: Path) -> None:
    """Make the checkpoint before the newest the newest, when that one is damaged.

    Otherwise the next save would keep the damaged one as the one before, and a kill during it leave nothing good.
    """
    os.replace(folder / PREVIOUS_CHECKPOINT, folder / CHECKPOINT)
    sync_folder(folder)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint file and verify its checksum.

    Raises:
        ModelError: foreign, cut short, or changed since it was written.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{path} is not a checkpoint of rtdetr train", code="checkpoint-foreign")
        seal = file.read(SEAL_BYTES).decode("ascii", "replace").split()
        start = file.tell()
        if len(seal) != 2 or os.fstat(file.fileno()).st_size - start != int(seal[1]):
            raise ModelError(f"{path} is cut short", code="checkpoint-damaged")
        if hashlib.file_digest(file, "sha256").hexdigest() != seal[0]:
            raise ModelError(f"{path} has been damaged: its checksum is another", code="checkpoint-damaged")
        file.seek(start)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelError(
                f"{path} holds more than tensors and numbers, or is none of ours", code="checkpoint-foreign"
            ) from error
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds no training state", code="checkpoint-foreign")
    return state

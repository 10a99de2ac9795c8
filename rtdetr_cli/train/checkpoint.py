"""A file that holds everything a run needs to continue, and that is either complete or not there.

Layout: one line of magic and version, one line with the payload's sha256 and length, the payload (`torch.save` of
plain containers and tensors, read with `weights_only`). It is written to a hidden file, synced and renamed over the old
one, which stays as another hidden file until the next save. A kill at any moment leaves a complete file, and one that
is damaged later is noticed when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from rtdetr_cli.errors import ModelError, RtdetrError
from rtdetr_cli.files import is_full, sync_folder
from rtdetr_cli.runs import CHECKPOINT, PARTIAL_CHECKPOINT, PREVIOUS_CHECKPOINT

MAGIC = b"rtdetr-checkpoint 1\n"
SEAL_BYTES = 64 + 1 + 20 + 1


# ---- writing ----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep_previous: bool = False) -> Path:
    """Write `last.ckpt`, and keep the checkpoint before it.

    The partial file has a fixed name, unlike that of `files.atomic_write`, so that repeated kills leave one such file
    and not one each.

    Args:
        folder: the run's.
        state: plain containers, numbers, strings and tensors.
        keep_previous: the present `last.ckpt` is no good state: replace it, and keep the one before it.

    Raises:
        RtdetrError: the disk is full or the folder cannot be written; the last good checkpoint is untouched.
    """
    partial, final, previous = folder / PARTIAL_CHECKPOINT, folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT
    with explain_write_failure(folder, "the checkpoint"):
        try:
            _write(partial, state)
        except (OSError, RuntimeError):
            partial.unlink(missing_ok=True)
            raise
        if final.exists() and not (keep_previous and previous.exists()):
            # A link and not a rename, so that there is a file called last.ckpt at every moment.
            previous.unlink(missing_ok=True)
            try:
                os.link(final, previous)
            except OSError:
                shutil.copyfile(final, previous)
        os.replace(partial, final)
        sync_folder(folder)
    return final


def _write(path: Path, state: dict[str, Any]) -> None:
    if not has_room(bytes_of(state), shutil.disk_usage(path.parent).free):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent))
    with path.open("w+b") as file:
        file.write(MAGIC + b" " * (SEAL_BYTES - 1) + b"\n")
        start = file.tell()
        torch.save(state, file)
        length = file.tell() - start
        file.seek(start)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(len(MAGIC))
        file.write(f"{digest} {length:20d}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def promote_previous(folder: Path) -> None:
    """Replace a damaged `last.ckpt` by the checkpoint before it.

    Otherwise the next save would keep the damaged one as the one before, and a kill during that save would leave no
    good checkpoint.
    """
    os.replace(folder / PREVIOUS_CHECKPOINT, folder / CHECKPOINT)
    sync_folder(folder)


@contextmanager
def explain_write_failure(folder: Path, what: str) -> Iterator[None]:
    """Turn the error of a file of a run that cannot be written into one that says how to continue the run."""
    try:
        yield
    except (OSError, RuntimeError, RtdetrError) as error:
        # torch.save and others wrap what the file object raised; the reason is in the cause.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        saved = (folder / CHECKPOINT).exists()
        full = is_full(cause)
        remedy = "free some space" if full else f"make {folder} writable"
        raise RtdetrError(
            f"{what} could not be written: {'the disk is full' if full else cause.strerror or cause}; "
            + (f"the last good checkpoint in {folder} is untouched" if saved else "there is no checkpoint yet"),
            hint=f"{remedy}, then rtdetr train --resume {folder}" if saved else "",
            code="disk-full" if full else "not-writable",
        ) from error


# ---- room -------------------------------------------------------------------------------------------------------


def run_bytes(learner_state: dict[str, Any]) -> int:
    """Return the bytes that a run takes: two checkpoints, a third while it is written, and the model."""
    return 3 * bytes_of(learner_state) + bytes_of(learner_state["average"])


def has_room(wanted: int, free: int) -> bool:
    """Return whether `wanted` bytes fit into `free`, with a margin."""
    return free >= wanted * 1.05 + 2**20


def require_room(folder: Path, wanted: int) -> None:
    """Refuse to start a run that the disk cannot hold.

    Raises:
        RtdetrError: code `disk-full`.
    """
    free = shutil.disk_usage(folder).free
    if not has_room(wanted, free):
        raise RtdetrError(
            f"a run needs {wanted / 2**30:.2f} GiB in {folder}, but only {free / 2**30:.2f} GiB is free",
            hint="free some space, or choose another disk with --out DIR",
            code="disk-full",
        )


def bytes_of(value: Any) -> int:
    """Return about how many bytes containers and tensors take in a file."""
    return sum(leaf.nbytes if isinstance(leaf, torch.Tensor) else 64 for leaf in tree_leaves(value))


# ---- reading ----------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path, *, after_finite_step: bool = False) -> tuple[dict[str, Any], str]:
    """Read `last.ckpt`, or the checkpoint before it if that is damaged.

    With `after_finite_step`, one that was saved right after a skipped step is read only if there is no other: the end
    of an epoch may have been saved while step after step was being skipped.

    Returns:
        The state with all tensors on the CPU, and a warning ("" for none).

    Raises:
        ModelError: neither can be read.
    """
    problems: list[str] = []
    fallback: dict[str, Any] | None = None
    warning = ""
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        try:
            state = read_checkpoint(folder / name)
        except ModelError as error:
            problems.append(error.message)
            warning = f"{problems[0]}: continuing from the checkpoint before it"
            continue
        if not (after_finite_step and state["place"]["in_a_row"]):
            return state, warning
        fallback = fallback or state
    if fallback is not None:
        return fallback, warning
    raise ModelError(
        "; ".join(problems[:1] if "does not exist" in problems[1] else problems),
        hint="a run can be resumed once it has written last.ckpt; rtdetr train --weights starts from a model file",
        code="checkpoint-damaged" if (folder / CHECKPOINT).exists() else "checkpoint-missing",
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint file and verify its checksum.

    Raises:
        ModelError: not a checkpoint, truncated, or changed since it was written.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise ModelError(f"{path} {problem}", code="checkpoint-missing")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{path} is not a checkpoint of rtdetr train", code="checkpoint-foreign")
        seal = file.read(SEAL_BYTES)
        start = file.tell()
        length = os.fstat(file.fileno()).st_size - start
        if not seal.endswith(f" {length:20d}\n".encode()):
            raise ModelError(f"{path} is truncated", code="checkpoint-damaged")
        if not seal.startswith(hashlib.file_digest(file, "sha256").hexdigest().encode()):
            raise ModelError(f"{path} is damaged: checksum mismatch", code="checkpoint-damaged")
        file.seek(start)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a pickle that is not ours provokes
            raise ModelError(
                f"{path} contains more than tensors and numbers, or was not written by rtdetr train",
                code="checkpoint-foreign",
            ) from error
    if not isinstance(state, dict):
        raise ModelError(f"{path} contains no training state", code="checkpoint-foreign")
    return state

"""Checkpoints: kills during a save, damage, full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdetr_cli.errors import ModelError, RtdetrError
from rtdetr_cli.runs import CHECKPOINT, PARTIAL_CHECKPOINT, PREVIOUS_CHECKPOINT
from rtdetr_cli.train import checkpoint
from rtdetr_cli.train.checkpoint import load_checkpoint, save_checkpoint


def state_of(number: int) -> dict[str, Any]:
    return {"number": number, "tensor": torch.full((50, 50), float(number)), "nested": {"a": [1, (2.5, None, "x")]}}


def saved(folder: Path, *numbers: int) -> None:
    for number in numbers:
        save_checkpoint(folder, state_of(number))


def test_a_saved_state_is_loaded_unchanged(tmp_path: Path) -> None:
    weight = torch.randn(8, 4, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    state = state_of(3) | {"generator": torch.get_rng_state(), "weight": weight}
    save_checkpoint(tmp_path, state)
    loaded, warning = load_checkpoint(tmp_path)
    assert not warning
    assert loaded["nested"] == state["nested"]
    for key in ("tensor", "generator", "weight"):
        assert torch.equal(loaded[key], state[key])
    assert loaded["weight"].stride() == weight.stride(), "the memory format"


def test_the_previous_checkpoint_is_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert checkpoint.read_checkpoint(tmp_path / PREVIOUS_CHECKPOINT)["number"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [PREVIOUS_CHECKPOINT, CHECKPOINT]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("numbers", [(1,), (1, 2)])
def test_keep_previous_replaces_the_newest_checkpoint(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    saved(tmp_path, *numbers)
    save_checkpoint(tmp_path, state_of(3), keep_previous=True)
    assert checkpoint.read_checkpoint(tmp_path / PREVIOUS_CHECKPOINT)["number"] == 1
    assert load_checkpoint(tmp_path)[0]["number"] == 3


# A digit of the length counts as well.
LENGTH_FIELD_END = len(checkpoint.MAGIC) + checkpoint.SEAL_BYTES - 1


@pytest.mark.parametrize("at", [-1, 2000, 200, 30, LENGTH_FIELD_END - 1, LENGTH_FIELD_END - 2, LENGTH_FIELD_END - 20])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path: Path, at: int) -> None:
    saved(tmp_path, 1, 2)
    flip(tmp_path / CHECKPOINT, at)
    loaded, warning = load_checkpoint(tmp_path)
    assert loaded["number"] == 1
    assert "damaged" in warning or "truncated" in warning


@pytest.mark.parametrize("keep", [0, 10, 60, 5000])
def test_a_truncated_checkpoint_falls_back_to_the_previous_one(tmp_path: Path, keep: int) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:keep])
    loaded, warning = load_checkpoint(tmp_path)
    assert loaded["number"] == 1
    assert warning


def test_two_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    flip(tmp_path / CHECKPOINT, -9)
    flip(tmp_path / PREVIOUS_CHECKPOINT, -9)
    with pytest.raises(ModelError, match="damaged"):
        load_checkpoint(tmp_path)


def test_a_missing_or_foreign_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist") as caught:
        load_checkpoint(tmp_path)
    assert caught.value.message.count("does not exist") == 1
    torch.save({"epoch": 3}, tmp_path / CHECKPOINT)
    with pytest.raises(ModelError, match="not a checkpoint of rtdetr train"):
        load_checkpoint(tmp_path)


class _Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch owned",))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum can be forged, so the content is loaded as tensors only."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path, {"x": _Evil()})
    with pytest.raises(ModelError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("number", "message", "code", "hint"),
    [
        (errno.ENOSPC, "the disk is full; the last good checkpoint", "disk-full", "free"),
        (
            errno.EROFS,
            "Read-only file system; the last good checkpoint",
            "not-writable",
            "writable, then rtdetr train --resume",
        ),
    ],
)
def test_a_disk_that_refuses_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, code: str, hint: str
) -> None:
    saved(tmp_path, 1)

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(RtdetrError, match=message) as caught:
            saved(tmp_path, 2)
    assert caught.value.exit_code == 1
    assert caught.value.code == code
    assert hint in caught.value.hint
    assert ("free" in caught.value.hint) == (number == errno.ENOSPC)
    assert load_checkpoint(tmp_path)[0]["number"] == 1
    assert not (tmp_path / PARTIAL_CHECKPOINT).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_write_that_fails_half_way_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / PARTIAL_CHECKPOINT).symlink_to("/dev/full")
    with pytest.raises(RtdetrError, match="the disk is full"):
        saved(tmp_path, 2)
    assert load_checkpoint(tmp_path)[0]["number"] == 1


def test_free_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(torch, "save", lambda *a: pytest.fail("began to write"))
    with pytest.raises(RtdetrError, match="the disk is full"):
        saved(tmp_path, 2)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RtdetrError, match="could not be written"):
        saved(tmp_path, 1)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from rtdetr_cli.train.checkpoint import save_checkpoint
folder, moment = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def fatal(real):
    def call(*a, **k):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    return call
save_checkpoint(folder, {"number": 1, "tensor": torch.ones(1000)})
save_checkpoint(folder, {"number": 2, "tensor": torch.ones(1000)})
os.fsync, os.link, os.replace, Path.unlink = fatal(os.fsync), fatal(os.link), fatal(os.replace), fatal(Path.unlink)
save_checkpoint(folder, {"number": 3, "tensor": torch.ones(1000)})
"""


@pytest.mark.parametrize("moment", [1, 3, 5])
def test_a_kill_during_a_save_leaves_a_complete_checkpoint(tmp_path: Path, moment: int) -> None:
    """The moments are the system calls of a save in order: fsync, unlink, link, replace, fsync of the folder."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moment)], check=False)
    assert done.returncode == -signal.SIGKILL
    loaded, warning = load_checkpoint(tmp_path)
    assert loaded["number"] == (3 if moment == 5 else 2)
    assert not warning
    save_checkpoint(tmp_path, state_of(4))
    assert load_checkpoint(tmp_path)[0]["number"] == 4
    assert not (tmp_path / PARTIAL_CHECKPOINT).exists()

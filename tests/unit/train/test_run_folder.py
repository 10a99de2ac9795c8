"""The folder of a run: names, refusals, metrics that can be taken back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rtdetr_cli.errors import RtdetrError, UsageError
from rtdetr_cli.train.run_folder import RunFolder


def test_numbers_are_never_used_again(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path, name="", stem="tiny-bccd").path.name for _ in range(3)]
    assert names == ["tiny-bccd-01", "tiny-bccd-02", "tiny-bccd-03"]
    (tmp_path / "tiny-bccd-02").rmdir()
    assert RunFolder.create(tmp_path, name="", stem="tiny-bccd").path.name == "tiny-bccd-04"


@pytest.mark.parametrize("stem", ["a b/c", "../up", "größe", "..."])
def test_names_of_datasets_make_names_of_folders(tmp_path: Path, stem: str) -> None:
    path = RunFolder.create(tmp_path / "runs", name="", stem=stem).path
    assert path.parent == tmp_path / "runs"


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, name="mine", stem="x")
    with pytest.raises(UsageError, match=r"the run .*mine exists"):
        RunFolder.create(tmp_path, name="mine", stem="x")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "."])
def test_a_name_that_is_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a folder"):
        RunFolder.create(tmp_path, name=name, stem="x")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RtdetrError, match="cannot be written") as caught:
        RunFolder.create(tmp_path / "file" / "runs", name="", stem="x")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("made", [False, True])
def test_only_a_run_can_be_opened(tmp_path: Path, made: bool) -> None:
    path = tmp_path / "x"
    if made:
        path.mkdir()
    with pytest.raises(UsageError):
        RunFolder.open(path)


def test_rows_can_be_taken_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics_offset() == 0
    folder.add_metrics({"epoch": 1, "AP": 0.1 + 0.2, "APl": None})
    offset = folder.metrics_offset()
    kept = (tmp_path / "metrics.csv").read_bytes()
    folder.add_metrics({"epoch": 2, "AP": float("nan"), "APl": 0.5, "new": 3})
    folder.truncate_metrics(offset)
    assert (tmp_path / "metrics.csv").read_bytes() == kept
    assert kept.decode() == "epoch,AP,APl\n1,0.30000000000000004,\n"
    folder.truncate_metrics(0)
    folder.add_metrics({"loss": 1.5})
    assert (tmp_path / "metrics.csv").read_text() == "loss\n1.5\n"


def test_a_run_that_was_killed_before_it_began_says_how_to_start_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    (path / ".config.toml.partial").touch()
    with pytest.raises(UsageError, match="mine is empty: the run was killed before it began") as empty:
        RunFolder.open(path)
    assert f"rm -r {path}, then the same command" in empty.value.hint
    (path / "config.toml").write_text("epochs = 3\n")
    with pytest.raises(
        UsageError, match=r"was killed before it began: it has config\.toml, but no manifest"
    ) as settled:
        RunFolder.open(path)
    assert f"rtdetr train --config {path / 'config.toml'} --name mine-again" in settled.value.hint
    (path / "manifest.json").write_text("{}\n")
    assert RunFolder.open(path).untrained


@pytest.mark.parametrize("name", ["last.ckpt", ".last.ckpt.previous", "metrics.csv", "best.safetensors"])
def test_what_came_of_a_run(tmp_path: Path, name: str) -> None:
    assert RunFolder(tmp_path).untrained
    (tmp_path / ".last.ckpt.partial").touch()
    (tmp_path / "train.log").touch()
    assert RunFolder(tmp_path).untrained
    (tmp_path / name).touch()
    assert not RunFolder(tmp_path).untrained


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.log("one") == ""
    (tmp_path / "train.log").unlink()
    (tmp_path / "train.log").symlink_to("/dev/full")
    assert "No space left on device; the run goes on" in folder.log("two")
    assert folder.log("three") == ""


def test_digests_of_images_are_kept(tmp_path: Path) -> None:
    folder, digests = RunFolder(tmp_path), np.asarray([0, 2**64 - 1, 7], np.uint64)
    assert folder.digests() is None
    folder.write_digests(digests)
    kept = folder.digests()
    assert kept is not None
    assert kept.tolist() == digests.tolist()
    (tmp_path / ".images").write_bytes(b"cut")
    assert folder.digests() is None

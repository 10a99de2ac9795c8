"""The folder of a run: names, refusals, metrics that can be taken back."""

from __future__ import annotations

from pathlib import Path

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

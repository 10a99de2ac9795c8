"""The run folder: names, refusals, metrics that can be truncated, and the lock."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.runs import RunFolder, find_runs, next_name

# ---- new folders ------------------------------------------------------------------------------------------------


def test_numbers_are_never_reused(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path, name="", stem="tiny-bccd").path.name for _ in range(3)]
    assert names == ["tiny-bccd-01", "tiny-bccd-02", "tiny-bccd-03"]
    (tmp_path / "tiny-bccd-02").rmdir()
    assert RunFolder.create(tmp_path, name="", stem="tiny-bccd").path.name == "tiny-bccd-04"
    assert next_name(tmp_path, "tiny-bccd") == "tiny-bccd-05"
    assert next_name(tmp_path / "missing", "a") == "a-01"


@pytest.mark.parametrize("stem", ["a b/c", "../up", "größe", "..."])
def test_any_dataset_name_makes_a_folder_name(tmp_path: Path, stem: str) -> None:
    path = RunFolder.create(tmp_path / "runs", name="", stem=stem).path
    assert path.parent == tmp_path / "runs"


def test_an_existing_name_is_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, name="mine", stem="x")
    with pytest.raises(UsageError, match=r"the run .*mine already exists"):
        RunFolder.create(tmp_path, name="mine", stem="x")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "."])
def test_a_path_is_not_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a valid folder name"):
        RunFolder.create(tmp_path, name=name, stem="x")


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RtdetrError, match="cannot write to the output folder") as caught:
        RunFolder.create(tmp_path / "file" / "runs", name="", stem="x")
    assert caught.value.exit_code == 1


# ---- existing folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"plan": 3}', b'{"finished": {}}',
     b'{"micro_batch": "x"}', b'{"versions": {"torch": 2}}', b'{"identity": [1]}', b'{"started": 9}',
     b'{"a": ' + b"9" * 5000 + b"}"],
    ids=lambda content: str(content[:20]),
)  # fmt: skip
def test_a_damaged_manifest_is_named_with_what_is_still_usable(tmp_path: Path, content: bytes) -> None:
    run = RunFolder.create(tmp_path, name="r", stem="")
    run.write("config.toml", "")
    run.best.write_bytes(b"x")
    (run.path / "manifest.json").write_bytes(content)
    assert isinstance(run.manifest(), dict)  # a list of runs is not the place for an error
    assert run.age
    run.caveat()
    with pytest.raises(ModelError, match=r"manifest\.json is damaged") as caught:
        RunFolder.open(run.path)
    assert "best.safetensors is still usable" in caught.value.hint


def test_damaged_metrics_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, name="r", stem="")
    run.write("metrics.csv", "epoch,AP\n1,0.5\n2,x,3,4\n\0\n,1\nnan,1\ninf,1\n0,1\n1.5,1\n1e13,1\n3,1e300\n")
    assert run.metrics() == [{"epoch": 1.0, "AP": 0.5}, {"epoch": 2.0, "AP": None}, {"epoch": 3.0, "AP": None}]
    run.write("metrics.csv", "AP\n0.5\n")
    assert run.metrics() == []
    run.write("metrics.csv", "")
    assert run.metrics() == []


def test_a_missing_folder_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        RunFolder.open(tmp_path / "x")


def test_a_run_killed_before_it_started_says_how_to_start_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    (path / ".config.toml.x7q.part").touch()
    (path / ".lock").touch()
    with pytest.raises(UsageError, match="mine is empty: the run was killed before it started") as empty:
        RunFolder.open(path)
    assert f"rm -r {path}, then repeat the first command" in empty.value.hint
    (path / "config.toml").write_text("epochs = 3\n")
    with pytest.raises(UsageError, match=r"was killed before it started: it has a config\.toml but no man") as settled:
        RunFolder.open(path)
    assert f"rtdetr train --config {path / 'config.toml'} --name mine-again" in settled.value.hint
    assert not RunFolder(path).started
    (path / "manifest.json").write_text("{}\n")
    assert RunFolder.open(path).untrained
    assert RunFolder(path).started


@pytest.mark.parametrize("name", ["last.ckpt", ".last.ckpt.previous", "metrics.csv", "best.safetensors"])
def test_a_run_with_results_is_not_untrained(tmp_path: Path, name: str) -> None:
    assert RunFolder(tmp_path).untrained
    (tmp_path / ".last.ckpt.partial").touch()
    (tmp_path / "train.log").touch()
    assert RunFolder(tmp_path).untrained
    (tmp_path / name).touch()
    assert not RunFolder(tmp_path).untrained


def test_rows_can_be_removed_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics_offset() == 0
    assert folder.metrics() == []
    folder.add_metrics({"epoch": 1, "AP": 0.1 + 0.2, "APl": None})
    offset = folder.metrics_offset()
    before = (tmp_path / "metrics.csv").read_bytes()
    folder.add_metrics({"epoch": 2, "AP": float("nan"), "APl": 0.5, "new": 3})
    folder.truncate_metrics(offset)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert before.decode() == "epoch,AP,APl\n1,0.30000000000000004,\n"
    assert folder.metrics() == [{"epoch": 1.0, "AP": 0.1 + 0.2, "APl": None}]
    folder.truncate_metrics(0)
    folder.add_metrics({"loss": 1.5})
    assert (tmp_path / "metrics.csv").read_text() == "loss\n1.5\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_that_cannot_be_written_warns_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.log("one") == ""
    (tmp_path / "train.log").unlink()
    (tmp_path / "train.log").symlink_to("/dev/full")
    assert "No space left on device; training continues" in folder.log("two")
    assert folder.log("three") == ""


def test_image_digests_are_stored(tmp_path: Path) -> None:
    folder, digests = RunFolder(tmp_path), np.asarray([0, 2**64 - 1, 7], np.uint64)
    assert folder.digests() is None
    folder.write_digests(digests)
    stored = folder.digests()
    assert stored.tolist() == digests.tolist()
    (tmp_path / ".images").write_bytes(b"cut")
    assert folder.digests() is None


# ---- state ------------------------------------------------------------------------------------------------------


def test_a_run_is_unfinished_until_it_is_marked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_manifest({"started": "2026-11-21T16:07:36+0000", "finished": None, "plan": {"epochs": 50}})
    folder.log("finished (done), best AP 0.5 at epoch 1")  # nobody reads this from the log
    assert not folder.finished
    assert folder.caveat() == "unfinished"
    folder.add_metrics({"epoch": 1})
    assert folder.caveat() == "unfinished, epoch 1 of 50"
    folder.mark_finished("patience")
    assert folder.finished == "patience"
    assert folder.caveat() == ""
    manifest = folder.manifest()
    assert manifest["started"] == "2026-11-21T16:07:36+0000"
    assert manifest["ended"]


def test_a_model_without_any_record_has_no_caveat(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).caveat() == ""


def test_the_run_that_started_last_is_the_newest(tmp_path: Path) -> None:
    """The model file's own time counts only where there is no record."""
    for name, started, written in (
        ("a", "2026-11-21T17:07:35+0100", 3000),
        ("b", "2026-11-21T16:07:36+0000", 2000),
        ("c", "yesterday", 1000),
    ):
        RunFolder.create(tmp_path, name=name, stem="").write_manifest({"started": started})
        (tmp_path / name / "best.safetensors").touch()
        os.utime(tmp_path / name / "best.safetensors", (written, written))
    RunFolder.create(tmp_path, name="d", stem="")  # without a model
    assert [run.path.name for run in find_runs(tmp_path)] == ["c", "a", "b"]
    assert find_runs(tmp_path / "missing") == []


# ---- the lock ---------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from rtdetr_cli.runs import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_locked_run_says_who_holds_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            for _ in range(2):  # a refused attempt leaves the record as it is
                with pytest.raises(UsageError) as refused, folder.lock():
                    pass
                assert f"process {process.pid} on {socket.gethostname()}" in refused.value.message
        finally:
            process.kill()
    began = time.monotonic()
    with folder.lock():  # a killed process leaves no lock
        assert time.monotonic() - began < 5
    with folder.lock():
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_reading_a_run_needs_no_heavy_package() -> None:
    code = (
        "import sys, rtdetr_cli.runs;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'pydantic', 'rich', 'filelock')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

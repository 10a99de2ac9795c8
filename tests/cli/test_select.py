"""The model, run and size that a command line names, and the errors where it names none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rtdetr_cli.cli.select import model_file, parse_size, resolve_model
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.weights.header import read_header, rewrite_header


def refused(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        model_file(path)
    return caught.value


@pytest.fixture
def runs(tmp_path: Path, shapes_model: Path) -> Path:
    """Two finished runs, `a` and the newer `b`."""
    folder = tmp_path / "runs"
    for number, name in enumerate("ba"):
        (folder / name).mkdir(parents=True)
        best = folder / name / "best.safetensors"
        shutil.copy(shapes_model, best)
        os.utime(best, (2000 - number, 2000 - number))
    return folder


def test_a_folder_of_runs_names_the_newest(runs: Path) -> None:
    error = refused(runs)
    assert error.message == f"{runs} is a folder of runs (2), not a run"
    assert error.hint == f"the newest is {runs / 'b'}"


# ------------------------------------------------------------------------------------------------- the newest run


def record(run: Path, *, started: str = "", epochs: int = 50, rows: int | None = None, finished: bool = False) -> None:
    """Write the files of a run other than the weights."""
    (run / "manifest.json").write_text(json.dumps({"started": started, "plan": {"epochs": epochs}}))
    rows = epochs if rows is None else rows
    (run / "metrics.csv").write_text("epoch,loss\n" + "".join(f"{n + 1},2.5\n" for n in range(rows)))
    log = [f"2026-11-21 16:01:{n:02d}  epoch {n + 1}/{epochs}  step {n}" for n in range(rows)]
    if finished:
        log.append("2026-11-21 16:09:26  finished (patience), best AP 0.5221 at epoch 8")
    (run / "train.log").write_text("".join(f"{line}\n" for line in log))


def newest(runs: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return the name of the run that is used when none is named, and the message about it."""
    path = resolve_model(None, runs=runs)
    return path.parent.name, capsys.readouterr().err.strip().replace(f"{runs}{os.sep}", "")


def test_the_newest_run_is_the_one_started_last(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrating, copying and touching a model do not make its run newer."""
    record(runs / "a", started="2026-11-21T17:07:35+0100", finished=True)
    record(runs / "b", started="2026-11-21T16:07:36+0000", finished=True)
    assert newest(runs, capsys) == ("b", "model b/best.safetensors (the newest run)")
    best = runs / "a" / "best.safetensors"
    rewrite_header(best, read_header(best))
    assert newest(runs, capsys)[0] == "b"


def test_a_finished_run_is_preferred_to_a_newer_unfinished_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(runs / "a", finished=True)
    record(runs / "b", rows=3)
    message = "model a/best.safetensors (the newest finished run; b is newer, but unfinished, epoch 3 of 50)"
    assert newest(runs, capsys) == ("a", message)


def test_an_unfinished_run_is_used_with_a_note_when_there_is_no_other(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(runs / "a", rows=7)
    record(runs / "b", rows=3)
    assert newest(runs, capsys) == ("b", "model b/best.safetensors (the newest run, unfinished, epoch 3 of 50)")
    (runs / "b" / "manifest.json").write_text("{")
    assert newest(runs, capsys)[1] == "model b/best.safetensors (the newest run, unfinished, epoch 3)"
    (runs / "b" / "metrics.csv").unlink()
    assert newest(runs, capsys)[1] == "model b/best.safetensors (the newest run, unfinished)"


def test_a_discrete_run_that_lost_too_much_ap_is_not_preferred(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        record(runs / name, finished=True)
    result = {"passed": False, "drop": 0.034, "max_drop": 0.01}
    (runs / "b" / "discrete.json").write_text(json.dumps(result))
    lost = "its discrete sampling lost 0.034 AP, more than --max-drop 0.01"
    message = f"model a/best.safetensors (the newest finished run; b is newer, but {lost})"
    assert newest(runs, capsys) == ("a", message)
    shutil.rmtree(runs / "a")
    assert newest(runs, capsys) == ("b", f"model b/best.safetensors (the newest run, {lost})")
    (runs / "b" / "discrete.json").write_text(json.dumps({**result, "drop": 0.002}))
    assert newest(runs, capsys)[1].endswith("(the newest run, an export of finetune-discrete failed verification)")
    (runs / "b" / "discrete.json").write_text(json.dumps({**result, "passed": True}))
    assert newest(runs, capsys)[1].endswith("(the newest run)")


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ((), "the folder {} is empty", "pass a model file, or the folder of a run such as runs/NAME"),
        (("notes.txt",), "the folder {} is not a run and has no model", "pass a model file, or the folder of a run"),
        (("x.onnx", "y.xml"), "the folder {} is not a run", "pass the model file: {0}/x.onnx, {0}/y.xml"),
        (("config.toml", "last.ckpt"), "no epoch has been evaluated yet", "rtdetr train --resume {}"),
        (("config.toml",), "no epoch has been evaluated yet", "pass a model file, or the folder of a run"),
    ],
)
def test_a_folder_without_a_model(files: tuple[str, ...], message: str, hint: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    error = refused(tmp_path)
    assert message.format(tmp_path) in error.message
    assert error.hint.startswith(hint.format(tmp_path))


def test_a_missing_file_names_its_neighbours(runs: Path) -> None:
    error = refused(runs / "a" / "bset.safetensors")
    assert "does not exist" in error.message
    assert "best.safetensors" in error.hint
    assert "does not exist either" in refused(runs / "c" / "best.safetensors").hint


@pytest.mark.parametrize(("name", "hint"), [("p.jpg", "rtdetr predict"), ("d.json", "--data"), ("t.txt", "")])
def test_a_file_of_another_kind_names_the_command_for_it(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    error = refused(tmp_path / name)
    assert error.message == f"{tmp_path / name} is not a model file"
    assert ".safetensors" in error.hint
    assert hint in error.hint


def test_a_training_checkpoint_names_its_run(runs: Path) -> None:
    (runs / "a" / "last.ckpt").write_bytes(b"x")
    assert refused(runs / "a" / "last.ckpt").hint == f"pass the run folder: {runs / 'a'}"


@pytest.mark.parametrize("command", ["info", "eval", "export"])
def test_every_command_exits_with_4(command: str, rtdetr, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jpg").write_bytes(b"x")
    for path in (runs, tmp_path / "gone", tmp_path / "p.jpg"):
        ran = rtdetr(command, path, code=4)
        assert str(path) in ran.err
        assert "hint:" in ran.err


@pytest.mark.parametrize("text", ["8192", "640x8192", "100", "16", "big"])
def test_an_invalid_size_is_a_usage_error_that_names_the_flag(text: str) -> None:
    assert (parse_size("640"), parse_size("480x4096")) == ((640, 640), (480, 4096))
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.message.startswith(f"--imgsz {text}: ")
    assert "--imgsz 480x640" in caught.value.hint

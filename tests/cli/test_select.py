"""Which model, run and size the words of a command line mean, and what is said where they mean none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rtdetr_cli.cli.select import model_file, output_file, parse_size
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError


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


def test_a_file_or_a_run_is_meant(runs: Path) -> None:
    best = runs / "a" / "best.safetensors"
    assert model_file(best) == model_file(runs / "a") == best


def test_a_folder_of_runs_is_answered_with_its_newest(runs: Path) -> None:
    error = refused(runs)
    assert error.message == f"{runs} is a folder of runs (2), not a run"
    assert error.hint == f"{runs / 'b'} is the newest"


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert error.message == f"the folder {tmp_path} holds no model: it is empty"
    assert "name a model file" in error.hint
    assert "--resume" not in error.hint


def test_a_foreign_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    error = refused(tmp_path)
    assert error.message == f"the folder {tmp_path} is not a run and holds no model"
    assert "name a model file" in error.hint
    assert "--resume" not in error.hint


def test_a_folder_of_models_is_answered_with_their_names(tmp_path: Path) -> None:
    for name in ("x.onnx", "y.xml"):
        (tmp_path / name).write_bytes(b"x")
    error = refused(tmp_path)
    assert error.message == f"the folder {tmp_path} is not a run"
    assert error.hint == f"name the file: {tmp_path / 'x.onnx'}, {tmp_path / 'y.xml'}"


def test_a_run_without_a_model_goes_on_if_it_can(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "last.ckpt").write_bytes(b"x")
    error = refused(tmp_path)
    assert "no epoch" in error.message
    assert error.hint == f"rtdetr train --resume {tmp_path}"
    (tmp_path / "last.ckpt").unlink()
    assert "--resume" not in refused(tmp_path).hint


def test_a_missing_file_is_answered_with_its_neighbours(runs: Path) -> None:
    error = refused(runs / "a" / "bset.safetensors")
    assert "does not exist" in error.message
    assert "best.safetensors" in error.hint
    assert "does not exist either" in refused(runs / "c" / "best.safetensors").hint


@pytest.mark.parametrize(("name", "said"), [("p.jpg", "rtdetr predict"), ("d.json", "--data"), ("t.txt", "")])
def test_a_file_of_another_kind_is_answered_with_what_reads_it(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    error = refused(tmp_path / name)
    assert error.message == f"{tmp_path / name} is not a model file"
    assert ".safetensors" in error.hint
    assert said in error.hint


def test_a_training_checkpoint_is_answered_with_the_model_beside_it(runs: Path) -> None:
    (runs / "a" / "last.ckpt").write_bytes(b"x")
    assert refused(runs / "a" / "last.ckpt").hint == f"name the run: {runs / 'a'}"


@pytest.mark.parametrize("command", ["info", "eval", "export"])
def test_every_command_exits_with_4(command: str, rtdetr, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jpg").write_bytes(b"x")
    for path in (runs, tmp_path / "gone", tmp_path / "p.jpg"):
        ran = rtdetr(command, path)
        assert ran.code == 4, ran.err
        assert str(path) in ran.err
        assert "hint:" in ran.err


@pytest.mark.parametrize(
    ("text", "hint"), [("8192", "4096"), ("640x8192", "4096"), ("100", "96 or 128"), ("16", "32"), ("big", "480x640")]
)
def test_a_size_that_cannot_be_has_a_hint(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert hint in caught.value.hint


def test_sizes() -> None:
    assert parse_size("640") == (640, 640)
    assert parse_size("480x4096") == (480, 4096)


def test_a_file_to_write_is_tried_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for free in (tmp_path / "file", tmp_path / "new.html", tmp_path / "new" / "deep" / "page.html"):
        output_file(free, "--html")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="is a folder, not a file") as folder:
        output_file(tmp_path, "--html")
    assert folder.value.hint == f"--html {tmp_path / 'report.html'}"
    with pytest.raises(RtdetrError, match="is a file, not a folder") as caught:
        output_file(tmp_path / "file" / "page.html", "--html")
    assert caught.value.exit_code == 1

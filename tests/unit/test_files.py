"""Atomic writes and the check that a folder can be written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.files import ensure_writable, missing_path_hint


def test_ensure_writable_creates_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    ensure_writable(folder)
    assert list(folder.iterdir()) == []


def test_ensure_writable_names_the_folder_and_the_hint(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RtdetrError, match="cannot be written") as caught:
        ensure_writable(file / "below", hint="choose another --out")
    assert (caught.value.code, caught.value.hint) == ("not-writable", "choose another --out")
    assert str(file / "below") in caught.value.message


def test_the_hint_for_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "instances.json").touch()
    assert missing_path_hint(tmp_path / "instance.json") == f"did you mean {tmp_path / 'instances.json'}?"
    assert missing_path_hint(tmp_path / "x.jpg") == f"the folder {tmp_path} has no such file"
    assert missing_path_hint(tmp_path / "a" / "x.jpg") == f"the folder {tmp_path / 'a'} does not exist either"
    assert missing_path_hint(Path("no such file.jpg")) == "the current folder has no such file"

"""The sources of predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.images.decode import IMAGE_SUFFIXES
from rtdetr_cli.infer.sources import find_sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "sub/c.webp", "sub/a.png", ".hidden.jpg", "clip.mp4", "odd[1].jpg"):
        path = tmp_path / "shots" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(words: list[str], lines: list[str] | None = None) -> list[tuple[str, str, bool]]:
    return [(str(s.path), str(s.name), s.video) for s in find_sources(words, lines or [])]


def test_folder_is_searched_through_in_order(folder: Path) -> None:
    assert names(["shots"]) == [
        ("shots/a.PNG", "a", False),
        ("shots/b.jpg", "b", False),
        ("shots/clip.mp4", "clip", True),
        ("shots/odd[1].jpg", "odd[1]", False),
        ("shots/sub/a.png", "sub/a", False),
        ("shots/sub/c.webp", "sub/c", False),
    ]


def test_images_are_recognized_as_in_datasets(folder: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        (folder / "kinds" / suffix[1:]).mkdir(parents=True)
        (folder / "kinds" / suffix[1:] / f"a{suffix}").write_bytes(b"x")
    assert {Path(path).suffix for path, _, _ in names(["kinds"])} == IMAGE_SUFFIXES


def test_files_patterns_and_lists(folder: Path) -> None:
    assert names(["shots/b.jpg"]) == [("shots/b.jpg", "b", False)]
    assert names(["shots/notes.txt"])[0][0] == "shots/notes.txt"  # reading it fails later
    assert [n for n, *_ in names(["shots/*.jpg"])] == ["shots/b.jpg", "shots/odd[1].jpg"]
    assert [n for n, *_ in names(["shots/**/*.png"])] == ["shots/sub/a.png"]
    assert names(["shots/odd[1].jpg"])[0][0] == "shots/odd[1].jpg"  # an existing file takes precedence over a pattern
    listed = ["shots/b.jpg\n", "\n", "shots/gone.jpg\r\n"]
    assert [n for n, *_ in names(["-"], listed)] == ["shots/b.jpg", "shots/gone.jpg"]


def test_each_file_once_and_with_a_unique_name(folder: Path) -> None:
    assert len(names(["shots", "shots/b.jpg", str(folder / "shots" / "b.jpg")])) == 6
    assert names(["shots/a.PNG", "shots/sub/a.png"]) == [("shots/a.PNG", "a", False), ("shots/sub/a.png", "a_2", False)]


def test_a_single_missing_file_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg does not exist") as raised:
        find_sources(["shots/gone.jpg"])
    assert "shots" in raised.value.hint
    assert [n for n, *_ in names(["shots/gone.jpg", "shots/b.jpg"])] == ["shots/gone.jpg", "shots/b.jpg"]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["empty"], "contains no images", "looked for"),
        (["shots/*.bmp"], "matches no file", "shots contains a.PNG, b.jpg, clip.mp4 and 1 more"),
        (["gone/*/*.jpg"], "matches no file", "the folder gone does not exist"),
        (["*.jpg"], "matches no file", "this folder contains no images or videos"),
        (["-"], "stdin is empty", "predict -"),
        (["nowhere/x.jpg"], "does not exist", "nowhere"),
    ],
)
def test_sources_without_images(folder: Path, words: list[str], message: str, hint: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=message) as raised:
        find_sources(words, ["", " "])
    assert raised.value.exit_code == 3
    assert hint in raised.value.hint


def test_url(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a URL"):
        find_sources(["https://example.org/a.jpg"])

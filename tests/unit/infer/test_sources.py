"""The sources of predict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.images.decode import IMAGE_SUFFIXES, ImageError
from rtdetr_cli.infer.sources import fetch_image, find_sources
from tests.server import Behavior, serve


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


def test_folders_in_a_list_get_a_name_as_well(folder: Path) -> None:
    assert [stem for _, stem, _ in names(["-"], [".\n", "/\n", "shots/sub/..\n"])] == ["image", "image_2", "image_3"]


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
        (["empty"], "contains no images", "supported: "),
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
    assert hint in raised.value.hint


def test_web_addresses(folder: Path) -> None:
    found = find_sources(["https://example.org/a%20b.jpg?size=2", "-"], ["http://example.org/\n", "shots/b.jpg\n"])
    assert [str(source) for source in found] == [
        "https://example.org/a%20b.jpg?size=2",
        "http://example.org/",
        "shots/b.jpg",
    ]
    assert [str(source.name) for source in found] == ["a b", "example", "b"]
    for url, message in (
        ("ftp://example.org/a.jpg", "is not a web address that can be read"),
        ("http://[/a.jpg", "is not a web address that can be read"),
        ("http:///a.jpg", "is not a web address that can be read"),
        ("https://example.org/clip.mp4", "only images are read from the web"),
    ):
        with pytest.raises(UsageError, match=message):
            find_sources([url])


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Behavior]]:
    """A server on this machine that has one file of 500 bytes."""
    (tmp_path / "image").write_bytes(b"x" * 500)
    with serve(tmp_path) as served:
        yield served


def test_images_are_fetched_from_the_web(web: tuple[str, Behavior]) -> None:
    url, behavior = web
    assert fetch_image(f"{url}/image") == b"x" * 500
    behavior.faults = [{"redirect": "/image"}]
    assert fetch_image(f"{url}/moved") == b"x" * 500


@pytest.mark.parametrize(
    ("fault", "limits", "code", "message"),
    [
        ({"status": 404}, {}, "url-refused", "HTTP 404 Not Found"),
        ({}, {"most_bytes": 400}, "url-too-large", "larger than 0 MB"),
        ({"stall": True, "cut": 100}, {"seconds": 0.2}, "url-timeout", "not received within 0.2 seconds"),
        ({"step": 1, "pause": 0.05}, {"seconds": 0.3}, "url-timeout", "not received within 0.3 seconds"),
        ({"lie": 500}, {}, "url-unreachable", "500 bytes are missing"),
    ],
)
def test_downloads_that_fail(
    web: tuple[str, Behavior], fault: dict[str, Any], limits: dict[str, Any], code: str, message: str
) -> None:
    url, behavior = web
    behavior.faults = [fault]
    with pytest.raises(ImageError, match=message) as raised:
        fetch_image(f"{url}/image", **limits)
    assert raised.value.code == code


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ImageError, match=r"cannot be read: .*refused"):
        fetch_image("http://127.0.0.1:9/a.jpg")


@pytest.mark.parametrize("name", ["data.zip", "instances.json"])
def test_a_dataset_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="is not an image or video") as caught:
        find_sources([str(tmp_path / name)])
    assert "rtdetr validate" in caught.value.hint

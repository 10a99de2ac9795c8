"""The weights cache, against a real server on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from rtdetr_cli.errors import ModelError
from rtdetr_cli.model import hub

FILE = "rtdetrv2_r50vd_6x_coco_ema.pth"  # no public hash: the first download's is recorded
PINNED = "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth"


class Quiet(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def log_message(self, *args: object) -> None:
        type(self).asked.append(self.path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "served"
    folder.mkdir()
    Quiet.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setenv(hub.MIRROR_VARIABLE, f"http://127.0.0.1:{running.server_port}/")
        monkeypatch.setenv(hub.HOME_VARIABLE, str(tmp_path / "home"))
        yield folder
        running.shutdown()
        thread.join()


def test_a_file_is_fetched_once_and_its_hash_recorded(server: Path) -> None:
    (server / FILE).write_bytes(b"weights")
    path = hub.fetch(FILE)
    assert path.read_bytes() == b"weights"
    assert hub.fetch(FILE) == path
    assert Quiet.asked == [f"/{FILE}"]
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["hashes.json", FILE]


def test_a_later_download_is_held_to_the_first(server: Path) -> None:
    (server / FILE).write_bytes(b"weights")
    path = hub.fetch(FILE)
    (server / FILE).write_bytes(b"others!")
    with pytest.raises(ModelError, match="did not give the published"):
        hub.fetch(FILE, force=True)
    assert path.read_bytes() == b"weights"
    assert sorted(p.name for p in path.parent.iterdir()) == ["hashes.json", FILE]


def test_a_pinned_file_with_another_content_is_not_kept(server: Path) -> None:
    (server / PINNED).write_bytes(b"something else")
    with pytest.raises(ModelError, match=PINNED) as caught:
        hub.fetch(PINNED)
    assert caught.value.exit_code == 4
    assert not (hub.weights_folder() / PINNED).exists()


def test_no_network_names_the_way_out(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.MIRROR_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="no connection") as caught:
        hub.fetch(FILE)
    assert "rtdetr weights import" in caught.value.hint


def test_a_missing_file_on_the_server_says_what_it_answered(server: Path) -> None:
    with pytest.raises(ModelError, match="the server answered 404"):
        hub.fetch(FILE)


def test_import_holds_a_file_to_its_hash(server: Path, tmp_path: Path) -> None:
    mine = tmp_path / PINNED
    mine.write_bytes(b"not it")
    with pytest.raises(ModelError, match="is not the published"):
        hub.import_file(mine)
    other = tmp_path / FILE
    other.write_bytes(b"weights")
    assert hub.import_file(other).read_bytes() == b"weights"
    with pytest.raises(ModelError, match="did you mean"):
        hub.import_file(_renamed(other, "rtdetrv2_r50vd_6x_coco.pth"))


def _renamed(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


def test_commands(server: Path, rtdetr) -> None:
    (server / FILE).write_bytes(b"weights")
    assert rtdetr("weights", "fetch", FILE, "--json").json["path"].endswith(FILE)
    listed = {f["file"]: f["here"] for f in rtdetr("weights", "list", "--json").json["files"]}
    assert listed[FILE] is True
    assert listed[PINNED] is False
    assert rtdetr("weights", "verify").code == 0
    (hub.weights_folder() / FILE).write_bytes(b"damaged")
    ran = rtdetr("weights", "verify")
    assert ran.code == 4
    assert "is not the published" in ran.err
    assert rtdetr("weights", "path", "r50").out.strip().endswith(FILE)
    assert rtdetr("weights", "fetch", "tiny").code == 2

"""The cache of published weights, with a real server on loopback."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.backbone import ResNet
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights import hub

FILE = "rtdetrv2_r50vd_6x_coco_ema.pth"  # without a public hash: that of the first good download is recorded
PINNED = "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth"
BACKBONE = "ResNet50_vd_ssld_v2_pretrained_from_paddle.pth"
PAGE = b"<!DOCTYPE html><html>Please log in</html>"


class Quiet(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    cut: ClassVar[int] = 0  # the connection ends after this number of bytes
    sized: ClassVar[bool] = True

    def log_message(self, *args: object) -> None:
        type(self).asked.append(self.path)

    def send_header(self, keyword: str, value: str) -> None:
        if self.sized or keyword != "Content-Length":
            super().send_header(keyword, value)

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        if self.cut:
            outputfile.write(source.read(self.cut))
        else:
            super().copyfile(source, outputfile)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(Quiet, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv(hub.MIRROR_VARIABLE, f"http://127.0.0.1:{running.server_port}/")
        monkeypatch.setenv(hub.HOME_VARIABLE, str(tmp_path / "home"))
        yield folder
        running.shutdown()
        thread.join()


@pytest.fixture
def write(make_small: Callable[..., RTDETR]) -> Callable[..., bytes]:
    """Write a checkpoint in the published layout, with values that depend on the seed."""

    def to(path: Path, seed: int = 0) -> bytes:
        torch.save({"ema": {"module": make_small(seed=seed).state_dict()}}, path)
        return path.read_bytes()

    return to


def cached() -> list[str]:
    folder = hub.weights_folder()
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


# ---- what is kept


def test_a_file_is_downloaded_once_and_its_hash_recorded(server: Path, write: Callable[..., bytes]) -> None:
    content = write(server / FILE)
    path = hub.fetch(FILE)
    assert path.read_bytes() == content
    assert hub.fetch(FILE) == path
    assert Quiet.asked == [f"/{FILE}"]
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)
    assert cached() == ["hashes.json", FILE]


def test_a_later_download_must_equal_the_first_unless_forced(server: Path, write: Callable[..., bytes]) -> None:
    first = write(server / FILE)
    path = hub.fetch(FILE)
    second = write(server / FILE, seed=1)
    path.unlink()
    with pytest.raises(ModelError, match="is not the published") as caught:
        hub.fetch(FILE)
    assert f"rtdetr weights fetch {FILE} --force" in caught.value.hint
    assert cached() == ["hashes.json"]
    assert hub.fetch(FILE, force=True).read_bytes() == second != first
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)
    hub.fetch(FILE)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_with_a_public_hash_must_have_it(server: Path, write: Callable[..., bytes], force: bool) -> None:
    write(server / PINNED)
    expected = rf"{PINNED}: checksum mismatch: sha256 is \w+\.\.\., expected 2ace52184b62"
    with pytest.raises(ModelError, match=expected) as caught:
        hub.fetch(PINNED, force=force)
    assert caught.value.exit_code == 4
    assert cached() == []


# ---- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PAGE, "a web page of 41 bytes"),
        (b"", "empty"),
        (b"nothing much", "not a model file"),
        (b"PK\x03\x04..", "truncated"),
    ],
)
def test_what_is_not_a_checkpoint_is_not_kept(
    server: Path, write: Callable[..., bytes], content: bytes, message: str
) -> None:
    (server / FILE).write_bytes(content)
    with pytest.raises(ModelError, match=f"is not the published {FILE}: .*{message}") as caught:
        hub.fetch(FILE)
    assert caught.value.exit_code == 4
    assert str(hub.weights_folder() / ".") not in caught.value.message
    assert cached() == []
    assert hub.expected_sha256(FILE) == ""
    content = write(server / FILE)
    assert hub.fetch(FILE).read_bytes() == content


def test_a_web_page_does_not_replace_a_cached_file(server: Path, write: Callable[..., bytes]) -> None:
    content = write(server / FILE)
    path = hub.fetch(FILE)
    (server / FILE).write_bytes(PAGE)
    with pytest.raises(ModelError, match="web page"):
        hub.fetch(FILE, force=True)
    assert path.read_bytes() == content
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)


def test_force_replaces_a_wrongly_recorded_hash(server: Path, write: Callable[..., bytes]) -> None:
    hub.weights_folder().mkdir(parents=True)
    (hub.weights_folder() / FILE).write_bytes(PAGE)
    (hub.weights_folder() / "hashes.json").write_text(json.dumps({FILE: hub.file_sha256(hub.weights_folder() / FILE)}))
    with pytest.raises(ModelError, match=r"is not the published .* a web page") as caught:
        hub.fetch(FILE)
    assert caught.value.hint == f"rtdetr weights fetch {FILE} --force"
    content = write(server / FILE)
    assert hub.fetch(FILE, force=True).read_bytes() == content


def test_a_detector_is_not_accepted_as_a_backbone(server: Path, write: Callable[..., bytes]) -> None:
    write(server / BACKBONE)
    with pytest.raises(ModelError, match="contains a detector"):
        hub.fetch(BACKBONE)
    torch.save(ResNet(depth=10, width=8).state_dict(), server / BACKBONE)
    assert hub.fetch(BACKBONE).is_file()


def test_a_cached_file_that_has_changed_is_not_used(server: Path, write: Callable[..., bytes]) -> None:
    write(server / FILE)
    path = hub.fetch(FILE)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{path} is not the published {FILE}: checksum mismatch") as caught:
        hub.fetch(FILE)
    assert caught.value.hint == f"rtdetr weights fetch {FILE} --force"


def test_a_file_put_into_the_cache_by_hand_is_checked(server: Path, write: Callable[..., bytes]) -> None:
    path = hub.weights_folder() / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(PAGE)
    with pytest.raises(ModelError, match="web page"):
        hub.fetch(FILE)
    assert hub.expected_sha256(FILE) == ""
    write(path)
    assert hub.fetch(FILE) == path
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)
    assert Quiet.asked == []


# ---- the network


@pytest.mark.parametrize("sized", [True, False])
def test_a_lost_connection_is_reported_with_the_received_bytes(
    server: Path, write: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, sized: bool
) -> None:
    content = write(server / FILE)
    monkeypatch.setattr(Quiet, "cut", 70_000)
    monkeypatch.setattr(Quiet, "sized", sized)
    with pytest.raises(ModelError) as caught:
        hub.fetch(FILE)
    if sized:
        assert f"was lost after 70,000 of {len(content):,} bytes" in caught.value.message
        assert caught.value.code == "weights-network"
    else:  # the length is unknown, but the file is truncated
        assert "truncated" in caught.value.message
    assert caught.value.exit_code == 4
    assert cached() == []
    monkeypatch.setattr(Quiet, "cut", 0)
    assert hub.fetch(FILE).read_bytes() == content


def test_without_network_the_hint_says_what_to_do(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.MIRROR_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="no connection") as caught:
        hub.fetch(FILE)
    assert caught.value.exit_code == 4
    assert f"http://127.0.0.1:9/{FILE}" in caught.value.hint
    assert str(hub.weights_folder() / FILE) in caught.value.hint
    assert f"rtdetr weights import {FILE}" in caught.value.hint
    monkeypatch.delenv(hub.MIRROR_VARIABLE)
    hint = hub.manual_download_hint(hub.find_published(FILE))
    assert f"https://github.com/lyuwenyu/storage/releases/download/v0.1/{FILE} " in hint


def test_a_mirror_must_be_an_address(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.MIRROR_VARIABLE, "mirror")
    with pytest.raises(ModelError, match=f"mirror/{FILE}: not a valid address"):
        hub.fetch(FILE)


def test_a_file_missing_on_the_server(server: Path) -> None:
    with pytest.raises(ModelError, match="the server answered 404"):
        hub.fetch(FILE)


def test_a_download_reports_its_progress(server: Path, write: Callable[..., bytes]) -> None:
    content = write(server / FILE)
    received: list[int] = []

    class Sum:
        def advance(self, n: int = 1) -> None:
            received.append(n)

    @contextmanager
    def watch(total: int | None, what: str) -> Iterator[Sum]:
        assert total == len(content)
        assert FILE in what
        yield Sum()

    hub.fetch(FILE, progress=watch)
    assert sum(received) == len(content)
    assert len(received) > 1
    hub.fetch(FILE, progress=watch)  # in the cache already
    assert sum(received) == len(content)


# ---- import


def test_import_checks_the_hash(server: Path, tmp_path: Path, write: Callable[..., bytes]) -> None:
    path = tmp_path / PINNED
    path.write_bytes(b"not it")
    with pytest.raises(ModelError, match="is not the published"):
        hub.import_file(path)
    other = tmp_path / FILE
    content = write(other)
    assert hub.import_file(other).read_bytes() == content
    assert hub.import_file(hub.weights_folder() / FILE).read_bytes() == content  # onto itself
    second = write(other, seed=1)
    with pytest.raises(ModelError, match="expected"):
        hub.import_file(other)
    assert hub.import_file(other, force=True).read_bytes() == second
    with pytest.raises(ModelError, match="did you mean"):
        hub.import_file(other.rename(other.with_name("rtdetrv2_r50vd_6x_coco.pth")))


def test_import_records_no_hash_of_a_web_page(server: Path, tmp_path: Path, write: Callable[..., bytes]) -> None:
    path = tmp_path / FILE
    path.write_bytes(PAGE)
    with pytest.raises(ModelError, match=f"{path} is not the published {FILE}: it is a web page"):
        hub.import_file(path)
    assert cached() == []


# ---- commands


def test_commands(server: Path, rtdetr, write: Callable[..., bytes]) -> None:
    write(server / FILE)
    ran = rtdetr("weights", "path", "r50")
    assert (ran.code, ran.out) == (4, "")
    assert "rtdetr weights fetch r50" in ran.err
    assert rtdetr("weights", "verify").out == ""
    assert "a preset (" in rtdetr("weights", "fetch", "r99").err
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


def test_fetch_shows_progress_and_warns_of_a_changed_file(server: Path, rtdetr, write: Callable[..., bytes]) -> None:
    content = write(server / FILE)
    ran = rtdetr("weights", "fetch", FILE)
    assert ran.code == 0
    lines = [line for line in ran.err.splitlines() if line.startswith(f"fetching {FILE}")]
    assert 2 <= len(lines) <= 10
    assert re.search(rf"100%  {len(content) / 1e6:.1f} of {len(content) / 1e6:.1f} MB", lines[-1])
    assert ran.out.strip() == str(hub.weights_folder() / FILE)
    write(server / FILE, seed=1)
    ran = rtdetr("weights", "fetch", FILE, "--force")
    assert ran.code == 0
    assert "warning: the file has changed" in ran.err
    ran = rtdetr("weights", "fetch", FILE)
    assert ran.err == ""


def test_import_command(server: Path, tmp_path: Path, rtdetr, write: Callable[..., bytes]) -> None:
    write(tmp_path / FILE)
    assert rtdetr("weights", "import", tmp_path / FILE).code == 0
    write(tmp_path / FILE, seed=1)
    ran = rtdetr("weights", "import", tmp_path / FILE)
    assert ran.code == 4
    assert f"rtdetr weights import {tmp_path / FILE} --force" in ran.err
    assert rtdetr("weights", "import", tmp_path / FILE, "--force").code == 0


def test_predict_shows_the_progress_of_its_first_download(
    server: Path, tmp_path: Path, rtdetr, shapes, monkeypatch: pytest.MonkeyPatch, write: Callable[..., bytes]
) -> None:
    write(server / PINNED)
    sha256 = hub.file_sha256(server / PINNED)
    monkeypatch.setattr(hub, "PUBLISHED", {PINNED: hub.Published(PINNED, "", sha256=sha256)})
    monkeypatch.chdir(tmp_path)
    image = next(shapes.write_dataset(tmp_path / "data").parent.glob("*.png"))
    shutil.copy(image, tmp_path / "a.png")
    ran = rtdetr("predict", "a.png", "--no-save")
    assert ran.code == 0, ran.err
    assert f"fetching {PINNED}  100%" in ran.err

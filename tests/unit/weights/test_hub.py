"""The cache of published weights, with a real server on loopback and a catalogue of small models."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.backbone import ResNet
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights import catalogue, download, hub
from rtdetr_cli.weights.catalogue import Published
from rtdetr_cli.weights.download import Limits
from tests.server import Behavior, serve

FILE = "rtdetrv2_r50vd_6x_coco_ema.pth"  # without a public hash: that of the first good download is recorded
PINNED = "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth"
BACKBONE = "ResNet50_vd_ssld_v2_pretrained_from_paddle.pth"
PAGE = b"<!DOCTYPE html><html>Please log in</html>"


@pytest.fixture
def preset(tmp_path: Path, small_spec: ModelSpec) -> Path:
    """A preset file with the sizes of the smallest detector."""
    path = tmp_path / "small.toml"
    sizes = "\n".join(
        f"{k} = {json.dumps(v)}"
        for k, v in small_spec.model_copy(update={"num_points": (4, 4, 4)}).model_dump().items()
    )
    path.write_text(
        f'name = "small"\ndescription = ""\nparams_m = 0.1\n[model]\n{sizes}\n[optim]\n[official]\nepochs = 9\n'
        "strong_augmentation_until = 8\n"
    )
    return path


@pytest.fixture(autouse=True)
def small_catalogue(preset: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Published]:
    entries = [
        Published("r50", FILE, str(preset), "coco", 0.534),
        Published("r50-discrete", "discrete.pth", str(preset), "coco", 0.5, sampling="discrete"),
        Published("r50-v1", "v1.pth", str(preset), "coco", 0.5, version="v1"),
        Published("r50-sp2", "sp2.pth", str(preset), "coco", 0.5, points=2),
        Published("r18", PINNED, str(preset), "coco", 0.481, release="v0.2", sha256="2ace52184b62" + "0" * 52),
        Published("r50-imagenet", BACKBONE, str(preset), "imagenet"),
    ]
    known = {entry.name: entry for entry in entries}
    monkeypatch.setattr(catalogue, "catalogue", lambda: known)
    monkeypatch.setattr(hub, "catalogue", lambda: known)
    monkeypatch.setattr(download, "LIMITS", Limits(attempts=2, wait=0.01, silence=0.5, total=5))
    return known


@pytest.fixture
def behavior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Behavior]:
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as (address, behavior):
        monkeypatch.setenv(catalogue.MIRROR_VARIABLE, f"{address}/")
        monkeypatch.setenv(hub.HOME_VARIABLE, str(tmp_path / "home"))
        yield behavior


@pytest.fixture
def server(behavior: Behavior) -> Path:
    """The folder that is served."""
    return behavior.folder


@pytest.fixture
def write(make_small: Callable[..., RTDETR]) -> Callable[..., bytes]:
    """Write a checkpoint in the published layout, with values that depend on the seed."""

    def to(path: Path, seed: int = 0, *, points: tuple[int, ...] = (4, 4, 4), classes: int = 80, **sizes: int) -> bytes:
        model = make_small(seed=seed, num_classes=classes, num_points=points, **sizes)
        torch.save({"ema": {"module": model.state_dict()}}, path)
        return path.read_bytes()

    return to


def cached() -> list[str]:
    """The files of the cache, and of downloads that were not finished."""
    folders = (hub.weights_folder(), hub.weights_folder().parent / "incomplete")
    return sorted(p.name for f in folders if f.exists() for p in f.iterdir() if p.suffix != ".lock")


# ---- what is kept


def test_a_file_is_downloaded_once_and_its_hash_recorded(
    server: Path, behavior: Behavior, write: Callable[..., bytes]
) -> None:
    content = write(server / FILE)
    path = hub.fetch(FILE)
    assert path.read_bytes() == content
    assert hub.fetch(FILE) == path
    assert behavior.asked == [f"/{FILE}"]
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)
    assert cached() == ["hashes.json", FILE]


def test_a_later_download_must_equal_the_first_unless_forced(server: Path, write: Callable[..., bytes]) -> None:
    first = write(server / FILE)
    path = hub.fetch(FILE)
    second = write(server / FILE, seed=1)
    path.unlink()
    with pytest.raises(ModelError, match="is not the published") as caught:
        hub.fetch(FILE)
    assert "rtdetr weights fetch r50 --force" in caught.value.hint
    assert cached() == ["hashes.json"]
    assert hub.fetch(FILE, force=True).read_bytes() == second != first
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)
    hub.fetch(FILE)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_with_a_public_hash_must_have_it(server: Path, write: Callable[..., bytes], force: bool) -> None:
    write(server / PINNED)
    expected = rf"{PINNED}: checksum mismatch: sha256 is \w+\.\.\., expected 2ace52184b62"
    with pytest.raises(ModelError, match=expected):
        hub.fetch(PINNED, force=force)
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
    assert caught.value.hint == "rtdetr weights fetch r50 --force"
    content = write(server / FILE)
    assert hub.fetch(FILE, force=True).read_bytes() == content


def test_a_detector_is_not_accepted_as_a_backbone(server: Path, write: Callable[..., bytes]) -> None:
    write(server / BACKBONE)
    with pytest.raises(ModelError, match="contains a detector"):
        hub.fetch(BACKBONE)
    torch.save(ResNet(depth=18, width=8).state_dict(), server / BACKBONE)
    with pytest.raises(ModelError, match="not the backbone of"):
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
    assert caught.value.hint == "rtdetr weights fetch r50 --force"


def test_a_file_put_into_the_cache_by_hand_is_checked(
    server: Path, behavior: Behavior, write: Callable[..., bytes]
) -> None:
    path = hub.weights_folder() / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(PAGE)
    with pytest.raises(ModelError, match="web page"):
        hub.fetch(FILE)
    assert hub.expected_sha256(FILE) == ""
    write(path)
    assert hub.fetch(FILE) == path
    assert hub.expected_sha256(FILE) == hub.file_sha256(path)
    assert behavior.asked == []


# ---- the network


def test_a_lost_connection_leaves_nothing_in_the_cache_and_is_continued(
    server: Path, behavior: Behavior, write: Callable[..., bytes]
) -> None:
    content = write(server / FILE)
    behavior.faults = [{"cut": 20_000}]
    with pytest.raises(ModelError, match=f"was lost after 40,000 of {len(content):,} bytes"):
        hub.fetch(FILE)
    assert not list(hub.weights_folder().iterdir())
    behavior.faults = []
    assert hub.fetch(FILE).read_bytes() == content
    assert behavior.requests[-1][1] == "bytes=40000-"
    assert cached() == ["hashes.json", FILE]


def test_old_parts_are_removed(server: Path, write: Callable[..., bytes]) -> None:
    folder = hub.weights_folder().parent / "incomplete"
    folder.mkdir(parents=True)
    for name, days in (("old.pth", 15), ("new.pth", 13)):
        (folder / name).write_bytes(b"part")
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    write(server / FILE)
    hub.fetch(FILE)
    assert cached() == ["hashes.json", "new.pth", FILE]


def test_a_file_of_another_length_than_stated_is_not_kept(
    server: Path, behavior: Behavior, write: Callable[..., bytes]
) -> None:
    write(server / FILE)
    behavior.faults = [{"lie": -5000}]
    with pytest.raises(ModelError, match="truncated"):
        hub.fetch(FILE)
    assert cached() == []


def test_a_redirect_is_followed(server: Path, behavior: Behavior, write: Callable[..., bytes]) -> None:
    content = write(server / "elsewhere.pth")
    behavior.faults = [{"redirect": "/elsewhere.pth"}]
    assert hub.fetch(FILE).read_bytes() == content
    assert behavior.asked == [f"/{FILE}", "/elsewhere.pth"]


@pytest.mark.parametrize("by", ["environment", "flag"])
def test_offline(server: Path, behavior: Behavior, write, rtdetr, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    write(server / FILE)
    monkeypatch.setenv(download.OFFLINE_VARIABLE, "1" if by == "environment" else "0")
    words = ["weights", "fetch", "r50", *(["--offline"] if by == "flag" else [])]
    rtdetr(*words, code=4, err=f"{FILE} is not in the cache, and downloads are turned off")
    assert behavior.asked == []
    monkeypatch.setenv(download.OFFLINE_VARIABLE, "")
    hub.fetch(FILE)
    assert rtdetr(*words).code == 0


# ---- the architecture that the catalogue promises


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": (2, 2, 2)}, r"it has \(2, 2, 2\) sampling points, not \(4, 4, 4\)"),
        ({"classes": 3}, "it has 3 classes"),
        ({"hidden_dim": 48}, "its hidden_dim is 48, not 32"),
        ({"depth": 18}, "its depth is 18, not 10"),
    ],
)
def test_another_architecture_is_not_accepted(server: Path, write: Callable[..., bytes], changes, message) -> None:
    write(server / FILE, **changes)
    with pytest.raises(ModelError, match=f"is not the published {FILE}: {message}"):
        hub.fetch(FILE)
    assert cached() == []
    # Nor when an earlier version has recorded its hash.
    hub.weights_folder().mkdir(parents=True, exist_ok=True)
    shutil.copy(server / FILE, hub.weights_folder() / FILE)
    (hub.weights_folder() / "hashes.json").write_text(json.dumps({FILE: hub.file_sha256(server / FILE)}))
    with pytest.raises(ModelError, match=message):
        hub.fetch(FILE)


def test_the_size_of_a_pinned_file_is_checked_first(
    server: Path, write: Callable[..., bytes], small_catalogue: dict[str, Published]
) -> None:
    content = write(server / PINNED)
    small_catalogue["r18"] = replace(small_catalogue["r18"], bytes=len(content) + 1)
    with pytest.raises(ModelError, match=rf"it has {len(content):,} bytes, not {len(content) + 1:,}"):
        hub.fetch(PINNED)


def test_without_network_the_hint_says_what_to_do(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalogue.MIRROR_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="no connection") as caught:
        hub.fetch(FILE)
    assert f"http://127.0.0.1:9/{FILE}" in caught.value.hint
    assert str(hub.weights_folder() / FILE) in caught.value.hint
    assert f"rtdetr weights import {FILE}" in caught.value.hint
    monkeypatch.delenv(catalogue.MIRROR_VARIABLE)
    hint = hub.manual_download_hint(hub.find_published(FILE))
    assert f"https://github.com/lyuwenyu/storage/releases/download/v0.1/{FILE} " in hint


def test_a_mirror_must_be_an_address(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalogue.MIRROR_VARIABLE, "mirror")
    with pytest.raises(ModelError, match=f"mirror/{FILE}: not a valid address"):
        hub.fetch(FILE)


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


def test_import_recognizes_a_file_of_any_name(server: Path, tmp_path: Path, write: Callable[..., bytes]) -> None:
    told: list[str] = []
    path = tmp_path / "downloaded.pth"
    write(path, points=(2, 2, 2))
    assert hub.import_file(path, notify=told.append).name == "sp2.pth"
    assert told[0] == f"{path} holds r50-sp2: {hub.find_published('r50-sp2').description}"
    assert "no hash of sp2.pth is publicly known: recorded that of this copy" in told[1]
    write(path)
    with pytest.raises(ModelError, match="fit several published files: r50, r50-discrete") as caught:
        hub.import_file(path)
    assert caught.value.hint == f"rtdetr weights import {path} --as r50"
    assert hub.import_file(path, name="r50-discrete").name == "discrete.pth"
    assert hub.import_file(path).name == "discrete.pth"  # by its recorded hash
    second = tmp_path / FILE.replace(".pth", " (1).pth")
    write(second, seed=1)
    assert hub.import_file(second).name == FILE
    write(path, classes=3)
    with pytest.raises(ModelError, match="none of the published files"):
        hub.import_file(path)


def test_import_records_no_hash_of_a_web_page(server: Path, tmp_path: Path, write: Callable[..., bytes]) -> None:
    path = tmp_path / FILE
    path.write_bytes(PAGE)
    with pytest.raises(ModelError, match=f"{path} is not the published {FILE}: it is a web page"):
        hub.import_file(path)
    assert cached() == []


def test_a_known_file_is_told_by_its_hash_or_its_name(
    server: Path, tmp_path: Path, write: Callable[..., bytes], small_catalogue: dict[str, Published]
) -> None:
    write(tmp_path / FILE)
    known = hub.known_file(tmp_path / FILE)
    assert known.name == "r50"  # by its name
    hub.import_file(tmp_path / FILE)
    copy = tmp_path / "copy.pth"
    shutil.copy(tmp_path / FILE, copy)
    assert hub.known_file(copy) == known  # by its recorded hash
    write(tmp_path / FILE, seed=1)
    assert hub.known_file(tmp_path / FILE) is None  # the name with other content


# ---- commands


def test_commands(server: Path, rtdetr, write: Callable[..., bytes]) -> None:
    write(server / FILE)
    ran = rtdetr("weights", "path", "r50")
    assert (ran.code, ran.out) == (4, "")
    assert "rtdetr weights fetch r50" in ran.err
    assert rtdetr("weights", "verify").out == ""
    assert "did you mean" in rtdetr("weights", "fetch", "r50-discret").err
    assert rtdetr("weights", "fetch", FILE, "--json").json["path"].endswith(FILE)
    listed = {f["file"]: f["here"] for f in rtdetr("weights", "list", "--json").json["files"]}
    assert listed[FILE] is True
    kinds = {f["name"]: f["hash"] for f in rtdetr("weights", "list", "--json").json["files"]}
    assert (kinds["r50"], kinds["r18"], kinds["r50-v1"]) == ("recorded", "pinned", None)
    assert listed[PINNED] is False
    assert rtdetr("weights", "verify").code == 0
    (hub.weights_folder() / FILE).write_bytes(b"damaged")
    rtdetr("weights", "verify", code=4, err="is not the published")
    assert rtdetr("weights", "path", "r50").out.strip().endswith(FILE)
    assert rtdetr("weights", "fetch", "tiny").code == 4


def test_fetch_shows_progress_and_warns_of_a_changed_file(server: Path, rtdetr, write: Callable[..., bytes]) -> None:
    content = write(server / FILE)
    ran = rtdetr("weights", "fetch", FILE, code=0)
    assert "no hash of" in ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith(f"fetching {FILE}")]
    assert 2 <= len(lines) <= 10
    assert re.search(rf"100%  {len(content) / 1e6:.1f} of {len(content) / 1e6:.1f} MB", lines[-1])
    assert ran.out.strip() == str(hub.weights_folder() / FILE)
    write(server / FILE, seed=1)
    rtdetr("weights", "fetch", FILE, "--force", code=0, err="warning: the file has changed")
    ran = rtdetr("weights", "fetch", FILE)
    assert ran.err == ""


def test_import_command(server: Path, tmp_path: Path, rtdetr, write: Callable[..., bytes]) -> None:
    write(tmp_path / FILE)
    assert rtdetr("weights", "import", tmp_path / FILE).code == 0
    write(tmp_path / FILE, seed=1)
    rtdetr("weights", "import", tmp_path / FILE, code=4, err=f"rtdetr weights import {tmp_path / FILE} --force")
    assert rtdetr("weights", "import", tmp_path / FILE, "--force").code == 0


def test_predict_shows_the_progress_of_its_first_download(
    server: Path, tmp_path: Path, rtdetr, shapes, monkeypatch, write: Callable[..., bytes], small_catalogue
) -> None:
    write(server / PINNED)
    sha256 = hub.file_sha256(server / PINNED)
    small_catalogue["r18"] = replace(small_catalogue["r18"], sha256=sha256)
    monkeypatch.chdir(tmp_path)
    image = next(shapes.write_dataset(tmp_path / "data").parent.glob("*.png"))
    shutil.copy(image, tmp_path / "a.png")
    rtdetr("predict", "a.png", "--no-save", code=0, err=f"fetching {PINNED}  100%")

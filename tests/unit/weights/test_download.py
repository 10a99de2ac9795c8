"""Downloads from a server on loopback that stalls, cuts off, drips, lies, redirects and fails."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.errors import ModelError
from rtdetr_cli.weights import download as module
from rtdetr_cli.weights.download import Limits, discard, download, exclusive
from tests.server import Behavior, serve

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
QUICK = Limits(attempts=3, wait=0.01, silence=0.2, slowest=1e4, total=3.0)


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Limits], None]:
    """Set short limits, and return a function that sets others."""

    def set_limits(limits: Limits) -> None:
        monkeypatch.setattr(module, "LIMITS", limits)

    set_limits(QUICK)
    return set_limits


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Behavior]]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/x.pth").write_bytes(CONTENT)
    with serve(tmp_path / "served") as (address, behavior):
        yield f"{address}/x.pth", behavior


def fetch(url: str, part: Path, **options: Any) -> None:
    part.parent.mkdir(exist_ok=True)
    download(url, part, name="x.pth", hint="do it by hand", **options)


def left(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "incomplete").iterdir())


@pytest.mark.parametrize(
    "faults",
    [
        [{}],
        [{"status": 503}, {"status": 500}, {}],  # fails twice, then works
        [{"status": 429}, {}],
        [{"cut": 200_000}, {}],
        [{"cut": 200_000}, {"cut": 100_000}, {}],
        [{"stall": True, "cut": 200_000}, {}],
        [{"silent": True}, {}],
        [{"cut": 200_000}, {"no_ranges": True}],  # cannot continue, and starts again
        [{"no_length": True}],
        [{"lie": 1000}, {}],  # claims more than it has, and the connection ends
        [{"step": 100, "pause": 0.05}, {}],  # drips below the slowest rate
    ],
    ids=str,
)
def test_a_download_that_recovers(server: tuple[str, Behavior], tmp_path: Path, faults: list[dict[str, Any]]) -> None:
    url, behavior = server
    behavior.faults = [*faults]
    part = tmp_path / "incomplete/x.pth"
    fetch(url, part)
    assert part.read_bytes() == CONTENT
    assert left(tmp_path) == ["x.pth"]
    assert len(behavior.requests) == len(faults)
    resumed = [r for _, r in behavior.requests if r]
    assert bool(resumed) == any("cut" in f or "lie" in f or "step" in f for f in faults[:-1])


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x", ""], ids=lambda text: text[:5])
def test_an_odd_content_length_ends_in_one_sentence(server: tuple[str, Behavior], tmp_path: Path, length: str) -> None:
    url, behavior = server
    behavior.faults = [{"length": length}]
    fetch(url, tmp_path / "incomplete/x.pth")
    assert (tmp_path / "incomplete/x.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "message", "kept", "requests"),
    [
        ({"status": 404}, "the server answered 404", False, 1),
        ({"status": 503}, "the server answered 503", False, 3),
        ({"silent": True}, "no response", False, 3),
        ({"cut": 100_000}, "the connection was lost after 300,000 of 512,000 bytes", True, 3),
        ({"cut": 0}, "the connection was lost", False, 3),
        ({"cut": 100_000, "no_ranges": True}, "the connection was lost after 100,000 bytes", False, 3),
        ({"step": 100, "pause": 0.05}, r"the server sent only [\d,]+ bytes in 0 s after", True, 3),
        ({"redirect": "/x.pth", "forever": True}, "the server redirects without end", False, 31),
    ],
    ids=str,
)
def test_a_download_that_fails_ends_in_time_and_says_why(
    server: tuple[str, Behavior], tmp_path: Path, fault: dict[str, Any], message: str, kept: bool, requests: int, limit
) -> None:
    url, behavior = server
    behavior.faults = [fault]
    if "redirect" in fault:
        limit(replace(QUICK, silence=5))
    with pytest.raises(ModelError, match=rf"x.pth could not be downloaded from {url}: {message}") as caught:
        fetch(url, tmp_path / "incomplete/x.pth")
    assert (caught.value.exit_code, caught.value.code) == (4, "weights-network")
    assert ("continues where this one stopped" in caught.value.hint) == kept
    assert "do it by hand" in caught.value.hint
    assert left(tmp_path) == (["x.pth", "x.pth.json"] if kept else [])
    assert len(behavior.requests) == requests


def test_a_server_that_is_not_there_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(ModelError, match="no connection"):
        fetch("http://127.0.0.1:9/x.pth", tmp_path / "incomplete/x.pth")


def test_a_proxy_from_the_environment_is_used(
    server: tuple[str, Behavior], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, behavior = server
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", url.removesuffix("/x.pth"))
    part = tmp_path / "incomplete/x.pth"
    fetch("http://weights.invalid/x.pth", part)
    assert part.read_bytes() == CONTENT
    assert behavior.asked == ["http://weights.invalid/x.pth"]


def test_the_whole_time_is_bounded(server: tuple[str, Behavior], tmp_path: Path, limit) -> None:
    url, behavior = server
    limit(Limits(attempts=9, silence=5, slowest=0, total=0.1))
    behavior.faults = [{"step": 500, "pause": 0.01}]
    with pytest.raises(ModelError, match="it took longer than 0 s"):
        fetch(url, tmp_path / "incomplete/x.pth")
    assert len(behavior.requests) == 1


def test_an_interrupt_keeps_what_can_be_continued(server: tuple[str, Behavior], tmp_path: Path) -> None:
    url, _ = server

    class Interrupted:
        def __enter__(self) -> Interrupted:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, n: int = 1) -> None:
            raise KeyboardInterrupt

    part = tmp_path / "incomplete/x.pth"
    with pytest.raises(KeyboardInterrupt):
        fetch(url, part, progress=lambda total, what: Interrupted())
    assert left(tmp_path) == ["x.pth", "x.pth.json"]
    fetch(url, part)
    assert part.read_bytes() == CONTENT
    discard(part)
    assert left(tmp_path) == []


def _hold(part: Path, ready: Any, release: Any) -> None:
    with exclusive(part):
        ready.set()
        release.wait(10)


def test_one_process_at_a_time(tmp_path: Path, limit) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "x.pth", ready, release))
    holder.start()
    ready.wait(10)
    limit(Limits(total=0.3))
    with pytest.raises(ModelError, match="another process has been downloading"), exclusive(tmp_path / "x.pth"):
        pass
    limit(Limits(total=10))
    threading.Timer(0.1, release.set).start()
    begin = time.monotonic()
    with exclusive(tmp_path / "x.pth"):
        assert time.monotonic() > begin
        assert release.is_set()
    holder.join()

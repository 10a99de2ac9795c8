"""Download a file: resumed where the connection was lost, one process at a time, and bounded in time.

What has arrived is kept in a folder of its own, so that a later attempt continues there, in the same process or in
another one. It is kept only where the server can continue a file and says which version it is.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rtdetr_cli.errors import ModelError

if TYPE_CHECKING:
    import requests

OFFLINE_VARIABLE = "RTDETR_CLI_OFFLINE"
CHUNK = 1 << 16


class Progress(Protocol):
    """A progress display."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more bytes."""


ShowProgress = Callable[[int | None, str], AbstractContextManager[Progress]]
"""Starts a progress display for a total number of bytes (None when unknown) and a description."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a download may take; times in seconds."""

    attempts: int = 5
    wait: float = 1.0  # before the second attempt; twice as long before each further one
    silence: float = 30.0  # without a byte, or below `slowest`
    slowest: float = 2048.0  # bytes per second
    total: float = 2 * 3600.0  # for the whole file, with all attempts


LIMITS = Limits()

_REASONS = {
    "ConnectionError": "no connection",
    "ConnectTimeout": "no response",
    "ReadTimeout": "no response",
}
_HOPELESS = {
    "ProxyError": "the proxy refused the connection",
    "SSLError": "no secure connection",
    "TooManyRedirects": "the server redirects without end",
    "MissingSchema": "not a valid address",
    "InvalidSchema": "not a valid address",
    "InvalidURL": "not a valid address",
}


class _Failure(Exception):
    """An attempt failed; `final` where another one would fail too."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final


@dataclass(frozen=True, slots=True)
class _Source:
    """The file on the server that a part was taken from."""

    url: str
    validator: str  # its ETag or date; empty where the server gives neither, or cannot continue a file
    total: int  # bytes; 0 when unknown


def offline() -> bool:
    """Return whether the environment forbids downloads."""
    return os.environ.get(OFFLINE_VARIABLE, "").lower() not in ("", "0", "false", "no")


def download(url: str, part: Path, *, name: str, hint: str, progress: ShowProgress | None = None) -> None:
    """Download `url` to `part`, whose folder exists, within `LIMITS`; continue what is there from an earlier attempt.

    Args:
        url: the address.
        part: where the file is put.
        name: of the file, in messages.
        hint: what to do when it fails.
        progress: a display of the bytes.

    Raises:
        ModelError: it did not arrive. What did is kept only where it can be continued.
    """
    deadline = time.monotonic() + LIMITS.total
    for attempt in range(LIMITS.attempts):
        try:
            _attempt(url, part, name, progress, deadline)
            _record_path(part).unlink(missing_ok=True)
            return
        except _Failure as failure:
            pause = LIMITS.wait * 2**attempt
            if failure.final or attempt + 1 == LIMITS.attempts or time.monotonic() + pause > deadline:
                raise _gave_up(failure, url, part, name, hint) from failure
            time.sleep(pause)
        except BaseException:
            _discard_unless_resumable(part)
            raise


def discard(part: Path) -> None:
    """Remove what has arrived of a file."""
    part.unlink(missing_ok=True)
    _record_path(part).unlink(missing_ok=True)


@contextmanager
def exclusive(part: Path, progress: ShowProgress | None = None) -> Iterator[None]:
    """Keep other processes from downloading the same file; wait where one does.

    Raises:
        ModelError: another process has been downloading it for longer than a download may take.
    """
    import filelock

    lock = filelock.FileLock(part.with_name(part.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        what = f"waiting for another process that fetches {part.name}"
        with progress(None, what) if progress else nullcontext():
            try:
                lock.acquire(timeout=LIMITS.total, poll_interval=0.2)
            except filelock.Timeout:
                message = f"another process has been downloading {part.name} for {LIMITS.total:.0f} s"
                raise ModelError(message, hint="end it, and try again", code="weights-locked") from None
    try:
        yield
    finally:
        lock.release()


def _attempt(url: str, part: Path, name: str, progress: ShowProgress | None, deadline: float) -> None:
    """Make one request and store what it brings."""
    import requests
    from urllib3.exceptions import HTTPError

    record = _read_record(part)
    begin = part.stat().st_size if record is not None and record.url == url and part.is_file() else 0
    # Without compression, so that the length that the server gives is that of the file.
    headers = {"Accept-Encoding": "identity"}
    if begin and record is not None:
        headers |= {"Range": f"bytes={begin}-", "If-Range": record.validator}
    try:
        with _open(url, headers, deadline) as response:
            if response.status_code == 416:
                discard(part)
                raise _Failure("the server cannot continue the file")
            if not response.ok:
                again = response.status_code >= 500 or response.status_code in (408, 429)
                raise _Failure(f"the server answered {response.status_code}", final=not again)
            if url.startswith("https:") and not response.url.startswith("https:"):
                raise _Failure("the server redirects to an address without encryption", final=True)
            continued = response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
            if response.status_code != 206 or not continued:
                begin = 0
            source = _source(url, response, begin)
            if not begin:
                part.unlink(missing_ok=True)
            if source.validator:
                _record_path(part).write_text(json.dumps(asdict(source)), encoding="utf-8")
            else:
                _record_path(part).unlink(missing_ok=True)
            display = progress(source.total or None, f"fetching {name}") if progress else nullcontext()
            with display as bar, part.open("ab") as file:
                if bar is not None and begin:
                    bar.advance(begin)
                for chunk in _chunks(response, deadline):
                    file.write(chunk)
                    if bar is not None:
                        bar.advance(len(chunk))
                received = file.tell()
        if received < source.total:
            raise _Failure("the connection was lost")
    except requests.exceptions.RequestException as error:
        reason = type(error).__name__
        unreachable = not begin and _never_connected(error)  # with a part at hand, the network has worked before
        raise _Failure((_REASONS | _HOPELESS).get(reason, reason), final=unreachable or reason in _HOPELESS) from error
    except (HTTPError, TimeoutError, ConnectionError) as error:
        raise _Failure("the connection was lost") from error


def _open(url: str, headers: dict[str, str], deadline: float) -> requests.Response:
    """Send a request, and wait for the answer no longer than the limits say, however slowly its headers come."""
    import requests

    answer: Future[requests.Response] = Future()

    def send() -> None:
        try:
            answer.set_result(requests.get(url, stream=True, timeout=LIMITS.silence, headers=headers))
        except BaseException as error:
            answer.set_exception(error)

    def close(late: Future[requests.Response]) -> None:
        if late.exception() is None:
            late.result().close()

    threading.Thread(target=send, daemon=True).start()
    try:
        return answer.result(max(0.0, min(2 * LIMITS.silence, deadline - time.monotonic())))
    except TimeoutError:
        answer.add_done_callback(close)
        raise _Failure("no response") from None


def _chunks(response: requests.Response, deadline: float) -> Iterator[bytes]:
    """Yield the bytes of a response as they come; a server that is too slow counts as lost."""
    since, received = time.monotonic(), 0
    while chunk := response.raw.read1(CHUNK):
        yield chunk
        received += len(chunk)
        now = time.monotonic()
        if now > deadline:
            raise _Failure(f"it took longer than {LIMITS.total:.0f} s", final=True)
        if now - since >= LIMITS.silence:
            if received < LIMITS.slowest * (now - since):
                raise _Failure(f"the server sent only {received:,} bytes in {now - since:.0f} s")
            since, received = now, 0


def _source(url: str, response: requests.Response, begin: int) -> _Source:
    stated = response.headers.get("Content-Length", "")
    length = int(stated) if re.fullmatch("[0-9]{1,15}", stated) else 0
    tag = response.headers.get("ETag", "")
    validator = response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    resumable = response.status_code == 206 or response.headers.get("Accept-Ranges", "") == "bytes"
    return _Source(url, validator if resumable else "", begin + length if length else 0)


def _record_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_record(part: Path) -> _Source | None:
    try:
        return _Source(**json.loads(_record_path(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _discard_unless_resumable(part: Path) -> bool:
    """Return whether what has arrived is kept."""
    kept = part.is_file() and part.stat().st_size > 0 and _read_record(part) is not None
    if not kept:
        discard(part)
    return kept


def _gave_up(failure: _Failure, url: str, part: Path, name: str, hint: str) -> ModelError:
    record = _read_record(part)
    received = part.stat().st_size if part.is_file() else 0
    total = f" of {record.total:,}" if record is not None and record.total else ""
    after = f" after {received:,}{total} bytes" if received else ""
    resume = "the same command continues where this one stopped; " if _discard_unless_resumable(part) else ""
    return ModelError(
        f"{name} could not be downloaded from {url}: {failure.reason}{after}",
        hint=resume + hint,
        code="weights-network",
    )


def _never_connected(error: Exception) -> bool:
    from requests.exceptions import ConnectTimeout
    from urllib3.exceptions import NewConnectionError

    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, ConnectTimeout) or isinstance(reason, NewConnectionError)

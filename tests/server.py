"""A server on loopback that misbehaves as told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Behavior:
    """What the server does; each request consumes one entry of `faults`, the last of which stays."""

    folder: Path
    faults: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # path and Range
    released: threading.Event = field(default_factory=threading.Event)  # ends a stall

    @property
    def asked(self) -> list[str]:
        return [path for path, _ in self.requests]


def make_handler(behavior: Behavior) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            behavior.requests.append((self.path, self.headers.get("Range", "")))
            fault = behavior.faults[0] if behavior.faults else {}
            if len(behavior.faults) > 1:
                behavior.faults.pop(0)
            if "status" in fault:
                self.send_error(fault["status"])
                return
            if fault.get("redirect"):
                self.send_response(302)
                self.send_header("Location", fault["redirect"])
                self.end_headers()
                behavior.faults = behavior.faults if fault.get("forever") else []
                return
            if fault.get("silent"):
                behavior.released.wait(5)
                return
            path = behavior.folder / urlsplit(self.path).path.lstrip("/")  # a proxy is sent the whole address
            if not path.is_file():
                self.send_error(404)
                return
            self._send(path.read_bytes(), fault)

        def _send(self, content: bytes, fault: dict[str, Any]) -> None:
            begin, ranged = 0, self.headers.get("Range", "")
            if ranged and not fault.get("no_ranges"):
                begin = int(ranged.removeprefix("bytes=").rstrip("-"))
            rest = content[begin:]
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            if not fault.get("no_ranges"):
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", '"1"')
            if not fault.get("no_length"):
                self.send_header("Content-Length", fault.get("length", str(len(rest) + fault.get("lie", 0))))
            self.end_headers()
            rest = rest[: len(rest) + min(0, fault.get("lie", 0))]
            for start in range(0, len(rest[: fault.get("cut")]), fault.get("step", 1 << 20)):
                try:
                    self.wfile.write(rest[: fault.get("cut")][start : start + fault.get("step", 1 << 20)])
                    self.wfile.flush()
                except OSError:
                    return
                if fault.get("pause"):
                    time.sleep(fault["pause"])
            if fault.get("stall"):
                behavior.released.wait(5)

    return Handler


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Behavior]]:
    """Serve a folder; yields its address and what to change about it."""
    behavior = Behavior(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), make_handler(behavior)) as running:
        running.daemon_threads = True
        running.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", behavior
        finally:
            behavior.released.set()
            running.shutdown()
            thread.join()

"""A web server on this machine that plays the hub or a mirror, with the faults that real ones have."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What is wrong with a file on the server.

    Attributes:
        status: of every answer, with ``headers``; 0 answers properly.
        breaks_after: bytes of an answer after which the connection is closed.
        breaks: how many times that happens.
        stalls_at: byte of the file from which on nothing comes any more, on an open connection.
        pause: seconds after every piece of ``piece`` bytes.
        ranges: whether it sends the rest of a file to who asks for that.
        sha256: that it claims for the file.
        endless: whether it sends the file again and again, and names no length.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    breaks_after: float = math.inf
    breaks: float = math.inf
    stalls_at: float = math.inf
    pause: float = 0.0
    piece: int = 2**16
    ranges: bool = True
    sha256: str = ""
    endless: bool = False


@dataclass
class Server:
    """Files by path, what is wrong with some, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""
    stop: Callable[[], None] = lambda: None
    stopped: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    state: Server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        wanted = self.headers.get("Range", "")
        self.state.asked.append(" ".join(filter(None, [self.command, self.path, wanted])))
        content, fault = self.state.files.get(self.path), self.state.faults.get(self.path, Fault())
        if fault.status or content is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self.head(fault.status or 404, fault.headers if fault.status else missing, 0)
            return
        start = int(found[1]) if fault.ranges and (found := re.fullmatch(r"bytes=(\d+)-", wanted)) else 0
        headers = {
            "ETag": f'"{fault.sha256 or hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            **({"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}),
        }
        if fault.endless:
            self.head(200, headers, None)
            with suppress(ConnectionError):
                while with_body and not self.state.stopped.is_set():
                    self.wfile.write(content)
            return
        self.head(206 if start else 200, headers, len(content) - start)
        if with_body:
            with suppress(ConnectionError):  # the client has left
                self.send(content, start, fault)

    def head(self, status: int, headers: dict[str, str], length: int | None) -> None:
        self.send_response(status)
        for name, value in (
            headers if length is None else {**headers, "Content-Length": str(length)}
        ).items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, content: bytes, start: int, fault: Fault) -> None:
        breaks_at = start + fault.breaks_after if fault.breaks > 0 else math.inf
        end, at = min(len(content), fault.stalls_at, breaks_at), start
        while at < end and not self.state.stopped.is_set():
            piece = content[at : int(min(at + fault.piece, end))]
            self.wfile.write(piece)
            at += len(piece)
            self.state.stopped.wait(fault.pause)
        if at < len(content) and at >= fault.stalls_at:
            self.state.stopped.wait()
        elif at < len(content):
            fault.breaks -= 1

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Server]:
    """Answer on a free port until the block ends, or ``stop`` is called."""
    state = Server()
    real = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    real.daemon_threads = True
    threading.Thread(target=real.serve_forever, args=(0.01,), daemon=True).start()

    def stop() -> None:
        state.stopped.set()
        real.shutdown()
        real.server_close()

    state.url, state.stop = f"http://127.0.0.1:{real.server_port}", stop
    try:
        yield state
    finally:
        stop()

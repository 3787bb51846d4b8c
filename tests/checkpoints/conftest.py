"""A loopback server that plays the hub and a mirror, and a store that fetches from it."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save

from service.checkpoints.resolve import CheckpointStore


@dataclass
class Answer:
    """What the server says to one path.

    `sent` is what really comes where the way is bad; nothing is sent before `gate`, nor the end before `hold`.
    With `ranges` what is missing can be asked for, by ETag or date. `breaks` says after how many bytes each GET in turn
    breaks off; `then` is what the next one gets. `trickle_s` seconds are between any two bytes, also of the head.
    """

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent: bytes | None = None
    gate: Event | None = None
    hold: Event | None = None
    ranges: bool = False
    breaks: list[int] = field(default_factory=list)
    then: Answer | None = None
    trickle_s: float | None = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Quiet about clients that hang up, which is what the tests are about."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # passed on


class Trickling:
    """A connection's writer that sends a byte at a time, if the answer does."""

    def __init__(self, writer: Any, answer: Answer) -> None:
        self._writer = writer
        self._pause_s = answer.trickle_s
        self._ended = Event()

    def write(self, data: bytes) -> int:
        if self._pause_s is None:
            return int(self._writer.write(data))
        for byte in data:
            self._writer.write(bytes([byte]))
            self._writer.flush()
            self._ended.wait(self._pause_s)
        return len(data)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    @property
    def closed(self) -> bool:
        return bool(self._writer.closed)


class Remote:
    """The server: what it has, and what was asked of it."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str | None] = []
        self.asked = Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def has(self, path: str, body: bytes, **more: object) -> Answer:
        """Serve `body` at `path`, with the hub's headers."""
        answer = Answer(body, **more)  # type: ignore[arg-type]  # fields of Answer
        digest = hashlib.sha256(body).hexdigest()
        answer.headers = {"ETag": f'"{digest}"', "X-Repo-Commit": "c" * 40, **answer.headers}
        self.answers[path] = answer
        return answer

    def asked_for(self, method: str, path: str) -> int:
        """How often."""
        return self.requests.count((method, path))

    def stop(self) -> None:
        """Close the port; later connections are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        remote = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.reply(with_body=False)

            def do_GET(self) -> None:
                self.reply(with_body=True)

            def reply(self, *, with_body: bool) -> None:
                remote.requests.append((self.command, self.path))
                missing = Answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
                answer = remote.answers.get(self.path, missing)
                if with_body:
                    remote.ranges.append(self.headers["Range"])
                    if answer.then is not None:
                        remote.answers[self.path] = answer.then
                remote.asked.set()
                if with_body and answer.gate is not None:
                    answer.gate.wait(10)
                self.wfile = Trickling(self.wfile, answer)
                body = self.head(answer)
                if with_body:
                    self.body(answer, body)

            def head(self, answer: Answer) -> bytes:
                status, headers, body = answer.status, dict(answer.headers), answer.body
                known = {headers.get("ETag"), headers.get("Last-Modified")}
                if answer.ranges and self.headers["Range"] and self.headers["If-Range"] in known:
                    first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                    status, size = 206, len(body)
                    headers["Content-Range"], body = f"bytes {first}-{size - 1}/{size}", body[first:]
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                return body

            def body(self, answer: Answer, body: bytes) -> None:
                sent = body if answer.sent is None else answer.sent
                if answer.breaks:
                    sent = sent[: answer.breaks.pop(0)]
                    self.close_connection = True
                self.wfile.write(sent)
                self.close_connection |= answer.sent is not None
                if answer.hold is not None:
                    self.wfile.flush()
                    answer.hold.wait(10)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        return Handler


@pytest.fixture
def remote() -> Iterator[Remote]:
    """A running server with nothing on it."""
    server = Remote()
    yield server
    for answer in server.answers.values():
        for event in (answer.gate, answer.hold):
            if event is not None:
                event.set()
    server.stop()


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty checkpoint directory."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


MakeStore = Callable[..., CheckpointStore]


@pytest.fixture
def make_store(directory: Path) -> MakeStore:
    """A store whose hub and whose one other host are both mirrored at `url`."""

    def make(url: str = "http://127.0.0.1:9", **more: object) -> CheckpointStore:
        options: dict[str, object] = {
            "hosts": frozenset({"huggingface.co", "download.pytorch.org"}),
            "mirrors": {"huggingface.co": url, "download.pytorch.org": url},
            "max_bytes": 10_000_000,
            "connect_timeout_s": 0.5,
            "download_timeout_s": 1.0,
        }
        return CheckpointStore(directory, **{**options, **more})  # type: ignore[arg-type]  # its keywords

    return make


@pytest.fixture(scope="session")
def weights() -> bytes:
    """A small safetensors file."""
    return save({"conv1.weight": torch.arange(6.0).reshape(2, 3)})

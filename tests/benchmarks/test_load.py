"""The load generator, against a small server that counts too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.failures import LoadFailed
from benchmarks.load import LoadPlan, LoadResult, percentile, run_load
from benchmarks.wire import multipart_message, raw_message


class Handler(BaseHTTPRequestHandler):
    """Answers by path: with a length, in chunks, with an error after a while, or not at all."""

    protocol_version = "HTTP/1.1"
    bodies: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(body)
        path = self.path.partition("?")[0]
        getattr(self, f"_{path.strip('/')}")(body)

    def _length(self, body: bytes) -> None:
        self._answer(200, body * 1000)

    def _chunked(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (body * 300, body):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _fails_later(self, body: bytes) -> None:
        fine = len(self.bodies) < 5
        self._answer(200 if fine else 503, body if fine else b"the queue is full")

    def _hangs_up(self, body: bytes) -> None:
        self.close_connection = True

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def server() -> Iterator[tuple[int, list[bytes]]]:
    """The port, and the bodies that came."""
    bodies: list[bytes] = []
    handler = type("Counting", (Handler,), {"bodies": bodies})
    listener = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield listener.server_address[1], bodies
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def load(port: int, path: str, clients: int = 3, least: int = 20) -> LoadResult:
    messages = tuple(raw_message(path, {"a": "b c"}, body, "text/plain", "*/*") for body in (b"one", b"two"))
    return run_load(LoadPlan(port, messages, clients, 0.05, os.getpid(), warm_s=0.02, least=least))


@pytest.mark.parametrize("path", ["/length", "/chunked"])
def test_whole_replies_are_counted_whatever_their_framing(path: str) -> None:
    with server() as (port, bodies):
        found = load(port, path)
    assert 20 <= found.answers == len(found.latencies_ms) <= len(bodies)
    assert found.per_second == pytest.approx(found.answers / found.seconds)
    assert min(found.latencies_ms) > 0
    assert found.server_cpu_s >= 0
    assert set(bodies) == {b"one", b"two"}


def test_every_request_that_was_sent_is_answered_before_the_end() -> None:
    with server() as (port, bodies):
        found = load(port, "/length", clients=8, least=1)
        # What is counted begins after the warm-up; nothing is left on its way.
        assert len(bodies) >= found.answers
        sent = len(bodies)
        load(port, "/length", clients=1, least=1)
        assert len(bodies) > sent


def test_another_status_than_200_ends_the_run_with_what_was_said() -> None:
    with server() as (port, _), pytest.raises(LoadFailed, match=r"(?s)status 503.*the queue is full"):
        load(port, "/fails_later")


def test_a_connection_that_closes_instead_of_answering_ends_the_run() -> None:
    with server() as (port, _), pytest.raises(LoadFailed, match="closed a connection"):
        load(port, "/hangs_up")


def test_a_form_arrives_with_its_parts() -> None:
    message = multipart_message("/length", {"pool": "avg"}, [b"\xff\xd8first", b"\xff\xd8second"], "*/*")
    with server() as (port, bodies):
        run_load(LoadPlan(port, (message,), 1, 0.0, os.getpid(), warm_s=0.0))
    assert all(part in bodies[0] for part in (b'name="pool"', b"\xff\xd8first", b"\xff\xd8second"))


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 5.0), (99, 10.0), (100, 10.0), (1, 1.0)], ids=["50", "99", "100", "1"]
)
def test_percentiles_are_values_that_occurred(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in (3, 1, 2, 10, 9, 8, 7, 6, 5, 4)], percent) == expected

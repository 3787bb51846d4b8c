"""`backbone-service health`, as a container's health check runs it."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.cli.test_cli import run
from tests.conftest import RunningService
from tests.processes import Start


class Starting(http.server.BaseHTTPRequestHandler):
    """Alive and not ready."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()
        self.wfile.write(b'{"status":"not ready","reason":"starting"}')


@pytest.fixture
def starting_port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Starting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_running_service_is_alive_and_ready(service: RunningService) -> None:
    port = str(service.http.base_url.port)
    assert json.loads(run("health", BACKBONE_PORT=port).stdout) == {"status": "ok"}
    assert json.loads(run("health", "--ready", "--port", port).stdout) == {"status": "ready"}


def test_one_that_starts_is_alive_and_not_ready(starting_port: int) -> None:
    assert run("health", "--port", str(starting_port)).returncode == 0
    ready = run("health", "--ready", "--port", str(starting_port))
    assert ready.returncode == 1
    assert "starting" in ready.stdout


def test_a_service_that_listens_everywhere_is_asked_on_loopback(start: Start) -> None:
    process = start(BACKBONE_ALLOW_ANONYMOUS="1")
    found = run("health", "--port", str(process.port), BACKBONE_HOST="0.0.0.0")
    assert (found.returncode, found.stderr) == (0, "")


def test_where_nobody_answers_it_says_so_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
    found = run("health", "--port", str(port))
    assert found.returncode == 1
    assert found.stderr.startswith("backbone-service: /healthz: no answer")
    assert len(found.stderr.splitlines()) == 1

"""How the service leaves: what is answered meanwhile, and that it ends when it said it would."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.api.test_third_party import TINY_NET, write_package
from tests.cli.test_cli import HalfSent
from tests.conftest import multipart, npy
from tests.processes import Process, Start

RESNET18 = {"type": "ResNet", "depth": 18}
AS_IN_A_CONTAINER = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")
NEEDS_ROOT = pytest.mark.skipif(
    shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs setpriv, and capabilities to drop"
)
TENSOR = npy(np.zeros((1, 3, 32, 32), np.float32))


def inspect(process: Process) -> httpx.Response:
    return process.http.post("/backbones/inspect", json={"backbone": RESNET18})


def drain(process: Process, number: int = signal.SIGTERM) -> None:
    process.signal(number)
    process.wait_for_line("draining")


def test_after_sigterm_it_is_not_ready_but_serves_on_for_the_delay(start: Start) -> None:
    process = start("--drain-delay", "600")
    assert inspect(process).status_code == 200
    drain(process)
    ready, alive, served = process.http.get("/readyz"), process.http.get("/healthz"), inspect(process)
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert (alive.status_code, served.status_code) == (200, 200)
    assert {reply.headers["connection"] for reply in (ready, alive, served)} == {"close"}
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


def test_a_reply_that_was_asked_for_before_sigterm_closes_its_connection_too(start: Start) -> None:
    process = start("--drain-delay", "600")
    assert process.http.get("/version").status_code == 200
    held = HalfSent(process.port, RESNET18)
    drain(process)
    reply = held.finish()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    held.close()


def test_ctrl_c_does_not_wait_for_the_delay(start: Start) -> None:
    process = start("--drain-delay", "600")
    assert process.http.get("/version").status_code == 200
    process.signal(signal.SIGINT)
    assert process.wait() == 0


def test_sigterm_before_the_service_is_up_does_not_wait_for_the_delay(start: Start) -> None:
    process = start("--drain-delay", "600")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


def test_what_is_cut_off_is_told_so(start: Start) -> None:
    process = start("--drain-seconds", "0.2")
    assert process.http.get("/version").status_code == 200
    with socket.create_connection(("127.0.0.1", process.port), 60) as held:
        head = "POST /backbones/inspect HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        held.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert held.recv(1024).startswith(b"HTTP/1.1 100")
        process.signal(signal.SIGTERM)
        reply = http.client.HTTPResponse(held)
        reply.begin()
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert b"/problems/draining" in reply.read()
    assert process.wait() == 0
    assert "Traceback" not in "".join(process.lines)


@pytest.mark.parametrize("under", [(), pytest.param(AS_IN_A_CONTAINER, marks=NEEDS_ROOT)])
def test_nothing_that_comes_while_it_serves_on_or_refuses_is_lost(
    start: Start, under: tuple[str, ...]
) -> None:
    process = start("--drain-delay", "1", under=under)
    assert ask_features(process.port)[0] == 200
    leaving = threading.Event()

    def client() -> list[tuple[int, str]]:
        """Ask one after the other until the service is gone, as a gateway without a health check does."""
        replies = []
        while True:
            try:
                replies.append(ask_features(process.port))
            except ConnectionRefusedError:
                return replies
            if len(replies) == 3:
                leaving.set()

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        assert leaving.wait(60)
        process.signal(signal.SIGTERM)
        found = [client.result(60) for client in clients]  # a reset would be raised here
    assert process.wait() == 0
    for replies in found:
        statuses = "".join("s" if status == 200 else "r" if status == 503 else "?" for status, _ in replies)
        assert re.fullmatch("s+r*", statuses), statuses


def test_who_asks_on_and_on_does_not_keep_it_from_ending(start: Start) -> None:
    process = start("--drain-seconds", "40")
    assert process.http.get("/version").status_code == 200
    refused = threading.Event()

    def client() -> None:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{process.port}/version", trust_env=False).status_code == 503:
                    refused.set()
            except httpx.TransportError:
                return

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        process.signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait() == 0
        assert time.monotonic() - began < 20
        for one in clients:
            one.result(60)
    assert process.wait() == 0


def ask_features(port: int) -> tuple[int, str]:
    """A request on a connection of its own: its status, and what becomes of the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(
            "POST",
            "/features?backbone=%7B%22type%22%3A%22ResNet%22%2C%22depth%22%3A18%2C%22base_channels%22%3A8%7D",
            TENSOR,
            {"Content-Type": "application/x-npy"},
        )
        reply = connection.getresponse()
        reply.read()
        return reply.status, reply.headers.get("connection", "")
    finally:
        connection.close()


# --- what hangs ---------------------------------------------------------------------------------

HANGING = TINY_NET.replace(
    "        first = torch.relu",
    '        if not images.is_meta:\n            open("hang", "rb").read()\n        first = torch.relu',
)


@pytest.fixture
def hanging(tmp_path: Path, start: Start) -> Callable[..., Process]:
    """Starts a service with a network that hangs on a pipe which nobody writes to."""
    os.mkfifo(tmp_path / "hang")
    site = tmp_path / "site"
    site.mkdir()
    write_package(site, "acme_tinynet", HANGING, {"acme.TinyNet": "acme_tinynet:FAMILY"})
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))

    def one(*arguments: str) -> Process:
        return start(*arguments, PYTHONPATH=paths)

    return one


def hang(process: Process) -> httpx.Response:
    tensor = np.zeros((1, 3, 32, 32), np.float32)
    return process.http.post("/features", **multipart({"type": "acme.TinyNet"}, tensor=tensor))


def test_a_device_that_hangs_does_not_keep_the_process(hanging: Callable[..., Process]) -> None:
    process = hanging("--drain-seconds", "0.1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(hang, process)
        while "backbone_models 1.0" not in process.http.get("/metrics").text:
            pass
        process.signal(signal.SIGTERM)
        reply = waiting.result(60)
    assert (reply.status_code, reply.json()["type"]) == (503, "/problems/draining")
    assert process.wait() == 0
    assert "something did not end within 5.1 s" in "".join(process.lines)


def test_liveness_notices_a_device_that_hangs(hanging: Callable[..., Process]) -> None:
    process = hanging("--stuck-after", "0.3")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(hang, process)
        while (alive := process.http.get("/healthz")).status_code == 200:
            pass
        ready = process.http.get("/readyz")
        process.signal(signal.SIGKILL)
        assert isinstance(waiting.exception(60), httpx.TransportError)
    assert (alive.status_code, ready.status_code) == (503, 503)
    assert "the device worker has been busy for" in alive.json()["reason"]
    assert ready.json()["reason"] == alive.json()["reason"]

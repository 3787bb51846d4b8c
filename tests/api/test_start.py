"""The door opens first: what a starting service answers, and how a start ends that does not go well.

The import of torch is held at a gate, so that a test decides when it goes on.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.api.app import create_app
from service.metrics import Metrics
from service.runtime.engine import Engine
from tests.conftest import encoded, settings_for
from tests.processes import COMMAND, Process, Start, environment

HOLD = """\
import sys
from importlib.machinery import PathFinder

class Gate:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        spec = PathFinder.find_spec(name, path, target)
        self.execute, spec.loader.exec_module = spec.loader.exec_module, self.hold
        return spec

    def hold(self, module):
        with open({fifo!r}, "rb") as gate:
            fault = gate.read().decode()
        if fault:
            raise ImportError(fault)
        self.execute(module)

sys.meta_path.insert(0, Gate())
"""
RESNET18 = {"type": "ResNet", "depth": 18}


class Gate:
    """Holds the import of torch in processes that are started with `settings`."""

    def __init__(self, folder: Path) -> None:
        self._fifo = folder / "gate"
        os.mkfifo(self._fifo)
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(HOLD.format(fifo=str(self._fifo)))
        self.settings = {"PYTHONPATH": str(site)}

    def wait(self) -> None:
        """Until the process stands at the gate."""
        self._writer = self._fifo.open("wb")

    def open(self, fault: str = "") -> None:
        """Let the import go on, or fail."""
        self._writer.write(fault.encode())
        self._writer.close()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
def held(gate: Gate, start: Start) -> Process:
    """A service that has opened its door and is about to import torch."""
    process = start(**gate.settings)
    gate.wait()
    return process


def send(process: Process, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
    """Send a request whole; who wants the reply asks for it later."""
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def reply_to(connection: http.client.HTTPConnection) -> tuple[int, dict[str, Any]]:
    reply = connection.getresponse()
    body = json.loads(reply.read())
    connection.close()
    return reply.status, body


def test_probes_are_answered_while_torch_is_imported(held: Process, gate: Gate) -> None:
    alive, ready = held.http.get("/healthz"), held.http.get("/readyz")
    numbers, description = held.http.get("/metrics"), held.http.get("/openapi.json")
    gate.open()
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    assert (ready.status_code, ready.json()["reason"]) == (503, "starting")
    assert ready.headers["retry-after"] == "1"
    assert numbers.status_code == 200
    assert "backbone_in_flight_requests 1.0" in numbers.text
    assert description.status_code == 200


def test_requests_that_come_early_are_answered_when_the_service_is_up(held: Process, gate: Gate) -> None:
    data = encoded(np.zeros((8, 8, 3), np.uint8))
    early = [
        send(held, "POST", "/backbones/inspect", {"backbone": RESNET18}),
        send(held, "GET", "/version"),
        send(held, "GET", "/backbones?limit=1"),
        send(held, "GET", "/backbones/timm.resnet18"),
        send(held, "GET", "/configs"),
        send(held, "GET", "/models"),
        send(held, "DELETE", "/models/none"),
    ]
    assert held.http.get("/readyz").json()["reason"] == "starting"
    gate.open()
    image = held.http.post(
        "/features",
        params={"backbone": json.dumps(RESNET18)},
        content=data,
        headers={"Content-Type": "image/png"},
    )
    ready = held.http.get("/readyz")
    statuses = [reply_to(connection)[0] for connection in early]
    assert image.status_code == 200, image.text
    assert ready.status_code == 200
    assert statuses == [200, 200, 200, 200, 200, 200, 404]


def test_who_may_not_ask_does_not_wait_for_the_start(gate: Gate, start: Start) -> None:
    process = start(BACKBONE_API_KEYS="secret", **gate.settings)
    gate.wait()
    refused = process.http.get("/models")
    gate.open()
    assert refused.status_code == 401


def test_a_request_waits_no_longer_than_a_request_may_take(gate: Gate, start: Start) -> None:
    process = start(BACKBONE_REQUEST_TIMEOUT="0.2", **gate.settings)
    gate.wait()
    late = process.http.post("/features", json={"backbone": RESNET18})
    gate.open()
    assert (late.status_code, late.json()["type"]) == (503, "/problems/starting")
    assert late.headers["retry-after"] == "1"


def test_sigterm_while_torch_is_imported_answers_who_waits_and_ends_at_once(held: Process) -> None:
    waiting = send(held, "GET", "/models")
    assert held.http.get("/healthz").status_code == 200
    held.signal(signal.SIGTERM)
    status, body = reply_to(waiting)
    # The gate is still closed: nobody waited for the import.
    assert held.wait() == 0
    assert (status, body["type"]) == (503, "/problems/draining")
    assert "Traceback" not in "".join(held.lines)


def test_a_device_that_is_not_there_ends_the_start_with_the_reason() -> None:
    done = subprocess.run(
        [COMMAND, "serve", "--port", "0", "--device", "cuda:99"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if '"level":"error"' in line]
    assert done.returncode == 2
    assert len(errors) == 1
    assert "cannot start: BACKBONE_DEVICE: device cuda:99 is not there" in errors[0]
    assert "Traceback" not in done.stderr


def test_a_start_that_crashes_answers_who_waits_and_ends_the_process(held: Process, gate: Gate) -> None:
    waiting = send(held, "GET", "/models")
    assert held.http.get("/healthz").status_code == 200
    gate.open("libtorch is broken")
    status, body = reply_to(waiting)
    assert (status, body["type"]) == (503, "/problems/unavailable")
    assert "libtorch" not in body["detail"]
    assert held.wait() == 1
    assert "libtorch is broken" in "".join(held.lines)


async def test_an_engine_made_elsewhere_is_used_and_left_running(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    engine = Engine(settings, Metrics())
    app = create_app(settings, engine=engine)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/models")).json()["models"] == []
    assert engine.fault() is None
    assert engine.not_ready() is None
    await engine.stop()


@pytest.mark.parametrize("module", ["service.api.app", "service.api.server", "service.cli"])
def test_the_door_opens_without_what_is_slow_to_import(module: str) -> None:
    slow = ("torch", "timm", "torchvision", "openvino", "pyarrow", "huggingface_hub", "httpx", "PIL", "yaml")
    code = f"import sys, {module}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_engine_starts_without_what_its_first_request_does_not_need() -> None:
    slow = (
        "timm",
        "torchvision",
        "openvino",
        "pyarrow",
        "huggingface_hub",
        "httpx",
        "torch._dynamo",
        "sympy",
    )
    code = f"import sys, service.runtime.engine; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"

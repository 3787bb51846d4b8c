"""No descriptors, no room for the log, no room for a checkpoint: what goes on, and what comes back."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
from safetensors.torch import save_file

from tests.api.problems import assert_problem
from tests.checkpoints.conftest import Remote
from tests.checkpoints.test_weights_over_http import IMAGES, TINY, weights_of
from tests.conftest import Serve, multipart
from tests.faults.conftest import SmallDisk
from tests.processes import COMMAND, Process, Start, environment, wait_until

PARTS = multipart(TINY, tensor=IMAGES)
CONNECTIONS = 40


def limit_descriptors(service: Process, more: int) -> int:
    """Let a process open so many more files; gives how many that are."""
    limit = psutil.Process(service.pid).num_fds() + more
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (limit, limit))
    return limit


def test_without_descriptors_old_connections_are_answered_and_new_ones_later(start: Start) -> None:
    service = start()
    service.http.post("/features", **PARTS).raise_for_status()
    limit = limit_descriptors(service, CONNECTIONS // 2)
    crowd = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(CONNECTIONS)]
    wait_until(lambda: psutil.Process(service.pid).num_fds() >= limit - 1)
    assert service.http.get("/healthz").status_code == 200
    assert service.http.post("/features", **PARTS).status_code == 200
    for connection in crowd:
        connection.close()
    fresh = httpx.post(f"http://127.0.0.1:{service.port}/features", timeout=60, trust_env=False, **PARTS)
    assert fresh.status_code == 200


def test_a_checkpoint_without_room_is_fetched_once_there_is_some(
    serve: Serve, small_disk: SmallDisk, remote: Remote, tmp_path: Path
) -> None:
    save_file(weights_of(1), tmp_path / "w.safetensors")
    remote.has("/w.safetensors", (tmp_path / "w.safetensors").read_bytes())
    service = serve(checkpoint_dir=small_disk.path, checkpoint_mirrors=f"download.openmmlab.com={remote.url}")
    fetched = {**TINY, "checkpoint": "https://download.openmmlab.com/w.safetensors"}
    small_disk.fill()
    refused = service.http.post("/features", **multipart(fetched, tensor=IMAGES))
    assert "there is no room to keep it" in assert_problem(refused, 503)["detail"]
    assert refused.headers["retry-after"] == "60"
    assert [path.name for path in small_disk.path.rglob("*") if path.is_file()] == ["filler"]
    assert service.http.post("/features", **PARTS).status_code == 200
    small_disk.clear()
    assert service.http.post("/features", **multipart(fetched, tensor=IMAGES)).status_code == 200


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_log_without_room_costs_no_request(tmp_path: Path) -> None:
    port = str(free_port())
    with Path("/dev/full").open("wb") as log:
        service = subprocess.Popen(
            [COMMAND, "serve", "--port", port], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )
    try:
        transport = httpx.HTTPTransport(retries=10)  # until it listens
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=60) as http:
            assert http.post("/features", **PARTS).status_code == 200
            unknown = {"type": "ResNet", "depth": 51}
            assert_problem(http.post("/features", **multipart(unknown, tensor=IMAGES)), 422)
        service.terminate()
        assert service.wait(60) in (0, -signal.SIGTERM)
    finally:
        service.kill()
        service.wait(60)

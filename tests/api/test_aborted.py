"""Ten thousand clients that leave in the middle: nothing of them stays."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import threading
from dataclasses import dataclass, replace
from urllib.parse import quote

import numpy as np
import psutil
import pytest

from tests.conftest import RunningService, Serve, npy
from tests.processes import wait_until

THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8, "out_indices": [3]}
BODY = npy(np.zeros((1, 3, 32, 32), np.float32))
AT_ONCE = 100
RESET = struct.pack("ii", 1, 0)  # close with a reset instead of in good order
# The C library settles: 20, 11, 5, 1 MB with each 5,000. The bodies of all would be 120 MB.
MAX_GROWTH_BYTES = 90_000_000


@dataclass(frozen=True)
class Left:
    """What a service holds."""

    tasks: int
    threads: int
    files: int
    leases: int
    loads: int
    waiting_images: int
    in_flight: int
    connections: float


def request(path: str, media_type: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def some_request(rng: random.Random) -> bytes:
    """Mostly for a model that is there; sometimes a config to be planned, seldom a model to be loaded."""
    kind = rng.random()
    if kind < 0.85:
        return request(f"/features?backbone={quote(json.dumps(THIN))}", "application/x-npy", BODY)
    config = {**THIN, "base_channels": 8 * rng.randint(1, 4)}
    path = "/models" if kind > 0.99 else "/backbones/inspect"
    return request(path, "application/json", json.dumps({"backbone": config}).encode())


async def leave(port: int, seed: int) -> None:
    """Send a request, or a part of one, and go: with a reset or in good order, perhaps in the middle of the reply."""
    rng = random.Random(seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = some_request(rng)
    is_whole = rng.random() < 0.6
    writer.write(data if is_whole else data[: rng.randrange(len(data))])
    try:
        await writer.drain()
        if is_whole and rng.random() < 0.3:
            await reader.read(rng.randint(1, 200))
    except ConnectionError:
        pass  # it was refused, which is as good an end as any
    if rng.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def leave_often(port: int, seeds: range) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> None:
        async with places:
            await leave(port, seed)

    await asyncio.gather(*(one(seed) for seed in seeds))


def connections(service: RunningService) -> float:
    """Those that the server looks after, this one among them."""
    found = re.search(r"^backbone_connections (\S+)$", service.http.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def held_by(service: RunningService) -> Left:
    cache = service.engine.networks.cache

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    loop = service.app.state.startup._making.get_loop()
    return Left(
        tasks=asyncio.run_coroutine_threadsafe(tasks(), loop).result(60),
        threads=threading.active_count(),
        files=psutil.Process().num_fds(),
        leases=sum(entry.leases for entry in cache),
        loads=len(cache.loading),
        waiting_images=service.engine.batcher.waiting_images,
        in_flight=len(service.app.state.drain.in_flight),
        connections=connections(service),
    )


def settled(service: RunningService, expected: Left) -> Left:
    """What it holds when it has come to rest, or after it has been asked often enough."""
    for _ in range(5_000):
        service.http.get("/healthz")
        left = held_by(service)
        # another test's files may be closed meanwhile
        left = replace(left, files=max(left.files, expected.files))
        if left == expected:
            break
    return left


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(serve: Serve) -> None:
    service = serve()
    data = request(f"/features?backbone={quote(json.dumps(THIN))}", "application/x-npy", BODY)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", service.http.base_url.port or 0)) as connection:
            connection.sendall(data[: len(data) // 2])
    wait_until(lambda: connections(service) == 1)
    assert 'backbone_dropped_connections_total{reason="unread body"} 0.0' in service.http.get("/metrics").text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_left_of_ten_thousand_requests_whose_clients_left(serve: Serve) -> None:
    service = serve(request_timeout=10)
    port = service.http.base_url.port or 0
    asyncio.run(leave_often(port, range(2000)))  # has every thread started and every config planned
    service.http.post("/features", params={"backbone": json.dumps(THIN)}, content=BODY, headers=NPY)
    before = settled(service, held_by(service))
    resident = psutil.Process().memory_info().rss
    asyncio.run(leave_often(port, range(2000, 12_000)))
    assert settled(service, before) == before
    assert before.leases == before.loads == before.waiting_images == before.in_flight == 0
    assert psutil.Process().memory_info().rss - resident < MAX_GROWTH_BYTES
    assert "backbone_in_flight_requests 1.0" in service.http.get("/metrics").text


NPY = {"Content-Type": "application/x-npy"}

"""`make bench`: the service beside timm behind FastAPI and a raw loop, interleaved in one run, as ratios.

Absolute numbers depend on the machine and on who else is on it; ratios of one run hold.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

SERVICE_PORT, PEER_PORT = 8701, 8702


@dataclass(frozen=True)
class Job:
    """What is asked for, in the words of the service and of the peer."""

    name: str
    model: str
    clients: int
    service: dict[str, str]
    accept: str
    peer_route: str


POOLED = {"pool": "avg", "return": "tensors"}
JOBS = (
    Job(
        "J1 ResNet-50, pooled vector",
        "resnet50",
        8,
        {"backbone": '{"type":"timm.resnet50","out_indices":[4]}', **POOLED},
        "application/json",
        "/pooled",
    ),
    Job(
        "J2 ResNet-50, four maps",
        "resnet50",
        8,
        {"backbone": '{"type":"timm.resnet50","out_indices":[1,2,3,4]}'},
        "application/vnd.safetensors",
        "/maps",
    ),
    Job(
        "J3 MobileNetV3-S, pooled vector",
        "mobilenetv3_small_100",
        32,
        {"backbone": '{"type":"timm.mobilenetv3_small_100","out_indices":[4]}', **POOLED},
        "application/json",
        "/pooled",
    ),
)


def photo() -> bytes:
    """A 500x375 JPEG with some structure."""
    coarse = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


@contextmanager
def running(command: list[str], port: int, path: str) -> Iterator[str]:
    """A server, from when it answers until it is told to stop."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        transport = httpx.HTTPTransport(retries=20)  # backs off between attempts to connect
        with httpx.Client(transport=transport, timeout=60) as client:
            client.get(url + path)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def requests_per_second(
    send: Callable[[httpx.Client], None], clients: int, seconds: float
) -> tuple[float, float]:
    """Requests a second and the median latency in ms, `clients` at a time."""
    until = time.perf_counter() + seconds
    latencies: list[float] = []

    def work() -> None:
        with httpx.Client(timeout=120, trust_env=False) as client:
            while time.perf_counter() < until:
                started = time.perf_counter()
                send(client)
                latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(work) for _ in range(clients)]:
            future.result()
    return len(latencies) / (time.perf_counter() - started), statistics.median(latencies) * 1000


def raw_loop(model_name: str, seconds: float) -> float:
    """Forward passes a second of the model alone, in a process of its own so that thread pools do not mix."""
    code = (
        "import sys,time,timm,torch\n"
        "m=timm.create_model(sys.argv[1],features_only=True).eval(); x=torch.randn(1,3,224,224)\n"
        "with torch.inference_mode():\n"
        " [m(x) for _ in range(3)]; n=0; t=time.perf_counter()\n"
        " while time.perf_counter()-t<float(sys.argv[2]): m(x); n+=1\n"
        "print(n/(time.perf_counter()-t))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model_name, str(seconds)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def service_request(job: Job, url: str, image: bytes) -> Callable[[httpx.Client], None]:
    """One request of the job to the service."""

    def send(client: httpx.Client) -> None:
        files = {"image": ("photo.jpg", image, "image/jpeg")}
        reply = client.post(f"{url}/features", data=job.service, files=files, headers={"Accept": job.accept})
        reply.raise_for_status()

    return send


def peer_request(job: Job, url: str, image: bytes) -> Callable[[httpx.Client], None]:
    """The same of the peer."""

    def send(client: httpx.Client) -> None:
        client.post(
            url + job.peer_route, files={"image": ("photo.jpg", image, "image/jpeg")}
        ).raise_for_status()

    return send


def measure(job: Job, seconds: float, rounds: int, image: bytes) -> None:
    """Print one row: the service and the peer in turn, each as part of the raw loop beside it."""
    rows: list[tuple[float, float, float, float, float]] = []
    serve = [sys.executable, "-m", "service.cli", "serve", "--port", str(SERVICE_PORT)]
    peer = [sys.executable, "-m", "benchmarks.peer", job.model, str(PEER_PORT)]
    with (
        running(serve, SERVICE_PORT, "/healthz") as ours,
        running(peer, PEER_PORT, "/openapi.json") as theirs,
    ):
        send_ours, send_theirs = service_request(job, ours, image), peer_request(job, theirs, image)
        for send in (send_ours, send_theirs):
            requests_per_second(send, 2, 1)
        for _ in range(rounds):
            raw = raw_loop(job.model, seconds)
            our_rate, our_p50 = requests_per_second(send_ours, job.clients, seconds)
            their_rate, their_p50 = requests_per_second(send_theirs, job.clients, seconds)
            rows.append((raw, our_rate, our_p50, their_rate, their_p50))
    raw, our_rate, our_p50, their_rate, their_p50 = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    print(
        f"{job.name:34} {job.clients:3} clients | raw {raw:6.1f}/s | service {our_rate:6.1f}/s "
        f"({our_rate / raw:.2f} of raw, p50 {our_p50:.0f} ms) | FastAPI+timm {their_rate:6.1f}/s "
        f"({their_rate / raw:.2f}, p50 {their_p50:.0f} ms) | service/peer {our_rate / their_rate:.2f}",
        flush=True,
    )


def main() -> None:
    """Measure every job."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each job is measured")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {threading.active_count()} thread, Python {sys.version.split()[0]}")
    image = photo()
    for job in JOBS:
        measure(job, options.seconds, options.rounds, image)


if __name__ == "__main__":
    main()

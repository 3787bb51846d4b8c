"""`python -m benchmarks.soak`: mixed load at twice the capacity, with hostile requests among it, for as long as asked.

It starts the service, measures what honest clients wait when nobody else is there and what the service can do at
all, then lets a greedy client ask for twice as much and hostile ones for whatever they like, while the same honest
clients go on. It fails where a reply has a status that is not promised, an honest client is not answered, or the
service ends.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop

from benchmarks.images import normalised_batch, photo, photos
from benchmarks.jobs import JOBS
from benchmarks.load import tree_cpu_s
from benchmarks.processes import Launch, Server, running
from benchmarks.soak.exchange import CUT_OFF, Tally
from benchmarks.soak.honest import PROGRESS_EVERY_S, honest_clients, latencies
from benchmarks.soak.hostile import PROMISED, with_key
from benchmarks.soak.keys import KEYS
from benchmarks.soak.traffic import Traffic
from benchmarks.wire import raw_message

HOSTILE_CLIENTS = 6
DRIBBLING_CLIENTS = 10
SAMPLE_EVERY_S = 5.0
MAX_WARM_PHASES, MAX_SECONDS_IDLE = 10, 15
SETTLED_AFTER_S = 600.0


@dataclass(frozen=True)
class Sample:
    """Memory of the service at a second of the load."""

    at_s: float
    bytes: int


def main() -> int:
    """Run it; 1 where something was not as promised."""
    parser = argparse.ArgumentParser("python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long the load lasts (default: 60)")
    parser.add_argument("--alone", type=float, default=60.0, help="seconds of honest clients alone")
    parser.add_argument("--capacity", type=float, default=20.0, help="seconds of finding out what it can do")
    parser.add_argument("--times", type=float, default=2.0, help="load as a multiple of the capacity")
    parser.add_argument("--setting", action="append", default=[], metavar="BACKBONE_NAME=VALUE")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(_launch(options.setting, folder), Path(folder)) as server,
    ):
        server.wait_until_up()
        return uvloop.run(_soak(server, options))


def _launch(settings: Sequence[str], folder: str) -> Callable[[int], Launch]:
    given = dict(setting.split("=", 1) for setting in settings)
    keys = ",".join(KEYS[who] for who in ("honest", "greedy", "hostile"))
    environment = {
        "BACKBONE_API_KEYS": keys,
        "BACKBONE_ADMIN_KEYS": KEYS["admin"],
        "BACKBONE_CHECKPOINT_DIR": folder,
        "BACKBONE_ENGINE_CACHE": f"{folder}/engines",
        # What may grow is bounded tightly, so that what should not can be seen to.
        "BACKBONE_MODEL_BUDGET": "1000000000",
        "BACKBONE_WORK_MEMORY": "1500000000",
        **given,
    }
    command = [sys.executable, "-m", "service.cli", "serve", "--port"]
    return lambda port: Launch([*command, str(port)], "/readyz", environment)


def _mixed() -> Callable[[], bytes]:
    """Greedy work of all kinds: small and large models and images, vectors and maps."""
    images = photos(16)
    large = photo((4000, 3000))
    tensor = raw_message(
        "/features",
        {"backbone": '{"type": "timm.resnet18"}'},
        normalised_batch(4),
        "application/x-npy",
        "application/json",
    )
    kinds: list[tuple[float, list[bytes]]] = [
        (6, [JOBS["J1"].service_message(image) for image in images]),
        (2, [JOBS["J2"].service_message(image) for image in images]),
        (6, [JOBS["J3"].service_message(image) for image in images]),
        (0.5, [JOBS["J1"].service_message(large)]),
        (0.5, [tensor]),
    ]
    weights = [weight for weight, _ in kinds]
    messages = [[with_key(message, KEYS["greedy"]) for message in made] for _, made in kinds]
    return lambda: random.choice(random.choices(messages, weights)[0])


async def _soak(server: Server, options: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    mixed = _mixed()
    hostile_job = with_key(JOBS["J1"].service_message(photo()), KEYS["hostile"])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as honest_process:

        def honest(seconds: float) -> asyncio.Future[Tally]:
            return loop.run_in_executor(honest_process, honest_clients, server.port, seconds)

        await _warm(server, mixed)
        alone = await honest(options.alone)
        capacity, _ = await _phase(
            server, options.capacity, lambda traffic: [traffic.busy("capacity", mixed) for _ in range(8)]
        )
        per_second = len(capacity["capacity"].latencies_s) / options.capacity
        rate = per_second * options.times
        print(f"capacity {per_second:.1f}/s of mixed work; the load is {rate:.1f}/s", flush=True)
        spent_s = -tree_cpu_s(os.getpid()) + tree_cpu_s(server.pid)
        loaded = honest(options.minutes * 60)
        others, samples = await _phase(
            server,
            options.minutes * 60,
            lambda traffic: [
                traffic.greedy("greedy", mixed, rate),
                *(traffic.hostile(KEYS["hostile"], 0.2) for _ in range(HOSTILE_CLIENTS)),
                *(traffic.dribble(hostile_job) for _ in range(DRIBBLING_CLIENTS)),
            ],
        )
        tallies = {**others, "honest": await loaded}
        spent_s += tree_cpu_s(os.getpid()) - tree_cpu_s(server.pid)
        print(f"the senders took {spent_s / (options.minutes * 60):.2f} of {os.cpu_count()} cores")
        return _report(alone, tallies, samples)


async def _warm(server: Server, mixed: Callable[[], bytes]) -> None:
    """Let a few clients send until every model is on its engine: conversion is no load of anybody's."""
    async with httpx.AsyncClient(headers={"X-API-Key": KEYS["admin"]}) as client:
        for _ in range(MAX_WARM_PHASES):
            await _phase(server, 5.0, lambda traffic: [traffic.busy("warm", mixed) for _ in range(4)])
            states = await _promotions(server, client)
            for _ in range(MAX_SECONDS_IDLE):  # conversion has the lowest priority: let it have the cores
                if not states & {"converting", "comparing"}:
                    break
                await asyncio.sleep(1.0)
                states = await _promotions(server, client)
            if states <= {"promoted", "stays"}:
                return
    print(f"not every model is on its engine yet: {', '.join(sorted(states))}", flush=True)


async def _promotions(server: Server, client: httpx.AsyncClient) -> set[str]:
    reply = await client.get(f"http://127.0.0.1:{server.port}/models")
    return {model["promotion"]["state"] for model in reply.json()["models"]}


async def _phase(
    server: Server, seconds: float, senders: Callable[[Traffic], Sequence[Coroutine[Any, Any, None]]]
) -> tuple[Mapping[str, Tally], list[Sample]]:
    """Let senders send for so long; memory is looked at meanwhile."""
    started = time.monotonic()
    traffic = Traffic(server.port, started + seconds)
    samples: list[Sample] = []

    async def watch() -> None:
        while traffic.goes_on:
            samples.append(Sample(time.monotonic() - started, await asyncio.to_thread(server.memory_bytes)))
            _progress(samples)
            await asyncio.sleep(SAMPLE_EVERY_S)

    await asyncio.gather(watch(), *senders(traffic))
    return traffic.tallies, samples


def _progress(samples: Sequence[Sample]) -> None:
    if len(samples) % (PROGRESS_EVERY_S // SAMPLE_EVERY_S) == 0:
        last = samples[-1]
        print(f"{last.at_s / 60:5.1f} min: {last.bytes / 2**20:,.0f} MB", flush=True)


def _report(alone: Tally, loaded: Mapping[str, Tally], samples: Sequence[Sample]) -> int:
    honest = loaded["honest"]
    print("\n| sender | replies | by status |\n| --- | --- | --- |")
    for name, tally in sorted(loaded.items()):
        by_status = ", ".join(
            f"{status or 'closed'}: {count}" for status, count in sorted(tally.statuses.items())
        )
        print(f"| {name} | {tally.statuses.total():,} | {by_status} |")
    print(
        f"\nhonest clients, ms: alone {latencies(alone.latencies_s)}; under load {latencies(honest.latencies_s)}"
    )
    for seconds, at_s, stages in honest.slowest:
        print(f"  {seconds * 1000:6.0f} ms, {at_s:.0f} s in: {stages}")
    settled = [sample for sample in samples if sample.at_s >= min(SETTLED_AFTER_S, samples[-1].at_s / 2)]
    sizes = [sample.bytes / 2**20 for sample in settled]
    print(
        f"memory after {settled[0].at_s / 60:.0f} min: {sizes[0]:,.0f} MB, then {min(sizes):,.0f} to {max(sizes):,.0f},"
        f" at the end {sizes[-1]:,.0f}"
    )
    return _verdict(honest, loaded)


def _verdict(honest: Tally, loaded: Mapping[str, Tally]) -> int:
    every = sum((tally.statuses for tally in loaded.values()), Counter[int]())
    unpromised = {status for status in every if status not in PROMISED and status != CUT_OFF.status}
    unanswered = {status: count for status, count in honest.statuses.items() if status != 200}
    if unpromised:
        print(f"not promised: {sorted(unpromised)}")
    if unanswered:
        print(f"honest clients were answered otherwise: {unanswered}")
    return 1 if unpromised or unanswered else 0


if __name__ == "__main__":
    sys.exit(main())

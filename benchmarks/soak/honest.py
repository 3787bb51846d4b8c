"""Honest clients: each asks for a vector of a photo, waits for it, and asks again twice a second."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import uvloop

from benchmarks.images import photos
from benchmarks.jobs import JOBS
from benchmarks.load import percentile
from benchmarks.soak.exchange import Tally
from benchmarks.soak.hostile import with_key
from benchmarks.soak.keys import KEYS
from benchmarks.soak.traffic import Traffic

HONEST_CLIENTS = 4
HONEST_EVERY_S = 0.5
PROGRESS_EVERY_S = 60.0


def _honest_message() -> Callable[[], bytes]:
    job = JOBS["J1"]
    messages = [with_key(job.service_message(image), KEYS["honest"]) for image in photos(16)]
    return lambda: random.choice(messages)


def honest_clients(port: int, seconds: float) -> Tally:
    """Honest clients for so long: in a process of their own, or what the others cost would count as their wait."""
    return uvloop.run(_pace(Traffic(port, time.monotonic() + seconds)))


async def _pace(traffic: Traffic) -> Tally:
    message = _honest_message()
    tally = traffic.tallies["honest"]
    watching = asyncio.create_task(_tell_latencies(tally))
    await asyncio.gather(*(traffic.paced("honest", message, HONEST_EVERY_S) for _ in range(HONEST_CLIENTS)))
    watching.cancel()
    return tally


async def _tell_latencies(tally: Tally) -> None:
    told = 0
    while True:
        await asyncio.sleep(PROGRESS_EVERY_S)
        found, told = tally.latencies_s[told:], len(tally.latencies_s)
        if found:
            print(f"           honest clients, ms: {latencies(found)}", flush=True)


def latencies(seconds: Sequence[float]) -> str:
    """Median and 99th percentile in milliseconds."""
    found = [value * 1000 for value in seconds]
    return f"p50 {percentile(found, 50):.0f}, p99 {percentile(found, 99):.0f} of {len(found):,}"

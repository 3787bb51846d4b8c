"""`python -m benchmarks.soak`: mixed load at twice the capacity, with hostile requests among it, for as long as asked.

It starts the service, measures what honest clients wait when nobody else is there and what the service can do at
all, then lets a greedy client ask for twice as much and hostile ones for whatever they like, while the same honest
clients go on. It fails where a reply has a status that is not promised, an honest client is not answered, or the
service ends.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.images import normalised_batch, photo, photos
from benchmarks.jobs import JOBS
from benchmarks.load import percentile
from benchmarks.processes import Launch, Server, running
from benchmarks.soak.exchange import CUT_OFF, Tally
from benchmarks.soak.hostile import PROMISED, with_header
from benchmarks.soak.traffic import Traffic
from benchmarks.wire import raw_message

KEYS = {who: f"{who}-key-{'0' * 32}" for who in ("honest", "greedy", "hostile", "admin")}
HONEST_CLIENTS = 4
HONEST_EVERY_S = 0.5
HOSTILE_CLIENTS = 6
DRIBBLING_CLIENTS = 10
SAMPLE_EVERY_S = 5.0
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
        return asyncio.run(_soak(server, options))


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
    """Honest work of all kinds: small and large models and images, vectors and maps."""
    images = photos(16)
    large = photo((4000, 3000))
    tensor = raw_message(
        "/features",
        {"backbone": '{"type": "timm.resnet18"}'},
        normalised_batch(4),
        "application/x-npy",
        "application/json",
    )
    kinds: list[tuple[float, Callable[[], bytes]]] = [
        (6, lambda: JOBS["J1"].service_message(random.choice(images))),
        (2, lambda: JOBS["J2"].service_message(random.choice(images))),
        (6, lambda: JOBS["J3"].service_message(random.choice(images))),
        (0.5, lambda: JOBS["J1"].service_message(large)),
        (0.5, lambda: tensor),
    ]
    weights = [weight for weight, _ in kinds]

    def one() -> bytes:
        _, make = random.choices(kinds, weights)[0]
        return make()

    return one


def _vector_of(images: Sequence[bytes]) -> bytes:
    return JOBS["J1"].service_message(random.choice(images))


def _as(who: str, message: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: with_header(message(), "X-API-Key", KEYS[who])


async def _soak(server: Server, options: argparse.Namespace) -> int:
    images = photos(16)
    job = partial(_vector_of, images)
    honest = _as("honest", job)
    mixed = _as("greedy", _mixed())
    await _phase(server, 15.0, lambda traffic: [traffic.busy("warm", mixed) for _ in range(4)])
    alone, _ = await _phase(server, options.alone, lambda traffic: _honest(traffic, honest))
    capacity, _ = await _phase(
        server, options.capacity, lambda traffic: [traffic.busy("capacity", mixed) for _ in range(8)]
    )
    per_second = len(capacity["capacity"].latencies_s) / options.capacity
    rate = per_second * options.times
    print(f"capacity {per_second:.1f}/s of mixed work; the load is {rate:.1f}/s", flush=True)

    def everybody(traffic: Traffic) -> list[object]:
        return [
            *_honest(traffic, honest),
            traffic.greedy("greedy", mixed, rate),
            *(traffic.hostile(KEYS["hostile"], 0.2) for _ in range(HOSTILE_CLIENTS)),
            *(traffic.dribble(_as("hostile", job)()) for _ in range(DRIBBLING_CLIENTS)),
        ]

    under_load, samples = await _phase(server, options.minutes * 60, everybody)
    return _report(alone["honest"], under_load, samples)


def _honest(traffic: Traffic, message: Callable[[], bytes]) -> list[object]:
    return [traffic.paced("honest", message, HONEST_EVERY_S) for _ in range(HONEST_CLIENTS)]


async def _phase(
    server: Server, seconds: float, senders: Callable[[Traffic], Sequence[object]]
) -> tuple[Mapping[str, Tally], list[Sample]]:
    """Let senders send for so long; memory is looked at meanwhile."""
    started = time.monotonic()
    traffic = Traffic(server.port, started + seconds)
    samples: list[Sample] = []

    async def watch() -> None:
        while traffic.goes_on:
            samples.append(Sample(time.monotonic() - started, await asyncio.to_thread(server.memory_bytes)))
            _progress(samples, traffic)
            await asyncio.sleep(SAMPLE_EVERY_S)

    await asyncio.gather(watch(), *senders(traffic))  # type: ignore[call-overload]  # coroutines of None, all
    return traffic.tallies, samples


def _progress(samples: Sequence[Sample], traffic: Traffic) -> None:
    if len(samples) % 12 == 0:
        last, honest = samples[-1], traffic.tallies["honest"].latencies_s[-200:]
        p99 = f", honest p99 {percentile(honest, 99) * 1000:.0f} ms" if honest else ""
        print(f"{last.at_s / 60:5.1f} min: {last.bytes / 2**20:,.0f} MB{p99}", flush=True)


def _report(alone: Tally, loaded: Mapping[str, Tally], samples: Sequence[Sample]) -> int:
    honest = loaded["honest"]
    print("\n| sender | replies | by status |\n| --- | --- | --- |")
    for name, tally in sorted(loaded.items()):
        by_status = ", ".join(
            f"{status or 'closed'}: {count}" for status, count in sorted(tally.statuses.items())
        )
        print(f"| {name} | {tally.statuses.total():,} | {by_status} |")
    print(f"\nhonest clients, ms: alone {_latencies(alone)}; under load {_latencies(honest)}")
    settled = [sample for sample in samples if sample.at_s >= min(SETTLED_AFTER_S, samples[-1].at_s / 2)]
    sizes = [sample.bytes / 2**20 for sample in settled]
    print(
        f"memory after {settled[0].at_s / 60:.0f} min: {sizes[0]:,.0f} MB, then {min(sizes):,.0f} to {max(sizes):,.0f},"
        f" at the end {sizes[-1]:,.0f}"
    )
    return _verdict(honest, loaded)


def _latencies(tally: Tally) -> str:
    found = [seconds * 1000 for seconds in tally.latencies_s]
    return f"p50 {percentile(found, 50):.0f}, p99 {percentile(found, 99):.0f} of {len(found):,}"


def _verdict(honest: Tally, loaded: Mapping[str, Tally]) -> int:
    every = sum((tally.statuses for tally in loaded.values()), Counter[int]())
    unpromised = {status for status in every if status not in PROMISED and status != CUT_OFF}
    unanswered = {status: count for status, count in honest.statuses.items() if status != 200}
    if unpromised:
        print(f"not promised: {sorted(unpromised)}")
    if unanswered:
        print(f"honest clients were answered otherwise: {unanswered}")
    return 1 if unpromised or unanswered else 0


if __name__ == "__main__":
    sys.exit(main())

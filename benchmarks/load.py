"""The load generator: N connections, each with one request under way, in a process of its own.

It shares the cores with what it measures, so it may cost next to nothing: prepared bytes go out, replies are counted
by their length and forgotten.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import httptools
import psutil
import uvloop

from benchmarks.failures import LoadFailed

RECEIVE_BYTES = 1 << 20
PATIENCE_S = 60.0
PATIENCE_OF_AN_ANSWER_S = 3.0


@dataclass(frozen=True)
class LoadPlan:
    """What to send, how much of it at a time, and for how long.

    Counting starts after `warm_s`, and ends with the first answer after `seconds` more, when at least `least` came.
    """

    port: int
    messages: tuple[bytes, ...]
    clients: int
    seconds: float
    server_pid: int
    warm_s: float = 0.5
    least: int = 1


@dataclass(frozen=True)
class LoadResult:
    """What came of it. CPU seconds of the server are those of all its processes."""

    answers: int
    seconds: float
    latencies_ms: tuple[float, ...]
    server_cpu_s: float
    client_cpu_s: float

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds

    @property
    def server_cpu_ms(self) -> float:
        """CPU milliseconds of the server for one answer."""
        return self.server_cpu_s * 1000 / self.answers

    @property
    def client_cpu_ms(self) -> float:
        """CPU milliseconds of this generator for one answer."""
        return self.client_cpu_s * 1000 / self.answers


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def tree_cpu_s(pid: int) -> float:
    """CPU seconds that a process and its descendants have used."""
    total = 0.0
    for process in process_tree(pid):
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            spent = process.cpu_times()
            total += spent.user + spent.system
    return total


class _Run:
    """The counts of one plan, shared by its connections."""

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan
        self.messages = itertools.cycle(plan.messages)
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.drained = asyncio.Event()
        self.latencies_ms: list[float] = []
        self.in_flight = 0
        self.counts = False
        self.started = self.ended = self.server_cpu_s = self.client_cpu_s = 0.0

    def begin(self) -> None:
        """Count from here on."""
        self.server_cpu_s = -tree_cpu_s(self.plan.server_pid)
        self.client_cpu_s = -time.process_time()
        self.counts = True
        self.started = time.perf_counter()

    def answered(self, latency_s: float, now: float) -> None:
        """One more; perhaps the last that counts."""
        self.in_flight -= 1
        if self.counts:
            self.latencies_ms.append(latency_s * 1000)
            if now - self.started >= self.plan.seconds and len(self.latencies_ms) >= self.plan.least:
                self._end(now)
        if self.is_over and self.in_flight == 0:
            self.drained.set()

    def _end(self, now: float) -> None:
        self.counts = False
        self.ended = now
        self.client_cpu_s += time.process_time()
        self.server_cpu_s += tree_cpu_s(self.plan.server_pid)
        self.finished.set_result(None)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be sent."""
        return self.finished.done()

    def fail(self, reason: str) -> None:
        """End the run with an error; the first reason is the one that is told."""
        if not self.finished.done():
            self.finished.set_exception(LoadFailed(reason))
        self.drained.set()

    def result(self) -> LoadResult:
        """What was counted."""
        return LoadResult(
            answers=len(self.latencies_ms),
            seconds=self.ended - self.started,
            latencies_ms=tuple(self.latencies_ms),
            server_cpu_s=self.server_cpu_s,
            client_cpu_s=self.client_cpu_s,
        )


class _Connection(asyncio.BufferedProtocol):
    """One client: sends, waits for the whole reply, sends again."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        # The parser knows lengths and chunks; without an `on_body` it copies nothing.
        self._parser = httptools.HttpResponseParser(self)
        self._received = 0
        self._sent = 0.0
        self._waits = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's own, no subclass of it
        self._send()

    def _send(self) -> None:
        if self._run.is_over:
            return
        self._run.in_flight += 1
        self._waits = True
        self._sent = time.perf_counter()
        self._transport.write(next(self._run.messages))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's signature
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._received = nbytes
        self._parser.feed_data(self._buffer[:nbytes])

    def on_message_complete(self) -> None:
        """Called by the parser at the end of a reply."""
        now = time.perf_counter()
        self._waits = False
        status = self._parser.get_status_code()
        if status != 200:
            shown = bytes(self._buffer[: min(self._received, 2000)]).decode(errors="replace")
            self._run.fail(f"status {status}:\n{shown}")
            return
        self._run.answered(now - self._sent, now)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waits:
            self._run.fail(f"the server closed a connection instead of answering: {exc or 'end of stream'}")


def _patience_s(plan: LoadPlan) -> float:
    return plan.warm_s + plan.seconds + PATIENCE_S + plan.least * PATIENCE_OF_AN_ANSWER_S


async def _load(plan: LoadPlan) -> LoadResult:
    loop = asyncio.get_running_loop()
    run = _Run(plan)
    loop.set_exception_handler(lambda _, context: run.fail(f"the load generator broke: {context}"))
    transports: list[asyncio.Transport] = []
    try:
        async with asyncio.timeout(_patience_s(plan)):
            for _ in range(plan.clients):
                transport, _ = await loop.create_connection(lambda: _Connection(run), "127.0.0.1", plan.port)
                transports.append(transport)
            loop.call_later(plan.warm_s, run.begin)
            await run.finished
            await run.drained.wait()  # leave the server with nothing to do
    finally:
        for transport in transports:
            transport.close()
    return run.result()


def run_load(plan: LoadPlan) -> LoadResult:
    """Carry out a plan in this process.

    Raises:
        LoadFailed: any answer was not a 200, a connection was closed, or the server stopped answering.
    """
    try:
        return uvloop.run(_load(plan))
    except TimeoutError as error:
        raise LoadFailed(
            f"{plan.clients} clients: no end after {PATIENCE_S:g} s more than planned"
        ) from error

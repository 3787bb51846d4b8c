"""Threads that clients share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial

import pytest

from service.runtime.fair_threads import FairThreads


@pytest.fixture
def pool():
    threads = FairThreads(1, "test")
    yield threads
    threads.shutdown(cancel_futures=True)


class Order:
    """Notes who was called; the first call waits until it is let go."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.go_on = threading.Event()
        self.began = threading.Event()

    def block(self) -> None:
        self.began.set()
        assert self.go_on.wait(30)

    def call(self, name: str) -> None:
        self.calls.append(name)


def test_a_single_call_waits_for_one_of_a_busy_client(pool) -> None:
    order = Order()
    busy = [pool.submit("busy", order.block)]
    assert order.began.wait(30)
    busy += [pool.submit("busy", lambda: order.call("busy")) for _ in range(100)]
    single = pool.of("other").submit(order.call, "other")
    order.go_on.set()
    wait([*busy, single], 30)
    assert order.calls[0] == "other"
    assert len(order.calls) == 101


def test_a_call_that_raises_fails_its_caller_and_not_the_thread(pool) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        pool.submit("a", leave).result(30)
    assert pool.submit("a", lambda: 1).result(30) == 1


def test_a_cancelled_call_is_not_made(pool) -> None:
    order = Order()
    first = pool.submit("a", order.block)
    assert order.began.wait(30)
    cancelled = pool.submit("a", lambda: order.call("cancelled"))
    alone = pool.submit("b", lambda: order.call("alone"))
    assert cancelled.cancel()
    assert alone.cancel()
    last = pool.submit("a", lambda: order.call("last"))
    order.go_on.set()
    wait([first, last], 30)
    assert order.calls == ["last"]


async def test_the_event_loop_gets_results_of_a_share(pool) -> None:
    assert await asyncio.get_running_loop().run_in_executor(pool.of("a"), sum, (1, 2)) == 3


def test_a_pool_that_ended_takes_nothing_and_cancels_what_waits() -> None:
    threads, order = FairThreads(1, "test"), Order()
    first = threads.submit("a", order.block)
    assert order.began.wait(30)
    waiting = threads.submit("a", lambda: order.call("waiting"))
    threads.shutdown(cancel_futures=True)
    order.go_on.set()
    first.result(30)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError):
        threads.submit("a", lambda: None)


@pytest.fixture
def pair() -> Iterator[FairThreads]:
    threads = FairThreads(2, "test")
    yield threads
    threads.shutdown(cancel_futures=True)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def occupy(pool: FairThreads, gate: threading.Event, threads: int) -> None:
    inside = threading.Barrier(threads + 1)

    def hold() -> None:
        inside.wait(10)
        gate.wait(10)

    for _ in range(threads):
        pool.submit("holder", hold)
    inside.wait(10)


def test_what_a_client_waits_for_is_its_own_calls_and_as_many_of_the_others(pair, gate) -> None:
    pair.submit("a", partial(threading.Event().wait, 0.01)).result(10)
    assert pair.expected_wait_s("a") == 0
    occupy(pair, gate, 2)
    assert pair.expected_wait_s("a") == 0
    waiting = [pair.submit("a", int) for _ in range(6)]
    six = pair.expected_wait_s("a")
    assert 0 < pair.expected_wait_s("b") < six
    waiting.pop().cancel()
    assert 0 < pair.expected_wait_s("a") < six
    gate.set()
    assert [future.result(10) for future in waiting] == [0] * 5
    assert pair.expected_wait_s("a") == 0


def test_a_pool_is_stuck_when_all_its_threads_are(pair, gate) -> None:
    occupy(pair, gate, 1)
    assert pair.stuck_seconds() == 0
    occupy(pair, gate, 1)
    assert pair.stuck_seconds() > 0


def test_a_call_that_fails_leaves_a_pool_as_it_was(pair) -> None:
    with pytest.raises(ValueError, match="x"):
        pair.submit("a", partial(int, "x")).result(10)
    assert pair.stuck_seconds() == 0
    assert pair.submit("a", partial(int, "1")).result(10) == 1
    assert pair.expected_wait_s("a") == 0

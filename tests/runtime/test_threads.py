"""Work off the event loop: how long it waits, whether it is stuck, and until when anybody waits for it."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator

import pytest

from service.errors import DeadlineExceeded
from service.runtime.pool import Pool
from service.runtime.threads import Deadline, on_thread, until


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2, "test") as threads:
        yield threads


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def occupy(pool: Pool, gate: threading.Event, threads: int) -> None:
    inside = threading.Barrier(threads + 1)

    def hold() -> None:
        inside.wait(10)
        gate.wait(10)

    for _ in range(threads):
        pool.submit(hold)
    inside.wait(10)


def test_a_pool_expects_to_wait_for_what_is_before_it(pool: Pool, gate: threading.Event) -> None:
    taken = threading.Event()
    pool.submit(taken.wait, 0.01).result(10)
    assert pool.expected_wait_s() == 0
    occupy(pool, gate, 2)
    assert pool.expected_wait_s() == 0
    waiting = [pool.submit(int) for _ in range(4)]
    four = pool.expected_wait_s()
    waiting.pop().cancel()
    assert 0 < pool.expected_wait_s() < four
    gate.set()
    assert [future.result(10) for future in waiting] == [0, 0, 0]
    assert pool.expected_wait_s() == 0


def test_a_pool_is_stuck_when_all_its_threads_are(pool: Pool, gate: threading.Event) -> None:
    occupy(pool, gate, 1)
    assert pool.stuck_seconds() == 0
    occupy(pool, gate, 1)
    assert pool.stuck_seconds() > 0


def test_work_that_fails_leaves_a_pool_as_it_was(pool: Pool) -> None:
    with pytest.raises(ValueError, match="x"):
        pool.submit(int, "x").result(10)
    assert pool.stuck_seconds() == 0
    assert pool.submit(int, "1").result(10) == 1
    assert pool.expected_wait_s() == 0


async def test_a_deadline_that_has_passed_lets_nothing_be_waited_for() -> None:
    with pytest.raises(DeadlineExceeded, match="longer than 0 s"):
        async with until(Deadline.after(0)):
            await asyncio.Event().wait()


async def test_a_deadline_of_never_ends_nothing(pool: Pool) -> None:
    never = Deadline.after(math.inf)
    async with until(never):
        assert await on_thread(pool, int, "7") == 7
    assert never.left_s == math.inf

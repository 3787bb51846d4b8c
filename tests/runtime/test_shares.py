"""A capacity that requests share, and whose turn it is."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest

from service.errors import QueueFull
from service.runtime.shares import Share, Shares


def shares(capacity: int = 10, max_burden: int = 100, **options: Any) -> Shares:
    return Shares(
        capacity, max_burden=max_burden, full=lambda s: QueueFull("full", retry_after_s=s), **options
    )


async def taken(pool: Shares, amount: int, client: str = "a") -> Share:
    share = pool.share(client)
    await share.take(amount)
    return share


async def settled() -> None:
    """Until everything that can go on has done so: each callback may schedule one more."""
    for _ in range(10):
        await asyncio.sleep(0)


def asked(pool: Shares, amount: int, client: str = "a") -> asyncio.Task[Share]:
    return asyncio.create_task(taken(pool, amount, client))


async def test_no_more_is_taken_than_there_is() -> None:
    pool = shares(10)
    first = await taken(pool, 7)
    waiting = asked(pool, 4)
    await settled()
    assert (pool.used, pool.waiting) == (7, 1)
    first.let_go()
    assert (await waiting).amount == 4
    assert (pool.used, pool.waiting) == (4, 0)


async def test_nobody_overtakes_who_waits_for_more() -> None:
    pool = shares(10)
    first = await taken(pool, 7)
    waiting = [asked(pool, 6), asked(pool, 1)]
    await settled()
    assert pool.waiting == 2
    assert not pool.share("a").take_now(1)
    first.let_go()
    await asyncio.gather(*waiting)
    assert pool.used == 7


async def test_a_single_request_waits_for_one_of_a_client_with_a_thousand() -> None:
    pool = shares(1, max_burden=10_000)
    running = await taken(pool, 1, "flood")
    order: list[str] = []

    async def run(client: str) -> None:
        async with pool.turn(client):
            order.append(client)

    flood = [asyncio.create_task(run("flood")) for _ in range(1000)]
    await settled()
    single = asyncio.create_task(run("single"))
    await settled()
    running.let_go()
    await asyncio.gather(*flood, single)
    assert order.index("single") == 1


async def test_who_gives_up_leaves_the_line_and_what_it_was_just_given() -> None:
    pool = shares(10)
    first = await taken(pool, 10)
    gave_up, kept = asked(pool, 10), asked(pool, 10)
    await settled()
    gave_up.cancel()
    await settled()
    assert pool.waiting == 1
    first.let_go()
    assert (await kept).amount == 10

    share = pool.share("a")
    late = asyncio.create_task(share.take(10))
    await settled()
    kept.result().let_go()  # the event loop grants it in a moment
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    share.let_go()
    await settled()
    assert (pool.used, pool.waiting) == (0, 0)


async def test_a_share_is_in_use_until_the_last_thread_that_uses_it_is_done() -> None:
    pool = shares(10)
    share = await taken(pool, 10)
    done, cancelled = Future[None](), Future[None]()
    share.until(done)
    share.until(cancelled)
    share.let_go()
    cancelled.cancel()
    assert pool.used == 10
    await asyncio.to_thread(done.set_result, None)
    assert pool.used == 0


async def test_what_a_thread_gives_back_wakes_who_waits() -> None:
    pool = shares(10)
    first = await taken(pool, 10)
    waiting = asked(pool, 5)
    await settled()
    await asyncio.to_thread(first.keep, 5)
    assert (await waiting).amount == 5
    assert pool.used == 10


async def test_whoever_has_most_of_a_full_line_makes_room() -> None:
    pool = shares(1, max_burden=3)
    running = await taken(pool, 1)
    flood = [asked(pool, 1, "flood") for _ in range(3)]
    await settled()
    with pytest.raises(QueueFull) as full:
        await taken(pool, 1, "flood")
    assert full.value.retry_after_s is not None
    single = asked(pool, 1, "single")
    await settled()
    assert [task.done() for task in flood] == [False, False, True]
    assert isinstance(flood[2].exception(), QueueFull)
    running.let_go()
    (await flood[0]).let_go()
    (await single).let_go()
    (await flood[1]).let_go()
    await settled()
    assert pool.used == 0


async def test_small_shares_go_on_while_a_large_one_waits_and_do_not_starve_it() -> None:
    pool = shares(640, max_burden=10_000, aside=True)
    assert (pool.small, pool.largest) == (10, 560)
    first = await taken(pool, 560)
    large = asked(pool, 560)
    await settled()
    small = [asked(pool, 10, "other") for _ in range(20)]
    await settled()
    assert (
        sum(task.done() for task in small) == 8
    )  # what is kept for them, and no more while the large one waits
    first.let_go()
    await settled()
    assert large.done()
    large.result().let_go()
    await asyncio.gather(*small)
    assert pool.used == 200


async def test_a_share_outlives_its_event_loop() -> None:
    pool = shares(10)

    def elsewhere() -> Share:
        return asyncio.run(taken(pool, 10))

    share = await asyncio.to_thread(elsewhere)
    waiting = asked(pool, 5)
    await settled()
    share.let_go()  # its own loop is closed and wakes nobody
    assert pool.used == 0
    waiting.cancel()


async def test_a_client_with_little_goes_on_where_anothers_small_shares_keep_a_large_one_waiting() -> None:
    pool = shares(640, max_burden=10_000, aside=True)
    greedy = [await taken(pool, 10, "greedy") for _ in range(50)]  # before a large one came
    large = asked(pool, 500, "greedy")
    await settled()
    waiting = asked(pool, 10, "greedy")
    await settled()
    assert pool.waiting == 2
    modest = asked(pool, 10, "modest")
    await settled()
    assert modest.done()
    assert not waiting.done()
    for share in greedy:
        share.let_go()
    (await modest).let_go()
    await settled()
    assert (await large).amount == 500
    assert (await waiting).amount == 10

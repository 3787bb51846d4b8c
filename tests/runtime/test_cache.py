"""The model cache, tested without torch: models are strings here."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import InvalidConfig, OutOfMemory, QueueFull, UnknownModel
from service.runtime.cache import IN_USE_S, MAX_WAITING_LOADS, ModelCache
from service.runtime.threads import ThreadEnded


class Model:
    """Something that can be watched going away."""

    def close(self) -> None:
        """As the cache asks of what it keeps."""


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def make(executor: ThreadPoolExecutor) -> Callable[..., ModelCache[Model]]:
    def build(budget: int = 100, residency_s: float = 0.0, wait_s: float = 0.2) -> ModelCache[Model]:
        return ModelCache(
            budget_bytes=budget,
            min_residency_s=residency_s,
            executor=executor,
            released=gc.collect,
            wait_s=wait_s,
        )

    return build


def builder(size: int = 40, log: list[str] | None = None, name: str = "") -> Callable[[], tuple[Model, int]]:
    def build() -> tuple[Model, int]:
        if log is not None:
            log.append(name)
        return Model(), size

    return build


async def use(cache: ModelCache[Model], key: str, size: int = 40) -> None:
    async with cache.lease(key, size, builder(size)):
        pass


def keys(cache: ModelCache[Model]) -> set[str]:
    return {entry.key for entry in cache}


async def test_two_requests_share_one_load(make) -> None:
    cache, log = make(), []
    release = threading.Event()

    def build() -> tuple[Model, int]:
        log.append("load")
        assert release.wait(10)
        return Model(), 40

    async def ask() -> Model:
        async with cache.lease("a", 40, build) as entry:
            return entry.model

    asking = [asyncio.create_task(ask()) for _ in range(5)]
    await asyncio.sleep(0)
    release.set()
    models = await asyncio.gather(*asking)
    assert len(set(map(id, models))) == 1
    assert log == ["load"]


async def test_one_that_gives_up_does_not_stop_the_load_for_others(make) -> None:
    cache, release = make(), threading.Event()

    def build() -> tuple[Model, int]:
        assert release.wait(10)
        return Model(), 40

    async def ask() -> None:
        async with cache.lease("a", 40, build):
            pass

    impatient, patient = asyncio.create_task(ask()), asyncio.create_task(ask())
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    release.set()
    await patient
    assert keys(cache) == {"a"}


async def test_a_slow_load_does_not_delay_a_loaded_model(make) -> None:
    cache, release = make(), threading.Event()
    await use(cache, "loaded")

    def build() -> tuple[Model, int]:
        assert release.wait(10)
        return Model(), 40

    async def ask() -> None:
        async with cache.lease("slow", 40, build):
            pass

    slow = asyncio.create_task(ask())
    await asyncio.sleep(0)
    await asyncio.wait_for(use(cache, "loaded"), 5)
    assert not slow.done()
    release.set()
    await slow


async def test_the_least_recently_used_goes_first(make) -> None:
    cache = make(budget=100)
    for key in "aba":
        await use(cache, key)
    await use(cache, "c")
    assert keys(cache) == {"a", "c"}
    assert cache.evictions == 1


async def test_a_model_in_use_is_not_evicted(make) -> None:
    cache = make(budget=50)
    async with cache.lease("a", 40, builder()):
        with pytest.raises(OutOfMemory):
            await use(cache, "b")
        assert keys(cache) == {"a"}
    await use(cache, "b")
    assert keys(cache) == {"b"}


async def test_a_load_waits_for_a_lease_to_end(make) -> None:
    cache = make(budget=50, wait_s=10)
    leased, leave = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with cache.lease("a", 40, builder()):
            leased.set()
            await leave.wait()

    holding = asyncio.create_task(hold())
    await leased.wait()
    waiting = asyncio.create_task(use(cache, "b"))
    await asyncio.sleep(0)
    leave.set()
    await asyncio.gather(holding, waiting)
    assert keys(cache) == {"b"}


async def test_a_young_model_is_waited_for(make) -> None:
    cache = make(budget=50, residency_s=0.05, wait_s=10)
    await use(cache, "a")
    await use(cache, "b")
    assert keys(cache) == {"b"}


async def test_what_never_fits_is_refused_before_it_is_built(make) -> None:
    cache, log = make(budget=50), []
    with pytest.raises(OutOfMemory, match="60 bytes"):
        async with cache.lease("a", 60, builder(60, log)):
            pass
    assert log == []


async def test_a_failed_load_fails_all_that_wait_and_leaves_nothing(make) -> None:
    cache = make()

    def build() -> tuple[Model, int]:
        raise InvalidConfig("#/backbone", "no")

    async def ask() -> None:
        async with cache.lease("a", 40, build):
            pass

    results = await asyncio.gather(ask(), ask(), return_exceptions=True)
    assert [type(result) for result in results] == [InvalidConfig, InvalidConfig]
    assert cache.used_bytes == 0
    assert cache.loading == ()


async def test_an_evicted_model_is_really_gone(make) -> None:
    cache = make(budget=50)
    async with cache.lease("a", 40, builder()) as entry:
        watched = weakref.ref(entry.model)
    del entry
    await use(cache, "b")
    assert watched() is None


async def test_unload_waits_for_the_last_user(make) -> None:
    cache = make(budget=100)
    async with cache.lease("a", 40, builder()):
        assert cache.unload("a") is False
        assert cache.used_bytes == 40
        with pytest.raises(UnknownModel):
            cache.unload("a")
    assert cache.used_bytes == 0
    await use(cache, "a")
    assert cache.unload("a") is True


async def test_a_clock_that_is_set_back_does_not_make_the_newest_model_the_oldest(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, hour_ago = make(budget=80), time.time() - 3600
    await use(cache, "old")
    monkeypatch.setattr(time, "time", lambda: hour_ago)
    await use(cache, "new")
    await use(cache, "next")
    assert keys(cache) == {"new", "next"}


# --- clients ------------------------------------------------------------------------------------


async def settled() -> None:
    """Until everything that can go on has done so: each callback may schedule one more."""
    for _ in range(10):
        await asyncio.sleep(0)


async def use_as(cache: ModelCache[Model], client: str, key: str, size: int = 40) -> None:
    async with cache.lease(key, size, builder(size), client):
        pass


async def test_a_single_load_waits_for_one_of_a_client_with_fifty(make) -> None:
    cache, release = make(budget=10_000), threading.Event()
    log: list[str] = []

    def first() -> tuple[Model, int]:
        assert release.wait(30)
        return Model(), 1

    async def ask(client: str, key: str, build: Callable[[], tuple[Model, int]]) -> None:
        async with cache.lease(key, 1, build, client):
            pass

    asking = [asyncio.create_task(ask("flood", "first", first))]
    asking += [asyncio.create_task(ask("flood", name, builder(1, log, name))) for name in map(str, range(50))]
    await asyncio.sleep(0)
    asking.append(asyncio.create_task(ask("single", "single", builder(1, log, "single"))))
    await settled()
    assert len(cache.loading) == 52
    release.set()
    await asyncio.gather(*asking)
    assert log.index("single") <= 1
    assert len(log) == 51


async def test_loads_that_wait_are_bounded_and_say_when_to_come_back(make) -> None:
    cache, release = make(budget=10_000), threading.Event()

    def first() -> tuple[Model, int]:
        assert release.wait(30)
        return Model(), 1

    async def ask(key: str, build: Callable[[], tuple[Model, int]]) -> None:
        async with cache.lease(key, 1, build, "flood"):
            pass

    asking = [asyncio.create_task(ask("first", first))]
    asking += [asyncio.create_task(ask(str(number), builder(1))) for number in range(MAX_WAITING_LOADS + 10)]
    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    refused = [task.exception() for task in done]
    assert all(isinstance(error, QueueFull) and error.retry_after_s for error in refused)
    release.set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(outcome, QueueFull) for outcome in outcomes) == 10
    assert cache.loading == ()


async def test_a_load_that_nobody_waits_for_any_more_is_dropped_before_its_turn(make) -> None:
    cache, release = make(), threading.Event()
    log: list[str] = []

    def first() -> tuple[Model, int]:
        assert release.wait(30)
        return Model(), 1

    async def ask(key: str, build: Callable[[], tuple[Model, int]]) -> None:
        async with cache.lease(key, 1, build):
            pass

    running = asyncio.create_task(ask("first", first))
    dropped = [asyncio.create_task(ask("dropped", builder(1, log, "dropped"))) for _ in range(2)]
    await settled()
    assert "dropped" in cache.loading
    for task in dropped:
        task.cancel()
    await asyncio.wait(dropped)
    assert "dropped" not in cache.loading
    again = asyncio.create_task(ask("dropped", builder(1, log, "again")))
    release.set()
    await asyncio.gather(running, again)
    assert log == ["again"]


async def test_a_client_with_most_models_thrashes_its_own(make) -> None:
    cache = make(budget=200)
    await use_as(cache, "calm", "calm")
    for number in range(20):
        await use_as(cache, "flood", f"flood{number}")
    assert "calm" in cache
    assert cache.evictions == 16
    for number in range(4):
        await use_as(cache, "calm", f"calm{number}")
    assert len(keys(cache) & {f"calm{number}" for number in range(4)}) >= 1


async def test_a_young_model_of_a_flood_is_waited_for_and_no_other_goes_in_its_place(make) -> None:
    cache = make(budget=100, residency_s=0.05, wait_s=30.0)
    await use_as(cache, "calm", "calm", 20)
    for number in range(4):
        await use_as(cache, "flood", f"flood{number}")
    assert "calm" in cache


async def test_nobody_loses_a_model_in_use_to_a_client_with_more(make) -> None:
    cache = make(budget=100, wait_s=30.0)
    await use_as(cache, "calm", "calm", 20)
    await use_as(cache, "flood", "small", 30)
    with pytest.raises(OutOfMemory, match="others use theirs") as refused:
        await use_as(cache, "flood", "large", 90)
    assert refused.value.retry_after_s == IN_USE_S
    assert keys(cache) == {"calm", "small"}
    await use_as(cache, "flood", "fits", 80)
    [calm] = [entry for entry in cache if entry.key == "calm"]
    calm.used_at -= IN_USE_S
    await use_as(cache, "flood", "large", 90)
    assert keys(cache) == {"large"}


async def test_one_client_alone_has_the_whole_budget(make) -> None:
    cache = make(budget=100)
    for key, size in (("small", 20), ("large", 90), ("whole", 100), ("small", 20)):
        await use_as(cache, "alone", key, size)
        assert key in cache


async def test_a_client_with_less_gets_room_from_one_with_more_at_once(make) -> None:
    cache = make(budget=100, wait_s=30.0)
    await use_as(cache, "flood", "large", 90)
    await use_as(cache, "calm", "calm", 20)
    assert keys(cache) == {"calm"}


async def test_a_load_that_finds_no_memory_is_tried_again_without_idle_models(make) -> None:
    cache = make(budget=1000)
    await use(cache, "idle")
    attempts: list[set[str]] = []

    def build() -> tuple[Model, int]:
        attempts.append(keys(cache))
        if len(attempts) == 1:
            raise MemoryError
        return Model(), 40

    async with cache.lease("large", 40, build):
        assert attempts == [{"idle"}, set()]
        assert keys(cache) == {"large"}

    def never() -> tuple[Model, int]:
        raise MemoryError

    async with cache.lease("large", 40, build):
        with pytest.raises(OutOfMemory):
            await cache.acquire("never", 40, never)
    assert cache.used_bytes == 40


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
async def test_a_load_that_would_end_its_thread_fails_its_request_and_no_more(make, end) -> None:
    cache = make()

    def leave() -> tuple[Model, int]:
        raise end

    with pytest.raises(ThreadEnded, match=end.__name__):
        await cache.acquire("a", 40, leave)
    await use(cache, "a")
    assert keys(cache) == {"a"}

"""The model cache, tested without torch: models are strings here."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import InvalidConfig, OutOfMemory, UnknownModel
from service.runtime.cache import ModelCache


class Model:
    """Something that can be watched going away."""


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

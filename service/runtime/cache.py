"""Models in memory: loaded once, leased while in use, evicted when the budget asks for it.

Everything here runs on the event loop; only `build` runs elsewhere, on the loader's own executor, so a slow load
delays no request for a model that is already there.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from service.errors import OutOfMemory, QueueFull, ServiceError, UnknownModel
from service.runtime.shares import Share, Shares
from service.runtime.threads import on_thread_holding


class Closable(Protocol):
    """What is kept here."""

    def close(self) -> None:
        """Let go of the memory it holds: it left, and nobody has a lease of it."""


M = TypeVar("M", bound=Closable)
# Loads that may wait for their turn.
MAX_WAITING_LOADS = 64
# Nobody has to make room for a client with more models than its own while they are in use.
IN_USE_S = 30.0


@dataclass
class Entry(Generic[M]):
    """One loaded model and who uses it. `client` used it last."""

    key: str
    model: M
    bytes: int
    load_seconds: float
    loaded_at: float
    client: str = ""
    leases: int = 0
    hits: int = 0
    last_used: float = field(default_factory=time.time)
    used_at: float = field(default_factory=time.monotonic)
    doomed: bool = False

    def touch(self) -> None:
        """Note a use: `last_used` to be shown, `used_at` to decide, as no clock that is set back can mislead it."""
        self.last_used = time.time()
        self.used_at = time.monotonic()


@dataclass(eq=False)
class _Load(Generic[M]):
    """A load that was asked for. Until it has begun it goes with the last who waits for it."""

    needed_bytes: int
    build: Callable[[], tuple[M, int]]
    client: str
    waiters: int = 0
    has_begun: bool = False
    task: asyncio.Task[Entry[M]] | None = None


class ModelCache(Generic[M]):
    """A byte budget of models with single-flight loads, leases and least-recently-used eviction.

    Clients take turns at loads, and whoever has the most bytes of models makes room: one that asks for a thousand
    models thrashes its own. One that asks for a model as large as the budget has it only if nobody else's was used
    lately.

    Args:
        budget_bytes: what all models together may take; a load that is under way counts with what it needs.
        min_residency_s: a model younger than this is not evicted; a load waits for it instead.
        executor: where `build` runs; one thread makes loads take turns.
        released: called after a model was closed and dropped, to give its memory back to the system.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        min_residency_s: float,
        executor: Executor,
        released: Callable[[], None],
        wait_s: float = 30.0,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.evictions = 0
        self._min_residency_s = min_residency_s
        self._executor = executor
        self._released = released
        self._wait_s = wait_s
        self._entries: dict[str, Entry[M]] = {}
        self._doomed_bytes = 0
        self._loads: dict[str, _Load[M]] = {}
        self._reserved: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._turns = Shares(1, max_burden=MAX_WAITING_LOADS, full=_too_many_loads)

    @property
    def used_bytes(self) -> int:
        """Bytes of all loaded models, those that wait for their last user, and loads under way."""
        loaded = sum(entry.bytes for entry in self._entries.values())
        return loaded + self._doomed_bytes + sum(self._reserved.values())

    def __iter__(self) -> Iterator[Entry[M]]:
        return iter(list(self._entries.values()))

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def loading(self) -> tuple[str, ...]:
        """Keys of loads under way."""
        return tuple(self._loads)

    def admit(self, needed_bytes: int) -> None:
        """Refuse what can never fit, before anything is allocated.

        Raises:
            OutOfMemory: the whole budget is too small.
        """
        if needed_bytes > self.budget_bytes:
            detail = f"the model needs {needed_bytes:,} bytes; the budget is {self.budget_bytes:,} bytes"
            raise OutOfMemory(detail, retry_after_s=60)

    @asynccontextmanager
    async def lease(
        self, key: str, needed_bytes: int, build: Callable[[], tuple[M, int]], client: str = ""
    ) -> AsyncIterator[Entry[M]]:
        """The model of this key, loaded if need be, not evicted while leased.

        Args:
            build: makes the model and says how many bytes it takes; runs once however many ask.
            client: whose turn it takes; empty for what the service does by itself.

        Raises:
            OutOfMemory: it does not fit, or nothing could be evicted in time.
            QueueFull: too many loads wait, most of them this client's.
        """
        entry = self.hold(key, client) or await self.acquire(key, needed_bytes, build, client)
        try:
            yield entry
        finally:
            self.release(entry)

    def hold(self, key: str, client: str = "") -> Entry[M] | None:
        """The model of this key if it is there, not evicted until it is given to `release`."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.leases += 1
            entry.hits += 1
            entry.touch()
            entry.client = client
        return entry

    async def acquire(
        self, key: str, needed_bytes: int, build: Callable[[], tuple[M, int]], client: str = ""
    ) -> Entry[M]:
        """As `lease`, for who releases it otherwise than by leaving a block."""
        while (entry := self.hold(key, client)) is None:
            if key not in self._loads:
                self.admit(needed_bytes)
                self._loads[key] = _Load(needed_bytes, build, client)
            await self._wait_for(key, self._loads[key])
        return entry

    async def _wait_for(self, key: str, load: _Load[M]) -> None:
        """Wait for a load. One waiter that gives up does not stop it for the others; the last one does, in its line."""
        if load.task is None:
            load.task = asyncio.create_task(self._load(key, load))
        load.waiters += 1
        try:
            await asyncio.shield(load.task)
        finally:
            load.waiters -= 1
            if not load.waiters and not load.has_begun and not load.task.done():
                self._end(key, load)
                load.task.cancel()

    def release(self, entry: Entry[M]) -> None:
        """Give back what `hold` or `acquire` gave."""
        entry.leases -= 1
        entry.touch()
        if entry.doomed and entry.leases == 0:
            self._doomed_bytes -= entry.bytes
            self._forget(entry)
        self._changed.set()

    async def _load(self, key: str, load: _Load[M]) -> Entry[M]:
        try:
            async with self._turns.turn(load.client) as turn:
                await self._make_room(load)
                load.has_begun = True
                self._reserved[key] = load.needed_bytes
                started = time.monotonic()
                model, size = await self._built(load, turn)
                entry = Entry(key, model, size, time.monotonic() - started, time.monotonic(), load.client)
                self._entries[key] = entry
                return entry
        finally:
            self._reserved.pop(key, None)
            self._end(key, load)
            self._changed.set()

    def _end(self, key: str, load: _Load[M]) -> None:
        """Nobody joins a load any more; another of its key may have begun meanwhile."""
        if self._loads.get(key) is load:
            del self._loads[key]

    async def _built(self, load: _Load[M], turn: Share) -> tuple[M, int]:
        """The model; tried again without idle ones where it finds too little memory for all."""
        try:
            return await on_thread_holding(turn, self._executor, load.build)
        except OutOfMemory:
            if not self.evict_idle():
                raise
        return await on_thread_holding(turn, self._executor, load.build)

    async def _make_room(self, load: _Load[M]) -> None:
        deadline = time.monotonic() + self._wait_s
        while self.used_bytes + load.needed_bytes > self.budget_bytes:
            if not self._could_fit(load):
                others = f"others use theirs of the budget of {self.budget_bytes:,}"
                raise OutOfMemory(
                    f"{load.needed_bytes:,} bytes are needed and {others}", retry_after_s=IN_USE_S
                )
            if self._evict_one(load):
                continue
            patience_s = min(deadline - time.monotonic(), self._until_evictable_s(load))
            if patience_s <= 0:
                budget = f"all {self.budget_bytes:,} of the budget are in use"
                detail = f"{load.needed_bytes:,} bytes are needed and {budget}"
                raise OutOfMemory(detail, retry_after_s=1)
            await self._room_changes(patience_s)

    def _could_fit(self, load: _Load[M]) -> bool:
        """Whether there would be room for a load if all that give way for it were gone."""
        going = self._doomed_bytes + sum(entry.bytes for entry in self._giving_way(load))
        return self.used_bytes - going + load.needed_bytes <= self.budget_bytes

    def _bytes_by_client(self, load: _Load[M]) -> Counter[str]:
        """What clients have, a load counted with the models of its own."""
        used = Counter({load.client: load.needed_bytes})
        for entry in self._entries.values():
            used[entry.client] += entry.bytes
        return used

    def _giving_way(self, load: _Load[M]) -> Iterator[Entry[M]]:
        """The models that may have to go for a load, now or when they are no longer used."""
        used = self._bytes_by_client(load)
        now = time.monotonic()
        for entry in self._entries.values():
            is_in_use = entry.leases > 0 or now - entry.used_at < IN_USE_S
            if not is_in_use or entry.client == load.client or used[entry.client] >= used[load.client]:
                yield entry

    def _idle(self, load: _Load[M] | None = None) -> list[Entry[M]]:
        """The models that nobody uses, the one used last longest ago first; for a load those of the client with most,
        of those that give way.
        """
        entries = self._entries.values() if load is None else self._giving_way(load)
        idle = [entry for entry in entries if entry.leases == 0]
        if load is not None and idle:
            used = self._bytes_by_client(load)
            heaviest = max((entry.client for entry in idle), key=lambda client: used[client])
            idle = [entry for entry in idle if entry.client == heaviest]
        return sorted(idle, key=lambda entry: entry.used_at)

    def _age_s(self, entry: Entry[M]) -> float:
        return time.monotonic() - entry.loaded_at

    def _evict_one(self, load: _Load[M] | None = None) -> bool:
        for entry in self._idle(load):
            if self._age_s(entry) >= self._min_residency_s:
                del self._entries[entry.key]
                self.evictions += 1
                self._forget(entry)
                return True
        return False

    def _until_evictable_s(self, load: _Load[M]) -> float:
        """Seconds until an idle model is old enough; as long as we wait at all when every model is leased."""
        waits = [self._min_residency_s - self._age_s(entry) for entry in self._idle(load)]
        return max(min(waits), 0.001) if waits else self._wait_s

    def evict_idle(self) -> bool:
        """Drop every model that nobody uses, however young: memory is short. Says whether there was any."""
        idle = self._idle()
        for entry in idle:
            del self._entries[entry.key]
            self._forget(entry)
        self.evictions += len(idle)
        if idle:
            self._changed.set()
        return bool(idle)

    async def _room_changes(self, patience_s: float) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), patience_s)
        except TimeoutError:
            return  # a model came of age; look again

    def _forget(self, entry: Entry[M]) -> None:
        entry.model.close()
        del entry.model
        self._released()

    def resize(self, entry: Entry[M], now_bytes: int) -> None:
        """Note that a model grew or shrank; idle others give way where the budget asks for it."""
        if entry.bytes == now_bytes:
            return
        if entry.doomed:
            self._doomed_bytes += now_bytes - entry.bytes
        entry.bytes = now_bytes
        while self.used_bytes > self.budget_bytes and self._evict_one():
            pass
        self._changed.set()

    def unload(self, key: str) -> bool:
        """Take a model out; True if it is gone at once, False if it goes with its last user.

        Raises:
            UnknownModel: no model of this key.
        """
        entry = self._entries.pop(key, None)
        if entry is None:
            raise UnknownModel("model", key)
        if entry.leases:
            entry.doomed = True
            self._doomed_bytes += entry.bytes
            return False
        self._forget(entry)
        self._changed.set()
        return True


def _too_many_loads(retry_after_s: float) -> ServiceError:
    return QueueFull("too many models wait to be loaded", retry_after_s=retry_after_s)

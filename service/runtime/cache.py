"""Models in memory: loaded once, leased while in use, evicted when the budget asks for it.

Everything here runs on the event loop; only `build` runs elsewhere, on the loader's own executor, so a slow load
delays no request for a model that is already there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.errors import OutOfMemory, UnknownModel

M = TypeVar("M")


@dataclass
class Entry(Generic[M]):
    """One loaded model and who uses it."""

    key: str
    model: M
    bytes: int
    load_seconds: float
    loaded_at: float
    leases: int = 0
    hits: int = 0
    last_used: float = field(default_factory=time.time)
    doomed: bool = False


class ModelCache(Generic[M]):
    """A byte budget of models with single-flight loads, leases and least-recently-used eviction.

    Args:
        budget_bytes: what all models together may take; a load that is under way counts with what it needs.
        min_residency_s: a model younger than this is not evicted; a load waits for it instead.
        executor: where `build` runs; one thread makes loads take turns.
        released: called after a model was dropped, to give its memory back to the system.
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
        self._loads: dict[str, asyncio.Task[Entry[M]]] = {}
        self._reserved: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()

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
        self, key: str, needed_bytes: int, build: Callable[[], tuple[M, int]]
    ) -> AsyncIterator[Entry[M]]:
        """The model of this key, loaded if need be, not evicted while leased.

        Args:
            build: makes the model and says how many bytes it takes; runs once however many ask.

        Raises:
            OutOfMemory: it does not fit, or nothing could be evicted in time.
        """
        entry = self.hold(key) or await self.acquire(key, needed_bytes, build)
        try:
            yield entry
        finally:
            self.release(entry)

    def hold(self, key: str) -> Entry[M] | None:
        """The model of this key if it is there, not evicted until it is given to `release`."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.leases += 1
            entry.hits += 1
            entry.last_used = time.time()
        return entry

    async def acquire(self, key: str, needed_bytes: int, build: Callable[[], tuple[M, int]]) -> Entry[M]:
        """As `lease`, for who releases it otherwise than by leaving a block."""
        while (entry := self.hold(key)) is None:
            if key not in self._loads:
                self.admit(needed_bytes)
                self._loads[key] = asyncio.create_task(self._load(key, needed_bytes, build))
            # One waiter that gives up does not stop the load for the others.
            await asyncio.shield(self._loads[key])
        return entry

    def release(self, entry: Entry[M]) -> None:
        """Give back what `hold` or `acquire` gave."""
        entry.leases -= 1
        entry.last_used = time.time()
        if entry.doomed and entry.leases == 0:
            self._doomed_bytes -= entry.bytes
            self._forget(entry)
        self._changed.set()

    async def _load(self, key: str, needed_bytes: int, build: Callable[[], tuple[M, int]]) -> Entry[M]:
        try:
            async with self._turn:
                await self._make_room(needed_bytes)
                self._reserved[key] = needed_bytes
                started = time.monotonic()
                model, size = await asyncio.get_running_loop().run_in_executor(self._executor, build)
                entry = Entry(key, model, size, time.monotonic() - started, time.monotonic())
                self._entries[key] = entry
                return entry
        finally:
            self._reserved.pop(key, None)
            self._loads.pop(key, None)
            self._changed.set()

    async def _make_room(self, needed_bytes: int) -> None:
        deadline = time.monotonic() + self._wait_s
        while self.used_bytes + needed_bytes > self.budget_bytes:
            if self._evict_one():
                continue
            patience_s = min(deadline - time.monotonic(), self._until_evictable_s())
            if patience_s <= 0:
                detail = f"{needed_bytes:,} bytes are needed and all {self.budget_bytes:,} of the budget are in use"
                raise OutOfMemory(detail, retry_after_s=1)
            await self._room_changes(patience_s)

    def _idle(self) -> list[Entry[M]]:
        idle = [entry for entry in self._entries.values() if entry.leases == 0]
        return sorted(idle, key=lambda entry: entry.last_used)

    def _age_s(self, entry: Entry[M]) -> float:
        return time.monotonic() - entry.loaded_at

    def _evict_one(self) -> bool:
        for entry in self._idle():
            if self._age_s(entry) >= self._min_residency_s:
                del self._entries[entry.key]
                self.evictions += 1
                self._forget(entry)
                return True
        return False

    def _until_evictable_s(self) -> float:
        """Seconds until an idle model is old enough; as long as we wait at all when every model is leased."""
        waits = [self._min_residency_s - self._age_s(entry) for entry in self._idle()]
        return max(min(waits), 0.001) if waits else self._wait_s

    async def _room_changes(self, patience_s: float) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), patience_s)
        except TimeoutError:
            return  # a model came of age; look again

    def _forget(self, entry: Entry[M]) -> None:
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

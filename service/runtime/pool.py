"""Threads that know how long their queue is, and whether they are stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
NEWEST_SHARE = 0.1  # of the average of what a piece of work takes


class Pool(ThreadPoolExecutor):
    """A pool whose work is timed."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, name)
        self._count = threads
        self._noting = threading.Lock()
        self._pending = 0
        self._mean_s = 0.0
        self._begun: dict[int, float] = {}  # by thread, what runs now

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As an executor does; what is cancelled before it begins is no longer waited for."""
        with self._noting:
            self._pending += 1
        future = super().submit(self._timed, fn, *args, **kwargs)
        future.add_done_callback(self._done)
        return future

    def _timed(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        me, began = threading.get_ident(), time.monotonic()
        self._begun[me] = began
        try:
            return fn(*args, **kwargs)
        finally:
            del self._begun[me]
            self._mean_s += NEWEST_SHARE * (time.monotonic() - began - self._mean_s)

    def _done(self, _future: Future[T]) -> None:
        with self._noting:
            self._pending -= 1

    def expected_wait_s(self) -> float:
        """About how long something submitted now waits for a thread."""
        return max(0, self._pending - self._count) * self._mean_s / self._count

    def stuck_seconds(self) -> float:
        """For how long all threads have been busy, each with one piece of work; 0 while one is free."""
        begun = tuple(self._begun.copy().values())
        return time.monotonic() - max(begun) if len(begun) == self._count else 0.0

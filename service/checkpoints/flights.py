"""One thread does the work, the others that want the same wait for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Calls of one key at the same time are one call; its value or its error goes to everyone.

    Nothing is remembered once the call has ended.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._flying: dict[K, Future[V]] = {}

    def do(self, key: K, work: Callable[[], V]) -> V:
        """The value of `work()`, run by this thread or by one that is already at it."""
        with self._lock:
            waiting = self._flying.get(key)
            future = waiting or self._flying.setdefault(key, Future())
        if waiting is not None:
            return waiting.result()
        return self._run(key, work, future)

    def _run(self, key: K, work: Callable[[], V], future: Future[V]) -> V:
        try:
            value = work()
        except BaseException as error:
            self._land(key)
            future.set_exception(error)
            raise
        self._land(key)
        future.set_result(value)
        return value

    def _land(self, key: K) -> None:
        with self._lock:
            del self._flying[key]

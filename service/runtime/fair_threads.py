"""Threads that clients share: each gets its turn by the seconds it has had, however much of its work waits.

They know how long a client's next call waits, and whether they are stuck.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from service.runtime.turns import Turns

P = ParamSpec("P")
T = TypeVar("T")
MAX_DEBT_S, CREDIT_S = 10.0, 0.1
NEWEST_SHARE = 0.1  # of the average of what a call takes


@dataclass(eq=False)
class _Line:
    """The calls of one client that wait, in order, and the seconds that its calls have taken."""

    client: Hashable
    used_s: float = 0.0
    calls: OrderedDict[Future[Any], Callable[[], Any]] = field(default_factory=OrderedDict)


class FairThreads:
    """A pool of threads, fair between clients. `of` gives each client an executor of its own onto it."""

    def __init__(self, threads: int, name: str) -> None:
        self._lines: Turns[_Line] = Turns(MAX_DEBT_S, CREDIT_S)
        self._changed = threading.Condition(threading.Lock())
        self._ends = False
        self._mean_s = 0.0
        self._begun: dict[int, float] = {}  # by thread, when it began what it does now
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def of(self, client: Hashable) -> Executor:
        """The pool as one client has it."""
        return _Share(self, client)

    def submit(self, client: Hashable, call: Callable[[], T]) -> Future[T]:
        """Have a thread make a call when it is the client's turn. Cancelled before, it is not made and does not wait.

        Raises:
            RuntimeError: the pool has ended.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._ends:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._lines.join(client, lambda: _Line(client)).calls[future] = call
            self._changed.notify()
        future.add_done_callback(partial(self._drop_cancelled, client))
        return future

    def _drop_cancelled(self, client: Hashable, future: Future[Any]) -> None:
        if not future.cancelled():
            return
        with self._changed:
            line = self._lines.active.get(client)
            if line is not None and line.calls.pop(future, None) is not None and not line.calls:
                self._lines.rest(client)

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            self._run(*taken)
            del taken  # nothing of a call outlives it

    def _next(self) -> tuple[_Line, Future[Any], Callable[[], Any]] | None:
        """The next call; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines.active or self._ends)
            if not self._lines.active:
                return None
            line = self._lines.in_order()[0]
            future, call = line.calls.popitem(last=False)
            if not line.calls:
                self._lines.rest(line.client)
            return line, future, call

    def _run(self, line: _Line, future: Future[Any], call: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        self._begun[threading.get_ident()] = time.monotonic()
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the caller, not to this thread
            self._charge(line)
            future.set_exception(error)
        else:
            self._charge(line)
            future.set_result(result)

    def _charge(self, line: _Line) -> None:
        spent_s = time.monotonic() - self._begun.pop(threading.get_ident())
        with self._changed:
            self._mean_s += NEWEST_SHARE * (spent_s - self._mean_s)
            self._lines.charge(line, spent_s)

    def expected_wait_s(self, client: Hashable) -> float:
        """About how long another call of a client waits for a thread: for its own and, by turns, for others'."""
        with self._changed:
            lines = self._lines.active
            if not lines:
                return 0.0
            waiting = sum(len(line.calls) for line in lines.values())
            own = len(lines[client].calls) if client in lines else 0
            others = len(lines) - (client in lines)
            ahead = min(waiting, own + (own + 1) * others)
            return ahead * self._mean_s / len(self._threads)

    def stuck_seconds(self) -> float:
        """For how long all threads have been busy, each with one call; 0 while one is free."""
        begun = tuple(self._begun.copy().values())
        return time.monotonic() - max(begun) if len(begun) == len(self._threads) else 0.0

    def shutdown(self, *, cancel_futures: bool) -> None:
        """End the threads after what they do now, and after what waits unless that is cancelled."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
            waiting = [future for line in self._lines.active.values() for future in line.calls]
        if cancel_futures:
            for future in waiting:
                future.cancel()


class _Share(Executor):
    """One client's executor."""

    def __init__(self, pool: FairThreads, client: Hashable) -> None:
        self._pool = pool
        self._client = client

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `FairThreads.submit`, for this client."""
        return self._pool.submit(self._client, partial(fn, *args, **kwargs))

"""Running blocking work off the event loop, and giving up in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from service.errors import DeadlineExceeded, ServiceError, Unavailable
from service.runtime.shares import Share
from service.runtime.shortage import as_shortage, is_shortage

P = ParamSpec("P")
T = TypeVar("T")


class ThreadEnded(Exception):
    """Something that ran on a thread meant to end it, or the whole process: `sys.exit` in a library."""


async def on_thread(
    executor: Executor, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs
) -> T:
    """The result of `function`, run on the executor.

    Raises:
        Unavailable: no thread can be started, or none will be any more.
    """
    return await asyncio.wrap_future(_submitted(executor, partial(function, *arguments, **keywords)))


async def on_thread_holding(
    share: Share, executor: Executor, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs
) -> T:
    """As `on_thread`; the share is in use until the function has ended, though nobody may wait for it any more."""
    future = _submitted(executor, partial(function, *arguments, **keywords))
    share.until(future)
    return await asyncio.wrap_future(future)


async def all_of(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order; once one fails, those that have not begun are not begun."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _submitted(executor: Executor, function: Callable[[], T]) -> Future[T]:
    try:
        return executor.submit(_contained, function)
    except RuntimeError as error:
        raise Unavailable("no thread is free for this request; ask again") from error


def _contained(function: Callable[[], T]) -> T:
    """The result of a function, none of whose errors ends an event loop that waits for it."""
    try:
        return function()
    except (MemoryError, RuntimeError) as error:
        if is_shortage(error):
            raise as_shortage(error) from error
        raise
    except (StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        raise contained(error) from error


def contained(error: BaseException) -> Exception:
    """An error that may be handed to an event loop: those that mean to end a thread would end the loop."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    ended = ThreadEnded(f"{type(error).__name__} on a thread")
    ended.__cause__ = error
    return ended


@dataclass(frozen=True)
class Deadline:
    """When a request must have been answered: `at` is a reading of `time.monotonic`, `seconds` what it had in all."""

    at: float
    seconds: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """So many seconds from now; `math.inf` is never."""
        return cls(time.monotonic() + seconds, seconds)

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 when it has passed."""
        return max(0.0, self.at - time.monotonic())

    def passed(self) -> DeadlineExceeded:
        """What a request is told that was not answered by then."""
        return DeadlineExceeded(f"the request took longer than {self.seconds:g} s")


class until:  # noqa: N801 - reads as a word of `async with`
    """Raises what `too_late` makes, by default that the deadline passed, if the block is not done at `deadline`."""

    def __init__(self, deadline: Deadline, too_late: Callable[[], ServiceError] | None = None) -> None:
        self._timeout = asyncio.timeout(deadline.left_s)
        self._too_late = too_late or deadline.passed

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise self._too_late() from late

"""Running blocking work off the event loop, and giving up in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from types import TracebackType
from typing import ParamSpec, TypeVar

from service.errors import ServiceError, Unavailable
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


class until:  # noqa: N801 - reads as a word of `async with`
    """Raises what `too_late` makes if the block is not done at `deadline`, a reading of `time.monotonic`."""

    def __init__(self, deadline: float, too_late: Callable[[], ServiceError]) -> None:
        self._timeout = asyncio.timeout(max(0.0, deadline - time.monotonic()))
        self._too_late = too_late

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise self._too_late() from late

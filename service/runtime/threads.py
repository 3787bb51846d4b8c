"""Running blocking work off the event loop, and giving up in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from types import TracebackType
from typing import ParamSpec, TypeVar

from service.errors import ServiceError

P = ParamSpec("P")
T = TypeVar("T")


async def on_thread(
    executor: Executor, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs
) -> T:
    """The result of `function`, run on the executor."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, lambda: function(*arguments, **keywords))


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

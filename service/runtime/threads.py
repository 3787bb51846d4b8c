"""Running blocking work off the event loop, and giving up in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
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


@asynccontextmanager
async def until(deadline: float, too_late: ServiceError) -> AsyncIterator[None]:
    """Raise `too_late` if the block is not done at `deadline`, a reading of `time.monotonic`."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError as error:
        raise too_late from error

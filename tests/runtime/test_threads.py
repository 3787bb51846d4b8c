"""Work off the event loop, and until when anybody waits for it."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import DeadlineExceeded
from service.runtime.threads import Deadline, on_thread, until


async def test_a_deadline_that_has_passed_lets_nothing_be_waited_for() -> None:
    with pytest.raises(DeadlineExceeded, match="longer than 0 s"):
        async with until(Deadline.after(0)):
            await asyncio.Event().wait()


async def test_a_deadline_of_never_ends_nothing() -> None:
    never = Deadline.after(math.inf)
    with ThreadPoolExecutor(1) as threads:
        async with until(never):
            assert await on_thread(threads, int, "7") == 7
    assert never.left_s == math.inf

"""What a request handler needs of the app, typed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.api.access import Visitor
from service.api.startup import Startup
from service.runtime.threads import Deadline

if TYPE_CHECKING:
    from service.runtime.engine import Engine

T = TypeVar("T")


def startup_of(request: Request) -> Startup:
    """The engine's making, for what does not wait for the engine."""
    startup: Startup = request.app.state.startup
    return startup


async def engine_of(request: Request) -> Engine:
    """The engine of the app that serves this request; who comes before it waits for it.

    Raises:
        Starting, Draining, Unavailable: as for `Startup.engine`.
    """
    startup = startup_of(request)
    return startup.now or await startup.engine(deadline_of(request))


def deadline_of(request: Request) -> Deadline:
    """When this request must have been answered; it was set when its headers came."""
    deadline: Deadline = request.scope["deadline"]
    return deadline


def visitor_of(request: Request) -> Visitor:
    """Who asks, on a route that is not for anyone."""
    visitor: Visitor = request.scope["visitor"]
    return visitor


def name_of(request: Request) -> str:
    """Whose request it is, for turns: the name of its key, or the address that it came from."""
    peer = request.client.host if request.client is not None else ""
    return str(request.scope.get("client_name") or peer)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. The body must have been read.

    Raises:
        ClientDisconnect: the client left first.
    """
    watch = _Watch()
    leaving = asyncio.ensure_future(_left(request))
    leaving.add_done_callback(watch.on_left)
    try:
        return await work
    except asyncio.CancelledError as error:
        if watch.ended_it():
            raise ClientDisconnect from error
        raise
    finally:
        leaving.remove_done_callback(watch.on_left)
        leaving.cancel()


class _Watch:
    """Cancels the task that made it once a client has left, as `asyncio.timeout` does when time is up."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelled_before = task.cancelling()
        self._has_left = False

    def on_left(self, leaving: asyncio.Future[None]) -> None:
        """The client is gone; what waits for its answer need not."""
        if not leaving.cancelled():
            self._has_left = True
            self._task.cancel()

    def ended_it(self) -> bool:
        """Whether the task was cancelled for this reason and no other."""
        return self._has_left and self._task.uncancel() <= self._cancelled_before


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

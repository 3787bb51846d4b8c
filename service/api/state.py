"""What a request handler needs of the app, typed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from service.api.access import Access
from service.runtime.engine import Engine

T = TypeVar("T")


def engine_of(request: Request) -> Engine:
    """The engine of the app that serves this request."""
    engine: Engine = request.app.state.engine
    return engine


def access_of(request: Request) -> Access:
    """Who may ask what."""
    access: Access = request.app.state.access
    return access


async def client(request: Request) -> None:
    """Route dependency: clients and operators may."""
    await access_of(request).client(request)


async def operator(request: Request) -> None:
    """Route dependency: operators may."""
    await access_of(request).operator(request)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. The body must have been read.

    Raises:
        ClientDisconnect: the client left first.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, leaving):
            pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

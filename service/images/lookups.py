"""Names to addresses, on threads of their own: the system's resolver blocks, and cannot be told to give up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Final

from service.images.addresses import Address

THREADS: Final = 8


def system_addresses(host: str) -> tuple[Address, ...]:
    """The addresses of a name by the system's resolver, `/etc/hosts` included.

    Raises:
        OSError: there are none.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # A zone (`fe80::1%eth0`) is dropped: with it an address would not equal the one that a rule names.
    texts = dict.fromkeys(str(sockaddr[0]).partition("%")[0] for *_, sockaddr in found)
    return tuple(ip_address(text) for text in texts)


class Lookups:
    """Looks names up. One that several ask for at once is looked up once; nothing is kept.

    Args:
        look_up: blocks until it has every address of a name, at least one; raises OSError where there is none.
    """

    def __init__(self, look_up: Callable[[str], tuple[Address, ...]] = system_addresses) -> None:
        self._look_up = look_up
        self._threads = ThreadPoolExecutor(THREADS, "lookup")
        self._under_way: dict[str, asyncio.Task[tuple[Address, ...]]] = {}

    async def addresses(self, host: str) -> tuple[Address, ...]:
        """Every address of a name. Who gives up waiting leaves a thread behind until the resolver gives up too.

        Raises:
            OSError: the name has none.
        """
        task = self._under_way.get(host)
        if task is None:
            task = asyncio.create_task(self._looked_up(host))
            self._under_way[host] = task
            task.add_done_callback(lambda done: self._landed(host, done))
        return await asyncio.shield(task)

    async def _looked_up(self, host: str) -> tuple[Address, ...]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, host)

    def _landed(self, host: str, task: asyncio.Task[tuple[Address, ...]]) -> None:
        del self._under_way[host]
        if not task.cancelled():
            task.exception()  # is told to those who still wait, if any

    def stop(self) -> None:
        """End the threads that are not inside the resolver."""
        self._threads.shutdown(wait=False, cancel_futures=True)

"""What the service does on its way out, and the requests that it still has to answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from service.errors import Draining


def draining() -> Draining:
    """What a request is told that is not served any more."""
    return Draining("the service is shutting down")


@dataclass(eq=False)
class Drain:
    """First it is `leaving`: not ready any more, and every reply closes its connection. Then it is `refusing` too.

    `in_flight` are the tasks of requests that were let in. `leave` may be called by a signal handler.
    """

    leaving: bool = False
    refusing: bool = False
    is_over: bool = False
    in_flight: set[asyncio.Task[object]] = field(default_factory=set)

    def leave(self) -> None:
        """Tell load balancers; serve on."""
        self.leaving = True

    def refuse(self) -> None:
        """Take nothing new."""
        self.leaving = self.refusing = True

    def cut_off(self) -> None:
        """End what is still in flight: its clients are told that the service is shutting down."""
        self.refuse()
        self.is_over = True
        for task in self.in_flight:
            task.cancel()

"""A capacity that requests share: bytes of memory, or turns at a thread. Who finds none left waits for a turn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from service.errors import ServiceError

NEWEST_SHARE = 0.2  # of an exponential average
# Of a capacity that has an `aside`: a small share is no larger than this part of it, and this part is for them alone.
SMALL_PART, ASIDE_PART = 64, 8


@dataclass(eq=False)
class _Waiter:
    """A share that waits for `amount` more. `burden` is what waiting itself takes."""

    share: Share
    amount: int
    burden: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Line:
    """Those who wait. The first is of the client whose turn it is; each client's own wait in order."""

    def __init__(self) -> None:
        self.burden = self.amount = self.count = 0
        self._clients: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    def add(self, waiter: _Waiter) -> None:
        self._clients.setdefault(waiter.share.client, deque()).append(waiter)
        self._count(waiter, 1)

    def first(self, may: Callable[[str, int], bool]) -> _Waiter | None:
        """The next of the first client that may take what it waits for."""
        heads = (waiters[0] for waiters in self._clients.values())
        return next((head for head in heads if may(head.share.client, head.amount)), None)

    def take(self, waiter: _Waiter) -> None:
        """Take out the first of a client, whose next turn comes after those of the others."""
        client = waiter.share.client
        waiters = self._clients[client]
        self._count(waiters.popleft(), -1)
        if waiters:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]

    def remove(self, waiter: _Waiter) -> bool:
        """Take out one wherever it is, and say whether it was there."""
        waiters = self._clients.get(waiter.share.client, deque())
        if waiter not in waiters:
            return False
        waiters.remove(waiter)
        self._count(waiter, -1)
        if not waiters:
            del self._clients[waiter.share.client]
        return True

    def burden_of(self, client: str) -> int:
        return sum(waiter.burden for waiter in self._clients.get(client, ()))

    def newest_of_heaviest(self) -> _Waiter | None:
        """The last to come of the client that has most waiting."""
        heaviest = max(self._clients, key=self.burden_of, default=None)
        return None if heaviest is None else self._clients[heaviest][-1]

    def _count(self, waiter: _Waiter, sign: int) -> None:
        self.count += sign
        self.burden += sign * waiter.burden
        self.amount += sign * waiter.amount


class Shares:
    """A capacity. Shares are taken on the event loop, or on a thread while nobody waits; they are given back anywhere.

    Args:
        capacity: what there is to share.
        max_burden: what may wait, in the unit of `burden` of `Share.take`; of a full line whoever has most makes room.
        full: what one is told for whom there is no place, given the seconds until there may be.
        aside: keep an eighth for small shares, which need no more than a 64th, so that they never wait behind large
            ones for long; what large ones leave is theirs too.
    """

    def __init__(
        self, capacity: int, *, max_burden: int, full: Callable[[float], ServiceError], aside: bool = False
    ) -> None:
        self.capacity = capacity
        self.small = capacity // SMALL_PART if aside else 0
        self.largest = capacity - (capacity // ASIDE_PART if aside else 0)
        self.used = 0
        self._used_by_small = 0
        self._small_of: Counter[str] = Counter()  # what small shares of each client have
        self._max_burden = max_burden
        self._full = full
        self._lines = {True: _Line(), False: _Line()}  # of the small, and of the others
        self._held_s = 0.0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(line.count for line in self._lines.values())

    def share(self, client: str) -> Share:
        """A share of nothing yet, in use by whoever asked for it."""
        return Share(self, client)

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[Share]:
        """A share of one for as long as the block runs, and whatever it starts that uses it `until` it is done."""
        share = self.share(client)
        try:
            await share.take(1)
            yield share
        finally:
            share.let_go()

    def retry_after_s(self) -> float:
        """About how long it takes until those who wait now have had their turn."""
        with self._lock:
            waiting = sum(line.amount for line in self._lines.values())
            return max(1.0, self._held_s * waiting / self.capacity)

    # --- what a share does ----------------------------------------------------------------------

    def take_now(self, share: Share, amount: int) -> bool:
        """Take at once if nobody of its kind waits and there is room."""
        with self._lock:
            is_small = amount <= self.small
            if self._lines[is_small].count or not self._may(share.client, amount):
                return False
            if not self._has_room(amount, is_small=is_small):
                return False
            self._grant(share, amount)
            return True

    async def take(self, share: Share, amount: int, burden: int) -> None:
        """Take when its turn comes; what `full` makes where too much waits."""
        if self.take_now(share, amount):
            return
        waiter = _Waiter(share, amount, burden)
        with self._lock:
            has_place, gone = self._place(waiter)
        for other in gone:
            if not other.granted.done():
                other.granted.set_exception(self._full(self.retry_after_s()))
        if not has_place:
            raise self._full(self.retry_after_s())
        try:
            self._next_turns()  # something may have been given back since it was asked for
            await waiter.granted
        finally:
            self._leave(waiter)

    def resize(self, share: Share, amount: int) -> None:
        """Give back all of a share but so much."""
        with self._lock:
            self._put_back(share, max(0, share.amount - amount))
        self._wake(share)

    def begin(self, share: Share) -> None:
        """One user of a share more."""
        with self._lock:
            share.users += 1

    def end(self, share: Share) -> None:
        """One user of a share fewer; with the last it is given back."""
        with self._lock:
            share.users -= 1
            if share.users:
                return
            if share.amount:
                held_s = time.monotonic() - share.since
                self._held_s += NEWEST_SHARE * (held_s - self._held_s) if self._held_s else held_s
            self._put_back(share, share.amount)
        self._wake(share)

    # --- under the lock -------------------------------------------------------------------------

    def _has_room(self, amount: int, *, is_small: bool) -> bool:
        aside = self.capacity - self.largest
        if not is_small:
            return self.used - min(self._used_by_small, aside) + amount <= self.largest
        return self.used + amount <= self.capacity

    def _may(self, client: str, amount: int) -> bool:
        """Whether it is no other's turn: while large shares wait, small ones keep to what is set aside for them.

        All together may have had more before; then each client keeps to its own part of that.
        """
        aside = self.capacity - self.largest
        if amount > self.small or not self._lines[False].count or self._used_by_small + amount <= aside:
            return True
        own = self._small_of[client] + amount
        clients = len(self._small_of) + (client not in self._small_of)
        return own <= max(aside // clients, self.small)

    def _grant(self, share: Share, amount: int) -> None:
        share.since = share.since or time.monotonic()
        share.is_small = amount <= self.small
        share.amount += amount
        self.used += amount
        if share.is_small:
            self._count_small(share.client, amount)

    def _put_back(self, share: Share, amount: int) -> None:
        share.amount -= amount
        self.used -= amount
        if share.is_small:
            self._count_small(share.client, -amount)

    def _count_small(self, client: str, amount: int) -> None:
        self._used_by_small += amount
        self._small_of[client] += amount
        if not self._small_of[client]:
            del self._small_of[client]

    def _place(self, waiter: _Waiter) -> tuple[bool, list[_Waiter]]:
        """Put one in its line, and take out who has to make room; whether it has a place."""
        line, gone = self._lines[waiter.amount <= self.small], list[_Waiter]()
        while line.burden and line.burden + waiter.burden > self._max_burden:
            other = line.newest_of_heaviest()
            own = line.burden_of(waiter.share.client) + waiter.burden
            if other is None or line.burden_of(other.share.client) <= own:
                return False, gone
            line.remove(other)
            gone.append(other)
        line.add(waiter)
        return True, gone

    # --- whose turn it is -----------------------------------------------------------------------

    def _leave(self, waiter: _Waiter) -> None:
        """Whoever waited no longer does; one that gave up may have been in the way of others."""
        with self._lock:
            was_waiting = self._lines[waiter.amount <= self.small].remove(waiter)
        if was_waiting:
            self._next_turns()

    def _wake(self, share: Share) -> None:
        """Have the event loop look who is next; it may be called from any thread, after the loop's end too."""
        if not self.waiting:
            return
        try:
            share.loop.call_soon_threadsafe(self._next_turns)
        except RuntimeError:  # the loop is closed, and nobody waits on it any more
            return

    def _next_turns(self) -> None:
        with self._lock:
            for is_small, line in self._lines.items():
                while (first := line.first(self._may)) and self._has_room(first.amount, is_small=is_small):
                    line.take(first)
                    if not first.granted.done():  # nor cancelled at this moment
                        self._grant(first.share, first.amount)
                        first.granted.set_result(None)


class Share:
    """What one request has of a capacity; given back when the last who uses it lets go. Made on the event loop."""

    __slots__ = ("_shares", "amount", "client", "is_small", "loop", "since", "users")

    def __init__(self, shares: Shares, client: str) -> None:
        self._shares = shares
        self.client = client
        self.amount = 0
        self.users = 1
        self.since = 0.0
        self.is_small = False
        self.loop = asyncio.get_running_loop()

    def take_now(self, amount: int) -> bool:
        """Take so much, if it is there and nobody waits for it."""
        return self._shares.take_now(self, amount)

    async def take(self, amount: int, *, burden: int = 1) -> None:
        """Take so much, in turn. Raises what the capacity's `full` makes."""
        await self._shares.take(self, amount, burden)

    def keep(self, amount: int) -> None:
        """Give back all but so much."""
        self._shares.resize(self, amount)

    def until(self, future: Future[Any]) -> None:
        """In use until a thread's future is done, however that ends and whoever still waits for it."""
        self._shares.begin(self)
        future.add_done_callback(lambda _: self.let_go())

    def let_go(self) -> None:
        """One user fewer."""
        self._shares.end(self)

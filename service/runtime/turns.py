"""Turns by what everyone has had (start-time fair queueing: Goyal, Vin and Cheng, "Start-time Fair Queueing", 1996).

Whoever comes back from a rest may go first for a moment (as in Duda and Cheriton, "Borrowed-Virtual-Time Scheduling",
1999): one that asks for less than its part finds the thing as good as unused, however much another asks for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

MAX_RESTING = 256


class TakesTurns(Protocol):
    """Who waits for a turn. `used_s` are the seconds that it has had."""

    used_s: float


M = TypeVar("M", bound=TakesTurns)


class Turns(Generic[M]):
    """Members that take turns: next is who has used the least. Those with nothing to do rest and are not forgotten.

    Args:
        max_debt_s: how far one that used much at once may fall behind the others.
        credit_s: what a rest is worth at most, of the time that was not used meanwhile.
    """

    def __init__(self, max_debt_s: float, credit_s: float = 0.0) -> None:
        self.active: dict[Hashable, M] = {}
        self._max_debt_s = max_debt_s
        self._credit_s = credit_s
        self._resting: OrderedDict[Hashable, M] = OrderedDict()
        self._now_s = 0.0  # what the member that is furthest behind has used

    def join(self, key: Hashable, make: Callable[[], M]) -> M:
        """The member of this key, active; of what it did not use while it rested a little is its credit."""
        member = self.active.get(key)
        if member is None:
            member = self._resting.pop(key) if key in self._resting else make()
            member.used_s = max(member.used_s, self._now_s - self._credit_s)
            self.active[key] = member
        return member

    def rest(self, key: Hashable) -> None:
        """Take a member out of the turns until it joins again."""
        self._resting[key] = self.active.pop(key)
        if len(self._resting) > MAX_RESTING:
            self._resting.popitem(last=False)

    def in_order(self) -> list[M]:
        """The active members, who is next first."""
        return sorted(self.active.values(), key=lambda member: member.used_s)

    def charge(self, member: M, seconds: float) -> None:
        """Count seconds as used by a member; negative ones are given back."""
        behind = min((active.used_s for active in self.active.values()), default=member.used_s)
        self._now_s = max(self._now_s, min(behind, member.used_s))
        member.used_s = min(member.used_s + seconds, self._now_s + self._max_debt_s)

"""How fast what waits goes away, and when to ask again."""

from __future__ import annotations

import random
from collections import deque
from statistics import median

KEPT = 16
SOUND_AFTER, SOUND_AFTER_S = 3, 3.0
SPREAD = 0.5  # those who were refused together do not come back together


class DrainRate:
    """Seconds that a thing takes, over the time that there was something to do: the median of the last few times.

    The first batches after a start take many times what the others do, and would be believed for long by a mean.
    Readings of one clock go in.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=KEPT)
        self._since = 0.0
        self._seen_s = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether enough was seen to refuse anyone for it: one slow batch says little."""
        times = len(self._seconds)
        return times == KEPT or (times >= SOUND_AFTER and self._seen_s >= SOUND_AFTER_S)

    def begin(self, now: float) -> None:
        """From now on there is something to do."""
        self._since = now

    def note(self, done: int, now: float) -> None:
        """So many were done since the last time."""
        if done:
            self._seconds.append((now - self._since) / done)
            self._seen_s += now - self._since
            self._since = now

    def seconds_for(self, count: int) -> float:
        """How long so many take; 0 before anything was done."""
        return count * median(self._seconds) if self._seconds else 0.0


def retry_after(wait_s: float, at_most_s: float) -> float:
    """Seconds after which to ask again where the wait is `wait_s`: 1 at least, and up to half as much again."""
    return max(1.0, min(wait_s, at_most_s)) * random.uniform(1.0, 1.0 + SPREAD)  # noqa: S311 - no secret

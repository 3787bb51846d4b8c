"""How fast what waits goes away, and when to ask again."""

from __future__ import annotations

import random

FORGOTTEN_SHARE = 0.05  # of the past, each time
SOUND_AFTER, SOUND_AFTER_S = 16, 3.0
SPREAD = 0.5  # those who were refused together do not come back together


class DrainRate:
    """Things per second, over the time that there was something to do. Readings of one clock go in."""

    def __init__(self) -> None:
        self._done = self._seconds = 0.0
        self._since = 0.0
        self._times, self._seen_s = 0, 0.0

    @property
    def is_sound(self) -> bool:
        """Whether enough was seen to refuse anyone for it: one slow batch says little."""
        return self._times >= SOUND_AFTER or self._seen_s >= SOUND_AFTER_S

    def begin(self, now: float) -> None:
        """From now on there is something to do."""
        self._since = now

    def note(self, done: int, now: float) -> None:
        """So many were done since the last time."""
        self._times += 1
        self._seen_s += now - self._since
        self._done += done - FORGOTTEN_SHARE * self._done
        self._seconds += now - self._since - FORGOTTEN_SHARE * self._seconds
        self._since = now

    def seconds_for(self, count: int) -> float:
        """How long so many take; 0 before anything was done."""
        return count * self._seconds / self._done if self._done else 0.0


def retry_after(wait_s: float, at_most_s: float) -> float:
    """Seconds after which to ask again where the wait is `wait_s`: 1 at least, and up to half as much again."""
    return max(1.0, min(wait_s, at_most_s)) * random.uniform(1.0, 1.0 + SPREAD)  # noqa: S311 - no secret

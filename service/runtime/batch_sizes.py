"""How many images are worth one forward pass, learned from the batches that were run.

On a GPU a batch costs hardly more than one image; on a CPU a large network gains nothing from company, and whoever
came first waits for the rest. So the size is measured: it starts at one, is doubled when that many wait, and stays
doubled if an image became clearly cheaper; much cheaper, where the batch becomes a long one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

# What an image may take, of the seconds that it takes at half the size, for a size to be taken.
CLEARLY_CHEAPER = 0.95
MUCH_CHEAPER = 0.8  # one batch is proof enough
# Whoever comes next waits for a long batch, and on a busy machine chance alone makes one size seem cheaper.
LONG_S = 0.05
WORTH_LENGTH, WORTH_LENGTH_AT_ONCE, STILL_WORTH_LENGTH = 0.8, 0.6, 0.9
BATCHES_OF_A_TRIAL = 3
BATCHES_BETWEEN_TRIALS = 128
LONGEST_BETWEEN_TRIALS = 1024
NEWEST_SHARE = 0.2  # of an exponential average
LARGEST_RISE = 2.0  # one batch that the machine was busy elsewhere in says little
FADING_TRUST = 0.9
GUESSED_SECONDS = 0.001  # for an image, before anything has been run


@dataclass
class _Cost:
    """Seconds an image takes in batches of about one size.

    The first batch of a size also pays for what engines set up for a new shape; `batches` does not count it.
    """

    seconds: float
    batches: int = 0

    def add(self, seconds: float) -> None:
        if self.batches == 0:
            self.seconds = seconds
        else:
            self.seconds += NEWEST_SHARE * (min(seconds, LARGEST_RISE * self.seconds) - self.seconds)
        self.batches += 1


@dataclass
class _Learned:
    """What is known of one group; `best` and the keys of `costs` are positions in the table of `sizes`."""

    sizes: tuple[int, ...]
    costs: dict[int, _Cost] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)
    best: int = 0
    batches: int = 0
    next_trial: int = 0
    pause: int = BATCHES_BETWEEN_TRIALS
    seconds_per_image: float | None = None
    trust: float = 1.0

    def add(self, position: int, images: int, seconds_per_image: float) -> None:
        self.batches += 1
        self.trust = 1.0
        self.seconds_per_image = _average(self.seconds_per_image, seconds_per_image)
        if images in self.met:
            self.costs.setdefault(position, _Cost(seconds_per_image)).add(seconds_per_image)
        else:
            self.met.add(images)
            self.costs.setdefault(position, _Cost(seconds_per_image))
        self._judge()

    def _judge(self) -> None:
        """Go one size up or down, or none."""
        now, larger, smaller = (self.costs.get(self.best + step) for step in (0, 1, -1))
        if now is None or now.batches == 0:
            return
        if larger is not None and larger.seconds <= now.seconds * self._needed(larger):
            self.best += 1
            self.costs.pop(self.best + 1, None)  # from another load; to be measured anew
            self.pause = BATCHES_BETWEEN_TRIALS
        elif larger is not None and larger.batches >= BATCHES_OF_A_TRIAL:
            del self.costs[self.best + 1]
            self.put_off()
        elif smaller is not None and smaller.batches:
            allowed = STILL_WORTH_LENGTH if self._is_long(self.best, now) else 1.0
            self.best -= now.seconds > smaller.seconds * allowed

    def _needed(self, larger: _Cost) -> float:
        is_tried = larger.batches >= BATCHES_OF_A_TRIAL
        if self._is_long(self.best + 1, larger):
            return WORTH_LENGTH if is_tried else WORTH_LENGTH_AT_ONCE
        return CLEARLY_CHEAPER if is_tried else MUCH_CHEAPER

    def _is_long(self, position: int, cost: _Cost) -> bool:
        return cost.seconds * self.sizes[position] > LONG_S

    def put_off(self) -> None:
        """Try nothing larger for a while; for longer each time."""
        self.next_trial = self.batches + self.pause
        self.pause = min(2 * self.pause, LONGEST_BETWEEN_TRIALS)

    def may_try_more(self) -> bool:
        """Whether it is time to try the next size: the present one was measured, the last failure is long ago."""
        now = self.costs.get(self.best)
        return now is not None and now.batches > 0 and self.batches >= self.next_trial


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else before + NEWEST_SHARE * (newest - before)


class BatchSizes:
    """The images that one forward pass of a group should hold. Not for several threads at once, save `best`.

    What is measured beside another batch (`crowded`: fewer cores for each) is kept apart from what is measured alone.

    Args:
        max_batch: images that no batch goes beyond.
        max_groups: groups that are remembered; those met last.
    """

    def __init__(self, max_batch: int, max_groups: int = 512) -> None:
        powers = (1 << exponent for exponent in range(max_batch.bit_length()))
        self.max_batch = max_batch
        self._sizes = tuple(sorted({*powers, max_batch}))
        self._max_groups = max_groups
        self._groups: OrderedDict[tuple[Hashable, bool], _Learned] = OrderedDict()
        self._seconds_per_image: float | None = None

    def best(self, group: Hashable, *, crowded: bool = False) -> int:
        """The size that was found to be worth it so far; 1 for a group that is not known."""
        learned = self._groups.get((group, crowded))
        return 1 if learned is None else self._sizes[learned.best]

    def limit(self, group: Hashable, waiting: int, *, crowded: bool = False) -> int:
        """Images to take now, of `waiting` ones: the best size, or the next one to try it."""
        learned = self._groups.get((group, crowded))
        if learned is None:
            return 1
        larger = learned.best + 1
        if larger < len(self._sizes) and waiting >= self._sizes[larger] and learned.may_try_more():
            return self._sizes[larger]
        return self._sizes[learned.best]

    def learn(self, group: Hashable, images: int, seconds: float, *, crowded: bool = False) -> None:
        """Take note of one batch. What was larger than `max_batch` ran in pieces and tells of no size."""
        seconds_per_image = seconds / images
        self._seconds_per_image = _average(self._seconds_per_image, seconds_per_image)
        if images > self.max_batch:
            return
        key = (group, crowded)
        learned = self._groups.setdefault(key, _Learned(self._sizes))
        self._groups.move_to_end(key)
        learned.add(bisect_right(self._sizes, images) - 1, images, seconds_per_image)
        if len(self._groups) > self._max_groups:
            self._groups.popitem(last=False)

    def put_off(self, group: Hashable, *, crowded: bool = False) -> None:
        """Go back one size, and stay there for a while: a batch failed, perhaps for want of memory."""
        learned = self._groups.get((group, crowded))
        if learned is not None:
            learned.best = max(0, learned.best - 1)
            learned.put_off()

    def has_met(self, group: Hashable, images: int, *, crowded: bool = False) -> bool:
        """Whether a batch of so many images was run before; what is beyond `max_batch` runs in pieces."""
        learned = self._groups.get((group, crowded))
        return learned is not None and (images in learned.met or images > self.max_batch)

    def proven_seconds(self, group: Hashable, images: int) -> float:
        """What a batch takes at least, as measured and not yet in doubt; 0 for a group that was not measured."""
        found = [self._groups.get((group, crowded)) for crowded in (True, False)]
        proven = [
            learned.trust * cost.seconds
            for learned in found
            if learned is not None
            for cost in learned.costs.values()
            if cost.batches
        ]
        return min(proven, default=0.0) * images

    def doubt(self, group: Hashable) -> None:
        """Believe a little less in what was measured: it kept something from being run, so nobody measures anew."""
        for crowded in (True, False):
            learned = self._groups.get((group, crowded))
            if learned is not None:
                learned.trust *= FADING_TRUST

    def seconds(self, group: Hashable, images: int) -> float:
        """About how long a batch takes; from other groups, or a guess, for one that is not known."""
        for crowded in (True, False):
            learned = self._groups.get((group, crowded))
            if learned is not None and learned.seconds_per_image is not None:
                return learned.seconds_per_image * images
        return (self._seconds_per_image or GUESSED_SECONDS) * images

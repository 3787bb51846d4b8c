"""The jobs that wait for a device: who is next, without walking over all of them.

Clients take turns by the device seconds they have had, and so do the models of each: one with hundreds of jobs delays
another's single job by the batch that runs. Within a model the oldest job is next, with those of its group, whosever
they are. Nothing here is a thread's or a lock's; `Batcher` holds both.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.runtime.turns import Turns

P = TypeVar("P")
R = TypeVar("R")
# Who has just had a long batch is passed over for no longer than this: a model of a client, and a client.
MAX_MODEL_DEBT_S = 1.0
MAX_CLIENT_DEBT_S = 10.0
# A client that rested may go first for as long as this.
CLIENT_CREDIT_S = 0.25


@dataclass(frozen=True)
class Place:
    """Where a job waits: whose it is, for which model, and whether it may run beside another batch."""

    client: Hashable
    model: Hashable
    concurrent: bool


@dataclass(eq=False)
class Job(Generic[P, R]):
    """One request's images for the device.

    Jobs of one `group` may run in one forward pass: the same model, input shape and precision. Clients take turns, and
    the models of a client. A `concurrent` job may run beside another batch; any other runs on the first lane.
    `deadline` is a reading of `time.monotonic`. `waiter` is the event loop's view of `future`.
    """

    group: Hashable
    images: int
    payload: P
    deadline: float
    model: Hashable = None
    concurrent: bool = False
    client: Hashable = None
    future: Future[R] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)
    waiter: asyncio.Future[R] | None = None

    def is_wanted(self, now: float) -> bool:
        """Whether anybody still waits for it, who may be answered yet."""
        return now <= self.deadline and not (self.waiter is not None and self.waiter.cancelled())

    @property
    def place(self) -> Place:
        """Where it waits; holds nothing of its payload."""
        return Place(self.client, self.model, self.concurrent)


@dataclass(eq=False)
class Flow(Generic[P, R]):
    """The jobs of one client for one model in order of arrival, and by group."""

    place: Place
    used_s: float = 0.0
    jobs: OrderedDict[Future[R], Job[P, R]] = field(default_factory=OrderedDict)
    groups: dict[Hashable, OrderedDict[Future[R], Job[P, R]]] = field(default_factory=dict)

    def add(self, job: Job[P, R]) -> None:
        self.jobs[job.future] = job
        self.groups.setdefault(job.group, OrderedDict())[job.future] = job

    def remove(self, job: Job[P, R]) -> None:
        del self.jobs[job.future]
        group = self.groups[job.group]
        del group[job.future]
        if not group:
            del self.groups[job.group]

    @property
    def next_group(self) -> Hashable:
        """The group of the oldest job."""
        return next(iter(self.jobs.values())).group


@dataclass(frozen=True)
class Waiting:
    """A queue in numbers: its images, those of the model with the most, its models, its clients, the longest wait."""

    images: int
    longest: int
    models: int
    clients: int
    oldest_s: float


@dataclass(eq=False)
class Party(Generic[P, R]):
    """All that one client has waiting."""

    client: Hashable
    used_s: float = 0.0
    images: int = 0
    flows: Turns[Flow[P, R]] = field(default_factory=lambda: Turns(MAX_MODEL_DEBT_S))

    def newest_first(self) -> Iterator[_Waiting[P, R]]:
        """Its jobs and where they wait, the one that came last first."""
        found = [(self, flow, job) for flow in self.flows.active.values() for job in flow.jobs.values()]
        return iter(sorted(found, key=lambda waiting: waiting[2].queued_at, reverse=True))


_Waiting = tuple[Party[P, R], Flow[P, R], Job[P, R]]


@dataclass(frozen=True)
class Turn(Generic[P, R]):
    """Jobs of one group that were taken to run together, and how many images of them each flow had."""

    jobs: list[Job[P, R]]
    shares: tuple[tuple[Party[P, R], Flow[P, R], int], ...]

    @property
    def images(self) -> int:
        """Images of all jobs."""
        return count_images(self.jobs)


class WaitingJobs(Generic[P, R]):
    """A queue of jobs that is fair between clients, and between the models of each. `images` counts all that wait."""

    def __init__(self) -> None:
        self.images = 0
        self._parties: Turns[Party[P, R]] = Turns(MAX_CLIENT_DEBT_S, CLIENT_CREDIT_S)
        self._group_images: dict[tuple[Hashable, bool], int] = {}
        self._first_deadline = math.inf
        self._last_deadline = -math.inf

    def __len__(self) -> int:
        return sum(len(flow.jobs) for _, flow in self._flows())

    def __iter__(self) -> Iterator[Job[P, R]]:
        return (job for _, flow in self._flows() for job in flow.jobs.values())

    def _flows(self) -> Iterator[tuple[Party[P, R], Flow[P, R]]]:
        return (
            (party, flow) for party in self._parties.active.values() for flow in party.flows.active.values()
        )

    @property
    def last_deadline(self) -> float:
        """When the last of all jobs will be gone at the latest, a reading of the clock of the deadlines."""
        return self._last_deadline

    def ahead(self, client: Hashable, model: Hashable) -> int:
        """About how many images run before another one of a client and a model does, as these take turns."""
        party = self._parties.active.get(client)
        if party is None:
            return 0
        flows = party.flows.active.values()
        own = sum(job.images for flow in flows if flow.place.model == model for job in flow.jobs.values())
        return min(self.images, min(party.images, own * len(flows)) * len(self._parties.active))

    def summary(self, now: float) -> Waiting:
        """The queue in numbers. Walks over all jobs: for who asks now and then."""
        by_model: Counter[Hashable] = Counter()
        for job in self:
            by_model[job.model] += job.images
        oldest_s = max((now - job.queued_at for job in self), default=0.0)
        longest = max(by_model.values(), default=0)
        return Waiting(self.images, longest, len(by_model), len(self._parties.active), oldest_s)

    def add(self, job: Job[P, R]) -> None:
        place = job.place
        party = self._parties.join(place.client, lambda: Party(place.client))
        party.flows.join(place, lambda: Flow(place)).add(job)
        self._count(party, job, job.images)
        self._first_deadline = min(self._first_deadline, job.deadline)
        self._last_deadline = max(self._last_deadline, job.deadline)

    def _count(self, party: Party[P, R], job: Job[P, R], images: int) -> None:
        self.images += images
        party.images += images
        key = (job.group, job.concurrent)
        left = self._group_images.pop(key, 0) + images
        if left:
            self._group_images[key] = left

    def _remove(self, party: Party[P, R], flow: Flow[P, R], job: Job[P, R]) -> None:
        flow.remove(job)
        self._count(party, job, -job.images)
        if not flow.jobs:
            party.flows.rest(flow.place)
        if not party.flows.active:
            self._parties.rest(party.client)

    def take_for_room(self, job: Job[P, R], capacity: int) -> list[Job[P, R]]:
        """Jobs taken out so that another fits into `capacity` images: the newest of whoever has most waiting.

        Nothing where that is who asks, or would be with this job: a client makes room only for those that have less
        (longest queue drop: McKenney, "Stochastic Fairness Queueing", INFOCOM 1990).
        """
        chosen = self._outweighing(job, self.images + job.images - capacity) if self.images else []
        for party, flow, newest in chosen:
            self._remove(party, flow, newest)
        return [newest for *_, newest in chosen]

    def _outweighing(self, job: Job[P, R], excess: int) -> list[_Waiting[P, R]]:
        """Jobs of `excess` images or more of clients that keep more than a job's own client has; all or none."""
        own = self._parties.active.get(job.client)
        images = job.images + (0 if own is None else own.images)
        left = {party.client: party.images for party in self._parties.active.values() if party is not own}
        newest: dict[Hashable, Iterator[_Waiting[P, R]]] = {}
        chosen: list[_Waiting[P, R]] = []
        while excess > 0:
            client = max(left, key=lambda client: left[client], default=None)
            if client is None or left[client] <= images:
                return []
            party = self._parties.active[client]
            gone = next(newest.setdefault(client, party.newest_first()))
            left[client] -= gone[2].images
            excess -= gone[2].images
            chosen.append(gone)
        return chosen

    def discard(self, place: Place, future: Future[R]) -> bool:
        """Take out a job if it still waits, and say whether it did."""
        party = self._parties.active.get(place.client)
        flow = None if party is None else party.flows.active.get(place)
        job = None if flow is None else flow.jobs.get(future)
        if party is None or flow is None or job is None:
            return False
        self._remove(party, flow, job)
        return True

    def next_flow(self, *, concurrent_only: bool) -> Flow[P, R] | None:
        """The flow whose turn it is: of the client that has used the least, the model that has. None if none may."""
        for party in self._parties.in_order():
            for flow in party.flows.in_order():
                if flow.place.concurrent or not concurrent_only:
                    return flow
        return None

    def waits(self, *, concurrent_only: bool) -> bool:
        """Whether any job waits."""
        return any(flow.place.concurrent or not concurrent_only for _, flow in self._flows())

    def images_beside(self, flow: Flow[P, R]) -> int:
        """Images that wait and may run with the oldest job of a flow, its own among them."""
        return self._group_images[flow.next_group, flow.place.concurrent]

    def take(self, flow: Flow[P, R], limit: int) -> Turn[P, R]:
        """The oldest job of a flow, and jobs of its group that fit beside it into `limit` images.

        Its own come first, then those of other clients by turns; each client's are in order.
        """
        group = flow.next_group
        jobs: list[Job[P, R]] = []
        shares = []
        for party, other in self._alike(flow, group):
            taken = _fitting(other.groups[group].values(), limit - count_images(jobs), at_least_one=not jobs)
            if taken:
                shares.append((party, other, count_images(taken)))
                jobs += taken
                for job in taken:
                    self._remove(party, other, job)
        return Turn(jobs, tuple(shares))

    def _alike(self, flow: Flow[P, R], group: Hashable) -> list[tuple[Party[P, R], Flow[P, R]]]:
        """A flow, then those of other clients for the same model that have jobs of a group, by turns."""
        own = self._parties.active[flow.place.client]
        found = [(own, flow)]
        if self._group_images[group, flow.place.concurrent] == count_images(flow.groups[group].values()):
            return found
        for party in self._parties.in_order():
            place = Place(party.client, flow.place.model, flow.place.concurrent)
            other = party.flows.active.get(place)
            if party is not own and other is not None and group in other.groups:
                found.append((party, other))
        return found

    def charge(self, turn: Turn[P, R], seconds: float) -> None:
        """Count device seconds as used by those whose jobs ran, by their images; negative ones are given back."""
        for party, flow, images in turn.shares:
            part_s = seconds * images / turn.images
            party.flows.charge(flow, part_s)
            self._parties.charge(party, part_s)

    def take_expired(self, now: float) -> list[Job[P, R]]:
        """All jobs whose deadline has passed. Walks over the jobs only if there may be one."""
        if now <= self._first_deadline:
            return []
        expired = self._take_where(lambda job: now > job.deadline)
        self._first_deadline = min((job.deadline for job in self), default=math.inf)
        return expired

    def take_all(self) -> list[Job[P, R]]:
        """Everything that waits."""
        return self._take_where(lambda _: True)

    def _take_where(self, wanted: Callable[[Job[P, R]], bool]) -> list[Job[P, R]]:
        found = [
            (party, flow, job) for party, flow in self._flows() for job in flow.jobs.values() if wanted(job)
        ]
        for party, flow, job in found:
            self._remove(party, flow, job)
        return [job for _, _, job in found]


def _fitting(jobs: Iterable[Job[P, R]], limit: int, *, at_least_one: bool) -> list[Job[P, R]]:
    """The first jobs that together have no more than `limit` images."""
    taken: list[Job[P, R]] = []
    left = limit
    for job in jobs:
        if job.images <= left or (at_least_one and not taken):
            taken.append(job)
            left -= job.images
        if left <= 0:
            break
    return taken


def count_images(jobs: Iterable[Job[P, R]]) -> int:
    """Images of all jobs."""
    return sum(job.images for job in jobs)

"""The jobs that wait for a device: who is next, without walking over all of them.

Models take turns by the device seconds they have had (start-time fair queueing: Goyal, Vin and Cheng, "Start-time
Fair Queueing", SIGCOMM 1996), so one with hundreds of jobs delays another's single job by the batch that runs. Within
a model the oldest job is next, with those of its group. Nothing here is a thread's or a lock's; `Batcher` holds both.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

P = TypeVar("P")
R = TypeVar("R")
MAX_DEBT_S = 1.0  # a model that has just had a long batch is passed over for no longer than this
MAX_RESTING = 256


@dataclass(eq=False)
class Job(Generic[P, R]):
    """One request's images for the device.

    Jobs of one `group` may run in one forward pass: the same model, input shape and precision. Models take turns.
    A `concurrent` job may run beside another batch; any other runs on the first lane. `deadline` is a reading of
    `time.monotonic`. `waiter` is the event loop's view of `future`.
    """

    group: Hashable
    images: int
    payload: P
    deadline: float
    model: Hashable = None
    concurrent: bool = False
    future: Future[R] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)
    waiter: asyncio.Future[R] | None = None


@dataclass(eq=False)
class Flow(Generic[P, R]):
    """The jobs of one model in order of arrival, and by group. `used_s` are the device seconds it has had."""

    key: tuple[Hashable, bool]
    used_s: float
    jobs: OrderedDict[Future[R], Job[P, R]] = field(default_factory=OrderedDict)
    groups: dict[Hashable, OrderedDict[Future[R], Job[P, R]]] = field(default_factory=dict)
    images: dict[Hashable, int] = field(default_factory=dict)

    @property
    def concurrent(self) -> bool:
        """Whether its jobs may run on any lane."""
        return self.key[1]

    def add(self, job: Job[P, R]) -> None:
        self.jobs[job.future] = job
        self.groups.setdefault(job.group, OrderedDict())[job.future] = job
        self.images[job.group] = self.images.get(job.group, 0) + job.images

    def remove(self, job: Job[P, R]) -> None:
        del self.jobs[job.future]
        group = self.groups[job.group]
        del group[job.future]
        self.images[job.group] -= job.images
        if not group:
            del self.groups[job.group], self.images[job.group]

    @property
    def next_group(self) -> Hashable:
        """The group of the oldest job."""
        return next(iter(self.jobs.values())).group


class WaitingJobs(Generic[P, R]):
    """A queue of jobs that is fair between models. `images` counts all that wait."""

    def __init__(self) -> None:
        self.images = 0
        self._flows: dict[tuple[Hashable, bool], Flow[P, R]] = {}
        self._resting: OrderedDict[tuple[Hashable, bool], Flow[P, R]] = OrderedDict()
        self._now_s = 0.0  # device seconds of the model that is furthest behind
        self._first_deadline = math.inf
        self._last_deadline = -math.inf

    def __len__(self) -> int:
        return sum(len(flow.jobs) for flow in self._flows.values())

    def __iter__(self) -> Iterator[Job[P, R]]:
        return (job for flow in self._flows.values() for job in flow.jobs.values())

    @property
    def last_deadline(self) -> float:
        """When the last of all jobs will be gone at the latest, a reading of the clock of the deadlines."""
        return self._last_deadline

    def add(self, job: Job[P, R]) -> None:
        key = (job.model, job.concurrent)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._resting.pop(key) if key in self._resting else Flow(key, self._now_s)
            flow.used_s = max(flow.used_s, self._now_s)  # what was not used while nothing waited is no credit
            self._flows[key] = flow
        flow.add(job)
        self.images += job.images
        self._first_deadline = min(self._first_deadline, job.deadline)
        self._last_deadline = max(self._last_deadline, job.deadline)

    def remove(self, flow: Flow[P, R], job: Job[P, R]) -> None:
        flow.remove(job)
        self.images -= job.images
        if not flow.jobs:
            self._rest(flow)

    def _rest(self, flow: Flow[P, R]) -> None:
        self._resting[flow.key] = self._flows.pop(flow.key)
        if len(self._resting) > MAX_RESTING:
            self._resting.popitem(last=False)

    def discard(self, model: Hashable, concurrent: bool, future: Future[R]) -> bool:
        """Take out a job if it still waits, and say whether it did."""
        flow = self._flows.get((model, concurrent))
        job = None if flow is None else flow.jobs.get(future)
        if flow is None or job is None:
            return False
        self.remove(flow, job)
        return True

    def next_flow(self, *, concurrent_only: bool) -> Flow[P, R] | None:
        """The model whose turn it is: it has had the fewest device seconds. None if none may run."""
        flows = [flow for flow in self._flows.values() if flow.concurrent or not concurrent_only]
        return min(flows, key=lambda flow: flow.used_s, default=None)

    def waits(self, *, concurrent_only: bool) -> bool:
        """Whether any job waits."""
        return any(flow.concurrent or not concurrent_only for flow in self._flows.values())

    def take(self, flow: Flow[P, R], limit: int) -> list[Job[P, R]]:
        """The oldest job of a model, and those of its group that fit beside it into `limit` images, in order."""
        taken: list[Job[P, R]] = []
        images = 0
        for job in flow.groups[flow.next_group].values():
            if taken and images >= limit:
                break
            if not taken or images + job.images <= limit:
                taken.append(job)
                images += job.images
        for job in taken:
            self.remove(flow, job)
        return taken

    def charge(self, flow: Flow[P, R], seconds: float) -> None:
        """Count device seconds as used by a model; negative ones are given back."""
        behind = min((waiting.used_s for waiting in self._flows.values()), default=flow.used_s)
        self._now_s = max(self._now_s, min(behind, flow.used_s))
        flow.used_s = min(flow.used_s + seconds, self._now_s + MAX_DEBT_S)

    def take_expired(self, now: float) -> list[Job[P, R]]:
        """All jobs whose deadline has passed. Walks over the jobs only if there may be one."""
        if now <= self._first_deadline:
            return []
        expired = [
            (flow, job) for flow in self._flows.values() for job in flow.jobs.values() if now > job.deadline
        ]
        for flow, job in expired:
            self.remove(flow, job)
        self._first_deadline = min((job.deadline for job in self), default=math.inf)
        return [job for _, job in expired]

    def take_all(self) -> list[Job[P, R]]:
        """Everything that waits."""
        jobs = list(self)
        for flow in list(self._flows.values()):
            for job in list(flow.jobs.values()):
                self.remove(flow, job)
        return jobs

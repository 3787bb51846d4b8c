"""The queue of the device workers against a plain list of jobs."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.runtime.waiting import Job, WaitingJobs

CLIENTS = st.sampled_from(["a", "b", "c"])
MODELS = st.sampled_from(["m", "n", "o"])
GROUPS = st.sampled_from(["small", "large"])


class QueueMachine(RuleBasedStateMachine):
    """Every job that came leaves once: taken in its turn, discarded, or expired."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: WaitingJobs[int, int] = WaitingJobs()
        self.expected: list[Job[int, int]] = []
        self.now = 0.0

    @rule(
        client=CLIENTS,
        model=MODELS,
        group=GROUPS,
        images=st.integers(1, 5),
        concurrent=st.booleans(),
        patience=st.integers(1, 9),
    )
    def add(self, client: str, model: str, group: str, images: int, concurrent: bool, patience: int) -> None:
        job = Job[int, int]((model, group), images, 0, self.now + patience, model, concurrent, client)
        self.queue.add(job)
        self.expected.append(job)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.expected))
        assert self.queue.discard(job.place, job.future)
        assert not self.queue.discard(job.place, job.future)
        self.expected.remove(job)

    @rule(limit=st.integers(1, 8), concurrent_only=st.booleans(), seconds=st.floats(0, 5))
    def take(self, limit: int, concurrent_only: bool, seconds: float) -> None:
        flow = self.queue.next_flow(concurrent_only=concurrent_only)
        fit = [job for job in self.expected if job.concurrent or not concurrent_only]
        assert (flow is None) == (not fit)
        assert self.queue.waits(concurrent_only=concurrent_only) == bool(fit)
        if flow is None:
            return
        waiting = self.queue.images_beside(flow)
        turn = self.queue.take(flow, limit)
        self.queue.charge(turn, seconds)
        own = [job for job in self.expected if job.place == flow.place]
        assert turn.jobs[0] is own[0]
        alike = [
            job for job in self.expected if (job.group, job.concurrent) == (own[0].group, own[0].concurrent)
        ]
        assert waiting == sum(job.images for job in alike)
        for client in {job.client for job in turn.jobs}:  # in order of arrival, one after the other
            assert [job for job in alike if job.client == client and job in turn.jobs] == [
                job for job in turn.jobs if job.client == client
            ]
        assert all(job in alike for job in turn.jobs)
        assert len(turn.jobs) == 1 or turn.images <= limit
        assert sum(images for *_, images in turn.shares) == turn.images
        for job in turn.jobs:
            self.expected.remove(job)

    @rule(client=CLIENTS, images=st.integers(1, 5), capacity=st.integers(1, 30))
    def make_room(self, client: str, images: int, capacity: int) -> None:
        job = Job[int, int]("g", images, 0, math.inf, client=client)
        own = images + sum(other.images for other in self.expected if other.client == client)
        excess = self.queue.images + images - capacity
        taken = self.queue.take_for_room(job, capacity)
        assert not taken or sum(gone.images for gone in taken) >= excess > 0
        for gone in taken:
            before = sum(other.images for other in self.expected if other.client == gone.client)
            assert gone.client != client
            assert before > own
            self.expected.remove(gone)

    @rule(passed=st.floats(0, 4))
    def expire(self, passed: float) -> None:
        self.now += passed
        late = [job for job in self.expected if job.deadline < self.now]
        assert sorted(map(id, self.queue.take_expired(self.now))) == sorted(map(id, late))
        self.expected = [job for job in self.expected if job not in late]

    @rule()
    def take_all(self) -> None:
        assert sorted(map(id, self.queue.take_all())) == sorted(map(id, self.expected))
        self.expected = []

    @invariant()
    def counts_the_images_that_wait(self) -> None:
        assert self.queue.images == sum(job.images for job in self.expected)
        assert sorted(map(id, self.queue)) == sorted(map(id, self.expected))

    @invariant()
    def last_deadline_is_none_that_waits_beyond(self) -> None:
        assert all(job.deadline <= self.queue.last_deadline for job in self.expected)
        assert self.queue.last_deadline < math.inf


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueue = QueueMachine.TestCase


def test_clients_that_come_and_go_are_forgotten() -> None:
    queue: WaitingJobs[int, int] = WaitingJobs()
    for number in range(2000):
        job = Job[int, int]("g", 1, 0, 1.0, client=number)
        queue.add(job)
        flow = queue.next_flow(concurrent_only=False)
        assert flow is not None
        queue.charge(queue.take(flow, 1), 0.5)
    assert not queue.waits(concurrent_only=False)
    assert len(queue._parties._resting) <= 256

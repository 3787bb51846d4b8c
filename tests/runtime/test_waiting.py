"""The queue of the device workers against a plain list of jobs."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.runtime.waiting import Job, WaitingJobs

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
        model=MODELS,
        group=GROUPS,
        images=st.integers(1, 5),
        concurrent=st.booleans(),
        patience=st.integers(1, 9),
    )
    def add(self, model: str, group: str, images: int, concurrent: bool, patience: int) -> None:
        job = Job[int, int]((model, group), images, 0, self.now + patience, model, concurrent)
        self.queue.add(job)
        self.expected.append(job)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.expected))
        assert self.queue.discard(job.model, job.concurrent, job.future)
        assert not self.queue.discard(job.model, job.concurrent, job.future)
        self.expected.remove(job)

    @rule(limit=st.integers(1, 8), concurrent_only=st.booleans(), seconds=st.floats(0, 5))
    def take(self, limit: int, concurrent_only: bool, seconds: float) -> None:
        flow = self.queue.next_flow(concurrent_only=concurrent_only)
        fit = [job for job in self.expected if job.concurrent or not concurrent_only]
        assert (flow is None) == (not fit)
        assert self.queue.waits(concurrent_only=concurrent_only) == bool(fit)
        if flow is None:
            return
        taken = self.queue.take(flow, limit)
        self.queue.charge(flow, seconds)
        same = [job for job in self.expected if (job.model, job.concurrent) == flow.key]
        assert taken[0] is same[0]
        assert [job for job in same if job in taken] == taken
        assert {job.group for job in taken} == {same[0].group}
        assert len(taken) == 1 or sum(job.images for job in taken) <= limit
        for job in taken:
            self.expected.remove(job)

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


def test_models_that_come_and_go_are_forgotten() -> None:
    queue: WaitingJobs[int, int] = WaitingJobs()
    for number in range(2000):
        job = Job[int, int](number, 1, 0, 1.0, model=number)
        queue.add(job)
        flow = queue.next_flow(concurrent_only=False)
        assert flow is not None
        queue.take(flow, 1)
        queue.charge(flow, 0.5)
    assert not queue.waits(concurrent_only=False)
    assert len(queue._resting) <= 256

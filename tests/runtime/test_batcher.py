"""The device worker's queue, tested without torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from service.errors import DeadlineExceeded, Draining, QueueFull
from service.runtime.batcher import Batcher, Job

FAR = time.monotonic() + 3600


class Recorder:
    """Runs batches, notes them, and holds the first until told to go on."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.running = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, jobs: Sequence[Job[str, str]]) -> list[str | BaseException]:
        self.batches.append([job.payload for job in jobs])
        self.running.set()
        assert self.go_on.wait(30)
        return [ValueError(job.payload) if job.payload == "bad" else job.payload.upper() for job in jobs]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make(recorder: Recorder) -> Iterator[Callable[..., Batcher[str, str]]]:
    made: list[Batcher[str, str]] = []

    def start(max_batch: int = 4, queue_size: int = 8) -> Batcher[str, str]:
        made.append(Batcher(recorder, max_batch=max_batch, queue_size=queue_size, observe=lambda *_: None))
        return made[-1]

    yield start
    recorder.go_on.set()
    for batcher in made:
        batcher.stop()


def job(name: str, group: str = "a", images: int = 1, deadline: float = FAR) -> Job[str, str]:
    return Job(group, images, name, deadline)


def test_an_idle_worker_starts_at_once_and_a_busy_one_takes_all_that_came(make, recorder) -> None:
    batcher = make()
    first = batcher.submit(job("1"))
    assert recorder.running.wait(10)
    rest = [batcher.submit(job(name)) for name in "234"]
    recorder.go_on.set()
    assert [future.result(10) for future in (first, *rest)] == ["1", "2", "3", "4"]
    assert recorder.batches == [["1"], ["2", "3", "4"]]


def test_groups_do_not_mix_and_the_oldest_goes_first(make, recorder) -> None:
    batcher = make()
    first = batcher.submit(job("0"))
    assert recorder.running.wait(10)
    futures = [batcher.submit(job(*pair)) for pair in (("b1", "b"), ("a1", "a"), ("b2", "b"))]
    recorder.go_on.set()
    for future in (first, *futures):
        future.result(10)
    assert recorder.batches == [["0"], ["b1", "b2"], ["a1"]]


def test_a_batch_holds_no_more_images_than_it_may_and_a_larger_job_runs_alone(make, recorder) -> None:
    batcher = make(max_batch=4, queue_size=100)
    first = batcher.submit(job("0"))
    assert recorder.running.wait(10)
    futures = [
        batcher.submit(job(name, images=size)) for name, size in (("x", 3), ("y", 2), ("big", 9), ("z", 1))
    ]
    recorder.go_on.set()
    for future in (first, *futures):
        future.result(10)
    assert recorder.batches == [["0"], ["x", "z"], ["y"], ["big"]]


def test_a_cancelled_job_leaves_the_queue_and_its_place(make, recorder) -> None:
    batcher = make(queue_size=2)
    first = batcher.submit(job("1"))
    assert recorder.running.wait(10)
    cancelled, kept = batcher.submit(job("2")), batcher.submit(job("3"))
    with pytest.raises(QueueFull) as full:
        batcher.submit(job("4"))
    assert full.value.retry_after_s is not None
    assert cancelled.cancel()
    late = batcher.submit(job("5"))
    recorder.go_on.set()
    assert [future.result(10) for future in (first, kept, late)] == ["1", "3", "5"]
    assert recorder.batches == [["1"], ["3", "5"]]


def test_what_fails_in_a_batch_fails_only_its_own_job(make, recorder) -> None:
    recorder.go_on.set()
    batcher = make()
    bad, good = batcher.submit(job("bad")), batcher.submit(job("good"))
    assert good.result(10) == "GOOD"
    with pytest.raises(ValueError, match="bad"):
        bad.result(10)


def test_a_batch_that_raises_fails_its_jobs_and_the_worker_goes_on() -> None:
    def run(jobs: Sequence[Job[str, str]]) -> list[str]:
        if jobs[0].payload == "boom":
            raise RuntimeError("boom")
        return [job.payload for job in jobs]

    batcher: Batcher[str, str] = Batcher(run, max_batch=1, queue_size=8, observe=lambda *_: None)
    with pytest.raises(RuntimeError, match="boom"):
        batcher.submit(job("boom")).result(10)
    assert batcher.submit(job("next")).result(10) == "next"
    assert batcher.alive
    batcher.stop()


def test_a_job_past_its_deadline_is_not_run(make, recorder) -> None:
    recorder.go_on.set()
    batcher = make()
    with pytest.raises(DeadlineExceeded):
        batcher.submit(job("late", deadline=time.monotonic() - 1)).result(10)
    assert recorder.batches == []


def test_stop_answers_everyone(make, recorder) -> None:
    batcher = make()
    running = batcher.submit(job("1"))
    assert recorder.running.wait(10)
    waiting = batcher.submit(job("2"))
    stopper = threading.Thread(target=batcher.stop)
    stopper.start()
    with pytest.raises(Draining):
        waiting.result(10)
    recorder.go_on.set()
    stopper.join(10)
    assert running.result(10) == "1"
    with pytest.raises(Draining):
        batcher.submit(job("3"))

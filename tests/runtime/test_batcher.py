"""The device workers and their queue, tested without torch."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import pytest

from service.errors import DeadlineExceeded, Draining, QueueFull
from service.runtime.batch_sizes import BatchSizes
from service.runtime.batcher import Batcher, Job, Pace
from service.runtime.threads import ThreadEnded
from service.runtime.waiting import Waiting

FAR = 1e9
MakeBatcher = Callable[..., Batcher[str, str]]


class Machine:
    """Runs batches, notes them, takes as long as it is told, and holds each batch until told to go on.

    Its clock is moved by its own batches (and by tests), so that what is learned of time is the same every time.
    """

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.paces: list[Pace] = []
        self.threads: dict[str, int] = {}
        self.now = 0.0
        self.cost: Callable[[Sequence[Job[str, str]]], float] = lambda jobs: 1.0
        self.go_on = threading.Event()
        self.started = threading.Condition()

    def __call__(self, jobs: Sequence[Job[str, str]], pace: Pace) -> list[str | BaseException]:
        with self.started:
            self.batches.append([job.payload for job in jobs])
            self.paces.append(pace)
            self.threads |= {job.payload: threading.get_ident() for job in jobs}
            self.started.notify_all()
        assert self.go_on.wait(30)
        with self.started:
            self.now += self.cost(jobs)
        return [ValueError(job.payload) if job.payload == "bad" else job.payload.upper() for job in jobs]

    def clock(self) -> float:
        return self.now

    def wait_for(self, batches: int) -> None:
        """Until so many batches run or have run."""
        with self.started:
            assert self.started.wait_for(lambda: len(self.batches) >= batches, 10)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def make(machine: Machine) -> Iterator[MakeBatcher]:
    made: list[Batcher[str, str]] = []

    def start(
        run: Any = machine,
        lanes: int = 1,
        max_batch: int = 4,
        queue_size: int = 8,
        max_wait_s: float = math.inf,
    ) -> Batcher[str, str]:
        batcher: Batcher[str, str] = Batcher(
            run,
            lanes=lanes,
            max_batch=max_batch,
            queue_size=queue_size,
            max_wait_s=max_wait_s,
            observe=lambda *_: None,
            sizes=learned_sizes(max_batch),
            clock=machine.clock,
        )
        made.append(batcher)
        return batcher

    yield start
    machine.go_on.set()
    for batcher in made:
        batcher.stop()


def learned_sizes(max_batch: int) -> BatchSizes:
    """What is known of groups "a" and "b" on a device that takes as long for a batch as for one image."""
    sizes = BatchSizes(max_batch)
    for group in "ab":
        for crowded in (True, False):
            for _ in range(4 * max_batch):
                sizes.learn(group, sizes.limit(group, max_batch, crowded=crowded), 1.0, crowded=crowded)
            assert sizes.best(group, crowded=crowded) == max_batch
    return sizes


def job(name: str, group: str = "a", images: int = 1, deadline: float = FAR, **more: Any) -> Job[str, str]:
    return Job(group, images, name, deadline, **more)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


def results(futures: Sequence[Future[str]]) -> list[str]:
    return [future.result(10) for future in futures]


# --- batches ------------------------------------------------------------------------------------


def test_an_idle_worker_starts_at_once_and_a_busy_one_takes_all_that_came(make, machine) -> None:
    batcher = make()
    first = batcher.submit(job("1"))
    machine.wait_for(1)
    rest = [batcher.submit(job(name)) for name in "234"]
    machine.go_on.set()
    assert results([first, *rest]) == ["1", "2", "3", "4"]
    assert machine.batches == [["1"], ["2", "3", "4"]]


def test_groups_do_not_mix_and_the_oldest_goes_first(make, machine) -> None:
    batcher = make()
    first = batcher.submit(job("0"))
    machine.wait_for(1)
    futures = [batcher.submit(job(*pair)) for pair in (("b1", "b"), ("a1", "a"), ("b2", "b"))]
    machine.go_on.set()
    results([first, *futures])
    assert machine.batches == [["0"], ["b1", "b2"], ["a1"]]


def test_a_batch_holds_no_more_images_than_it_may_and_a_larger_job_runs_alone(make, machine) -> None:
    batcher = make(max_batch=4, queue_size=100)
    first = batcher.submit(job("0"))
    machine.wait_for(1)
    futures = [
        batcher.submit(job(name, images=size)) for name, size in (("x", 3), ("y", 2), ("big", 9), ("z", 1))
    ]
    machine.go_on.set()
    results([first, *futures])
    assert machine.batches == [["0"], ["x", "z"], ["y"], ["big"]]


@pytest.mark.parametrize(
    ("cost", "largest"),
    [(lambda jobs: 1.0, 8), (lambda jobs: float(len(jobs)), 2)],
    ids=["a GPU", "a CPU"],
)
def test_the_size_of_batches_is_learned_from_what_they_take(make, machine, cost, largest) -> None:
    machine.cost = cost
    batcher = make(max_batch=8, queue_size=100)
    futures = [batcher.submit(job(name, group="new")) for name in names("n", 100)]
    machine.go_on.set()
    results(futures)
    sizes = [len(batch) for batch in machine.batches]
    assert sizes[0] == 1
    assert max(sizes) == largest
    assert batcher.sizes.best("new") == (8 if largest == 8 else 1)


def test_what_fails_in_a_batch_fails_only_its_own_job(make, machine) -> None:
    batcher = make()
    first = batcher.submit(job("1"))
    machine.wait_for(1)
    bad, good = batcher.submit(job("bad")), batcher.submit(job("good"))
    machine.go_on.set()
    assert results([first, good]) == ["1", "GOOD"]
    with pytest.raises(ValueError, match="bad"):
        bad.result(10)
    assert machine.batches[1] == ["bad", "good"]


def test_a_batch_that_raises_fails_its_jobs_and_the_worker_goes_on(make) -> None:
    def run(jobs: Sequence[Job[str, str]], pace: Pace) -> list[str]:
        if jobs[0].payload == "boom":
            raise RuntimeError("boom")
        return [job.payload for job in jobs]

    batcher = make(run)
    with pytest.raises(RuntimeError, match="boom"):
        batcher.submit(job("boom")).result(10)
    assert batcher.submit(job("next")).result(10) == "next"
    assert batcher.alive


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
async def test_a_batch_that_would_end_its_thread_and_the_event_loop_fails_its_jobs(make, end) -> None:
    def run(jobs: Sequence[Job[str, str]], pace: Pace) -> list[str]:
        if jobs[0].payload == "leave":
            raise end
        return [job.payload for job in jobs]

    batcher = make(run)
    with pytest.raises(ThreadEnded, match=end.__name__):
        await batcher.submit_async(job("leave"))
    assert await batcher.submit_async(job("next")) == "next"
    assert batcher.alive


def test_results_that_are_too_few_fail_the_batch_and_not_the_worker(make) -> None:
    batcher = make(lambda jobs, pace: [])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="1 jobs were run and 0 results came"):
            batcher.submit(job("lost")).result(10)
    assert batcher.alive


def test_a_size_that_fails_is_left_again(make, machine) -> None:
    def run(jobs: Sequence[Job[str, str]], pace: Pace) -> list[str | BaseException]:
        if len(jobs) > 1:
            raise MemoryError
        return machine(jobs, pace)

    batcher = make(run, queue_size=100)
    futures = [batcher.submit(job(name, group="new")) for name in names("n", 50)]
    machine.go_on.set()
    failed = [future for future in futures if isinstance(future.exception(10), MemoryError)]
    assert len(failed) == 2  # the two of one trial
    assert batcher.sizes.best("new") == 1


# --- jobs that nobody waits for -----------------------------------------------------------------


def test_a_cancelled_job_leaves_the_queue_and_its_place(make, machine) -> None:
    batcher = make(queue_size=2)
    first = batcher.submit(job("1"))
    machine.wait_for(1)
    cancelled, kept = batcher.submit(job("2")), batcher.submit(job("3"))
    with pytest.raises(QueueFull) as full:
        batcher.submit(job("4"))
    assert full.value.retry_after_s is not None
    assert cancelled.cancel()
    assert batcher.waiting_images == 1
    late = batcher.submit(job("5"))
    machine.go_on.set()
    assert results([first, kept, late]) == ["1", "3", "5"]
    assert machine.batches == [["1"], ["3", "5"]]


def test_a_job_cancelled_before_it_is_queued_is_not_run(make, machine) -> None:
    batcher = make()
    first = batcher.submit(job("1"))
    machine.wait_for(1)
    cancelled = job("2")
    cancelled.future.cancel()
    batcher.submit(cancelled)
    assert batcher.waiting_images == 0
    machine.go_on.set()
    assert results([first, batcher.submit(job("3"))]) == ["1", "3"]
    assert [name for batch in machine.batches for name in batch] == ["1", "3"]


def test_a_job_past_its_deadline_is_not_run(make, machine) -> None:
    machine.go_on.set()
    batcher = make()
    with pytest.raises(DeadlineExceeded):
        batcher.submit(job("late", deadline=-1.0)).result(10)
    assert machine.batches == []


def test_jobs_past_their_deadline_make_room_wherever_they_wait(make, machine) -> None:
    batcher = make(queue_size=3)
    first = batcher.submit(job("1"))
    machine.wait_for(1)
    waiting = [batcher.submit(job("2")), *(batcher.submit(job(name, deadline=5.0)) for name in "34")]
    with pytest.raises(QueueFull):
        batcher.submit(job("5"))
    machine.now = 6.0
    kept = batcher.submit(job("6"))
    for late in waiting[1:]:
        with pytest.raises(DeadlineExceeded):
            late.result(10)
    machine.go_on.set()
    assert results([first, waiting[0], kept]) == ["1", "2", "6"]


# --- fairness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_single_job_waits_for_one_batch_of_a_busy_model_and_lane(make, machine, lanes) -> None:
    batcher = make(lanes=lanes, queue_size=1000)
    busy = [batcher.submit(job(name, model="busy", concurrent=True)) for name in names("n", 500)]
    machine.wait_for(lanes)
    single = batcher.submit(job("single", group="b", model="other", concurrent=True))
    machine.go_on.set()
    results([*busy, single])
    position = machine.batches.index(["single"])
    assert position - lanes < lanes


def test_models_share_the_seconds_of_the_device(make, machine) -> None:
    machine.cost = lambda jobs: {"heavy": 0.1, "light": 0.01}[str(jobs[0].model)]
    batcher = make(max_batch=1, queue_size=1000)
    blocker = batcher.submit(job("blocker", model="light"))
    machine.wait_for(1)
    futures = [batcher.submit(job(name, model="heavy")) for name in names("heavy", 100)]
    futures += [batcher.submit(job(name, model="light")) for name in names("light", 100)]
    machine.go_on.set()
    results([blocker, *futures])
    counts = Counter(batch[0].rstrip("0123456789") for batch in machine.batches[:67])
    assert counts["heavy"] == pytest.approx(6, abs=1)


def test_time_that_a_model_did_not_ask_for_is_no_credit(make, machine) -> None:
    batcher = make(max_batch=1, queue_size=1000)
    machine.go_on.set()
    results([batcher.submit(job("rare", model="rare"))])
    results([batcher.submit(job(name, model="busy")) for name in names("n", 50)])
    machine.go_on.clear()
    blocker = batcher.submit(job("blocker", model="busy"))
    machine.wait_for(52)
    futures = [batcher.submit(job(name, model="busy")) for name in names("busy", 20)]
    futures += [batcher.submit(job(name, model="rare")) for name in names("rare", 20)]
    machine.go_on.set()
    results([blocker, *futures])
    next_ten = Counter(batch[0].rstrip("0123456789") for batch in machine.batches[52:62])
    assert next_ten["busy"] == pytest.approx(5, abs=1)


def test_one_long_batch_does_not_lock_its_model_out(make, machine) -> None:
    machine.cost = lambda jobs: 600.0 if jobs[0].payload == "long" else 0.1
    batcher = make(max_batch=1, queue_size=1000)
    long = batcher.submit(job("long", model="slow"))
    machine.wait_for(1)
    rest = [batcher.submit(job(name, model="busy")) for name in names("n", 100)]
    rest.append(batcher.submit(job("again", model="slow")))
    machine.go_on.set()
    results([long, *rest])
    assert 1 < machine.batches.index(["again"]) < 15


def test_a_single_job_waits_for_one_batch_of_a_busy_client_of_many_models(make, machine) -> None:
    batcher = make(max_batch=1, queue_size=1000)
    busy = [batcher.submit(job(name, model=name, client="busy")) for name in names("n", 200)]
    machine.wait_for(1)
    single = batcher.submit(job("single", model="n7", client="other"))
    machine.go_on.set()
    results([*busy, single])
    assert machine.batches.index(["single"]) == 1


def test_clients_share_the_seconds_of_the_device_whatever_their_models_are(make, machine) -> None:
    batcher = make(max_batch=1, queue_size=1000)
    blocker = batcher.submit(job("blocker", model="m", client="blocker"))
    machine.wait_for(1)
    many = [batcher.submit(job(name, model=name, client="many")) for name in names("many", 50)]
    one = [batcher.submit(job(name, model="m", client="one")) for name in names("one", 50)]
    machine.go_on.set()
    results([blocker, *many, *one])
    counts = Counter(batch[0].rstrip("0123456789") for batch in machine.batches[1:41])
    assert counts["many"] == pytest.approx(20, abs=1)


def test_jobs_of_several_clients_share_a_batch(make, machine) -> None:
    batcher = make(max_batch=4)
    machine.cost = lambda jobs: 1.0  # a batch takes as long as one image: larger ones pay
    blocker = batcher.submit(job("blocker", model="m", group="g", client="z"))
    machine.wait_for(1)
    futures = [batcher.submit(job(name, model="m", group="g", client=name)) for name in "abcd"]
    machine.go_on.set()
    results([blocker, *futures])
    assert max(len(batch) for batch in machine.batches) > 1


def test_a_full_queue_takes_a_client_that_has_less_and_refuses_who_has_most(make, machine) -> None:
    batcher = make(max_batch=1, queue_size=4)
    blocker = batcher.submit(job("blocker", client="greedy"))
    machine.wait_for(1)
    greedy = [batcher.submit(job(name, client="greedy")) for name in "1234"]
    with pytest.raises(QueueFull):
        batcher.submit(job("5", client="greedy"))
    modest = [batcher.submit(job(name, client="modest")) for name in "ab"]
    for pushed_out in (greedy[3], greedy[2]):
        with pytest.raises(QueueFull, match="the queue holds 4"):
            pushed_out.result(10)
    with pytest.raises(QueueFull):  # both have two now
        batcher.submit(job("c", client="modest"))
    machine.go_on.set()
    assert results([blocker, *greedy[:2], *modest]) == ["BLOCKER", "1", "2", "A", "B"]


# --- lanes --------------------------------------------------------------------------------------


def test_two_concurrent_jobs_overlap(make) -> None:
    both = threading.Barrier(2, timeout=30)

    def run(jobs: Sequence[Job[str, str]], pace: Pace) -> list[str]:
        both.wait()
        return [job.payload for job in jobs]

    batcher = make(run, lanes=2)
    assert results([batcher.submit(job(name, concurrent=True)) for name in "12"]) == ["1", "2"]


def test_jobs_that_may_not_run_beside_others_run_on_the_thread_of_the_first_lane(make, machine) -> None:
    batcher = make(lanes=3, max_batch=1, queue_size=100)
    machine.go_on.set()
    futures = []
    with batcher._changed:  # the lanes see all of them at once
        for index in range(20):
            futures.append(batcher.submit(job(f"alone {index}")))
            futures.append(batcher.submit(job(f"beside {index}", concurrent=True)))
    results(futures)
    of_lane = {name: pace.lane for [name], pace in zip(machine.batches, machine.paces, strict=True)}
    assert {of_lane[f"alone {index}"] for index in range(20)} == {0}
    assert len({machine.threads[f"alone {index}"] for index in range(20)}) == 1


def test_a_job_of_the_first_lane_waits_while_concurrent_ones_pass(make, machine) -> None:
    go_on = threading.Event()

    def run(jobs: Sequence[Job[str, str]], pace: Pace) -> list[str | BaseException]:
        assert not jobs[0].payload.startswith("alone") or go_on.wait(30)
        machine.go_on.set()
        return machine(jobs, pace)

    batcher = make(run, lanes=2)
    alone = [batcher.submit(job(f"alone{index}")) for index in range(2)]
    assert results([batcher.submit(job(name, concurrent=True)) for name in "12"]) == ["1", "2"]
    assert not any(future.done() for future in alone)
    assert results([batcher.submit(job("3", concurrent=True))]) == ["3"]
    go_on.set()
    assert results(alone) == ["ALONE0", "ALONE1"]


def test_lanes_that_are_free_share_what_waits(make) -> None:
    both, sizes = threading.Barrier(2, timeout=30), []

    def run(jobs: Sequence[Job[str, str]], pace: Pace) -> list[str]:
        both.wait()
        sizes.append(len(jobs))
        return [job.payload for job in jobs]

    batcher = make(run, lanes=2, max_batch=8)
    with batcher._changed:  # the lanes see all of them at once
        futures = [batcher.submit(job(name, concurrent=True)) for name in names("n", 8)]
    results(futures)
    assert sizes == [4, 4]


def test_crowded_means_that_another_lane_runs(make, machine) -> None:
    batcher = make(lanes=2)
    first = batcher.submit(job("1", concurrent=True))
    machine.wait_for(1)
    second = batcher.submit(job("2", concurrent=True))
    machine.wait_for(2)
    machine.go_on.set()
    results([first, second])
    assert [pace.crowded for pace in machine.paces] == [False, True]
    assert {pace.lane for pace in machine.paces} == {0, 1}


def test_crowded_means_that_another_lane_will_run_at_once(make, machine) -> None:
    batcher = make(lanes=2, max_batch=1)
    with batcher._changed:
        futures = [batcher.submit(job(name, concurrent=True)) for name in "12"]
    machine.go_on.set()
    results(futures)
    assert machine.paces[0].crowded


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_no_other_lane_may_run_is_no_crowd(make, machine, lanes) -> None:
    batcher = make(lanes=lanes, max_batch=1)
    futures = [batcher.submit(job(name)) for name in "123"]
    machine.go_on.set()
    results(futures)
    assert [pace.crowded for pace in machine.paces] == [False] * 3


def test_the_longest_batch_says_how_long_the_lanes_are_busy(make, machine) -> None:
    batcher = make(lanes=3)
    assert batcher.busy_seconds() == 0.0
    first = batcher.submit(job("1", concurrent=True))
    machine.wait_for(1)
    machine.now = 100.0
    second = batcher.submit(job("2", concurrent=True))
    machine.wait_for(2)
    machine.now = 130.0
    assert batcher.busy_seconds() == 130.0
    machine.go_on.set()
    results([first, second])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lane_that_ends_is_noticed(machine) -> None:
    def end(*_: Any) -> None:
        raise SystemExit

    machine.go_on.set()
    batcher: Batcher[str, str] = Batcher(machine, lanes=2, max_batch=1, queue_size=1, observe=end)
    assert batcher.submit(job("1")).result(10) == "1"
    batcher._lanes[0].thread.join(10)
    assert not batcher.alive
    batcher.stop()


def test_what_waits_is_counted_without_naming_a_model_or_a_client(make, machine) -> None:
    batcher = make()
    futures = [batcher.submit(job("0"))]
    machine.wait_for(1)
    queued_at = machine.now
    for name, model, images in (("1", "m", 2), ("2", "m", 3), ("3", "n", 1)):
        client = "b" if name == "2" else "a"
        waiting = job(name, model=model, images=images, client=client, queued_at=queued_at)
        futures.append(batcher.submit(waiting))
    machine.now = 4.0
    assert batcher.waiting() == Waiting(images=6, longest=5, models=2, clients=2, oldest_s=4.0)
    machine.go_on.set()
    results(futures)
    assert batcher.waiting() == Waiting(images=0, longest=0, models=0, clients=0, oldest_s=0.0)


def test_each_batch_is_told_with_its_jobs_and_its_seconds(machine) -> None:
    told: list[tuple[Any, float]] = []
    machine.go_on.set()
    batcher: Batcher[str, str] = Batcher(
        machine,
        lanes=1,
        max_batch=4,
        queue_size=8,
        observe=lambda *batch: told.append(batch),
        clock=machine.clock,
    )
    asked = job("1", model="m", images=3)
    batcher.submit(asked).result(10)
    batcher.stop()
    assert told == [([asked], 1.0)]


# --- a full queue, and the end ------------------------------------------------------------------


def test_a_full_queue_says_how_long_it_takes_to_drain(make, machine) -> None:
    machine.cost = lambda jobs: 0.5 * len(jobs)
    batcher = make(max_batch=1, queue_size=8)
    machine.go_on.set()
    results([batcher.submit(job(name)) for name in names("n", 8)])
    machine.go_on.clear()
    futures = [batcher.submit(job("running"))]
    machine.wait_for(9)
    futures += [batcher.submit(job(name)) for name in names("n", 8)]
    with pytest.raises(QueueFull, match="8 images wait; the queue holds 8") as full:
        batcher.submit(job("more"))
    assert full.value.retry_after_s is not None
    assert 4.0 <= full.value.retry_after_s <= 6.0  # those who are refused together do not come back together


def test_a_full_queue_is_over_when_the_last_deadline_is(make, machine) -> None:
    machine.cost = lambda jobs: 100.0
    batcher = make(max_batch=1, queue_size=4)
    machine.go_on.set()
    for began in (0.0, 100.0, 200.0):
        results([batcher.submit(job("slow", deadline=began + 30.0))])
    machine.go_on.clear()
    batcher.submit(job("running", deadline=330.0))
    machine.wait_for(4)
    batcher.submit(job("waiting", deadline=330.0))
    with pytest.raises(QueueFull, match=r"takes about 100.0 s; this request may wait for 2\d.\d s") as full:
        batcher.submit(job("more", deadline=330.0))
    assert full.value.retry_after_s is not None
    assert 30.0 <= full.value.retry_after_s <= 45.0


def test_a_large_job_has_a_place_in_an_empty_queue_only(make, machine) -> None:
    batcher = make(queue_size=2)
    first = batcher.submit(job("1"))
    machine.wait_for(1)
    large = batcher.submit(job("2", images=9))
    with pytest.raises(QueueFull):
        batcher.submit(job("3"))
    machine.go_on.set()
    assert results([first, large]) == ["1", "2"]


@pytest.mark.parametrize("lanes", [1, 3])
def test_stop_answers_everyone_and_ends_the_lanes(make, machine, lanes) -> None:
    batcher = make(lanes=lanes)
    running = []
    for index in range(lanes):
        running.append(batcher.submit(job(f"r{index}", concurrent=True)))
        machine.wait_for(index + 1)
    waiting = [batcher.submit(job("2", concurrent=True)), batcher.submit(job("3"))]
    stopper = threading.Thread(target=batcher.stop)
    stopper.start()
    for future in waiting:
        with pytest.raises(Draining):
            future.result(10)
    with pytest.raises(Draining):
        batcher.submit(job("4"))
    machine.go_on.set()
    stopper.join(10)
    assert results(running) == [f"R{index}" for index in range(lanes)]
    assert not any(lane.thread.is_alive() for lane in batcher._lanes)


# --- the event loop -----------------------------------------------------------------------------


async def test_the_event_loop_is_told_of_a_whole_batch_at_once(make, machine) -> None:
    batcher = make()
    first = batcher.submit_async(job("1"))
    machine.wait_for(1)
    rest = [batcher.submit_async(job(name)) for name in ("2", "bad", "3")]
    machine.go_on.set()
    assert await first == "1"
    assert await rest[0] == "2"
    assert all(future.done() for future in rest)
    assert isinstance(rest[1].exception(), ValueError)


async def test_a_cancelled_wait_gives_its_place_back(make, machine) -> None:
    batcher = make(queue_size=1)
    first = batcher.submit_async(job("1"))
    machine.wait_for(1)
    left = job("2")
    waiter = batcher.submit_async(left)
    with pytest.raises(QueueFull):
        batcher.submit_async(job("3"))
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert (await asyncio.to_thread(wait, [left.future], 10)).done
    assert left.future.cancelled()
    kept = batcher.submit_async(job("4"))
    machine.go_on.set()
    assert [await first, await kept] == ["1", "4"]
    assert ["2"] not in machine.batches


async def test_a_wait_cancelled_while_its_batch_runs_disturbs_nobody(make, machine) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def run(jobs: Sequence[Job[str, str]], pace: Pace) -> list[str | BaseException]:
        if len(jobs) == 2:
            inside.set()
            assert go_on.wait(30)
        return machine(jobs, pace)

    batcher = make(run)
    first = batcher.submit_async(job("0"))
    machine.wait_for(1)
    pair = [batcher.submit_async(job(name)) for name in "12"]
    machine.go_on.set()
    assert inside.wait(10)
    pair[0].cancel()
    go_on.set()
    assert [await first, await pair[1]] == ["0", "2"]
    assert pair[0].cancelled()
    assert await batcher.submit_async(job("3")) == "3"


async def test_a_job_that_comes_too_late_is_told_to_the_event_loop(make, machine) -> None:
    with pytest.raises(DeadlineExceeded):
        await make().submit_async(job("late", deadline=-1.0))


def test_an_event_loop_that_is_gone_does_not_stop_the_lane(make, machine) -> None:
    batcher = make()

    async def leave() -> None:
        batcher.submit_async(job("1"))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    machine.wait_for(1)
    loop.close()
    machine.go_on.set()
    assert batcher.submit(job("2")).result(10) == "2"
    assert batcher.alive


# --- what cannot be in time ---------------------------------------------------------------------


def busy_batcher(make, machine, cost_s: float = 1.0, **given: Any) -> Batcher[str, str]:
    """One that has learned what an image takes, and is held in a batch."""
    machine.cost = lambda jobs: cost_s * len(jobs)
    batcher = make(max_batch=1, **given)
    machine.go_on.set()
    for name in names("n", 20):
        results([batcher.submit(job(name))])
    machine.go_on.clear()
    batcher.submit(job("running"))
    machine.wait_for(21)
    return batcher


def test_who_would_wait_too_long_is_refused_and_another_client_is_not(make, machine) -> None:
    batcher = busy_batcher(make, machine, max_wait_s=1.5, queue_size=100)
    waiting = [batcher.submit(job(name, client="many")) for name in "ab"]
    with pytest.raises(QueueFull, match=r"takes about 2.0 s; this request may wait for 1.5 s"):
        batcher.submit(job("c", client="many"))
    with pytest.raises(QueueFull):
        batcher.refuse_long_wait(None, FAR, "many")
    batcher.refuse_long_wait(None, FAR, "one")
    waiting.append(batcher.submit(job("d", client="one")))
    machine.go_on.set()
    assert sorted(results(waiting)) == ["A", "B", "D"]


def test_who_would_wait_beyond_its_deadline_is_refused(make, machine) -> None:
    batcher = busy_batcher(make, machine)
    waiting = [batcher.submit(job(name)) for name in "ab"]
    with pytest.raises(QueueFull, match=r"takes about 2.0 s; this request may wait for 1.0 s"):
        batcher.submit(job("c", deadline=machine.now + 2.0))  # one of them for its own batch
    machine.go_on.set()
    assert results(waiting) == ["A", "B"]


def test_a_job_that_cannot_be_done_in_time_makes_way_for_those_that_can(make, machine) -> None:
    batcher = busy_batcher(make, machine)
    hopeless = batcher.submit(job("hopeless", deadline=machine.now + 1.5))
    waiting = batcher.submit(job("waiting"))
    machine.go_on.set()
    assert results([waiting]) == ["WAITING"]
    with pytest.raises(DeadlineExceeded):
        hopeless.result(10)
    assert ["hopeless"] not in machine.batches


def test_a_job_that_seems_hopeless_is_tried_if_nothing_else_waits(make, machine) -> None:
    batcher = busy_batcher(make, machine)
    alone = batcher.submit(job("alone", deadline=machine.now + 1.5))
    machine.go_on.set()
    assert results([alone]) == ["ALONE"]


def test_a_model_that_has_become_faster_is_tried_again(make, machine) -> None:
    batcher = busy_batcher(make, machine, queue_size=100)  # has learned one second
    machine.cost = lambda jobs: 0.01 * len(jobs)
    soon = machine.now + 0.5
    futures = [batcher.submit(job(name, client=name, deadline=soon)) for name in names("n", 30)]
    machine.go_on.set()
    refused = [future.exception(10) for future in futures]
    assert isinstance(refused[0], DeadlineExceeded)
    assert refused[-1] is None
    assert ["n29"] in machine.batches


def test_first_batches_do_not_tell_how_long_the_queue_takes(make, machine) -> None:
    batcher = busy_batcher(make, machine, 0.01, max_wait_s=1.0, queue_size=100)
    machine.go_on.set()
    results([batcher.submit(job("after"))])
    machine.cost = lambda jobs: 100.0
    for name in names("new", 5):
        results([batcher.submit(job(name, group=name))])
    machine.go_on.clear()
    futures = [batcher.submit(job(name)) for name in names("n", 20)]
    machine.cost = lambda jobs: 0.01
    machine.go_on.set()
    assert len(results(futures)) == 20

"""The device workers: threads ("lanes") that run what waits for the device, in batches.

Work-conserving: an idle lane starts at once with what is there; a busy one finds what has come meanwhile. No timers.
Lane 0 is where torch runs, always: OpenMP gives every thread that uses it a team of its own, and once these outnumber
the cores, small networks run slower. The other lanes take only jobs that may run beside another batch.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

from service.errors import DeadlineExceeded, Draining, QueueFull, ServiceError
from service.runtime.batch_sizes import BatchSizes
from service.runtime.rates import DrainRate, retry_after
from service.runtime.threads import contained
from service.runtime.waiting import Flow, Job, Place, Turn, Waiting, WaitingJobs, count_images

__all__ = ["Batcher", "Job", "Pace"]

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Pace:
    """Where a batch runs, and whether it has the cores to itself: `crowded` if another lane runs or will at once."""

    lane: int
    crowded: bool


@dataclass(frozen=True)
class _Batch(Generic[P, R]):
    turn: Turn[P, R]
    pace: Pace
    charged_s: float
    started: float


class _Lane:
    """A thread and what it waits on. `asleep` until it is called; `busy_since` is None between batches."""

    def __init__(self, index: int, lock: threading.RLock) -> None:
        self.index = index
        self.called = threading.Condition(lock)
        self.asleep = False
        self.busy_since: float | None = None
        self.thread: threading.Thread


class Batcher(Generic[P, R]):
    """A bounded queue, fair between clients and between models, in front of one thread or more.

    Args:
        run: computes one batch on the thread of its lane: results in the order of the jobs. An exception among the
            results fails only its own job; one raised fails the whole batch, and never the thread.
        lanes: threads. Those after the first run only `concurrent` jobs.
        max_batch: images in one batch; a single larger job runs alone. Below it the size is learned.
        queue_size: images that may wait.
        max_wait_s: how long a job may be expected to wait.
        observe: told the jobs and the seconds of each batch.
        sizes: what is learned of batch sizes, where `run` wants to know it too.
        clock: seconds; what deadlines are readings of.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job[P, R]], Pace], Sequence[R | BaseException]],
        *,
        lanes: int,
        max_batch: int,
        queue_size: int,
        max_wait_s: float = math.inf,
        observe: Callable[[Sequence[Job[P, R]], float], None],
        sizes: BatchSizes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sizes = BatchSizes(max_batch) if sizes is None else sizes
        self._run = run
        self._queue_size = queue_size
        self._max_wait_s = max_wait_s
        self._observe = observe
        self._clock = clock
        self._waiting: WaitingJobs[P, R] = WaitingJobs()
        self._rate = DrainRate()
        self._stopping = False
        lock = threading.RLock()  # a future cancelled under it calls back
        self._changed = threading.Condition(lock)
        self._lanes = [_Lane(index, lock) for index in range(lanes)]
        for lane in self._lanes:
            lane.thread = threading.Thread(
                target=self._work, args=(lane,), name=f"device-worker-{lane.index}", daemon=True
            )
            lane.thread.start()

    @property
    def waiting_images(self) -> int:
        """Images in the queue."""
        return self._waiting.images

    def waiting(self) -> Waiting:
        """What is in the queue, for whoever counts it."""
        with self._changed:
            return self._waiting.summary(self._clock())

    def busy_seconds(self) -> float:
        """How long the longest of the batches that run now has been running; 0 when all lanes are idle."""
        now = self._clock()
        return max(0.0 if (since := lane.busy_since) is None else now - since for lane in self._lanes)

    @property
    def alive(self) -> bool:
        """Whether the threads of all lanes run."""
        return all(lane.thread.is_alive() for lane in self._lanes)

    # --- what comes in --------------------------------------------------------------------------

    def submit(self, job: Job[P, R]) -> Future[R]:
        """Queue a job. Cancelling its future before it runs gives its place back at once.

        A client that has most of a full queue waiting makes room: its newest jobs are refused for another's.

        Raises:
            QueueFull: the queue has no place for its images, or it would wait for too long; `retry_after_s` is how
                long the queue takes to drain.
            Draining: the worker is stopping.
        """
        with self._changed:
            if self._stopping:
                raise _draining()
            late = self._waiting.take_expired(self._clock())
            full = self._too_long(job.client, job.model, job.deadline, self._proven_seconds(job))
            if full is not None:
                self.sizes.doubt(job.group)
            pushed_out = [] if full else self._waiting.take_for_room(job, self._queue_size)
            full = full or self._full(job)
            if full is None:
                self._waiting.add(job)
                self._call_a_lane(job)
                self._changed.notify_all()
        _refuse(late, _too_late)
        _refuse(pushed_out, self._queue_full)
        if full is not None:
            raise full
        job.future.add_done_callback(partial(self._give_place_back, job.place))
        return job.future

    def submit_async(self, job: Job[P, R]) -> asyncio.Future[R]:
        """Queue a job and have the running event loop told: once for all jobs of a batch.

        Cancelling what is returned cancels the job. Raises what `submit` raises.
        """
        waiter: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        job.waiter = waiter
        self.submit(job)
        waiter.add_done_callback(partial(_cancel_too, job.future))
        return waiter

    def refuse_long_wait(self, model: Hashable, deadline: float, client: Hashable = None) -> None:
        """Refuse early what `submit` would refuse now: before anything is decoded for it.

        Raises:
            QueueFull: it would wait for too long.
        """
        with self._changed:
            too_long = self._too_long(client, model, deadline)
        if too_long is not None:
            raise too_long

    def _proven_seconds(self, job: Job[P, R]) -> float:
        return self.sizes.proven_seconds(job.group, job.images)

    def _too_long(
        self, client: Hashable, model: Hashable, deadline: float, own_s: float = 0.0
    ) -> QueueFull | None:
        """Why a job should not begin to wait; None if it may. What would wait for nothing is always tried."""
        if not self._rate.is_sound:
            return None
        wait_s = self._rate.seconds_for(self._waiting.ahead(client, model))
        limit_s = max(0.0, min(self._max_wait_s, deadline - self._clock() - own_s))
        if wait_s <= limit_s or not wait_s:
            return None
        return self._refusal(
            f"the queue takes about {wait_s:.1f} s; this request may wait for {limit_s:.1f} s"
        )

    def _full(self, job: Job[P, R]) -> QueueFull | None:
        """Why there is no place for a job; None if there is."""
        images = self._waiting.images
        return self._queue_full() if images and images + job.images > self._queue_size else None

    def _queue_full(self) -> QueueFull:
        return self._refusal(f"{self._waiting.images} images wait; the queue holds {self._queue_size}")

    def _refusal(self, detail: str) -> QueueFull:
        # whoever waits is answered or gone by the last deadline
        at_most_s = self._waiting.last_deadline - self._clock()
        wait_s = self._rate.seconds_for(self._waiting.images)
        return QueueFull(detail, retry_after_s=retry_after(wait_s, at_most_s))

    def _call_a_lane(self, job: Job[P, R]) -> None:
        """Wake one idle lane that may run this; the last ones first, as the first has torch's jobs to itself."""
        for lane in reversed(self._lanes if job.concurrent else self._lanes[:1]):
            if lane.asleep:
                lane.asleep = False
                lane.called.notify()
                return

    def _give_place_back(self, place: Place, future: Future[R]) -> None:
        """Called with every future that is done; those that were cancelled may still wait."""
        if not future.cancelled():
            return
        with self._changed:
            waited = self._waiting.discard(place, future)
            self._changed.notify_all()
        if waited:
            future.set_running_or_notify_cancel()

    # --- what a lane does -----------------------------------------------------------------------

    def _work(self, lane: _Lane) -> None:
        while self._work_once(lane):
            pass

    def _work_once(self, lane: _Lane) -> bool:
        """Run one batch; False when there will be no more. Nothing of a batch outlives this frame."""
        late, batch = self._next(lane)
        _refuse(late, _too_late)
        if batch is not None:
            self._run_batch(lane, batch)
        return bool(late) or batch is not None

    def _next(self, lane: _Lane) -> tuple[list[Job[P, R]], _Batch[P, R] | None]:
        """Jobs that came too late, and what to run; neither only when the lane is to end."""
        with self._changed:
            while True:
                late = self._waiting.take_expired(self._clock())
                flow = self._waiting.next_flow(concurrent_only=lane.index > 0)
                if flow and (hopeless := self._take_hopeless(flow)):
                    return late + hopeless, None
                if late or flow or self._stopping:
                    batch = None if flow is None else self._take(lane, flow)
                    self._changed.notify_all()
                    return late, batch
                lane.asleep = True
                lane.called.wait()

    def _take_hopeless(self, flow: Flow[P, R]) -> list[Job[P, R]]:
        """Jobs whose turn it is and that cannot meet their deadline, if their place is any use to others."""
        now = self._clock()
        first_jobs = islice(flow.groups[flow.next_group].values(), self.sizes.max_batch)
        slow = [job for job in first_jobs if now + self._proven_seconds(job) > job.deadline]
        if not slow or count_images(slow) == self._waiting.images:
            return []
        for job in slow:
            self._waiting.discard(job.place, job.future)
        self.sizes.doubt(slow[0].group)
        return slow

    def _take(self, lane: _Lane, flow: Flow[P, R]) -> _Batch[P, R]:
        """The next batch: of a flow, and what else of its group waits. Lanes that are free share it."""
        group = flow.next_group
        busy = sum(other.busy_since is not None for other in self._lanes)
        free = len(self._lanes) - busy if flow.place.concurrent else 1
        images = self._waiting.images_beside(flow)
        share = -(-images // free)
        limit = self.sizes.limit(group, share, crowded=busy > 0 or share < images)
        turn = self._waiting.take(flow, min(limit, share))
        charged_s = self.sizes.seconds(group, turn.images)
        self._waiting.charge(turn, charged_s)
        # lane 0 may run whatever waits, the others only what may run beside it
        crowded = busy > 0 or (len(self._lanes) > 1 and self._waiting.waits(concurrent_only=lane.index == 0))
        lane.busy_since = started = self._clock()
        if not busy:
            self._rate.begin(started)
        return _Batch(turn, Pace(lane.index, crowded), charged_s, started)

    def _run_batch(self, lane: _Lane, batch: _Batch[P, R]) -> None:
        jobs = [job for job in batch.turn.jobs if job.future.set_running_or_notify_cancel()]
        results = self._results(jobs, batch.pace) if jobs else []
        seconds = self._settle(lane, batch, jobs, results)
        try:
            if jobs:
                self._observe(jobs, seconds)
        finally:
            _answer(jobs, results)

    def _results(self, jobs: Sequence[Job[P, R]], pace: Pace) -> Sequence[R | BaseException]:
        try:
            results = self._run(jobs, pace)
            if len(results) != len(jobs):
                raise RuntimeError(f"{len(jobs)} jobs were run and {len(results)} results came")
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the callers, not to this thread
            return [contained(error)] * len(jobs)
        return results

    def _settle(
        self,
        lane: _Lane,
        batch: _Batch[P, R],
        jobs: Sequence[Job[P, R]],
        results: Sequence[R | BaseException],
    ) -> float:
        """Free the lane, and take note of the seconds that the batch took."""
        images, failed = count_images(jobs), all(isinstance(result, BaseException) for result in results)
        with self._changed:
            now = self._clock()
            seconds = now - batch.started
            lane.busy_since = None
            if jobs and self.sizes.has_met(jobs[0].group, images, crowded=batch.pace.crowded):
                self._rate.note(images, now)
            else:  # the first of a size also pays for what is set up once
                self._rate.begin(now)
            self._waiting.charge(batch.turn, seconds - batch.charged_s)
            if not failed:
                self.sizes.learn(jobs[0].group, images, seconds, crowded=batch.pace.crowded)
            elif len(jobs) > 1:
                self.sizes.put_off(jobs[0].group, crowded=batch.pace.crowded)
        return seconds

    # --- the end --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Refuse new jobs, fail those that wait, let the running batches finish, and end the threads."""
        with self._changed:
            self._stopping = True
            waiting = self._waiting.take_all()
            for lane in self._lanes:
                lane.called.notify()
            self._changed.notify_all()
        _refuse(waiting, _draining)
        for lane in self._lanes:
            lane.thread.join()


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed, or would have before the answer, while the request waited")


def _draining() -> Draining:
    return Draining("the service is shutting down")


def _refuse(jobs: Iterable[Job[P, R]], make_error: Callable[[], ServiceError]) -> None:
    """Answer jobs that were not run, those that nobody cancelled."""
    refused = [job for job in jobs if job.future.set_running_or_notify_cancel()]
    _answer(refused, [make_error() for _ in refused])


def _answer(jobs: Sequence[Job[P, R]], results: Sequence[R | BaseException]) -> None:
    """Complete the futures of jobs that were claimed, and tell each event loop once."""
    told: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[R], R | BaseException]]] = {}
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
        if job.waiter is not None:
            told.setdefault(job.waiter.get_loop(), []).append((job.waiter, result))
    for loop, answers in told.items():
        with suppress(RuntimeError):  # a loop that is closed: nobody waits
            loop.call_soon_threadsafe(_tell, answers)


def _tell(answers: Iterable[tuple[asyncio.Future[R], R | BaseException]]) -> None:
    """Complete futures on their event loop; those cancelled meanwhile stay so."""
    for waiter, result in answers:
        if waiter.done():
            continue
        if isinstance(result, BaseException):
            waiter.set_exception(result)
        else:
            waiter.set_result(result)


def _cancel_too(future: Future[R], waiter: asyncio.Future[R]) -> None:
    if waiter.cancelled():
        future.cancel()

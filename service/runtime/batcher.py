"""The device worker: one thread that owns the device and runs what waits for it, in batches.

Work-conserving: an idle device starts at once with what is there, a busy one takes all that has come meanwhile
and goes together. No timers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.errors import DeadlineExceeded, Draining, QueueFull

P = TypeVar("P")
R = TypeVar("R")


@dataclass
class Job(Generic[P, R]):
    """One request's images for the device.

    Jobs of one `group` may run in one forward pass. `deadline` is a reading of `time.monotonic`.
    """

    group: Hashable
    images: int
    payload: P
    deadline: float
    future: Future[R] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)


class Batcher(Generic[P, R]):
    """A bounded queue in front of one thread.

    Args:
        run: computes one batch: results in the order of the jobs. An exception among the results fails only its
            own job; one raised fails the whole batch, and never the thread.
        max_batch: images in one batch; a single larger job runs alone.
        queue_size: images that may wait.
        observe: told the images of each batch and the seconds it took.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job[P, R]]], Sequence[R | BaseException]],
        *,
        max_batch: int,
        queue_size: int,
        observe: Callable[[int, float], None],
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._queue_size = queue_size
        self._observe = observe
        self._queue: deque[Job[P, R]] = deque()
        self._waiting_images = 0
        self._stopping = False
        self._images_per_s = 0.0
        self._busy_since: float | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="device-worker", daemon=True)
        self._thread.start()

    @property
    def waiting_images(self) -> int:
        """Images in the queue, cancelled ones included until the worker meets them."""
        return self._waiting_images

    def busy_seconds(self) -> float:
        """How long the batch that runs now has been running; 0 when idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job[P, R]) -> Future[R]:
        """Queue a job.

        Raises:
            QueueFull: the queue has no place for its images; `retry_after_s` is how long the queue takes to drain.
            Draining: the worker is stopping.
        """
        with self._changed:
            if self._stopping:
                raise Draining("the service is shutting down")
            self._drop_cancelled()
            if self._waiting_images and self._waiting_images + job.images > self._queue_size:
                detail = f"{self._waiting_images} images wait; the queue holds {self._queue_size}"
                raise QueueFull(detail, retry_after_s=self._drain_seconds())
            self._queue.append(job)
            self._waiting_images += job.images
            self._changed.notify()
        return job.future

    def _drain_seconds(self) -> float:
        return max(1.0, self._waiting_images / self._images_per_s) if self._images_per_s else 1.0

    def _drop_cancelled(self) -> None:
        kept = deque(job for job in self._queue if not job.future.cancelled())
        if len(kept) != len(self._queue):
            self._queue = kept
            self._waiting_images = sum(job.images for job in kept)

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Run one batch; False when there will be no more. Nothing of a batch outlives this frame."""
        batch = self._next_batch()
        if batch is None:
            return False
        live = [job for job in batch if self._start(job)]
        if live:
            self._run_batch(live)
        return True

    def _next_batch(self) -> list[Job[P, R]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if not self._queue:
                return None
            return self._take_group()

    def _take_group(self) -> list[Job[P, R]]:
        """The oldest job and all of its group that fit beside it, in order; other groups keep their places."""
        group, images = self._queue[0].group, 0
        taken: list[Job[P, R]] = []
        left: deque[Job[P, R]] = deque()
        for job in self._queue:
            if job.group == group and (not taken or images + job.images <= self._max_batch):
                taken.append(job)
                images += job.images
            else:
                left.append(job)
        self._queue = left
        self._waiting_images -= images
        return taken

    def _start(self, job: Job[P, R]) -> bool:
        """Claim a job for running; False if nobody waits for it any more."""
        if not job.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() > job.deadline:
            job.future.set_exception(
                DeadlineExceeded("the deadline passed while the request waited in the queue")
            )
            return False
        return True

    def _run_batch(self, jobs: Sequence[Job[P, R]]) -> None:
        images = sum(job.images for job in jobs)
        started = self._busy_since = time.monotonic()
        try:
            results = self._run(jobs)
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the callers, not to this thread
            results = [error] * len(jobs)
        self._busy_since = None
        seconds = time.monotonic() - started
        self._note_speed(images, seconds)
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    def _note_speed(self, images: int, seconds: float) -> None:
        now = images / max(seconds, 1e-6)
        self._images_per_s = 0.8 * self._images_per_s + 0.2 * now if self._images_per_s else now
        self._observe(images, seconds)

    def stop(self) -> None:
        """Refuse new jobs, fail those that wait, let the running batch finish, and end the thread."""
        with self._changed:
            self._stopping = True
            waiting, self._queue = self._queue, deque()
            self._waiting_images = 0
            self._changed.notify()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Draining("the service is shutting down"))
        self._thread.join()

"""One job: every contestant started once, then measured in turn, several rounds; only the one whose turn it is runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.contestants import Contestant
from benchmarks.images import photos
from benchmarks.jobs import Job
from benchmarks.load import LoadPlan, LoadResult, run_load
from benchmarks.processes import Server, own_process, running
from benchmarks.raw import RawLoop, raw_process, spin
from benchmarks.service_facts import EngineFact, counters, mean_batch, stage_ms, wait_for_engine

PHOTOS = 16
Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How long is measured: rounds, seconds of each turn, seconds of each turn with one client."""

    rounds: int
    seconds: float
    single_seconds: float


@dataclass
class Measured:
    """One contestant at one job, as it grows round by round. Memory is that of all its processes, after load."""

    contestant: Contestant
    up_s: float
    first_answer_s: float
    engine: EngineFact | None
    loaded: list[LoadResult] = field(default_factory=list)
    single: list[LoadResult] = field(default_factory=list)
    memory_bytes: int = 0
    stages_ms: dict[str, float] = field(default_factory=dict)
    mean_batch: float = 0.0


@dataclass(frozen=True)
class JobResult:
    """One job: raw forward passes a second by loop and round, and the contestants."""

    job: Job
    raw: dict[str, list[float]]
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class _Turn:
    """A contestant that is up, paused between its turns."""

    server: Server
    measured: Measured
    messages: tuple[bytes, ...]


class LoadProcess:
    """The load generator's process."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def run(
        self, server: Server, messages: Sequence[bytes], clients: int, seconds: float, least: int = 1
    ) -> LoadResult:
        """Load a server; see `run_load`."""
        warm_s = min(0.5, seconds / 2)
        plan = LoadPlan(server.port, tuple(messages), clients, seconds, server.pid, warm_s, least)
        return self._executor.submit(run_load, plan).result()


def measure_job(
    job: Job,
    contestants: Sequence[Contestant],
    loops: Sequence[RawLoop],
    effort: Effort,
    folder: Path,
    say: Say,
) -> JobResult:
    """Measure one job.

    Raises:
        BenchmarkFailed: one of them did not do its work.
    """
    messages = photos(PHOTOS)
    with ExitStack() as stack:
        load = LoadProcess(stack.enter_context(own_process()))
        raws = {loop.name: stack.enter_context(raw_process(loop, job)) for loop in loops}
        raw: dict[str, list[float]] = {name: [] for name in raws}
        for process in raws.values():
            process.submit(spin, 0.0).result()  # built before anything is measured
        turns = [
            _start(stack, contestant, job, messages, folder, load, effort, say) for contestant in contestants
        ]
        for number in range(1, effort.rounds + 1):
            say(f"{job.name}: round {number} of {effort.rounds}")
            for name, process in raws.items():
                raw[name].append(process.submit(spin, effort.seconds).result())
            for turn in turns:
                _take_turn(turn, job, load, effort)
        return JobResult(job, raw, tuple(turn.measured for turn in turns))


def _start(
    stack: ExitStack,
    contestant: Contestant,
    job: Job,
    images: Sequence[bytes],
    folder: Path,
    load: LoadProcess,
    effort: Effort,
    say: Say,
) -> _Turn:
    """Start a contestant, time its first answer, warm it up, pause it."""
    say(f"{job.name}: starting {contestant.name}")
    server = stack.enter_context(running(partial(contestant.launch, job), folder))
    messages = tuple(contestant.message(job, image) for image in images)
    up_s = server.wait_until_up()
    load.run(server, messages[:1], 1, 0.0)
    first_answer_s = time.perf_counter() - server.started_at
    load.run(server, messages, job.clients, effort.single_seconds)
    engine = wait_for_engine(server) if contestant.is_service else None
    server.pause()
    return _Turn(server, Measured(contestant, up_s, first_answer_s, engine), messages)


def _take_turn(turn: _Turn, job: Job, load: LoadProcess, effort: Effort) -> None:
    server, measured = turn.server, turn.measured
    server.resume()
    before = counters(server) if measured.contestant.is_service else {}
    measured.loaded.append(load.run(server, turn.messages, job.clients, effort.seconds))
    if measured.contestant.is_service:
        after = counters(server)
        measured.stages_ms, measured.mean_batch = stage_ms(before, after), mean_batch(before, after)
    measured.single.append(load.run(server, turn.messages, 1, effort.single_seconds, least=3))
    measured.memory_bytes = max(measured.memory_bytes, server.memory_bytes())
    server.pause()

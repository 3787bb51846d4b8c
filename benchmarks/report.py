"""What was measured, as Markdown: printed while it comes in, and written to `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from benchmarks.growth import Growth, Row
from benchmarks.load import LoadResult, percentile
from benchmarks.raw import RAW_OPENVINO
from benchmarks.rounds import JobResult, Measured
from benchmarks.tables import markdown, median, number, spread

THROUGHPUT_HEAD = (
    "contestant",
    "requests/s",
    "of raw OpenVINO",
    "p50 ms",
    "p99 ms",
    "CPU ms/request",
    "1 client: p50 ms",
    "p99 ms",
)

TEMPLATE = """# Measured speed

Written by `python -m benchmarks --write` (`make bench` prints the same); every number is of that one run.

{machine}

What is compared: one server at a time runs, the others are stopped; each takes its turn in every round, and the raw
loops of the network alone (float32, no decoding, no HTTP) take theirs beside them. **of raw OpenVINO** is a
contestant's median over that of the raw loop with one stream of all cores. Weights are random, precision is float32,
images are sixteen different 500x375 JPEGs, cropped to 224. Each number is the median of {rounds} rounds, with the
lowest and the highest in brackets; latencies are of all answers together. The load generator runs on the same cores and
takes {generator} CPU ms of a request. Any answer but a 200 ends the run.

Peers are written as their documentation recommends, one network and one route each ({peers}), and once more with
OpenVINO put in by hand; their code is in `benchmarks/peers/`.

## The three jobs

{jobs}

## Start and memory

Seconds from the start of the process to the first 200 of its health route and to its first answer (page cache warm,
nothing else running); memory is the proportional set size of all its processes after the load.

{starts}

## What each stage costs

Mean milliseconds of a request in this service, under the load of the job; `queue` is waiting for the device.

{stages}
{growth}
## On a GPU

{gpu}
"""
NO_GPU = (
    "Not measured: there was no CUDA device. `python -m benchmarks.gpu --write` measures the same there, beside a raw "
    "`torch.compile` loop, and writes `docs/performance-gpu.md`."
)
WITH_GPU = "See [performance-gpu.md](performance-gpu.md), written by `python -m benchmarks.gpu --write`."
GROWTH_HEAD = """
## How it grows

One service, engine `{engine}` where it was promoted; seconds a line: {seconds:g}.
"""


def _latencies(results: Sequence[LoadResult]) -> list[float]:
    return list(chain.from_iterable(result.latencies_ms for result in results))


def _rates(measured: Measured) -> list[float]:
    return [result.per_second for result in measured.loaded]


def _raw_rate(result: JobResult) -> float:
    return median(result.raw[RAW_OPENVINO.name])


def _contestant_row(measured: Measured, raw: float) -> tuple[str, ...]:
    loaded, single = _latencies(measured.loaded), _latencies(measured.single)
    return (
        measured.contestant.name,
        spread(_rates(measured)),
        f"{median(_rates(measured)) / raw:.2f}",
        number(percentile(loaded, 50)),
        number(percentile(loaded, 99)),
        spread([result.server_cpu_ms for result in measured.loaded]),
        number(percentile(single, 50)),
        number(percentile(single, 99)),
    )


def throughput_table(result: JobResult) -> str:
    """Raw loops, the service, the peers."""
    raw = _raw_rate(result)
    loops = [
        (name, spread(rates), f"{median(rates) / raw:.2f}", "", "", "", "", "")
        for name, rates in result.raw.items()
    ]
    return markdown(
        THROUGHPUT_HEAD, [*loops, *(_contestant_row(measured, raw) for measured in result.measured)]
    )


def _best(result: JobResult, engine: str) -> Measured | None:
    peers = [
        measured
        for measured in result.measured
        if not measured.contestant.is_service and measured.contestant.engine == engine
    ]
    return max(peers, key=lambda measured: median(_rates(measured)), default=None)


def _factor(rate: float, peer: Measured, words: str) -> str:
    return f"{rate / median(_rates(peer)):.2f} times {words} ({peer.contestant.name})"


def _engine_of(service: Measured) -> str:
    if service.engine is None:
        return "?"
    reason = service.engine.reason
    return f"{service.engine.engine}: {reason}" if reason else service.engine.engine


def summary(result: JobResult) -> str:
    """One sentence: the service as part of the raw loop, and over the best peers of the same run."""
    service = result.measured[0]
    rate, raw = median(_rates(service)), _raw_rate(result)
    parts = [f"engine {_engine_of(service)}", f"{rate / raw:.2f} of the raw OpenVINO loop"]
    words = {"torch": "the best peer as documented", "openvino": "the best with OpenVINO put in"}
    for peer_engine, described in words.items():
        peer = _best(result, peer_engine)
        if peer is not None:
            parts.append(_factor(rate, peer, described))
    return f"This service ({parts[0]}): {'; '.join(parts[1:])}."


def job_section(result: JobResult) -> str:
    """One job's table under its title."""
    job = result.job
    return f"### {job.name}: {job.title}, {job.clients} clients\n\n{throughput_table(result)}\n\n{summary(result)}\n"


def start_table(results: Sequence[JobResult]) -> str:
    """Start and memory of every contestant, a group of columns for each job."""
    head = ["contestant"]
    for result in results:
        head += [f"{result.job.name}: up, s", "first answer, s", "MB"]
    rows = [[measured.contestant.name] for measured in results[0].measured]
    for result in results:
        for row, measured in zip(rows, result.measured, strict=True):
            row += [
                number(measured.up_s),
                number(measured.first_answer_s),
                f"{measured.memory_bytes / 1e6:.0f}",
            ]
    return markdown(head, rows)


def stage_table(results: Sequence[JobResult]) -> str:
    """The stages of the service's requests, by job."""
    services = [
        (result.job, measured)
        for result in results
        for measured in result.measured
        if measured.contestant.is_service
    ]
    names = list(dict.fromkeys(name for _, measured in services for name in measured.stages_ms))
    rows = [
        [f"{job.name}, {measured.contestant.name}"]
        + [number(measured.stages_ms.get(name, 0.0)) for name in names]
        + [f"{measured.mean_batch:.1f}"]
        for job, measured in services
    ]
    return markdown(["job", *names, "images in a forward pass"], rows)


def _growth_row(row: Row, images: int, stages: Sequence[str], has_notes: bool) -> list[str]:
    load = row.load
    cells = [row.label, number(load.per_second)]
    cells += [number(load.per_second * images)]
    cells += [number(percentile(load.latencies_ms, 50)), number(percentile(load.latencies_ms, 99))]
    cells += [number(load.server_cpu_ms / images)]
    cells += [number(row.stages_ms.get(stage, 0.0)) for stage in stages]
    cells += [f"{row.mean_batch:.1f}", f"{row.memory_bytes / 1e6:.0f}"]
    return cells + ([row.note] if has_notes else [])


def growth_section(growth: Growth) -> str:
    """One growth table under its title."""
    stages = list(dict.fromkeys(stage for row in growth.rows for stage in row.stages_ms))
    has_notes = any(row.note for row in growth.rows)
    head = [growth.varies, "requests/s", "images/s", "p50 ms", "p99 ms", "CPU ms/image"]
    head += [f"{stage} ms" for stage in stages] + ["batch", "MB"] + (["note"] if has_notes else [])
    rows = [
        _growth_row(row, images, stages, has_notes)
        for row, images in zip(growth.rows, growth.images, strict=True)
    ]
    return f"### {growth.title}\n\n{markdown(head, rows)}\n"


def growth_sections(tables: Sequence[Growth], engine: str, seconds: float) -> str:
    """All of them, under one head; nothing where none was measured."""
    if not tables:
        return ""
    return "\n".join([GROWTH_HEAD.format(engine=engine, seconds=seconds), *map(growth_section, tables)])


def generator_cost_ms(results: Sequence[JobResult]) -> str:
    """CPU milliseconds of the load generator for a request, by job."""
    costs = [
        (
            result.job.name,
            median([load.client_cpu_ms for measured in result.measured for load in measured.loaded]),
        )
        for result in results
    ]
    return ", ".join(f"{number(cost)} ({name})" for name, cost in costs)


def document(
    results: Sequence[JobResult],
    growth: Sequence[Growth],
    *,
    machine: str,
    peers: Sequence[str],
    seconds: float,
    has_gpu_tables: bool,
) -> str:
    """The whole of `docs/performance.md`."""
    service = results[0].measured[0]
    return TEMPLATE.format(
        machine=machine,
        rounds=len(service.loaded),
        generator=generator_cost_ms(results),
        peers=", ".join(peers) or "none in this run",
        jobs="\n".join(map(job_section, results)).rstrip(),
        starts=start_table(results),
        stages=stage_table(results),
        growth=growth_sections(growth, _engine_of(service), seconds),
        gpu=WITH_GPU if has_gpu_tables else NO_GPU,
    )

"""`make bench`: this service beside what one would use instead, and beside the raw engines, in one run.

Absolute numbers depend on the machine and on who else is on it; ratios of one run hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants import PEERS, peer_contestants, service_contestants
from benchmarks.failures import BenchmarkFailed
from benchmarks.growth import FULL, QUICK, Growth, service_growth
from benchmarks.jobs import JOBS
from benchmarks.machine import describe
from benchmarks.peer_environment import NotInstalled
from benchmarks.processes import ROOT
from benchmarks.raw import RAW_LOOPS
from benchmarks.report import document, growth_section, job_section
from benchmarks.rounds import Effort, JobResult, measure_job

PAGE = ROOT / "docs" / "performance.md"
GPU_PAGE = ROOT / "docs" / "performance-gpu.md"
SINGLE_SHARE = 0.4


def say(line: str) -> None:
    """Progress, apart from the tables."""
    print(line, file=sys.stderr, flush=True)


def names(known: Sequence[str]) -> str:
    """For a help text."""
    return ", ".join(known)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="which jobs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="beside which peers")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--seconds", type=float, default=2.5, help="length of each turn")
    parser.add_argument(
        "--growth", action=argparse.BooleanOptionalAction, default=True, help="how cost grows"
    )
    parser.add_argument("--quick", action="store_true", help="a second of everything: does it work at all")
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    return parser


def prepare_peers(wanted: Sequence[str]) -> dict[str, str]:
    """Versions of the peers that are there, installed if need be; the others are told of and left out."""
    found = {}
    for name in wanted:
        try:
            found[name] = PEERS[name].prepare()
        except NotInstalled as error:
            say(f"{PEERS[name].name} is left out: it could not be installed: {error}")
    return found


def measure(
    options: argparse.Namespace, peers: Sequence[str], folder: Path
) -> tuple[list[JobResult], list[Growth]]:
    """Everything that was asked for; each table is printed when it is there."""
    effort = Effort(options.rounds, options.seconds, max(0.2, options.seconds * SINGLE_SHARE))
    contestants = [*service_contestants(folder), *peer_contestants(peers)]
    results = []
    for name in options.jobs:
        results.append(measure_job(JOBS[name], contestants, RAW_LOOPS, effort, folder, say))
        print(job_section(results[-1]), flush=True)
    growth = service_growth(folder, QUICK if options.quick else FULL, say) if options.growth else []
    for table in growth:
        print(growth_section(table), flush=True)
    return results, growth


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked; the exit status."""
    options = make_parser().parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 1, 0.5
    peers = prepare_peers(options.peers)
    with tempfile.TemporaryDirectory(prefix="backbone-benchmark-") as folder:
        try:
            results, growth = measure(options, list(peers), Path(folder))
        except BenchmarkFailed as error:
            say(f"failed: {error}")
            return 1
    versions = [f"{PEERS[name].name} {version}" for name, version in peers.items()]
    text = document(
        results,
        growth,
        machine=describe(versions),
        peers=[PEERS[name].name for name in peers],
        seconds=(QUICK if options.quick else FULL).seconds,
        has_gpu_tables=GPU_PAGE.exists(),
    )
    if options.write:
        PAGE.write_text(text)
        say(f"written: docs/{PAGE.name}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The whole way, with the service alone and for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import make_parser
from benchmarks.contestants import service_contestants
from benchmarks.growth import Extent, Probe, concurrency, images_per_request, replies, ways_in
from benchmarks.jobs import JOBS, Job
from benchmarks.processes import own_process, running
from benchmarks.raw import RAW_OPENVINO
from benchmarks.report import growth_section, job_section
from benchmarks.rounds import Effort, LoadProcess, measure_job
from benchmarks.service_facts import wait_for_engine

TINY = Job("T", "a small network", "mobilenetv3_small_050", (4,), True, 2)
EXTENT = Extent(seconds=0.0, least=1, sizes=((64, 48),), clients=(2,), models=(1,), images=(2,))


@pytest.mark.slow
def test_a_job_is_measured_from_start_to_table(tmp_path: Path) -> None:
    on_torch = service_contestants(tmp_path)[1]
    said: list[str] = []
    result = measure_job(TINY, [on_torch], [RAW_OPENVINO], Effort(2, 0.05, 0.05), tmp_path, said.append)
    (measured,) = result.measured
    assert len(measured.loaded) == len(measured.single) == len(result.raw[RAW_OPENVINO.name]) == 2
    assert measured.engine is not None
    assert measured.engine.engine == "torch"
    assert measured.memory_bytes > 100_000_000
    assert 0 < measured.up_s < measured.first_answer_s
    assert {"decode", "forward"} <= set(measured.stages_ms)
    assert any("round 2 of 2" in line for line in said)
    assert on_torch.name in job_section(result)


@pytest.mark.slow
def test_growth_tables_ask_what_the_service_answers(tmp_path: Path) -> None:
    on_torch = service_contestants(tmp_path)[1]
    with own_process() as process, running(lambda port: on_torch.launch(TINY, port), tmp_path) as server:
        server.wait_until_up()
        probe = Probe(server, LoadProcess(process), EXTENT.seconds, EXTENT.least)
        tables = [table(probe, EXTENT, TINY) for table in (concurrency, images_per_request, ways_in, replies)]
        assert wait_for_engine(server).engine == "torch"
    assert [len(table.rows) for table in tables] == [1, 1, 4, 7]
    assert all(row.load.answers >= 1 for table in tables for row in table.rows)
    assert "| images |" in growth_section(tables[1])


def test_defaults_measure_everything() -> None:
    options = make_parser().parse_args([])
    assert options.jobs == list(JOBS)
    assert options.peers == ["fastapi", "litserve", "mosec"]
    assert options.growth
    assert not options.write


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
def test_without_a_cuda_device_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "no CUDA device: nothing was measured\n"

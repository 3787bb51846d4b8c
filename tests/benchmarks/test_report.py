"""What is made of the numbers."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks.contestants import PEERS, SERVICE, Contestant, Peer
from benchmarks.images import normalised_batch, photo, photos
from benchmarks.jobs import JOBS
from benchmarks.load import LoadResult
from benchmarks.peer_environment import PINS
from benchmarks.processes import Launch
from benchmarks.raw import RAW_OPENVINO
from benchmarks.report import document, summary
from benchmarks.rounds import JobResult, Measured
from benchmarks.service_facts import EngineFact, mean_batch, stage_ms
from benchmarks.tables import markdown, number, spread


def load(rate: float, latency_ms: float) -> LoadResult:
    return LoadResult(int(rate), 1.0, (latency_ms,) * int(rate), rate * 0.02, rate * 0.0001)


def measured(name: str, engine: str, *rates: float) -> Measured:
    contestant = Contestant(name, name, engine, lambda job, port: Launch([], "/"), lambda job, image: image)
    fact = EngineFact("openvino", None) if name == SERVICE else None
    found = Measured(contestant, 1.5, 2.5, fact, memory_bytes=700_000_000, stages_ms={"decode": 1.25})
    found.loaded = [load(rate, 40.0) for rate in rates]
    found.single = [load(10, 20.0)]
    return found


@pytest.fixture
def result() -> JobResult:
    contestants = (
        measured(SERVICE, "auto", 48, 50, 46),
        measured("Slow", "torch", 20, 24, 22),
        measured("Tuned", "openvino", 40, 40, 40),
    )
    return JobResult(JOBS["J1"], {RAW_OPENVINO.name: [50.0, 52.0, 49.0]}, contestants)


def test_the_service_is_told_as_part_of_the_raw_loop_and_over_each_kind_of_peer(result: JobResult) -> None:
    told = summary(result)
    assert "engine openvino" in told
    assert "0.96 of the raw OpenVINO loop" in told
    assert "2.18 times the best peer as documented (Slow)" in told
    assert "1.20 times the best with OpenVINO put in (Tuned)" in told


def test_the_page_has_every_table_and_nothing_left_to_fill_in(result: JobResult) -> None:
    page = document([result], [], machine="A machine.", peers=["Slow"], seconds=1.0, has_gpu_tables=False)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")
    ]
    assert [SERVICE, "48 (46-50)", "0.96", "40", "40", "20", "20", "20"] in cells
    assert [SERVICE, "1.5", "2.5", "700"] in cells
    assert ["J1, this service", "1.25", "0.0"] in cells
    assert not re.search(r"[{}]|\bnan\b", page)
    # Others read these texts as documentation of flags.
    assert "ARGS=" not in page


def test_stages_are_means_between_two_readings() -> None:
    before = {("backbone_stage_seconds_sum", "decode"): 1.0, ("backbone_stage_seconds_count", "decode"): 10.0}
    after = {
        ("backbone_stage_seconds_sum", "decode"): 1.5,
        ("backbone_stage_seconds_count", "decode"): 60.0,
        ("backbone_stage_seconds_sum", "queue"): 0.0,
        ("backbone_stage_seconds_count", "queue"): 0.0,
        ("backbone_batch_images_sum", ""): 12.0,
        ("backbone_batch_images_count", ""): 4.0,
    }
    assert stage_ms(before, after) == {"decode": pytest.approx(10.0)}
    assert mean_batch(before, after) == 3.0
    assert mean_batch(after, after) == 0.0


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1.234, "1.23"), (54.06, "54.1"), (1234.5, "1234"), (0, "0")]
)
def test_numbers_have_the_digits_that_mean_something(value: float, text: str) -> None:
    assert number(value) == text


def test_a_spread_is_the_median_with_what_lay_farthest() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2 (1-3)"
    assert spread([7.0]) == "7"


def test_columns_line_up() -> None:
    lines = markdown(["name", "n"], [["long name", "1"], ["x", "100"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | --: |"


def test_photos_differ_have_their_size_and_weigh_what_photos_do() -> None:
    made = photos(3)
    assert len(set(made)) == 3
    assert photo(seed=1) == made[1]
    with Image.open(io.BytesIO(made[0])) as image:
        assert (image.format, image.size) == ("JPEG", (500, 375))
    assert 20_000 < len(made[0]) < 100_000


def test_a_batch_is_what_the_service_takes_as_a_tensor() -> None:
    array = np.load(io.BytesIO(normalised_batch(2, side=8)), allow_pickle=False)
    assert (array.dtype, array.shape) == (np.dtype(np.float32), (2, 3, 8, 8))


def test_pins_are_names_and_versions_and_there_is_one_for_every_peer() -> None:
    pins = dict(line.split("==") for line in PINS.read_text().splitlines())
    assert all(
        re.fullmatch(r"[\w.-]+", name) and re.fullmatch(r"[\d.]+", version) for name, version in pins.items()
    )
    assert {peer.package for peer in PEERS.values() if peer.package} <= set(pins)


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_peer_is_started_with_its_job_engine_and_port(peer: Peer, engine: str) -> None:
    launch = peer.contestant("", engine).launch(JOBS["J2"], 1234)
    told = [*launch.command, *launch.environment.values()]
    assert {"J2", engine, "1234"} <= set(told)

"""What `make soak` sends, one after the other, to a real service."""

from __future__ import annotations

import pytest

from benchmarks.soak.exchange import Answer, Tally, connected
from benchmarks.soak.hostile import HOSTILE, PROMISED
from tests.conftest import RunningService


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_request_gets_a_promised_status_and_costs_the_next_one_nothing(
    name: str, service: RunningService
) -> None:
    async with connected(int(service.url.rpartition(":")[2])) as connection:
        assert (await connection.ask(HOSTILE[name]())).status in PROMISED
    assert service.http.get("/healthz").status_code == 200


def test_a_tally_keeps_the_slowest_of_those_that_were_answered() -> None:
    tally = Tally()
    for number in range(20):
        tally.note(Answer(200, f"forward;dur={number}"), float(number))
    tally.note(Answer(503), 100.0)
    assert [seconds for seconds, *_ in tally.slowest] == [19.0, 18.0, 17.0, 16.0, 15.0, 14.0, 13.0, 12.0]
    assert tally.slowest[0][2] == "forward;dur=19"
    assert (tally.statuses[200], tally.statuses[503], len(tally.latencies_s)) == (20, 1, 20)

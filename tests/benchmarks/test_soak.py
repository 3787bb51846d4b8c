"""What `make soak` sends, one after the other, to a real service."""

from __future__ import annotations

import pytest

from benchmarks.soak.exchange import connected
from benchmarks.soak.hostile import HOSTILE, PROMISED
from tests.conftest import RunningService


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_request_gets_a_promised_status_and_costs_the_next_one_nothing(
    name: str, service: RunningService
) -> None:
    async with connected(int(service.url.rpartition(":")[2])) as connection:
        assert await connection.ask(HOSTILE[name]()) in PROMISED
    assert service.http.get("/healthz").status_code == 200

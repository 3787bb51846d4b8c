"""nginx in front of the service that the tests share, and in front of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import RunningService
from tests.gateway.nginx import Edit, Gateway

Put = Callable[..., Gateway]


@pytest.fixture
def put(tmp_path: Path, service: RunningService) -> Iterator[Put]:
    """Put a gateway in front of the service, or of other ports; it stops with the test."""
    running: list[Gateway] = []

    def one(ports: Sequence[int] | None = None, **edits: Edit) -> Gateway:
        folder = tmp_path / f"gateway-{len(running)}"
        folder.mkdir()
        of_the_service = [urlsplit(service.url).port or 0]
        names = {"nginx": "nginx.conf"}
        by_name = {names.get(name, f"gateway/{name}.conf"): edit for name, edit in edits.items()}
        running.append(Gateway(folder, of_the_service if ports is None else ports, by_name))
        return running[-1]

    yield one
    for gateway in running:
        gateway.stop()


@pytest.fixture(scope="module")
def gateway(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway as it is shipped, in front of the service."""
    running = Gateway(tmp_path_factory.mktemp("gateway"), [urlsplit(service.url).port or 0])
    yield running
    running.stop()

"""Replicas that die, leave and come back behind nginx, under load."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import encoded
from tests.gateway.conftest import Put
from tests.gateway.nginx import Gateway
from tests.processes import Process

SMALL = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8, "out_indices": [0]}
# More than nginx keeps in memory.
LARGE_BODY = json.dumps({"backbone": SMALL}).encode() + b" " * 2_000_000
IMAGE = encoded(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
CLIENTS = 8


def features(http: httpx.Client, **headers: str) -> httpx.Response:
    form = {"backbone": json.dumps(SMALL), "preprocess": '{"mode":"native"}'}
    return http.post("/features", data=form, files={"image": IMAGE}, headers=headers)


def inspection(http: httpx.Client) -> httpx.Response:
    return http.post("/backbones/inspect", content=LARGE_BODY, headers={"content-type": "application/json"})


class Replicas:
    """Two services as processes of their own, which can be replaced on their ports."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.running = [Process(folder), Process(folder)]
        self.ports = [replica.port for replica in self.running]

    def end(self, index: int, number: int) -> int:
        """The exit status of one replica after a signal."""
        self.running[index].signal(number)
        return self.running[index].wait()

    def begin(self, index: int) -> None:
        """Start one again where it was, and wait until it can compute."""
        self.running[index].close()
        self.running[index] = Process(self._folder, "--port", str(self.ports[index]))
        assert features(self.running[index].http).status_code == 200

    def close(self) -> None:
        for replica in self.running:
            replica.close()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    two = Replicas(tmp_path_factory.mktemp("replicas"))
    try:
        assert [features(replica.http).status_code for replica in two.running] == [200, 200]
        yield two
    finally:
        two.close()


class Load:
    """Clients that ask one request after another until told to stop; each answer is counted.

    Most ask for features, one for descriptions by a body that nginx writes to a file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers: Counter[str] = Counter()
        self._more = threading.Condition()
        self._is_over = False
        asked = [features] * (CLIENTS - 1) + [inspection]
        self._threads = [threading.Thread(target=self._run, args=(ask,)) for ask in asked]

    def _run(self, ask: Callable[[httpx.Client], httpx.Response]) -> None:
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as http:
            while not self._is_over:
                try:
                    reply = ask(http)
                    answer = str(reply.status_code) if reply.is_success else reply.text
                except httpx.HTTPError as error:
                    answer = repr(error)
                with self._more:
                    self.answers[answer] += 1
                    self._more.notify_all()

    def wait_for(self, count: int) -> None:
        """Until so many more requests were answered."""
        with self._more:
            goal = self.answers.total() + count
            assert self._more.wait_for(lambda: self.answers.total() >= goal, timeout=120)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join(120)


def replicas_of(entry: dict[str, Any]) -> list[str]:
    """The replicas that a logged request was sent to, in order."""
    return [address.strip() for address in entry["replicas"].split(",")]


@pytest.mark.slow
def test_no_request_fails_when_a_replica_is_killed(replicas: Replicas, put: Put) -> None:
    gateway = put(replicas.ports)
    with Load(gateway.url) as load:
        load.wait_for(100)
        replicas.end(0, signal.SIGKILL)
        load.wait_for(200)
        replicas.begin(0)
        load.wait_for(100)
    assert set(load.answers) == {"200"}, load.answers
    log = gateway.log()
    assert {address for entry in log[-50:] for address in replicas_of(entry)} == set(addresses(replicas))
    assert any(len(replicas_of(entry)) > 1 for entry in log), "no request met the dead replica"


@pytest.mark.slow
def test_no_request_fails_in_a_rolling_restart(replicas: Replicas, put: Put) -> None:
    gateway = put(replicas.ports)
    with Load(gateway.url) as load:
        for index in (0, 1):
            load.wait_for(100)
            assert replicas.end(index, signal.SIGTERM) == 0
            load.wait_for(100)
            replicas.begin(index)
        load.wait_for(100)
    assert set(load.answers) == {"200"}, load.answers


def addresses(replicas: Replicas) -> list[str]:
    return [f"127.0.0.1:{port}" for port in replicas.ports]


def by_model(gateway: Gateway, ids: list[str]) -> None:
    for model_id in ids:
        assert features(gateway.http, **{"x-model-id": model_id}).status_code == 200


def test_what_is_no_model_id_is_balanced_as_usual(replicas: Replicas, put: Put) -> None:
    gateway = put(replicas.ports)
    by_model(gateway, ["not-hex", "a" * 65, "../../etc", ""] * 2)
    assert {address for entry in gateway.log() for address in replicas_of(entry)} == set(addresses(replicas))


def test_a_model_that_is_named_stays_on_one_replica_and_moves_when_that_dies(
    replicas: Replicas, put: Put
) -> None:
    ids = [f"{number:020x}" for number in range(12)]
    gateway = put(replicas.ports)
    by_model(gateway, ids * 3)
    chosen = [replicas_of(entry) for entry in gateway.log()]
    homes = dict(zip(ids, chosen, strict=False))
    assert chosen == [homes[model_id] for model_id in ids * 3]
    assert {address for [address] in homes.values()} == set(addresses(replicas))

    replicas.end(0, signal.SIGKILL)
    gateway = put(replicas.ports)
    by_model(gateway, ids)
    dead, alive = addresses(replicas)
    for model_id, entry in zip(ids, gateway.log(), strict=True):
        assert replicas_of(entry) == ([alive] if homes[model_id] == [alive] else [dead, alive])

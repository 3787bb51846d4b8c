"""What a client sees of a checkpoint on its way, and what its download does not hold up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save, save_file

from service.config.spec import WeightsRef
from tests.api.problems import assert_problem, pointers
from tests.checkpoints.conftest import Answer, Remote
from tests.checkpoints.test_weights_over_http import IMAGES, TINY, weights_of
from tests.conftest import RunningService, Serve, multipart
from tests.processes import Start

HOST = "https://download.openmmlab.com"
NAME = f"{HOST}/tiny.safetensors"
CONFIG = {**TINY, "checkpoint": NAME}
DATA = save(weights_of(1))
HALF = len(DATA) // 2


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def serve_with(serve: Serve, remote: Remote, **given: Any) -> RunningService:
    return serve(checkpoint_mirrors=f"download.openmmlab.com={remote.url}", **given)


def half_sent(remote: Remote, path: str = "/tiny.safetensors", data: bytes = DATA) -> Answer:
    """Half of a file and then nothing until the hold ends, which breaks it off; then what is missing of it."""
    answer = remote.has(path, data, sent=data[: len(data) // 2], hold=Event())
    answer.then = Answer(data, headers=answer.headers, ranges=True)
    return answer


def resume(answer: Answer) -> None:
    assert answer.hold is not None
    answer.hold.set()


def listed(http: httpx.Client, fits: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """`loading` of `GET /models`, once it fits."""
    deadline = time.monotonic() + 60
    while True:
        found: list[dict[str, Any]] = http.get("/models").raise_for_status().json()["loading"]
        if fits(found):
            return found
        assert time.monotonic() < deadline, found


def at_half(found: list[dict[str, Any]]) -> bool:
    return any(entry["received"] == HALF for entry in found)


def load(
    clients: ThreadPoolExecutor, http: httpx.Client, config: Any = CONFIG, **more: Any
) -> Future[httpx.Response]:
    return clients.submit(http.post, "/models", json={"backbone": config, **more})


def test_a_download_is_listed_with_how_far_it_is(
    remote: Remote, serve: Serve, clients: ThreadPoolExecutor
) -> None:
    answer = half_sent(remote)
    http = serve_with(serve, remote, request_timeout=60).http
    before = time.time()
    asked = load(clients, http)
    [entry] = listed(http, at_half)
    assert before - 1 <= entry.pop("started") <= time.time() + 1
    assert entry == {
        "id": None,
        "type": "mmpretrain.ResNet",
        "state": "downloading",
        "checkpoint": NAME,
        "received": HALF,
        "total": len(DATA),
    }
    metrics = http.get("/metrics").text
    assert "backbone_checkpoint_downloads 1.0" in metrics
    assert f"backbone_checkpoint_fetched_bytes_total {float(HALF)}" in metrics
    resume(answer)
    assert asked.result(60).status_code == 201
    told = http.get("/models").json()
    assert told["loading"] == []
    assert told["models"][0]["weights"]["checkpoint"] == NAME
    assert remote.ranges == [None, f"bytes={HALF}-"]


def test_a_load_is_listed_with_its_id(serve: Serve, clients: ThreadPoolExecutor) -> None:
    service = serve(request_timeout=60)
    gate = Event()
    service.engine.networks._loader.submit(gate.wait, 60)
    asked = load(clients, service.http, TINY)
    [entry] = listed(service.http, bool)
    gate.set()
    loaded = asked.result(60).json()
    assert (entry["id"], entry["type"], entry["state"]) == (loaded["id"], "mmpretrain.ResNet", "loading")
    assert (entry["checkpoint"], entry["received"], entry["total"]) == (None, None, None)


def test_a_necks_own_checkpoint_is_listed_as_the_necks(
    remote: Remote, serve: Serve, clients: ThreadPoolExecutor
) -> None:
    answer = half_sent(remote, "/neck.safetensors", save({"x": torch.zeros(4000)}))
    http = serve_with(serve, remote, request_timeout=60).http
    neck = {"type": "mmdet.FPN", "in_channels": [8, 32], "out_channels": 8, "num_outs": 2}
    asked = load(clients, http, TINY, neck={**neck, "checkpoint": f"{HOST}/neck.safetensors"})
    [entry] = listed(http, lambda found: bool(found) and bool(found[0]["received"]))
    assert (entry["type"], entry["checkpoint"]) == ("mmdet.FPN", f"{HOST}/neck.safetensors")
    resume(answer)
    problem = assert_problem(asked.result(60), 422, "checkpoint-mismatch")
    assert pointers(problem) == ["#/neck/checkpoint"]
    assert "the neck's with 'lateral_convs.'" in problem["detail"]
    assert "backbone" not in problem["detail"].partition("keys fit")[2]


def test_a_request_whose_deadline_passes_is_told_how_far_it_is_and_the_download_goes_on(
    remote: Remote, serve: Serve
) -> None:
    answer = half_sent(remote)
    service = serve_with(serve, remote, request_timeout=4)
    late = service.http.post("/features", **multipart(CONFIG, tensor=IMAGES))
    problem = assert_problem(late, 503, "model-loading")
    assert f"{HALF:,} of {len(DATA):,} bytes so far" in problem["detail"]
    assert late.headers["retry-after"] == "5"
    resume(answer)
    listed(service.http, lambda found: not found)
    assert service.engine.store.at_hand(WeightsRef(NAME)) is not None
    assert remote.ranges == [None, f"bytes={HALF}-"]


def test_many_requests_wait_for_one_download(
    remote: Remote, serve: Serve, clients: ThreadPoolExecutor
) -> None:
    answer = half_sent(remote)
    http = serve_with(serve, remote, request_timeout=60).http
    asked = [load(clients, http) for _ in range(6)]
    assert len(listed(http, at_half)) == 1
    resume(answer)
    assert {future.result(60).json()["id"] for future in asked} == {asked[0].result().json()["id"]}
    assert remote.asked_for("GET", "/tiny.safetensors") == 2


def test_files_that_are_here_do_not_wait_behind_downloads(
    remote: Remote, serve: Serve, clients: ThreadPoolExecutor, tmp_path: Path
) -> None:
    save_file(weights_of(2), tmp_path / "here.safetensors")
    answers = [half_sent(remote, f"/{index}.safetensors") for index in range(6)]
    http = serve_with(serve, remote, request_timeout=60).http
    asked = [load(clients, http, {**TINY, "checkpoint": f"{HOST}/{index}.safetensors"}) for index in range(6)]
    found = listed(
        http, lambda found: len(found) == 6 and sum(bool(entry["received"]) for entry in found) == 4
    )
    assert sorted(entry["state"] for entry in found) == ["downloading"] * 4 + ["queued"] * 2
    here = http.post("/models", json={"backbone": {**TINY, "checkpoint": "here.safetensors"}})
    assert here.status_code == 201
    for answer in answers:
        resume(answer)
    assert {future.result(60).status_code for future in asked} == {201, 200}


def test_a_failed_download_is_told_to_everyone_by_their_own_key(
    remote: Remote, serve: Serve, clients: ThreadPoolExecutor
) -> None:
    gate = Event()
    remote.has("/tiny.safetensors", DATA, status=404, gate=gate)
    http = serve_with(serve, remote, request_timeout=60).http
    long = {**TINY, "init_cfg": {"type": "Pretrained", "checkpoint": NAME}}
    asked = [load(clients, http, config) for config in (CONFIG, long)]
    listed(http, bool)
    gate.set()
    problems = [assert_problem(future.result(60), 422, "checkpoint-unavailable") for future in asked]
    assert [pointers(problem) for problem in problems] == [
        ["#/backbone/checkpoint"],
        ["#/backbone/init_cfg/checkpoint"],
    ]
    assert http.get("/models").json()["loading"] == []


def test_a_service_that_is_told_to_stop_does_not_wait_for_a_download(
    remote: Remote, start: Start, clients: ThreadPoolExecutor, tmp_path: Path
) -> None:
    half_sent(remote)
    process = start(
        BACKBONE_CHECKPOINT_MIRRORS=f"download.openmmlab.com={remote.url}",
        BACKBONE_CHECKPOINT_DIR=str(tmp_path),
        BACKBONE_REQUEST_TIMEOUT="300",
        BACKBONE_DRAIN_SECONDS="0.5",
    )
    load(clients, process.http)
    listed(process.http, at_half)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert remote.ranges == [None]
    [part] = tmp_path.rglob("*.part")
    assert part.stat().st_size == HALF
    assert part.with_name(f"{part.name}.json").exists()

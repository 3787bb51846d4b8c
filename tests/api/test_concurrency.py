"""Many clients at once: slow loads, full devices, clients that leave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import RunningService, Serve, multipart
from tests.processes import wait_until

RESNET18 = {"type": "ResNet", "depth": 18, "out_indices": [3]}
IMAGE = np.zeros((1, 3, 32, 32), np.float32)


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def ask(service: RunningService, config: Any, images: int = 1) -> httpx.Response:
    return service.http.post("/features", **multipart(config, tensor=np.repeat(IMAGE, images, axis=0)))


@contextmanager
def held_device(service: RunningService) -> Iterator[threading.Event]:
    """Holds the device worker inside the forward pass of the loaded model; yields the event that it is held."""
    [entry] = list(service.engine.networks.cache)
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    hook = entry.model.engine.backbone.register_forward_pre_hook(hold)
    try:
        yield inside
    finally:
        hook.remove()
        go_on.set()


def wait_for_queue(service: RunningService, images: int) -> None:
    changed = service.engine.batcher._changed
    with changed:
        assert changed.wait_for(lambda: service.engine.batcher.waiting_images == images, 30)


def test_a_slow_load_does_not_delay_a_loaded_model(serve: Serve, clients: ThreadPoolExecutor) -> None:
    service = serve()
    assert ask(service, RESNET18).status_code == 200
    go_on = threading.Event()
    service.engine.networks._loader.submit(go_on.wait, 60)
    slow = clients.submit(ask, service, {**RESNET18, "depth": 34})
    assert ask(service, RESNET18).status_code == 200
    assert not slow.done()
    go_on.set()
    assert slow.result(60).status_code == 200


def test_a_request_that_cannot_wait_for_a_load_is_told_to_come_back_and_the_load_goes_on(
    serve: Serve, clients: ThreadPoolExecutor
) -> None:
    service = serve(request_timeout=2)
    go_on = threading.Event()
    service.engine.networks._loader.submit(go_on.wait, 60)
    late = ask(service, RESNET18)
    assert late.status_code == 503
    assert late.json()["type"] == "/problems/model-loading"
    assert int(late.headers["retry-after"]) >= 1
    go_on.set()
    again = ask(service, RESNET18)
    assert again.status_code == 200


def test_ten_requests_for_a_new_model_load_it_once(serve: Serve, clients: ThreadPoolExecutor) -> None:
    service = serve()
    replies = [clients.submit(ask, service, RESNET18) for _ in range(10)]
    assert {reply.result(60).status_code for reply in replies} == {200}
    assert 'backbone_model_loads_total{outcome="loaded"} 1.0' in service.http.get("/metrics").text


def test_requests_that_wait_together_run_together_and_keep_their_own_results(
    serve: Serve, clients: ThreadPoolExecutor
) -> None:
    service = serve()
    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal((1, 3, 32, 32), np.float32) for _ in range(4)]

    def stats(tensor: np.ndarray) -> dict[str, float]:
        reply = service.http.post("/features", **multipart(RESNET18, tensor=tensor))
        return reply.json()["levels"][0]["stats"]

    alone = [stats(tensor) for tensor in tensors]
    with held_device(service) as held:
        first = clients.submit(ask, service, RESNET18)
        assert held.wait(30)
        together = [clients.submit(stats, tensor) for tensor in tensors]
        wait_for_queue(service, 4)
    assert first.result(60).status_code == 200
    for expected, found in zip(alone, together, strict=True):
        assert found.result(60) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_client_that_leaves_gives_its_place_in_the_queue_back(
    serve: Serve, clients: ThreadPoolExecutor
) -> None:
    service = serve(queue_size=1)
    assert ask(service, RESNET18).status_code == 200
    with held_device(service) as held:
        running = clients.submit(ask, service, RESNET18)
        assert held.wait(30)
        leaver = raw_request(service)
        wait_for_queue(service, 1)
        assert ask(service, RESNET18).status_code == 503
        left = told_when_done(next(iter(service.engine.batcher._waiting)).future)
        leaver.close()
        assert left.wait(30)
        kept = clients.submit(ask, service, RESNET18)
        wait_for_queue(service, 1)
    assert running.result(60).status_code == 200
    assert kept.result(60).status_code == 200


def raw_request(service: RunningService) -> socket.socket:
    """A request on a socket of its own, which nobody reads from."""
    request = service.http.build_request("POST", "/features", **multipart(RESNET18, tensor=IMAGE))
    body = request.read()
    head = [f"POST /features HTTP/1.1\r\nHost: {request.url.netloc.decode()}"]
    head += [f"{name}: {value}" for name, value in request.headers.items() if name == "content-type"]
    head += [f"Content-Length: {len(body)}", "", ""]
    connection = socket.create_connection(("127.0.0.1", request.url.port))
    connection.sendall("\r\n".join(head).encode() + body)
    return connection


def told_when_done(future: Future[Any]) -> threading.Event:
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    return done


def test_nothing_is_left_of_requests_whose_clients_left(serve: Serve) -> None:
    service = serve()
    assert ask(service, RESNET18).status_code == 200
    for _ in range(200):
        raw_request(service).close()
    assert ask(service, RESNET18).status_code == 200
    engine = service.engine
    service.stop()
    assert [entry.leases for entry in engine.networks.cache] == [0]
    assert engine.batcher.waiting_images == 0


def test_a_model_in_use_is_unloaded_with_its_last_user(serve: Serve, clients: ThreadPoolExecutor) -> None:
    service = serve()
    model_id = ask(service, RESNET18).headers["x-model-id"]
    with held_device(service) as held:
        running = clients.submit(ask, service, RESNET18)
        assert held.wait(30)
        assert service.http.delete(f"/models/{model_id}").status_code == 202
        assert service.http.get("/models").json()["models"] == []
    assert running.result(60).status_code == 200
    assert service.http.get("/models").json()["budget"]["used"] == 0
    assert service.http.delete(f"/models/{model_id}").status_code == 404


def test_a_model_may_go_under_a_forward_pass_that_nobody_waits_for(serve: Serve, caplog) -> None:
    service = serve()
    model_id = ask(service, RESNET18).headers["x-model-id"]
    with held_device(service) as held:
        leaver = raw_request(service)
        assert held.wait(30)
        leaver.close()
        wait_until(lambda: service.http.get("/models").json()["models"][0]["in_use"] == 0)
        assert service.http.delete(f"/models/{model_id}").status_code == 200
    assert ask(service, RESNET18).status_code == 200
    assert service.engine.batcher.alive
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_a_model_unloaded_while_it_is_warmed_up_is_still_answered(
    serve: Serve, clients: ThreadPoolExecutor
) -> None:
    service = serve()
    assert ask(service, RESNET18).status_code == 200
    with held_device(service) as held:
        running = clients.submit(ask, service, RESNET18)
        assert held.wait(30)
        warming = clients.submit(service.http.post, "/models", json={"backbone": {**RESNET18, "depth": 34}})
        wait_for_queue(service, 1)
        [fresh] = [entry.key for entry in service.engine.networks.cache if entry.leases and entry.hits == 1]
        assert service.http.delete(f"/models/{fresh}").status_code == 202
    assert running.result(60).status_code == 200
    assert warming.result(60).status_code == 201
    assert warming.result().json()["id"] == fresh


def test_a_model_is_loaded_ahead_and_listed(serve: Serve) -> None:
    service = serve()
    loaded = service.http.post("/models", json={"backbone": "resnet50_c5"})
    assert loaded.status_code == 201
    assert service.http.post("/models", json={"backbone": "resnet50_c5"}).status_code == 200
    [model] = service.http.get("/models").json()["models"]
    assert model["id"] == loaded.json()["id"]
    assert model["bytes"] > 90_000_000
    assert {"type", "device", "dtype", "weights", "engine", "hits", "last_used", "load_seconds"} <= set(model)
    assert service.http.delete(f"/models/{model['id']}").status_code == 200


def test_ready_means_warm(serve: Serve, clients: ThreadPoolExecutor) -> None:
    service = serve(warm="resnet50_c5")
    ready = service.http.get("/readyz")
    assert ready.status_code in (200, 503)
    asyncio_done(service)
    assert service.http.get("/readyz").status_code == 200
    assert [model["type"] for model in service.http.get("/models").json()["models"]] == ["mmpretrain.ResNet"]


def test_a_warm_list_that_cannot_be_loaded_is_never_ready(serve: Serve) -> None:
    service = serve(warm="no_such_config")
    asyncio_done(service)
    reply = service.http.get("/readyz")
    assert reply.status_code == 503
    assert "no_such_config" in reply.json()["reason"]


def asyncio_done(service: RunningService) -> None:
    """Wait for the warm list to be through, well or not."""
    done = threading.Event()
    warming = service.engine._warming
    loop = warming.get_loop()
    loop.call_soon_threadsafe(warming.add_done_callback, lambda _: done.set())
    assert done.wait(120)


def test_few_models_stay_within_a_small_budget(serve: Serve) -> None:
    service = serve(model_budget="60000000", min_residency=0)
    for width in range(32, 44):
        assert ask(service, {**RESNET18, "base_channels": width}).status_code == 200
        budget = service.http.get("/models").json()["budget"]
        assert budget["used"] <= budget["bytes"]
    assert "backbone_model_evictions_total 0.0" not in service.http.get("/metrics").text

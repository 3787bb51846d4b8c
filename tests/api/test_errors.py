"""Every row of the table of errors, provoked over HTTP: status, kind, place, and nothing of the machine."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import save
from starlette.requests import Request
from starlette.routing import Route

from tests.api.problems import assert_problem, pointers
from tests.checkpoints.conftest import Remote
from tests.conftest import RunningService, Serve, encoded, multipart

THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8}
SMALL = encoded(np.full((48, 64, 3), 77, np.uint8))
JSON = {"Content-Type": "application/json"}


def features(http: httpx.Client, config: Any = THIN, **given: Any) -> httpx.Response:
    return http.post("/features", **multipart(config, **{"image": SMALL, **given}))


def weights_of(service: RunningService, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that the service made for a config, by the names of its checkpoints."""
    assert features(service.http, config).status_code == 200
    [entry] = service.engine.networks.cache
    return {name: tensor.clone() for name, tensor in entry.model.engine.backbone.state_dict().items()}


@pytest.fixture
def remote() -> Iterator[Remote]:
    """A hub on loopback."""
    server = Remote()
    yield server
    for answer in server.answers.values():
        if answer.gate is not None:
            answer.gate.set()
    server.stop()


class HeldDevice:
    """The device worker of a service, busy with a request until it is let go."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        assert features(service.http).status_code == 200
        [entry] = service.engine.networks.cache
        self._busy, self._gate = Event(), Event()
        self._hook = entry.model.engine.backbone.register_forward_pre_hook(self._wait)
        self._threads = ThreadPoolExecutor(8)

    def _wait(self, _module: object, _inputs: object) -> None:
        self._busy.set()
        assert self._gate.wait(60)

    def send(self) -> Future[httpx.Response]:
        """Another request, in a thread of its own."""
        return self._threads.submit(features, self.service.http)

    def __enter__(self) -> HeldDevice:
        self.first = self.send()
        assert self._busy.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._gate.set()
        self._threads.shutdown()
        self._hook.remove()


# --- 400 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"--x\r\nthis is no part", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b'{"backbone": NaN}', "application/json"),
        (b"\xff\xfe{}", "application/json"),
    ],
)
def test_a_body_that_is_not_what_it_says_is_400(http: httpx.Client, body: bytes, content_type: str) -> None:
    reply = http.post("/features", content=body, headers={"Content-Type": content_type})
    assert_problem(reply, 400, "malformed-body")


def test_malformed_json_is_400_with_its_place_and_not_its_text(http: httpx.Client) -> None:
    reply = http.post("/backbones/inspect", content=b'{"backbone": sesame}', headers=JSON)
    body = assert_problem(reply, 400, "malformed-body")
    assert "line 1" in body["detail"]
    assert "sesame" not in reply.text


def test_a_part_that_starts_as_json_and_is_none_is_400(http: httpx.Client) -> None:
    body = assert_problem(features(http, '{"type": "ResNet", "depth": sesame}'), 400, "malformed-body")
    assert pointers(body) == ["#/backbone"]
    assert "sesame" not in body["detail"]


def test_a_request_without_an_image_is_400(http: httpx.Client) -> None:
    reply = http.post("/features", content=orjson.dumps({"backbone": THIN, "images": []}), headers=JSON)
    assert assert_problem(reply, 422)["errors"][0]["pointer"] == "#/images"
    only_text = {"backbone": (None, orjson.dumps(THIN))}
    assert_problem(http.post("/features", files=only_text), 400, "malformed-body")


def test_a_truncated_image_is_400(http: httpx.Client, photo: bytes) -> None:
    body = assert_problem(features(http, image=photo[: len(photo) // 2]), 400, "undecodable-image")
    assert body["detail"].startswith("image 0: ")


def test_bad_base64_is_400_with_its_place(http: httpx.Client) -> None:
    images = [{"base64": base64.b64encode(SMALL).decode()}, {"base64": "!!!"}]
    body = assert_problem(
        http.post("/features", json={"backbone": THIN, "images": images}), 400, "malformed-body"
    )
    assert pointers(body) == ["#/images/1/base64"]


# --- 401, 403, 429 ------------------------------------------------------------------------------

KEYED = [
    "/features",
    "/backbones",
    "/backbones/timm.resnet18",
    "/configs",
    "/configs/resnet50",
    "/models",
    "/version",
]


def test_keys_open_the_routes_of_clients_and_admin_keys_those_of_operators(serve: Serve) -> None:
    service = serve(api_keys="alpha,beta", admin_keys="gamma")

    def ask(method: str, path: str, **headers: str) -> httpx.Response:
        return service.http.request(method, path, headers=headers)

    for path in KEYED:
        method = "POST" if path == "/features" else "GET"
        missing = ask(method, path)
        assert_problem(missing, 401, "unauthenticated")
        assert missing.headers["www-authenticate"] == "Bearer"
        wrong = ask(method, path, Authorization="Bearer omega")
        assert_problem(wrong, 403, "forbidden")
        assert "omega" not in wrong.text
        for key in ("alpha", "beta", "gamma"):
            assert ask(method, path, Authorization=f"Bearer {key}").status_code in (200, 415)
            assert ask(method, path, **{"X-API-Key": key}).status_code in (200, 415)
    for method, path in (("POST", "/models"), ("DELETE", "/models/abc")):
        assert_problem(ask(method, path), 401, "unauthenticated")
        assert_problem(ask(method, path, Authorization="Bearer alpha"), 403, "forbidden")
        assert ask(method, path, Authorization="Bearer gamma").status_code in (404, 415)
    for path in ("/healthz", "/readyz"):
        assert ask("GET", path).status_code == 200


def test_a_refused_client_is_told_before_its_body_is_read(serve: Serve) -> None:
    service = serve(api_keys="alpha")
    assert_problem(features(service.http, {"type": "no such"}, image=b"no image"), 401, "unauthenticated")


@pytest.mark.parametrize("key", ["Bearer", "Basic YTpi", "alpha", "Bearer alpha beta", "bearer\talpha"])
def test_a_malformed_key_is_no_key(serve: Serve, key: str) -> None:
    reply = serve(api_keys="alpha").http.get("/models", headers={"Authorization": key})
    assert reply.status_code in (401, 403)
    assert_problem(reply, reply.status_code)


def test_a_client_over_its_quota_is_told_when_to_come_back(serve: Serve) -> None:
    service = serve(api_keys="alpha,beta", requests_per_minute=2)
    alpha, beta = ({"Authorization": f"Bearer {key}"} for key in ("alpha", "beta"))
    assert [service.http.get("/models", headers=alpha).status_code for _ in range(2)] == [200, 200]
    reply = service.http.get("/models", headers=alpha)
    body = assert_problem(reply, 429, "quota-exceeded")
    assert "2 requests a minute" in body["detail"]
    assert 1 <= int(reply.headers["retry-after"]) <= 30
    assert service.http.get("/models", headers=beta).status_code == 200
    assert service.http.get("/healthz").status_code == 200


# --- 404, 405 -----------------------------------------------------------------------------------


def test_an_unknown_type_is_404_with_the_nearest(http: httpx.Client) -> None:
    body = assert_problem(features(http, {"type": "timm.resnet_18"}), 404, "unknown-backbone")
    assert "timm.resnet18" in body["nearest"]
    assert "timm.resnet18" in body["detail"]
    assert pointers(body) == ["#/backbone/type"]
    page = assert_problem(http.get("/backbones/mmpretrain.ResNett"), 404, "unknown-backbone")
    assert page["nearest"][0] == "mmpretrain.ResNet"


def test_an_unknown_neck_is_404_with_the_nearest(http: httpx.Client) -> None:
    body = assert_problem(features(http, neck={"type": "GlobalAveragePool"}), 404, "unknown-backbone")
    assert "GlobalAveragePooling" in body["nearest"]
    assert pointers(body) == ["#/neck/type"]


def test_an_unknown_config_is_404_with_the_nearest(http: httpx.Client) -> None:
    body = assert_problem(features(http, "resnet_50"), 404, "unknown-config")
    assert "resnet50" in body["nearest"]
    assert "resnet50" in assert_problem(http.get("/configs/resnet51"), 404, "unknown-config")["nearest"]


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    assert_problem(http.delete("/models/0123456789abcdef0123"), 404, "unknown-model")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/feature",
        "/features/",
        "/features/x",
        "/backbones/",
        "/favicon.ico",
        "/docs/assets/nothing.js",
        "/%00",
    ],
)
def test_an_unknown_route_is_404(http: httpx.Client, path: str) -> None:
    assert_problem(http.get(path), 404, "about:blank")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/features", "POST"),
        ("PUT", "/features", "POST"),
        ("OPTIONS", "/features", "POST"),
        ("DELETE", "/backbones", "GET"),
        ("POST", "/healthz", "GET"),
        ("PATCH", "/configs/resnet50", "GET"),
        ("PUT", "/models/abc", "DELETE"),
        ("TRACE", "/version", "GET"),
    ],
)
def test_a_method_that_is_not_served_is_405(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    reply = http.request(method, path)
    assert_problem(reply, 405, "about:blank")
    assert reply.headers["allow"] == allowed


# --- 406, 415 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accept", ["image/png", "text/html;q=0.9", "application/json;q=0", "application/*;q=0"]
)
def test_an_unserved_reply_format_is_406_with_the_list(http: httpx.Client, accept: str) -> None:
    reply = http.post("/features", headers={"Accept": accept}, **multipart(THIN, image=SMALL))
    detail = assert_problem(reply, 406, "not-acceptable")["detail"]
    for served in ("json", "x-npz", "x-npy", "vnd.safetensors", "vnd.apache.arrow.stream"):
        assert f"application/{served}" in detail


def test_several_levels_do_not_fit_into_one_npy(http: httpx.Client) -> None:
    request = multipart({**THIN, "out_indices": [0, 1]}, image=SMALL)
    assert_problem(
        http.post("/features", headers={"Accept": "application/x-npy"}, **request), 406, "not-acceptable"
    )


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "multipart/mixed; boundary=x", "", "///"]
)
def test_an_unserved_body_type_is_415_with_the_list(http: httpx.Client, content_type: str) -> None:
    reply = http.post("/features", content=b"{}", headers={"Content-Type": content_type})
    detail = assert_problem(reply, 415, "unsupported-media")["detail"]
    for served in ("multipart/form-data", "application/json", "image/*", "application/x-npy"):
        assert served in detail
    reply = http.post("/backbones/inspect", content=b"{}", headers={"Content-Type": content_type})
    assert "application/json" in assert_problem(reply, 415, "unsupported-media")["detail"]


def test_an_unserved_image_format_is_415_with_the_list(http: httpx.Client) -> None:
    body = assert_problem(features(http, image=b"%PDF-1.7 and so on, and on"), 415, "unsupported-media")
    assert body["detail"].startswith("image 0: ")
    assert "JPEG, PNG" in body["detail"]


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip"])
def test_a_compressed_body_is_415(http: httpx.Client, coding: str) -> None:
    reply = http.post("/backbones/inspect", content=b"{}", headers={**JSON, "Content-Encoding": coding})
    assert_problem(reply, 415, "unsupported-media")


# --- 413 ----------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_with_the_limit(serve: Serve) -> None:
    service = serve(max_body_bytes=10_000)
    body = orjson.dumps({"backbone": {"type": "x" * 12_000}})
    for path in ("/features", "/backbones/inspect", "/models"):
        reply = service.http.post(path, content=body, headers=JSON)
        assert "10,000 bytes" in assert_problem(reply, 413, "too-large")["detail"]


@pytest.mark.parametrize("content_type", ["application/json", "image/png", "multipart/form-data; boundary=x"])
def test_a_chunked_body_is_counted_as_it_comes(serve: Serve, content_type: str) -> None:
    service = serve(max_body_bytes=10_000)

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        yield from [b"x" * 1000] * 12

    query = {"backbone": orjson.dumps(THIN).decode()} if content_type == "image/png" else {}
    reply = service.http.post(
        "/features", content=chunks(), params=query, headers={"Content-Type": content_type}
    )
    assert "10,000 bytes" in assert_problem(reply, 413, "too-large")["detail"]


def test_an_image_over_the_megapixels_is_413_with_both_numbers(serve: Serve) -> None:
    reply = features(serve(max_pixels=3000).http)
    assert assert_problem(reply, 413, "too-large")["detail"] == "image 0: 64x48 exceeds 0.003 megapixels"


def test_too_many_images_are_413_with_both_numbers(serve: Serve) -> None:
    service = serve(max_images=2)
    request = multipart(THIN, image=SMALL)
    request["files"] *= 3
    detail = "3 images exceed 2 in one request"
    assert assert_problem(service.http.post("/features", **request), 413, "too-large")["detail"] == detail
    tensor = np.zeros((3, 3, 32, 32), np.float32)
    reply = service.http.post("/features", **multipart(THIN, tensor=tensor))
    assert assert_problem(reply, 413, "too-large")["detail"] == detail


def test_a_reply_over_the_limit_is_refused_before_a_model_is_loaded(serve: Serve) -> None:
    service = serve(max_reply_bytes=1000)
    reply = features(service.http, **{"return": "tensors"})
    assert "1,000" in assert_problem(reply, 413, "too-large")["detail"]
    assert service.http.get("/models").json()["models"] == []


# --- 422 ----------------------------------------------------------------------------------------

INVALID = [
    ({"type": "ResNet", "depth": 18, "depht": 18}, "#/backbone/depht", "nearest: depth"),
    ({"type": "ResNet"}, "#/backbone/depth", "required"),
    ({"type": "ResNet", "depth": 17}, "#/backbone/depth", "18, 34, 50, 101 or 152"),
    (
        {"type": "ResNet", "depth": 18, "out_indices": [0, 4]},
        "#/backbone/out_indices/1",
        "4 is not an index of 0 to 3",
    ),
    (
        {"type": "timm.resnet18", "out_indices": [9]},
        "#/backbone/out_indices/0",
        "9 is not an index of 0 to 4",
    ),
    ({"type": "timm.resnet18", "in_chans": 0}, "#/backbone/in_chans", "greater than or equal to 1"),
    ({"type": "torchvision.resnet18", "return_nodes": ["layer9"]}, "#/backbone/return_nodes", "layer9"),
    ({"type": "ResNet", "depth": 18, "strides": [7]}, "#/backbone/strides/0", "4, 8, 16, 32"),
    ({"type": "resnet18"}, "#/backbone/type", "timm.resnet18, torchvision.resnet18"),
    ({"type": 7}, "#/backbone/type", "string"),
    ({}, "#/backbone/type", "string"),
    ({"type": "ResNet", "depth": 18, "frozen_stages": 9}, "#/backbone/frozen_stages", "4"),
]


@pytest.mark.parametrize(("config", "pointer", "text"), INVALID)
def test_a_config_that_is_not_valid_is_422_with_its_place(
    http: httpx.Client, config: dict[str, Any], pointer: str, text: str
) -> None:
    for reply in (features(http, config), http.post("/backbones/inspect", json={"backbone": config})):
        body = assert_problem(reply, 422, "invalid-config")
        assert pointers(body)[0].startswith(pointer)
        assert text in body["detail"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pool", "median"),
        ("precision", "int8"),
        ("dtype", "float64"),
        ("return", "everything"),
        ("encoding", "base32"),
        ("normalize", "perhaps"),
        ("preprocess", {"mode": "zoom"}),
        ("preprocess", {"size": 0}),
        ("preprocess", {"std": [0, 0, 0]}),
        ("preprocess", "sideways"),
        ("neck", {"type": "GlobalAveragePooling", "dim": 9}),
        ("colour", "red"),
    ],
)
def test_a_parameter_that_is_not_valid_is_422_with_its_place(
    http: httpx.Client, part: str, value: Any
) -> None:
    body = assert_problem(features(http, **{part: value}), 422, "invalid-config")
    assert pointers(body)[0].startswith(f"#/{part}")


def test_a_query_that_is_not_valid_is_422(http: httpx.Client) -> None:
    for query in ("limit=0", "limit=many", f"search={'x' * 200}"):
        body = assert_problem(http.get(f"/backbones?{query}"), 422, "invalid-config")
        assert pointers(body) == [f"#/query/{query.partition('=')[0]}"]


@pytest.mark.parametrize("size", [0, -1, [1], [1, 2, 3], ["a", 1], 10**9, True, 1.5, "224", {}])
def test_an_input_size_that_is_none_is_422(http: httpx.Client, size: Any) -> None:
    reply = http.post("/backbones/inspect", json={"backbone": THIN, "input_size": size})
    assert pointers(assert_problem(reply, 422, "invalid-config")) == ["#/input_size"]


def test_a_size_that_the_backbone_does_not_take_is_422(http: httpx.Client, photo: bytes) -> None:
    pixel = encoded(np.zeros((1, 1, 3), np.uint8))
    vit = {"type": "timm.vit_tiny_patch16_224"}
    too_small = features(http, {"type": "torchvision.squeezenet1_1"}, image=pixel, preprocess="native")
    assert "does not take images of 1x1" in assert_problem(too_small, 422, "invalid-config")["detail"]
    for reply in (
        features(http, vit, image=photo, preprocess="native"),
        features(http, vit, preprocess={"size": 200}),
    ):
        assert "it is made for 224x224" in assert_problem(reply, 422, "invalid-config")["detail"]


def test_a_checkpoint_that_is_not_there_is_422(http: httpx.Client) -> None:
    config = {**THIN, "init_cfg": {"type": "Pretrained", "checkpoint": "nothing.pth"}}
    body = assert_problem(features(http, config), 422, "checkpoint-unavailable")
    assert pointers(body) == ["#/backbone/init_cfg/checkpoint"]
    assert "'nothing.pth'" in body["detail"]


def test_a_checkpoint_that_does_not_fit_is_422_and_names_every_weight(serve: Serve, tmp_path: Any) -> None:
    service = serve()
    state = weights_of(service, THIN)
    first, second, *_ = [name for name in state if name.endswith("weight")]
    changed = {name: tensor for name, tensor in state.items() if name != first}
    changed[second] = torch.zeros(3, 5)
    (tmp_path / "thin.safetensors").write_bytes(save(changed))
    config = {**THIN, "checkpoint": "thin.safetensors"}
    body = assert_problem(features(service.http, config), 422, "checkpoint-mismatch")
    assert body["missing"] == [first]
    assert len(body["wrong_shape"]) == 1
    assert body["wrong_shape"][0].startswith(f"{second}: file [3,5], backbone ")
    assert pointers(body) == ["#/backbone/checkpoint"]
    (tmp_path / "thin.safetensors").write_bytes(save(state))
    assert features(service.http, config).json()["model"]["weights"]["source"] == "checkpoint"


def test_a_file_that_is_no_checkpoint_is_422(serve: Serve, tmp_path: Any) -> None:
    service = serve()
    for name in ("a.safetensors", "b.pth", "c.pt"):
        (tmp_path / name).write_bytes(b"not a file of tensors, however long it may be")
        body = assert_problem(
            features(service.http, {**THIN, "checkpoint": name}), 422, "checkpoint-unreadable"
        )
        assert pointers(body) == ["#/backbone/checkpoint"]


def test_a_level_that_is_not_finite_is_422(serve: Serve, tmp_path: Any) -> None:
    service = serve()
    state = weights_of(service, THIN)
    name = next(name for name in state if name.endswith("bias"))
    state[name][0] = float("nan")
    (tmp_path / "nan.safetensors").write_bytes(save(state))
    reply = features(service.http, {**THIN, "checkpoint": "nan.safetensors"})
    assert "level 3" in assert_problem(reply, 422, "non-finite-level")["detail"]


# --- 502, 503, 504 ------------------------------------------------------------------------------

HUB = {**THIN, "checkpoint": "hf-hub:someone/thin"}
HUB_FILE = "/someone/thin/resolve/main/model.safetensors"


def serve_with_hub(serve: Serve, url: str, **given: Any) -> RunningService:
    return serve(HF_ENDPOINT=url, checkpoint_hosts="127.0.0.1", **given)


def test_a_hub_that_sends_other_bytes_is_502(serve: Serve, remote: Remote) -> None:
    service = serve_with_hub(serve, remote.url)
    remote.has(HUB_FILE, b"what was promised").sent = b"what came instead"
    body = assert_problem(features(service.http, HUB), 502, "remote-failed")
    assert "sha256" in body["detail"]
    assert "127.0.0.1" not in body["detail"]


def test_a_hub_that_fails_or_is_gone_is_502(serve: Serve, remote: Remote) -> None:
    service = serve_with_hub(serve, remote.url)
    remote.has(HUB_FILE, b"", status=500)
    assert_problem(features(service.http, HUB), 502, "remote-failed")
    remote.stop()
    assert_problem(features(service.http, HUB), 502, "remote-failed")
    assert service.http.get("/models").json()["models"] == []


def test_a_hub_that_stalls_is_504(serve: Serve, remote: Remote) -> None:
    service = serve_with_hub(serve, remote.url, download_timeout=0.3)
    remote.has(HUB_FILE, b"never sent", gate=Event())
    assert_problem(features(service.http, HUB), 504, "remote-timeout")


def test_the_deadline_of_a_request_ends_a_download_with_504(serve: Serve, remote: Remote) -> None:
    service = serve_with_hub(serve, remote.url, request_timeout=0.5)
    remote.has(HUB_FILE, b"never sent", gate=Event())
    assert_problem(features(service.http, HUB), 504, "deadline-exceeded")


def test_a_full_queue_is_503_and_those_before_it_are_answered(serve: Serve) -> None:
    service = serve(queue_size=1, max_batch=1)
    batcher = service.engine.batcher
    with HeldDevice(service) as device:
        second = device.send()
        with batcher._changed:  # told of every job that is queued
            assert batcher._changed.wait_for(lambda: batcher.waiting_images == 1, 60)
        body = assert_problem(features(service.http), 503, "queue-full")
        assert "the queue holds 1" in body["detail"]
    assert [device.first.result().status_code, second.result().status_code] == [200, 200]


def test_the_deadline_passes_while_the_device_is_busy(serve: Serve) -> None:
    service = serve(request_timeout=3)
    with HeldDevice(service) as device:
        body = assert_problem(features(service.http), 504, "deadline-exceeded")
        assert "longer than 3 s" in body["detail"]
        assert_problem(device.first.result(), 504, "deadline-exceeded")
    assert features(service.http).status_code == 200


def test_a_model_that_is_still_loading_is_503_and_loads_on(serve: Serve) -> None:
    service = serve(request_timeout=1)
    gate = Event()
    service.engine.networks._loader.submit(gate.wait, 60)
    assert_problem(features(service.http), 503, "model-loading")
    [load] = service.engine.networks.cache._loads.values()
    loaded = Event()
    load.task.add_done_callback(lambda _: loaded.set())
    gate.set()
    assert loaded.wait(60)
    assert features(service.http).status_code == 200


def test_a_model_over_the_budget_is_503(serve: Serve) -> None:
    service = serve(model_budget="1000")
    body = assert_problem(features(service.http), 503, "out-of-memory")
    assert "the budget is 1,000 bytes" in body["detail"]
    assert_problem(service.http.post("/models", json={"backbone": THIN}), 503, "out-of-memory")


def test_a_draining_service_is_503_and_says_so_to_probes(serve: Serve) -> None:
    service = serve()
    assert features(service.http).status_code == 200
    service.app.state.drain.leave()
    still = features(service.http)
    assert (still.status_code, still.headers["connection"]) == (200, "close")
    ready = service.http.get("/readyz")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert int(ready.headers["retry-after"]) >= 1
    assert service.http.get("/healthz").status_code == 200
    service.app.state.drain.refuse()
    assert_problem(features(service.http), 503, "draining")


# --- 500, and what all of them share ------------------------------------------------------------


def test_a_crash_says_nothing_but_the_id_of_the_request(serve: Serve) -> None:
    service = serve()

    def crash(_request: Request) -> None:
        raise RuntimeError("the secret of the house")

    # In the place of a route that there is: any other would not be served.
    service.app.router.routes.insert(0, Route("/version", crash))
    reply = service.http.get("/version", headers={"X-Request-ID": "mine-1"})
    body = assert_problem(reply, 500, "about:blank")
    assert body["request_id"] == "mine-1"
    assert "secret" not in reply.text
    counted = 'status="500"} 1.0'
    assert counted in httpx.get(f"{service.url}/metrics").text


def test_a_problem_carries_the_id_that_the_client_gave(http: httpx.Client) -> None:
    reply = http.get("/backbones/nothing", headers={"X-Request-ID": "mine-2"})
    assert assert_problem(reply, 404)["request_id"] == "mine-2"


@pytest.mark.parametrize("forged", ["", "a b", "a" * 129, "<script>", "é"])
def test_a_malformed_request_id_is_replaced(http: httpx.Client, forged: str) -> None:
    reply = http.get("/backbones/nothing", headers={b"X-Request-ID": forged.encode()})
    assert assert_problem(reply, 404)["request_id"] != forged

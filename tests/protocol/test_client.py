"""Both clients against a real HTTP server that keeps what it is sent."""

from __future__ import annotations

import asyncio
import email
import email.policy
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.client import AsyncBackboneClient, BackboneClient, BackboneServiceError
from service.protocol.encode import ReplyOptions, encode
from service.protocol.negotiate import JSON, SAFETENSORS, negotiate
from service.protocol.reply import FeatureReply, FrozenInfo, ImageInfo, LevelArray, ModelInfo, WeightsInfo
from service.protocol.request import parse_text_parts

ARRAY = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
MODEL = ModelInfo(
    "0f3a", "ResNet", "cpu", "torch", "float32", WeightsInfo("random"), FrozenInfo(None, 0, 161)
)
REPLY = FeatureReply(
    MODEL, (ImageInfo(64, 48, "PNG", (64, 64), (48, 64)),), (LevelArray(3, "3", "NCHW", 32, 3, ARRAY),)
)
PROBLEM = {
    "type": "about:blank",
    "title": "The config is not valid",
    "status": 422,
    "detail": "#/backbone/depth: 7 is no depth",
    "request_id": "r-1",
    "errors": [{"pointer": "#/backbone/depth", "detail": "7 is no depth"}],
}
RESNET = {"type": "ResNet", "depth": 50}


@dataclass
class Seen:
    """What the last request said."""

    method: str = ""
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def parts(self) -> list[tuple[str, str | None, bytes]]:
        """(name, file name, content) of each multipart part."""
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + self.body, policy=email.policy.HTTP)
        return [
            (
                str(part.get_param("name", header="content-disposition")),
                part.get_filename(),
                bytes(part.get_payload(decode=True)),  # type: ignore[arg-type]  # bytes, as it is no multipart
            )
            for part in message.iter_parts()  # type: ignore[attr-defined]  # the policy makes an EmailMessage
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen = Seen()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        type(self).seen = Seen(self.command, self.path, headers, body)
        if self.path == "/features":
            encoded = encode(negotiate(headers["accept"]), REPLY, ReplyOptions())
            self.reply(200, encoded.media_type, encoded.body)
        elif self.path == "/models" and self.command == "POST":
            self.reply(422, "application/problem+json", json.dumps(PROBLEM).encode())
        elif self.path == "/readyz":
            self.reply(503, "text/html", b"<h1>a proxy says no</h1>", {"Retry-After": "7"})
        elif self.command == "DELETE":
            self.reply(202, JSON, b'{"id":"0f3a","state":"unloading"}')
        else:
            self.reply(200, JSON, b'{"path":"%s"}' % self.path.encode())

    do_GET = do_POST = do_DELETE = answer  # noqa: N815

    def reply(self, status: int, media_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        given = {"Content-Type": media_type, "Content-Length": str(len(body)), "X-Request-ID": "r-1"}
        for name, value in (given | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(url: str) -> Iterator[BackboneClient]:
    with BackboneClient(url, api_key="k-1") as client:
        yield client


def test_features_are_asked_for_as_the_contract_says(client: BackboneClient, tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"\xff\xd8 jpeg")
    features = client.features(
        [path, b"\x89PNG bytes"], backbone=RESNET, pool="avg", normalize=True, returns="tensors"
    )
    np.testing.assert_array_equal(features.arrays["3"], ARRAY)
    assert (features.request_id, features.model["id"]) == ("r-1", "0f3a")
    seen = Handler.seen
    assert seen.headers["authorization"] == "Bearer k-1"
    assert seen.headers["accept"] == SAFETENSORS
    parts = seen.parts()
    assert [part for part in parts if part[0] == "image"] == [
        ("image", "cat.jpg", b"\xff\xd8 jpeg"),
        ("image", "image", b"\x89PNG bytes"),
    ]
    request = parse_text_parts({name: text.decode() for name, file, text in parts if file is None})
    assert request.backbone == RESNET
    assert (request.pool, request.normalize, request.returns) == ("avg", True, "tensors")


def test_a_tensor_goes_as_a_float32_npy(client: BackboneClient) -> None:
    tensor = np.ones((1, 3, 4, 4), np.float16)
    client.features(tensor=tensor, backbone="resnet50")
    [content] = [content for name, _, content in Handler.seen.parts() if name == "tensor"]
    sent = np.load(io.BytesIO(content))
    assert (sent.dtype, sent.shape) == (np.float32, (1, 3, 4, 4))


def test_one_path_is_one_image_and_json_has_stats(client: BackboneClient, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"png")
    features = client.features(str(path), backbone="resnet50", accept=JSON)
    assert features.levels["3"].array is None
    assert features.levels["3"].stats == {
        "min": 0.0,
        "max": 11.0,
        "mean": 5.5,
        "std": pytest.approx(ARRAY.std(dtype=np.float64)),
    }


def test_images_and_a_tensor_exclude_each_other(client: BackboneClient) -> None:
    with pytest.raises(ValueError, match="one of the two"):
        client.features([b"x"], tensor=ARRAY, backbone="resnet50")
    with pytest.raises(ValueError, match="one of the two"):
        client.features(backbone="resnet50")


def test_a_problem_is_an_error_with_its_faults(client: BackboneClient) -> None:
    with pytest.raises(BackboneServiceError, match="7 is no depth") as caught:
        client.load(RESNET, preprocess="crop")
    error = caught.value
    assert (error.status, error.request_id) == (422, "r-1")
    assert error.faults == (("#/backbone/depth", "7 is no depth"),)
    assert json.loads(Handler.seen.body) == {"backbone": RESNET, "preprocess": "crop"}


def test_an_error_from_something_in_between_is_one_too(client: BackboneClient) -> None:
    with pytest.raises(BackboneServiceError) as caught:
        client.ready()
    assert (caught.value.status, caught.value.retry_after_s) == (503, 7.0)


def test_the_other_routes(client: BackboneClient) -> None:
    assert client.backbones(search="res net", limit=5)["path"] == "/backbones?search=res+net&limit=5"
    assert client.backbone("mmdet.ResNet")["path"] == "/backbones/mmdet.ResNet"
    assert client.config("../../secret")["path"] == "/configs/..%2F..%2Fsecret"
    assert client.inspect(RESNET, neck="fpn", input_size=(512, 640))["path"] == "/backbones/inspect"
    assert json.loads(Handler.seen.body) == {"backbone": RESNET, "neck": "fpn", "input_size": [512, 640]}
    assert client.configs()["path"] == "/configs"
    assert client.models()["path"] == "/models"
    assert client.health()["path"] == "/healthz"
    assert client.version()["path"] == "/version"
    assert client.unload("0f3a")["state"] == "unloading"
    assert (Handler.seen.method, Handler.seen.path) == ("DELETE", "/models/0f3a")


def test_the_async_client_does_the_same(url: str) -> None:
    async def talk() -> None:
        async with AsyncBackboneClient(url) as client:
            features = await client.features([b"x"], backbone=RESNET)
            np.testing.assert_array_equal(features.arrays["3"], ARRAY)
            assert "authorization" not in Handler.seen.headers
            for ask, path in [
                (client.backbones("net"), "/backbones?search=net"),
                (client.backbone("timm.resnet50"), "/backbones/timm.resnet50"),
                (client.inspect(RESNET), "/backbones/inspect"),
                (client.configs(), "/configs"),
                (client.config("resnet50"), "/configs/resnet50"),
                (client.models(), "/models"),
                (client.health(), "/healthz"),
                (client.version(), "/version"),
            ]:
                assert (await ask)["path"] == path
            await client.unload("0f3a")
            with pytest.raises(BackboneServiceError):
                await client.load(RESNET)
            with pytest.raises(BackboneServiceError):
                await client.ready()

    asyncio.run(talk())


def test_a_service_that_is_not_there_is_httpxs_error() -> None:
    with BackboneClient("http://127.0.0.1:9", timeout_s=5.0) as client, pytest.raises(httpx.TransportError):
        client.health()

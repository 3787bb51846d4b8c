"""`POST /features` with the URLs of images, fetched from a host on loopback that the settings allow."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.client import AsyncBackboneClient, BackboneClient
from service.protocol.decode import Features
from tests.api.problems import assert_problem, pointers
from tests.conftest import RunningService, Serve, encoded
from tests.images.remotes import Remote, endlessly, redirect, reply, then_silent
from tests.processes import COMMAND, environment

TINY = {"type": "timm.resnet10t", "out_indices": [4]}


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    with Remote() as server:
        yield server


@pytest.fixture
def fetching(serve: Serve, remote: Remote) -> RunningService:
    return serve(
        image_hosts=f"http://localhost:{remote.port}",
        image_networks="127.0.0.0/8,::1",
        max_body_bytes=500_000,
    )


@pytest.fixture(autouse=True)
def fresh(remote: Remote, photo: bytes) -> None:
    """Nothing was asked yet."""
    remote.answers = {"/photo.jpg": reply(photo, Content_Type="text/plain")}
    remote.heads.clear()
    remote.asked.clear()
    remote.hung_up.clear()


def asked(fetching: RunningService, *images: Any, backbone: Any = TINY, **headers: str) -> httpx.Response:
    """The reply to a request for these images; a text is the URL of one."""
    given = [{"url": image} if isinstance(image, str) else image for image in images]
    return fetching.http.post("/features", json={"backbone": backbone, "images": given}, headers=headers)


def at(remote: Remote, path: str) -> str:
    return f"http://localhost:{remote.port}{path}"


def fetches(fetching: RunningService) -> dict[str, float]:
    """Counters and gauges of fetching, without the histogram and the outcomes that never were."""
    rows = [line.split(" ") for line in fetching.http.get("/metrics").text.splitlines()]
    return {
        name.removeprefix("backbone_image_"): float(value)
        for name, value in (row for row in rows if len(row) == 2)
        if name.startswith(("backbone_image_fetches", "backbone_image_fetched"))
        if float(value) or "outcome" not in name
    }


def test_an_image_by_url_gives_what_its_bytes_give(
    fetching: RunningService, remote: Remote, photo: bytes
) -> None:
    other = encoded(np.zeros((8, 8, 3), np.uint8))
    remote.answers["/other"] = redirect(at(remote, "/other.png"))
    remote.answers["/other.png"] = reply(other)
    as_base64 = [{"base64": base64.b64encode(data).decode()} for data in (photo, other, photo)]
    sent = asked(fetching, *as_base64)
    fetched = asked(fetching, at(remote, "/photo.jpg"), at(remote, "/other"), as_base64[2])
    assert fetched.status_code == 200, fetched.text
    assert fetched.json()["levels"] == sent.json()["levels"]
    assert fetched.json()["images"] == sent.json()["images"]
    assert fetched.headers["etag"] == sent.headers["etag"]
    assert "fetch;dur=" in fetched.headers["server-timing"]
    assert "fetch" not in sent.headers["server-timing"]
    assert list(fetched.json()["timings_ms"]) == ["load", "decode", "queue", "forward", "encode"]
    assert fetches(fetching) == {
        'fetches_total{outcome="fetched"}': 2, "fetches_in_flight": 0, "fetched_bytes_total": len(photo) + len(other),
    }  # fmt: skip


def test_a_tag_is_of_the_bytes_and_not_of_the_url(fetching: RunningService, remote: Remote) -> None:
    tag = asked(fetching, at(remote, "/photo.jpg")).headers["etag"]
    assert asked(fetching, at(remote, "/photo.jpg"), **{"If-None-Match": tag}).status_code == 304
    remote.answers["/photo.jpg"] = reply(encoded(np.zeros((8, 8, 3), np.uint8)))
    changed = asked(fetching, at(remote, "/photo.jpg"), **{"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


def test_urls_are_off_by_default(http: httpx.Client, remote: Remote) -> None:
    images = [{"base64": "AAAA"}, {"url": at(remote, "/photo.jpg")}]
    problem = assert_problem(
        http.post("/features", json={"backbone": TINY, "images": images}), 422, "invalid-config"
    )
    assert pointers(problem) == ["#/images/1/url"]
    assert "off" in problem["detail"]
    assert remote.heads == []


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:PORT/photo.jpg", "https://localhost:PORT/photo.jpg", "http://localhost/photo.jpg", "file:///etc/passwd",
     "http://169.254.169.254/latest/meta-data/", "http://me:secret@localhost:PORT/photo.jpg", "photo.jpg", "data:,x"],
)  # fmt: skip
def test_a_url_that_is_not_allowed_is_refused_before_anything_is_fetched(
    fetching: RunningService, remote: Remote, url: str
) -> None:
    reply = asked(fetching, at(remote, "/photo.jpg"), url.replace("PORT", str(remote.port)))
    problem = assert_problem(reply, 422, "invalid-config")
    assert pointers(problem) == ["#/images/1/url"]
    assert "secret" not in reply.text
    assert remote.heads == []


@pytest.mark.parametrize(
    ("backbone", "status"),
    [
        ({"type": "timm.resnet10t", "out_indices": [9]}, 422),
        ({"type": "timm.no_such"}, 404),
        ({**TINY, "checkpoint": "none.safetensors"}, 422),
    ],
)
def test_nothing_is_fetched_for_a_config_that_cannot_be_served(
    fetching: RunningService, remote: Remote, backbone: Any, status: int
) -> None:
    assert_problem(asked(fetching, at(remote, "/photo.jpg"), backbone=backbone), status)
    assert remote.heads == []


def test_nothing_is_fetched_without_a_key(serve: Serve, remote: Remote) -> None:
    fetching = serve(
        api_keys="k-1", image_hosts=f"http://localhost:{remote.port}", image_networks="127.0.0.0/8,::1"
    )
    assert_problem(asked(fetching, at(remote, "/photo.jpg")), 401)
    assert remote.heads == []
    assert asked(fetching, at(remote, "/photo.jpg"), Authorization="Bearer k-1").status_code == 200
    assert "k-1" not in remote.heads[0]


@pytest.mark.parametrize("networks", ["", "10.0.0.0/8"])
def test_an_address_that_is_not_public_cannot_be_reached(serve: Serve, remote: Remote, networks: str) -> None:
    fetching = serve(image_hosts=f"http://localhost:{remote.port}", image_networks=networks)
    problem = assert_problem(asked(fetching, at(remote, "/photo.jpg")), 502, "remote-failed")
    assert problem["detail"] == "image 0: its host cannot be reached"
    assert pointers(problem) == ["#/images/0/url"]
    assert remote.heads == []


@pytest.mark.parametrize(
    ("answer", "status", "kind"),
    [
        (reply(b"<html><body>no image</body></html>", Content_Type="image/png"), 415, "unsupported-media"),
        (reply(b""), 400, "undecodable-image"),
        (reply(b"\xff\xd8\xff\xe0 not much of a photo"), 400, "undecodable-image"),
        (reply(b"secret", 404), 502, "remote-failed"),
        (reply(bytes(500_001)), 413, "too-large"),
        (endlessly(b"HTTP/1.0 200 -\r\n\r\n", bytes(65536)), 413, "too-large"),
        (redirect("http://169.254.169.254/"), 502, "remote-failed"),
    ],
)
def test_what_a_host_sends_instead_of_an_image(
    fetching: RunningService, remote: Remote, photo: bytes, answer: Any, status: int, kind: str
) -> None:
    remote.answers["/other"] = answer
    problem = assert_problem(asked(fetching, at(remote, "/photo.jpg"), at(remote, "/other")), status, kind)
    assert problem["detail"].startswith("image 1: ")
    assert "secret" not in str(problem)


def test_images_of_the_body_and_of_urls_share_the_limit_of_bytes(
    fetching: RunningService, remote: Remote
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    image = encoded(noise)  # 270 kB: one fits into 500 kB, two do not
    remote.answers["/noise.png"] = reply(image)
    assert asked(fetching, at(remote, "/noise.png")).status_code == 200
    sent = {"base64": base64.b64encode(image).decode()}
    problem = assert_problem(asked(fetching, sent, at(remote, "/noise.png")), 413, "too-large")
    assert problem["detail"].startswith("image 1: ")


def test_a_host_that_falls_silent_is_a_504(serve: Serve, remote: Remote) -> None:
    remote.answers["/slow"] = then_silent(b"HTTP/1.1 200 -\r\n")
    allowed = {"image_hosts": f"http://localhost:{remote.port}", "image_networks": "127.0.0.0/8,::1"}
    fetching = serve(**allowed, image_timeout=0.3)
    assert_problem(asked(fetching, at(remote, "/slow")), 504, "remote-timeout")
    assert remote.hung_up.wait(10)
    hurried = serve(**allowed, request_timeout=0.5)
    remote.hung_up.clear()
    assert_problem(asked(hurried, at(remote, "/slow")), 504, "deadline-exceeded")
    assert remote.hung_up.wait(10)
    assert fetches(hurried) == {
        'fetches_total{outcome="abandoned"}': 1, "fetches_in_flight": 0, "fetched_bytes_total": 0,
    }  # fmt: skip


def test_a_client_that_leaves_ends_the_fetch(fetching: RunningService, remote: Remote) -> None:
    remote.answers["/slow"] = then_silent(b"HTTP/1.1 200 -\r\nContent-Length: 9\r\n\r\nabc")
    body = json.dumps({"backbone": TINY, "images": [{"url": at(remote, "/slow")}] * 20})
    head = "POST /features HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", fetching.http.base_url.port)) as leaving:
        leaving.sendall(f"{head}{len(body)}\r\n\r\n{body}".encode())
        assert remote.asked.wait(10)
    assert remote.hung_up.wait(10)
    assert asked(fetching, at(remote, "/photo.jpg")).status_code == 200
    counted = fetches(fetching)
    assert counted["fetches_in_flight"] == 0
    assert counted['fetches_total{outcome="abandoned"}'] <= 8  # the others had not begun


def test_a_setting_that_is_not_valid_ends_the_start_with_its_name(tmp_path: Path) -> None:
    ended = subprocess.run(
        [COMMAND, "serve", "--port", "0", "--image-hosts", "a.example", "--image-networks", "10.0.0.1/8"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "BACKBONE_IMAGE_NETWORKS: '10.0.0.1/8' is no network" in ended.stderr


def test_the_clients_send_urls_beside_files(
    fetching: RunningService, remote: Remote, photo: bytes, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo)
    url, path = at(remote, "/photo.jpg"), tmp_path / "photo.jpg"

    async def ask() -> Features:
        async with AsyncBackboneClient(fetching.url) as client:
            return await client.features(
                [url, path], backbone=TINY, pool="avg", returns="tensors", dtype="float16"
            )

    with BackboneClient(fetching.url) as client:
        files = client.features([photo, path], backbone=TINY, pool="avg", dtype="float16")
        urls = client.features([url, path], backbone=TINY, pool="avg", dtype="float16")
        one = client.features(url, backbone=TINY)
    assert np.array_equal(files.levels["4"].array, urls.levels["4"].array)
    assert np.array_equal(files.levels["4"].array, asyncio.run(ask()).levels["4"].array)
    assert one.levels["4"].array.shape == (1, 512, 6, 6)
    assert remote.paths() == ["/photo.jpg"] * 3

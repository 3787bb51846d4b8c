"""Headers that a proxy adds: believed from the proxies that are named, and from nobody else."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
import uvicorn
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from service.api.forwarded import ForwardedMiddleware
from service.client import BackboneClient
from service.settings import Settings
from tests.conftest import Serve

PROXY = "127.0.0.2"
RESNET18 = {"type": "ResNet", "depth": 18}
Ask = Callable[..., dict[str, Any]]


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that answers with what it takes the request for."""
    seen = {"client": scope["client"][0], "scheme": scope["scheme"], "prefix": scope["prefix"]}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(seen).encode()})


class Telling:
    """`tell` on a real socket."""

    def __init__(self, proxies: Sequence[str], root_path: str = "/") -> None:
        self._app = ForwardedMiddleware(tell, proxies=proxies, root_path=root_path)

    def __enter__(self) -> str:
        self._listening = threading.Event()
        config = uvicorn.Config(
            self._app, port=0, interface="asgi3", lifespan="off", log_level="warning", proxy_headers=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        startup = self._server.startup

        async def started(sockets: Any = None) -> None:
            await startup(sockets)
            self._listening.set()

        self._server.startup = started  # type: ignore[method-assign]  # to be told, not to poll
        self._thread.start()
        assert self._listening.wait(60)
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


def coming_from(address: str, url: str) -> httpx.Client:
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=url, transport=transport, timeout=60)


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """What a server that believes one proxy and a network takes a request for."""
    with Telling([PROXY, "203.0.113.0/24"]) as url:

        def one(*headers: tuple[str, str], peer: str = PROXY) -> dict[str, Any]:
            with coming_from(peer, url) as http:
                seen: dict[str, Any] = http.get("/", headers=list(headers)).json()
                return seen

        yield one


# --- who is believed ----------------------------------------------------------------------------


def test_a_named_proxy_is_believed(ask: Ask) -> None:
    seen = ask(
        ("X-Forwarded-For", "198.51.100.7"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Prefix", "/vision")
    )
    assert seen == {"client": "198.51.100.7", "scheme": "https", "prefix": "/vision"}


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.0.0.3"])
def test_anybody_else_is_not_believed(ask: Ask, peer: str) -> None:
    seen = ask(
        ("X-Forwarded-For", PROXY),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Prefix", "/vision"),
        ("Forwarded", "for=198.51.100.7;proto=https"),
        peer=peer,
    )
    assert seen == {"client": peer, "scheme": "http", "prefix": ""}


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        (["1.1.1.1, 198.51.100.7"], "198.51.100.7"),  # what the client itself wrote stands on the left
        (["1.1.1.1", "198.51.100.7"], "198.51.100.7"),
        (["1.1.1.1, 198.51.100.7, 203.0.113.9"], "198.51.100.7"),  # one more proxy of ours
        (["198.51.100.7:4711"], "198.51.100.7"),
        (["[2001:db8::1]:4711"], "2001:db8::1"),
        (["2001:db8:0:0::1"], "2001:db8::1"),
    ],
)
def test_the_client_is_the_nearest_address_that_is_no_proxy(ask: Ask, chain: list[str], client: str) -> None:
    assert ask(*(("X-Forwarded-For", part) for part in chain))["client"] == client


@pytest.mark.parametrize(
    "chain",
    ["", ",", "unknown", "198.51.100.7, _hidden", "localhost", "198.51.100.777", "x" * 60_000, "1," * 30_000],
    ids=lambda chain: chain[:20],
)
def test_a_chain_without_an_address_at_its_end_leaves_the_proxy_as_the_client(ask: Ask, chain: str) -> None:
    assert ask(("X-Forwarded-For", chain))["client"] == PROXY


@pytest.mark.parametrize("proto", ["", "javascript", "HTTPS", "https,http", "ws", "x" * 60_000])
def test_a_scheme_that_is_none_of_two_is_not_taken(ask: Ask, proto: str) -> None:
    assert ask(("X-Forwarded-Proto", proto))["scheme"] == "http"


HOSTILE_PREFIXES = [
    "//evil.example",
    "/a//evil.example",
    "https://evil.example",
    "javascript:alert(1)",
    "/..",
    "/vision/../admin",
    "/.",
    "/%2e%2e",
    "/vision%0d%0aX-Evil:1",
    "/vi sion",
    "/vision?x=1",
    "/vision#x",
    "\\\\evil.example",
    "/'\"><script>",
    "/" + "a" * 65,
    "/a" * 9,
    "/" + "a" * 60_000,
    "vision",
    "",
    "/",
    "/vision, /other",
]


@pytest.mark.parametrize("prefix", HOSTILE_PREFIXES, ids=lambda prefix: prefix[:20])
def test_a_prefix_that_is_no_plain_path_is_not_taken(ask: Ask, prefix: str) -> None:
    assert ask(("X-Forwarded-Prefix", prefix))["prefix"] == ""


def test_the_setting_counts_where_the_proxy_names_no_prefix() -> None:
    with Telling([PROXY], "/of/the-setting/") as url, coming_from(PROXY, url) as proxy:
        assert proxy.get("/").json()["prefix"] == "/of/the-setting"
        assert proxy.get("/", headers={"X-Forwarded-Prefix": "//evil"}).json()["prefix"] == "/of/the-setting"
        assert proxy.get("/", headers={"X-Forwarded-Prefix": "/said/"}).json()["prefix"] == "/said"


@pytest.mark.parametrize("value", ["*", "0.0.0.0/0", "::/0", "10.0.0.1/8", "gateway", "10.0.0.0/8,*"])
def test_everybody_and_names_are_no_proxies(value: str) -> None:
    with pytest.raises(ValidationError, match="forwarded_allow_ips"):
        Settings.model_validate({"forwarded_allow_ips": value})


@pytest.mark.parametrize("prefix", [prefix for prefix in HOSTILE_PREFIXES if prefix != "/"])
def test_a_root_path_that_is_no_plain_path_is_refused(prefix: str) -> None:
    with pytest.raises(ValidationError, match="root_path"):
        Settings(root_path=prefix)


# --- what follows from it -----------------------------------------------------------------------


def test_a_quota_counts_the_clients_of_a_proxy_one_by_one(serve: Serve) -> None:
    http = serve(requests_per_minute=1).http
    asked = ["198.51.100.7", "198.51.100.8", "198.51.100.7", "1.1.1.1, 198.51.100.8"]
    statuses = [http.get("/configs", headers={"X-Forwarded-For": client}).status_code for client in asked]
    assert statuses == [200, 200, 429, 429]


def test_a_client_that_is_no_proxy_cannot_leave_its_quota(serve: Serve) -> None:
    http = serve(requests_per_minute=1, forwarded_allow_ips="192.0.2.1").http
    asked = ["198.51.100.7", "198.51.100.8"]
    statuses = [http.get("/configs", headers={"X-Forwarded-For": client}).status_code for client in asked]
    assert statuses == [200, 429]


# `/features` and `/docs` are routes of ours, too.
@pytest.mark.parametrize("prefix", ["/vision", "/a/b", "/features", "/docs"])
def test_every_address_that_is_given_out_is_below_the_prefix(http: httpx.Client, prefix: str) -> None:
    headers = {"X-Forwarded-Prefix": prefix}
    page = http.get("/docs", headers=headers).text
    named = [
        first or second for first, second in re.findall(r"""(?:src|href)=["']([^"']+)|url: '([^']+)'""", page)
    ]
    assert len(named) >= 4
    types = http.get("/backbones?limit=3", headers=headers).json()["types"]
    configs = http.get("/configs", headers=headers).json()["configs"]
    loaded = http.post("/models", json={"backbone": RESNET18}, headers=headers)
    assert loaded.status_code in (200, 201), loaded.text
    hrefs = [entry["href"] for entry in (*types, *configs)]
    one = http.get(f"/backbones/{types[0]['type']}", headers=headers).json()["href"]
    for address in (*named, *hrefs, one, loaded.headers["location"]):
        assert address.startswith(f"{prefix}/")
    for address in (*named, hrefs[0], hrefs[-1], one):
        assert http.get(address.removeprefix(prefix), headers=headers).status_code == 200
    assert http.get("/openapi.json", headers=headers).json()["servers"] == [{"url": prefix}]
    gone = http.delete(loaded.headers["location"].removeprefix(prefix), headers=headers)
    assert gone.status_code in (200, 202)


def test_without_a_prefix_the_description_names_no_server(http: httpx.Client) -> None:
    http.get("/openapi.json", headers={"X-Forwarded-Prefix": "/vision"})
    assert "servers" not in http.get("/openapi.json").json()


def test_probes_and_metrics_know_their_routes_below_a_prefix(serve: Serve) -> None:
    http = serve(root_path="/vision").http
    assert [http.get(path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 200]
    assert 'route="/healthz"' in http.get("/metrics").text
    assert urljoin("http://gateway/vision/", http.get("/configs").json()["configs"][0]["href"]).startswith(
        "http://gateway/vision/configs/"
    )


def test_the_client_of_the_package_works_below_a_path(service: Any) -> None:
    """The gateway's part is done by a transport that takes the prefix off."""

    class Gateway(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            path = request.url.raw_path.decode()
            assert path.startswith("/vision/")
            request.url = request.url.copy_with(raw_path=path.removeprefix("/vision").encode())
            return super().handle_request(request)

    with BackboneClient(f"{service.url}/vision", transport=Gateway()) as client:
        assert client.inspect(RESNET18)["levels"]

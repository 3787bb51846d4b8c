"""Who may ask what: every route has a decision, and nothing gets around it."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Mount, compile_path

from service.api.access import DECISIONS, Who, rule_for
from service.api.app import create_app
from service.settings import Settings
from tests.api.problems import assert_problem
from tests.conftest import RunningService, Serve, settings_for

CLIENT, OTHER, OPERATOR = "client-key-0123456789", "other-key-0123456789", "operator-key-0123456789"
WRONG = "wrong-key-0123456789"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service with keys for clients and operators."""
    settings = settings_for(
        tmp_path_factory.mktemp("keyed"), api_keys=f"{CLIENT},{OTHER}", admin_keys=OPERATOR
    )
    with RunningService(settings) as service:
        yield service


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes() -> list[tuple[str, str]]:
    """(path, method) of everything that the app serves, as its routes say; a mount is all paths below it."""
    found = []
    for route in iter_route_contexts(create_app(Settings()).routes):
        if isinstance(route.route, Mount):
            found += [(f"{route.path}/{{path:path}}", method) for method in ("GET", "HEAD")]
        else:
            found += [(str(route.path), method) for method in route.methods or ()]
    return found


PATTERNS = [(path, method, compile_path(path)[0]) for path, method in routes()]


def address(path: str) -> str:
    """A path with something in the place of each parameter."""
    return re.sub(r"{[^}]+}", "x", path)


DECIDED = [(path, method, who) for path, methods in DECISIONS.items() for method, who in methods.items()]


def for_whom(*whom: Who) -> list[tuple[str, str]]:
    return [(method, address(path)) for path, method, who in DECIDED if who in whom]


# --- the table ----------------------------------------------------------------------------------


def test_every_route_of_the_app_has_a_decision() -> None:
    undecided = [(path, method) for path, method in routes() if method not in DECISIONS.get(path, {})]
    assert undecided == [], "say in service/api/access.py whom they are for"


def test_every_decision_is_that_of_a_route() -> None:
    assert [(path, method) for path, method, _ in DECIDED if (path, method) not in routes()] == []


@pytest.mark.parametrize(("path", "method"), routes())
def test_a_route_is_found_in_the_table_by_its_addresses(path: str, method: str) -> None:
    rule = rule_for(address(path), method)
    assert rule is not None
    assert rule.path == path


SEGMENTS = [
    "models",
    "healthz",
    "docs",
    "assets",
    "configs",
    "backbones",
    "inspect",
    "features",
    "..",
    "",
    "x",
    "%",
    "{id}",
]


@given(
    st.lists(st.sampled_from(SEGMENTS) | st.text(max_size=3), max_size=5),
    st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
)
def test_whatever_is_asked_for_the_table_says_no_other_route_than_the_router(
    segments: list[str], method: str
) -> None:
    path = "/" + "/".join(segments)
    rule = rule_for(path, method)
    matching = [(found, pattern) for found, its, pattern in PATTERNS if its == method and pattern.match(path)]
    assert rule is None or (matching and matching[0][0] == rule.path)


def test_a_route_without_a_decision_is_not_served_to_anyone(serve: Serve) -> None:
    service = serve(api_keys=CLIENT, admin_keys=OPERATOR)

    def undecided() -> str:
        return "an answer of the route"

    service.app.add_api_route("/undecided", undecided, methods=["GET"])
    service.app.add_api_route("/version", undecided, methods=["PUT"])
    for headers, statuses in (({}, (401, 401)), (bearer(CLIENT), (404, 405)), (bearer(OPERATOR), (404, 405))):
        assert service.http.get("/undecided", headers=headers).status_code == statuses[0]
        assert service.http.put("/version", headers=headers).status_code == statuses[1]


# --- every route --------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), for_whom(Who.CLIENTS, Who.OPERATORS))
def test_a_route_is_closed_without_a_key_or_with_a_wrong_one(
    keyed: RunningService, method: str, path: str
) -> None:
    refused = assert_problem(keyed.http.request(method, path), 401, "unauthenticated")
    assert "Bearer" in refused["detail"]
    assert_problem(keyed.http.request(method, path, headers=bearer(WRONG)), 403, "forbidden")
    assert_problem(keyed.http.request(method, path, headers={"X-API-Key": WRONG}), 403, "forbidden")


@pytest.mark.parametrize(("method", "path"), for_whom(Who.OPERATORS))
def test_a_route_of_operators_is_closed_to_clients(keyed: RunningService, method: str, path: str) -> None:
    assert_problem(keyed.http.request(method, path, headers=bearer(CLIENT)), 403, "forbidden")
    assert keyed.http.request(method, path, headers=bearer(OPERATOR)).status_code in (404, 415)


@pytest.mark.parametrize(("method", "path"), for_whom(Who.CLIENTS))
@pytest.mark.parametrize("key", [CLIENT, OTHER, OPERATOR])
def test_a_route_of_clients_is_open_to_every_key(
    keyed: RunningService, method: str, path: str, key: str
) -> None:
    assert keyed.http.request(method, path, headers=bearer(key)).status_code in (200, 404, 415)


@pytest.mark.parametrize(("method", "path"), for_whom(Who.ANYONE, Who.SCRAPERS))
def test_a_route_for_anyone_takes_no_notice_of_keys(keyed: RunningService, method: str, path: str) -> None:
    for headers in ({}, bearer(WRONG)):
        assert keyed.http.request(method, path, headers=headers).status_code in (200, 404)


def test_metrics_may_be_for_holders_of_keys_only(serve: Serve) -> None:
    service = serve(api_keys=CLIENT, metrics_need_key=True)
    assert_problem(service.http.get("/metrics"), 401, "unauthenticated")
    assert service.http.get("/metrics", headers=bearer(CLIENT)).status_code == 200
    assert service.http.get("/healthz").status_code == 200


@pytest.mark.parametrize("settings", [{}, {"admin_keys": OPERATOR}])
def test_metrics_that_need_a_key_are_closed_where_clients_have_none(
    serve: Serve, settings: dict[str, object]
) -> None:
    service = serve(metrics_need_key=True, **settings)
    assert service.http.get("/models").status_code == 200
    assert_problem(service.http.get("/metrics"), 401, "unauthenticated")
    assert service.http.get("/metrics", headers=bearer(OPERATOR)).status_code == (200 if settings else 403)


# --- around the table ---------------------------------------------------------------------------

CRAFTED = [
    "//models",
    "/models/",
    "/Models",
    "/MODELS",
    "/models%2f",
    "/%6dodels%2f..",
    "/healthz/../models",
    "/healthz/%2e%2e/models",
    "/healthz%00",
    "/healthz%0a",
    "/healthz;/models",
    "/docs/../models",
    "/docs/assets%2f..%2f..%2fmodels",
    "/models\\",
    "/models%20",
    "/.",
    "/*",
    "/{type}",
    "/models/{id}",
    "/docs/assets/{path:path}/../../../models",
    "/" + "a/" * 2000,
]


def raw(service: RunningService, line: str, *headers: str) -> int:
    """The status of a request whose first line is sent as it is."""
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        head = "\r\n".join([line, "Host: localhost", "Connection: close", *headers])
        connection.sendall(f"{head}\r\nContent-Length: 0\r\n\r\n".encode("latin-1"))
        with connection.makefile("rb") as reply:
            return int(reply.readline().split()[1])


@pytest.mark.parametrize("target", CRAFTED)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_crafted_path_leads_nowhere_without_a_key(keyed: RunningService, method: str, target: str) -> None:
    assert raw(keyed, f"{method} {target} HTTP/1.1") in (400, 401, 404)


@pytest.mark.parametrize("target", [path for path in CRAFTED if "{id}" not in path])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_crafted_path_leads_no_client_to_what_is_for_operators(
    keyed: RunningService, method: str, target: str
) -> None:
    status = raw(keyed, f"{method} {target} HTTP/1.1", f"Authorization: Bearer {CLIENT}")
    assert status in (400, 403, 404, 405)


@pytest.mark.parametrize(
    "method", ["HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "PROPFIND", "get", "PoSt", "X-Y"]
)
@pytest.mark.parametrize("path", ["/models", "/models/x", "/features", "/version", "/nothing"])
def test_an_odd_method_leads_nowhere_without_a_key(keyed: RunningService, method: str, path: str) -> None:
    assert raw(keyed, f"{method} {path} HTTP/1.1") in (400, 401)


@pytest.mark.parametrize(
    "target", ["http://localhost/models", "http://evil.example/models", "//evil.example/models"]
)
def test_a_target_in_absolute_form_needs_a_key_too(keyed: RunningService, target: str) -> None:
    assert raw(keyed, f"GET {target} HTTP/1.1") in (400, 401)


def test_what_there_is_and_what_not_looks_the_same_without_a_key(keyed: RunningService) -> None:
    details = {
        keyed.http.request(method, path).json()["detail"]
        for method in ("GET", "DELETE")
        for path in ("/models", "/models/x", "/nothing", "/models/")
    }
    assert len(details) == 1


def test_clients_are_told_what_there_is_not(keyed: RunningService) -> None:
    assert_problem(keyed.http.get("/nothing", headers=bearer(CLIENT)), 404, "about:blank")
    refused = keyed.http.request("PUT", "/models", headers=bearer(CLIENT))
    assert_problem(refused, 405, "about:blank")
    assert refused.headers["allow"] == "GET, POST"


def test_a_websocket_is_refused(keyed: RunningService) -> None:
    upgrade = [
        "Upgrade: websocket",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    ]
    port = int(keyed.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        head = "\r\n".join(["GET /models HTTP/1.1", "Host: localhost", "Connection: Upgrade", *upgrade])
        connection.sendall(f"{head}\r\n\r\n".encode())
        assert int(connection.recv(1024).split()[1]) in (401, 403)


def test_a_prefix_of_a_gateway_is_no_way_around(keyed: RunningService) -> None:
    scope = {"root_path": "/vision"}
    for path, status in (("/vision/models", 401), ("/vision/healthz", 200), ("/visionhealthz", 401)):
        assert _status_below(keyed, path, scope) == status


def _status_below(service: RunningService, path: str, scope: dict[str, str]) -> int:
    async def app(given: dict[str, object], receive: object, send: object) -> None:
        await service.app({**given, **scope}, receive, send)  # type: ignore[arg-type]  # ASGI, as httpx calls it

    async def ask() -> int:
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]  # as above
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get(path)).status_code

    import asyncio

    return asyncio.run(ask())


# --- keys as they are sent ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Authorization", f"Bearer {CLIENT}"), ("X-API-Key", CLIENT)], 200),
        ([("Authorization", f"Bearer {CLIENT}"), ("X-API-Key", OTHER)], 401),
        ([("Authorization", f"Bearer {CLIENT}"), ("Authorization", f"Bearer {WRONG}")], 401),
        ([("X-API-Key", WRONG), ("X-API-Key", CLIENT)], 401),
        ([("X-API-Key", CLIENT), ("X-API-Key", CLIENT)], 200),
        ([("Authorization", "Basic YTpi"), ("X-API-Key", CLIENT)], 200),
        ([("Authorization", f"bEARER   {CLIENT}")], 200),
        ([("Authorization", CLIENT)], 401),
        ([("Authorization", "Bearer")], 401),
        ([("X-API-Key", "")], 401),
        ([("X-API-Key", CLIENT[:-1])], 403),
        ([("X-API-Key", CLIENT + "0")], 403),
        ([("X-API-Key", CLIENT.upper())], 403),
        ([("X-API-Key", "schlüssel-0123456789")], 403),
        ([("X-API-Key", "\xff\xfe\x80")], 403),
        ([("X-API-Key", "k" * 60_000)], 403),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_key_is_taken_from_either_header_and_only_one_of_them(
    keyed: RunningService, headers: list[tuple[str, str]], status: int
) -> None:
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    reply = keyed.http.get("/models", headers=sent)
    assert reply.status_code == status
    assert not any(value[-20:] in reply.text for _, value in headers if len(value) >= 20)


def test_a_key_of_a_megabyte_is_refused_and_the_service_goes_on(keyed: RunningService) -> None:
    port = int(keyed.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        head = f"GET /models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-API-Key: {'k' * 2**20}\r\n\r\n"
        try:
            connection.sendall(head.encode())
            answer = connection.recv(64)
        except ConnectionError:  # the server need not read it all
            answer = b""
    assert not answer or int(answer.split()[1]) in (400, 403, 431)
    assert keyed.http.get("/models", headers=bearer(CLIENT)).status_code == 200


def test_who_may_not_ask_is_told_before_the_body_is_there(keyed: RunningService) -> None:
    port = int(keyed.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(
            b"POST /features HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 1000000\r\n\r\n"
        )
        assert connection.recv(64).startswith(b"HTTP/1.1 401")


def test_refusals_are_counted_by_their_reason(keyed: RunningService) -> None:
    def count(reason: str) -> float:
        found = re.search(
            rf'backbone_access_refused_total{{reason="{reason}"}} (\S+)', keyed.http.get("/metrics").text
        )
        return float(found[1]) if found else 0.0

    reasons = ("no_key", "several_keys", "unknown_key", "no_operator")
    before = [count(reason) for reason in reasons]
    keyed.http.get("/models")
    keyed.http.get("/models", headers=[("X-API-Key", CLIENT), ("X-API-Key", OTHER)])
    keyed.http.get("/models", headers=bearer(WRONG))
    keyed.http.post("/models", headers=bearer(CLIENT))
    assert [count(reason) for reason in reasons] == [number + 1 for number in before]


def test_a_refusal_is_counted_by_its_route_and_not_by_its_path(keyed: RunningService) -> None:
    keyed.http.delete(f"/models/{quote('a client wrote this')}")
    text = keyed.http.get("/metrics").text
    assert re.search(
        r'backbone_requests_total{method="DELETE",route="/models/{id}",status="401"} [1-9]', text
    )
    assert "wrote" not in text


# --- without keys -------------------------------------------------------------------------------


def test_without_any_key_a_developer_may_do_everything(http: httpx.Client) -> None:
    assert http.get("/models").status_code == 200
    assert_problem(http.delete("/models/x"), 404, "unknown-model")
    assert http.get("/models", headers=bearer(WRONG)).status_code == 200


@pytest.mark.parametrize("settings", [{"api_keys": CLIENT}, {"allow_anonymous": True}])
def test_operators_are_nobody_where_there_is_no_key_for_them(
    serve: Serve, settings: dict[str, object]
) -> None:
    service = serve(**settings)
    for method, path in for_whom(Who.OPERATORS):
        refused = assert_problem(service.http.request(method, path, headers=bearer(CLIENT)), 403, "forbidden")
        assert "BACKBONE_ADMIN_KEYS" in refused["detail"]


@pytest.mark.parametrize("settings", [{}, {"allow_anonymous": True}])
def test_a_key_for_operators_alone_leaves_clients_anonymous(
    serve: Serve, settings: dict[str, object]
) -> None:
    service = serve(admin_keys=OPERATOR, **settings)
    assert service.http.get("/models").status_code == 200
    assert service.http.get("/models", headers=bearer(WRONG)).status_code == 200
    assert_problem(service.http.delete("/models/x"), 401, "unauthenticated")
    assert_problem(service.http.delete("/models/x", headers=bearer(WRONG)), 403, "forbidden")
    assert_problem(service.http.delete("/models/x", headers=bearer(OPERATOR)), 404, "unknown-model")


def test_the_description_says_which_keys_are_needed(keyed: RunningService) -> None:
    document = keyed.http.get("/openapi.json").json()
    needed = {
        (method.upper(), path): operation["security"]
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    schemes = [{name: []} for name in document["components"]["securitySchemes"]]
    assert needed["GET", "/healthz"] == []
    assert needed["POST", "/features"] == needed["DELETE", "/models/{id}"] == schemes

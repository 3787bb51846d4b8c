"""The OpenAPI description: sound, complete, true, and a page that works without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from service.api.app import create_app
from service.settings import Settings
from tests.conftest import RunningService, Serve, npy
from tests.docs.browser import Browser, find_chromium

Operation = dict[str, Any]
DOCUMENT: dict[str, Any] = create_app(Settings()).openapi()
OPERATIONS: dict[tuple[str, str], Operation] = {
    (method.upper(), path): operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
OPEN = ".opblock.is-open"


def named(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Parameters of a test for each operation, with a readable id."""
    return {"argnames": ("method", "path"), "argvalues": pairs, "ids": [" ".join(pair) for pair in pairs]}


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for child in value.values():
            yield from references(child)
    elif isinstance(value, list):
        for child in value:
            yield from references(child)


def looked_up(reference: str) -> Any:
    found: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def examples(holder: dict[str, Any]) -> list[Any]:
    """The example values of a media type or a parameter."""
    return (
        [holder["example"]]
        if "example" in holder
        else [item["value"] for item in holder.get("examples", {}).values()]
    )


def addresses(path: str, operation: Operation) -> list[str]:
    """The path with each combination of its parameters' examples, by position."""
    inside = [parameter for parameter in operation.get("parameters", ()) if parameter["in"] == "path"]
    values = list(zip(*(examples(parameter) for parameter in inside), strict=True)) or [()]
    found = []
    for combination in values:
        address = path
        for parameter, value in zip(inside, combination, strict=True):
            address = address.replace(f"{{{parameter['name']}}}", quote(value, safe=""))
        found.append(address)
    return found


# --- sound --------------------------------------------------------------------------------------


def test_the_document_is_openapi_3_1(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1.")
    assert set(document["info"]) >= {"title", "version", "description"}
    assert {tag["name"] for tag in document["tags"]} >= {
        tag for operation in OPERATIONS.values() for tag in operation["tags"]
    }
    assert document == DOCUMENT


def test_every_reference_leads_to_a_component_and_every_component_is_used() -> None:
    used = set(references(DOCUMENT))
    for reference in used:
        assert looked_up(reference)["description"]
    schemas = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert used == schemas


def test_operation_ids_are_unique_names_for_a_generated_client() -> None:
    ids = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"(get|post|delete)_[a-z]+", name) for name in ids)


def test_every_served_route_is_described_except_the_page_itself() -> None:
    served = {
        (method, re.sub(r":\w+}", "}", str(route.path)))
        for route in iter_route_contexts(create_app(Settings()).routes)
        if isinstance(route.route, APIRoute)
        for method in route.methods or ()
    }
    assert served - set(OPERATIONS) == {("GET", "/docs")}
    assert set(OPERATIONS) <= served


@pytest.mark.parametrize(**named(list(OPERATIONS)))
def test_an_operation_says_what_it_does_and_what_it_takes(method: str, path: str) -> None:
    operation = OPERATIONS[method, path]
    assert operation["summary"]
    assert operation["description"].endswith(".")
    inside = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"}
    assert inside == set(re.findall(r"{(\w+)}", path))
    for parameter in operation.get("parameters", ()):
        assert parameter["description"], parameter["name"]
        assert parameter["schema"]


@pytest.mark.parametrize(**named(list(OPERATIONS)))
def test_an_operation_describes_its_replies_with_an_example(method: str, path: str) -> None:
    responses = OPERATIONS[method, path]["responses"]
    fine = [response for status, response in responses.items() if status.startswith("2")]
    assert fine
    for response in fine:
        assert examples(next(iter(response["content"].values())))
    for status, response in responses.items():
        if status.startswith(("4", "5")) and path not in ("/healthz", "/readyz"):
            assert set(response["content"]) == {"application/problem+json"}
            assert "/problems/" in response["description"]


# --- true ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(**named([pair for pair in OPERATIONS if pair[0] == "GET"]))
def test_a_get_example_is_answered_as_described(http: httpx.Client, method: str, path: str) -> None:
    operation = OPERATIONS[method, path]
    [(described, content)] = operation["responses"]["200"]["content"].items()
    for address in addresses(path, operation):
        reply = http.get(address)
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].partition(";")[0] == described
        if described == "application/json":
            assert set(reply.json()) == set(content["example"])


@pytest.mark.parametrize(**named([pair for pair in OPERATIONS if pair[0] == "POST"]))
def test_a_post_example_in_json_is_answered_as_described(http: httpx.Client, method: str, path: str) -> None:
    operation = OPERATIONS[method, path]
    bodies = examples(operation["requestBody"]["content"]["application/json"])
    assert bodies
    for body in bodies:
        reply = http.post(path, json=body)
        assert reply.is_success, reply.text
        described = operation["responses"][str(reply.status_code)]["content"]["application/json"]["example"]
        assert set(reply.json()) == set(described)


def test_the_form_and_the_raw_body_of_features_work_as_described(http: httpx.Client, photo: bytes) -> None:
    operation = OPERATIONS["POST", "/features"]
    content = operation["requestBody"]["content"]
    parts = content["multipart/form-data"]["schema"]["properties"]
    texts = {name: part["example"] for name, part in parts.items() if "example" in part}
    chosen = {name: str(part["default"]).lower() for name, part in parts.items() if "default" in part}
    form = http.post("/features", data={**texts, **chosen}, files={"image": ("photo.jpg", photo)})
    assert form.status_code == 200, form.text
    [parameter] = [one for one in operation["parameters"] if one["in"] == "query"]
    for query in filter(None, examples(parameter)):
        assert set(query) <= set(parameter["schema"]["properties"])
        for media_type in content.keys() - {"multipart/form-data", "application/json"}:
            body = npy(np.zeros((1, 3, 64, 64), np.float32)) if media_type == "application/x-npy" else photo
            raw = http.post("/features", params=query, content=body, headers={"Content-Type": media_type})
            assert raw.status_code == 200, raw.text


def test_the_described_keys_of_features_are_those_it_takes(http: httpx.Client, photo: bytes) -> None:
    content = OPERATIONS["POST", "/features"]["requestBody"]["content"]
    for way, other in (("multipart/form-data", {"image", "tensor"}), ("application/json", {"images"})):
        refused = (
            http.post("/features", data={"backbone": "resnet50", "nonsense": "1"}, files={"image": photo})
            if way.startswith("multipart")
            else http.post("/features", json={"backbone": "resnet50", "images": [], "nonsense": 1})
        )
        known = refused.text.partition("known: ")[2].partition('"')[0]
        described = set(content[way]["schema"]["properties"])
        assert described >= other
        assert {word.strip() for word in known.split(",")} == described


@pytest.mark.parametrize("body", ["multipart", "json"])
def test_keys_in_the_query_of_a_body_that_has_its_own_are_refused(
    http: httpx.Client, photo: bytes, body: str
) -> None:
    given: dict[str, Any] = (
        {"data": {"backbone": "resnet50"}, "files": {"image": photo}}
        if body == "multipart"
        else {"json": {"backbone": "resnet50", "images": []}}
    )
    for key, pointer in {"pool": "#/pool", "a/b~c": "#/a~1b~0c", "k" * 99: f"#/{'k' * 63}…"}.items():
        refused = http.post("/features", params={key: "avg"}, **given)
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["pointer"] == pointer


def test_an_unknown_key_is_pointed_at_as_rfc_6901_has_it(http: httpx.Client, photo: bytes) -> None:
    files = {"image": photo, "a/b~c": (None, "1")}
    part = http.post("/features", data={"backbone": "resnet50"}, files=files)
    raw = http.post("/features", params={"a/b~c": "1"}, content=photo, headers={"Content-Type": "image/jpeg"})
    assert [reply.json()["errors"][0]["pointer"] for reply in (part, raw)] == ["#/a~1b~0c"] * 2


def test_the_delete_example_is_answered_as_described(serve: Serve) -> None:
    http = serve().http
    operation = OPERATIONS["DELETE", "/models/{id}"]
    loaded = http.post(
        "/models",
        json=examples(OPERATIONS["POST", "/models"]["requestBody"]["content"]["application/json"])[0],
    )
    [address] = addresses("/models/{id}", operation)
    assert urljoin(loaded.headers["location"], ".") == urljoin(address, ".")
    reply = http.delete(loaded.headers["location"])
    assert reply.status_code == 200
    assert set(reply.json()) == set(operation["responses"]["200"]["content"]["application/json"]["example"])
    missing = http.delete(address)
    assert missing.status_code == 404
    assert "/problems/unknown-model" in operation["responses"]["404"]["description"]


def test_a_bad_query_is_a_described_problem_and_not_the_frameworks_own(http: httpx.Client) -> None:
    reply = http.get("/backbones?limit=0")
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    assert set(reply.json()) <= set(DOCUMENT["components"]["schemas"]["Problem"]["properties"])
    assert "HTTPValidationError" not in str(DOCUMENT)


# --- the page -----------------------------------------------------------------------------------


def test_the_page_refers_to_this_server_only_and_its_assets_are_there(service: RunningService) -> None:
    page = service.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    named_there = re.findall(r"""(?:src|href)=["']([^"']+)|url: '([^']+)'""", page.text)
    links = [urljoin(f"{service.url}/docs", first or second) for first, second in named_there]
    assert len(links) >= 4
    assert {urlsplit(link).netloc for link in links} == {urlsplit(service.url).netloc}
    assert {service.http.get(link).status_code for link in links} == {200}


@pytest.mark.parametrize("asked", ["bytes=0-1", "bytes=5-1", "bytes=999999999-", "bytes=0-,0-,0-", "x"])
def test_an_asset_is_sent_whole_whatever_range_is_asked_for(http: httpx.Client, asked: str) -> None:
    whole = http.get("/docs/assets/swagger-ui.css")
    ranged = http.get("/docs/assets/swagger-ui.css", headers={"Range": asked})
    assert (ranged.status_code, ranged.content) == (200, whole.content)
    assert ranged.headers["accept-ranges"] == "none"


def test_an_image_is_tried_out_on_the_page(service: RunningService, photo: bytes, tmp_path: Path) -> None:
    command = find_chromium()
    if command is None:
        pytest.skip("no Chromium is installed")
    (tmp_path / "photo.jpg").write_bytes(photo)
    with Browser(command, tmp_path / "profile") as browser:
        browser.open(f"{service.url}/docs#/features/post_features")
        browser.click(f"{OPEN} .try-out__btn")
        browser.choose_file(f"{OPEN} input[type=file]", tmp_path / "photo.jpg")
        browser.click(f"{OPEN} .execute")
        answer = browser.text(f"{OPEN} .live-responses-table tbody .response-col_status")
        shown = browser.text(f"{OPEN} .live-responses-table")
        groups = browser.script("[...document.querySelectorAll('.opblock-tag')].map(tag => tag.dataset.tag)")
        complaints, requested = browser.complaints(), browser.requested()
    assert answer.split()[0] == "200", shown
    assert '"levels"' in shown
    assert groups == ["features", "backbones", "configs", "models", "health"]
    assert complaints == []
    web = [url for url in requested if url.startswith("http")]
    assert {urlsplit(url).netloc for url in web} == {urlsplit(service.url).netloc}

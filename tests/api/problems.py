"""What every refusal of the service has in common, checked in one place."""

from __future__ import annotations

import re
import tempfile
from typing import Any

import httpx

from tests.conftest import ROOT

KEYS = {
    "type",
    "title",
    "status",
    "detail",
    "request_id",
    "trace_id",
    "errors",
    "missing",
    "unexpected",
    "wrong_shape",
    "nearest",
}
LEAKS = re.compile(
    r"Traceback|File \"|site-packages|object at 0x|<class |\w\.py\b"
    rf"|{re.escape(str(ROOT))}|{re.escape(tempfile.gettempdir())}"
)
MAX_PROBLEM_BYTES = 32 * 1024


def assert_problem(reply: httpx.Response, status: int, kind: str = "") -> dict[str, Any]:
    """The body of a refusal, which is a whole problem document of this status and of `/problems/{kind}`."""
    assert reply.status_code == status, f"{reply.status_code} {reply.text[:500]}"
    body = assert_any_problem(reply)
    if kind:
        assert body["type"] == (kind if kind == "about:blank" else f"/problems/{kind}")
    return body


def assert_any_problem(reply: httpx.Response) -> dict[str, Any]:
    """The body of a refusal, whichever: RFC 9457 with the promised keys, and nothing of the machine in it."""
    assert reply.headers["content-type"] == "application/problem+json", reply.text[:500]
    assert not LEAKS.search(reply.text), reply.text[:1000]
    assert len(reply.content) <= MAX_PROBLEM_BYTES
    body: dict[str, Any] = reply.json()
    assert set(body) <= KEYS
    assert body["status"] == reply.status_code
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == reply.headers["x-request-id"]
    for fault in body.get("errors", []):
        assert set(fault) == {"pointer", "detail"}
        assert fault["pointer"].startswith("#")
        assert fault["detail"]
    if reply.status_code in (429, 503):
        assert int(reply.headers["retry-after"]) >= 1
    return body


def pointers(body: dict[str, Any]) -> list[str]:
    """The places that a problem names."""
    return [fault["pointer"] for fault in body.get("errors", [])]

"""Errors on the wire: RFC 9457 problem details, and the one table from error class to HTTP status."""

from __future__ import annotations

import http
import logging
import math
import secrets
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service import errors
from service.context import CURRENT

PROBLEM_JSON = "application/problem+json"
log = logging.getLogger("service.errors")

STATUS: Mapping[type[errors.ServiceError], int] = {
    errors.MalformedBody: 400,
    errors.MalformedRequest: 400,
    errors.InvalidHeader: 400,
    errors.UndecodableImage: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.NotAcceptable: 406,
    errors.SlowRequest: 408,
    errors.TooLarge: 413,
    errors.TargetTooLong: 414,
    errors.UnsupportedMedia: 415,
    errors.InvalidConfig: 422,
    errors.NonFiniteLevel: 422,
    errors.QuotaExceeded: 429,
    errors.HeadersTooLarge: 431,
    errors.RemoteFailed: 502,
    errors.Unavailable: 503,
    errors.RemoteTimeout: 504,
    errors.DeadlineExceeded: 504,
}


def status_of(error_class: type[errors.ServiceError]) -> int:
    """The status of an error: that of its nearest ancestor in the table."""
    return next(STATUS[cls] for cls in error_class.__mro__ if cls in STATUS)


def problem_type(error_class: type[errors.ServiceError]) -> str:
    """A stable relative URI for an error class: `/problems/queue-full`; `docs/errors.md` explains each."""
    name = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in error_class.__name__)
    return f"/problems/{name.lstrip('-')}"


def reason_of(error_class: type[errors.ServiceError]) -> str:
    """The problem's name as metrics and the access log have it: `queue_full`."""
    return problem_type(error_class).rpartition("/")[2].replace("-", "_")


class ProblemReply(Response):
    """A problem that says in the scope of its request which it is, for who counts and logs requests."""

    def __init__(self, error: errors.ServiceError, body: dict[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__(orjson.dumps(_writable(body)), body["status"], headers, PROBLEM_JSON)
        self._reason = reason_of(type(error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["problem"] = self._reason
        await super().__call__(scope, receive, send)


def problem_response(error: errors.ServiceError, request_id: str) -> Response:
    """The reply to a request that failed on purpose."""
    body: dict[str, Any] = {
        "type": problem_type(type(error)),
        "title": error.title,
        "status": status_of(type(error)),
        "detail": error.detail,
        **_ids(request_id),
    }
    if error.faults:
        body["errors"] = [{"pointer": fault.pointer, "detail": fault.detail} for fault in error.faults]
    for key in ("missing", "unexpected", "wrong_shape", "nearest"):
        if names := getattr(error, key, ()):
            body[key] = list(names[:200])
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return ProblemReply(error, body, headers)


def _writable(value: Any) -> Any:
    """A part of a body with `?` for halves of characters, which names in files may have and UTF-8 has not."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {key: _writable(child) for key, child in value.items()}
    return [_writable(child) for child in value] if isinstance(value, list) else value


def _ids(request_id: str) -> dict[str, str]:
    """What finds a request in the log and among the traces."""
    request = CURRENT.get()
    return {"request_id": request_id} | ({} if request is None else {"trace_id": request.trace.trace_id})


def plain_problem(
    status: int, detail: str, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    """A problem without a class of its own (`about:blank`, RFC 9457 section 4.2.1)."""
    title = http.HTTPStatus(status).phrase
    body = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        **_ids(request_id),
    }
    return Response(orjson.dumps(body), status, dict(headers or {}), PROBLEM_JSON)


def routing_problem(
    status: int, method: str, path: str, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The reply where there is no such route (404), or none for the method (405)."""
    detail = f"no route {method} {path[:200]}" if status == 404 else f"{method} is not served here"
    return plain_problem(status, detail, request_id, headers)


def request_id_of(request: Request) -> str:
    """The id that the middleware gave the request."""
    return str(request.scope.get("request_id") or secrets.token_hex(8))


async def on_service_error(request: Request, error: Exception) -> Response:
    """Answer an error of our own tree."""
    assert isinstance(error, errors.ServiceError)
    return problem_response(error, request_id_of(request))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: no such file of the page."""
    assert isinstance(error, HTTPException)
    request_id = request_id_of(request)
    if error.status_code in (404, 405):
        path = request.scope["path"]
        return routing_problem(error.status_code, request.method, path, request_id, error.headers)
    return plain_problem(error.status_code, str(error.detail), request_id, error.headers)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Answer a query or body that FastAPI refuses, without repeating the client's input."""
    assert isinstance(error, RequestValidationError)
    faults = [
        errors.Fault("#/" + "/".join(str(part) for part in item["loc"]), item["msg"])
        for item in error.errors()
    ]
    refused = errors.InvalidConfig(faults[0].pointer, faults[0].detail, *faults[1:20])
    return problem_response(refused, request_id_of(request))


async def on_memory_error(request: Request, error: Exception) -> Response:
    """Answer a request that found no memory where nothing else says so."""
    log.warning("a request found no memory", exc_info=error)
    refused = errors.OutOfMemory("the machine has no memory left for this request", retry_after_s=5)
    return problem_response(refused, request_id_of(request))


async def on_crash(request: Request, error: Exception) -> Response:
    """Answer a bug: nothing of it reaches the client but the id to find it in the log."""
    del error  # logged where the request was noted
    request_id = request_id_of(request)
    # The framework answers a crash outside of our middleware, which names the request otherwise.
    return plain_problem(
        500,
        "the service failed; the request id finds the reason in its log",
        request_id,
        {"X-Request-ID": request_id, "X-Content-Type-Options": "nosniff"},
    )

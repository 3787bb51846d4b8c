"""HTTP/1.1 requests as bytes, made once and sent many times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import httpx

BASE = "http://127.0.0.1"


def _message(request: httpx.Request) -> bytes:
    body = request.read()
    lines = [f"{request.method} {request.url.raw_path.decode()} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def raw_message(path: str, query: Mapping[str, str], body: bytes, media_type: str, accept: str) -> bytes:
    """A POST of `body` as it is, the rest in the query."""
    headers = {"Content-Type": media_type, "Accept": accept}
    return _message(httpx.Request("POST", BASE + path, params=query, content=body, headers=headers))


def multipart_message(path: str, parts: Mapping[str, str], images: Sequence[bytes], accept: str) -> bytes:
    """A POST of a form, with each image as a part `image`."""
    files = [("image", ("photo.jpg", image, "image/jpeg")) for image in images]
    return _message(httpx.Request("POST", BASE + path, data=parts, files=files, headers={"Accept": accept}))


def json_message(path: str, body: Mapping[str, object], accept: str) -> bytes:
    """A POST of JSON."""
    return _message(httpx.Request("POST", BASE + path, json=body, headers={"Accept": accept}))

"""JSON replies of the routes that answer with facts, not arrays."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Plain data, dataclasses included, as JSON."""
    return Response(orjson.dumps(body), status, headers, "application/json")

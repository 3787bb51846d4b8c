"""Headers of a request, from below the framework."""

from __future__ import annotations

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> bytes:
    """The value of a header, its name in lower case; several are one list (RFC 9110, 5.2), and empty is none."""
    return b", ".join(value for key, value in scope["headers"] if key == name)

"""Headers of a request, from below the framework."""

from __future__ import annotations

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> bytes:
    """The first value of a header, its name in lower case; empty where it is not there."""
    return next((value for key, value in scope["headers"] if key == name), b"")

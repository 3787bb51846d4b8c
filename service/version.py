"""The version of the service."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def service_version() -> str:
    """The version of the installed distribution; `0+source` when run from a tree that is not installed."""
    try:
        return version("backbone-service")
    except PackageNotFoundError:
        return "0+source"

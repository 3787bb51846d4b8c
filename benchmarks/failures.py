"""What ends a run: numbers of a server that did not do its work would mean nothing."""

from __future__ import annotations


class BenchmarkFailed(RuntimeError):
    """One of those below."""


class LoadFailed(BenchmarkFailed):
    """A server answered with another status than 200, or not at all."""


class ServerFailed(BenchmarkFailed):
    """A server ended, or did not come up; with the end of what it printed."""


class NotPromoted(BenchmarkFailed):
    """A model was neither promoted nor told to stay in time."""

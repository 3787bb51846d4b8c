"""The request that is being answered: its ids, for logs, problems and traces.

Ids of traces come and go as W3C Trace Context has them (https://www.w3.org/TR/trace-context/, section 3.2).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextvars import ContextVar
from typing import NamedTuple, Protocol

SAMPLED = 1
# version - trace id - parent's id - flags; neither id is all zeros, and version ff is none.
_TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)


class TraceIds(NamedTuple):
    """A span: its trace, 32 hex digits, its own id, 16, and whether somebody records it."""

    trace_id: str
    span_id: str
    is_sampled: bool

    def traceparent(self) -> str:
        """As a header has it."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


class Recorder(Protocol):
    """Records what one request goes through. `seconds` are a length of time, `ended_s_ago` is when it was over."""

    def stage(self, name: str, seconds: float, ended_s_ago: float = 0.0) -> None:
        """A stage of this request."""

    def batch(self, shared_by: Sequence[Recorder], images: int, seconds: float) -> None:
        """A forward pass that is over now, and the requests that shared it; called once for all of them."""


class RequestContext(NamedTuple):
    """What a request is known by; `recorder` is None where nobody records it."""

    request_id: str
    trace: TraceIds
    recorder: Recorder | None = None


# Tasks that a request starts have it too; threads have it where they are given a copy of the context.
CURRENT: ContextVar[RequestContext | None] = ContextVar("backbone_request", default=None)


def current_recorder() -> Recorder | None:
    """Who records the request that is being answered; None where nobody does."""
    request = CURRENT.get()
    return None if request is None else request.recorder


def parse_traceparent(headers: Sequence[bytes]) -> TraceIds | None:
    """The caller's span; None where there is no header, more than one, or one that is not valid.

    Of a version that is not known yet, the parts that version 00 has are read, as section 3.2.4 asks.
    """
    found = _TRACEPARENT.fullmatch(headers[0]) if len(headers) == 1 else None
    if found is None or (found[1] == b"00" and found[5] is not None):
        return None
    return TraceIds(found[2].decode(), found[3].decode(), bool(int(found[4], 16) & SAMPLED))


def span_below(parent: TraceIds | None) -> TraceIds:
    """A new span of the caller's trace, else of a new one, which nobody records here."""
    if parent is not None:
        return TraceIds(parent.trace_id, secrets.token_hex(8), is_sampled=False)
    ids = secrets.token_hex(24)
    return TraceIds(ids[:32], ids[32:], is_sampled=False)

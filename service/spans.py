"""Requests as OpenTelemetry spans, sent by OTLP; the extra `otel` brings the SDK, and nothing here is imported without.

Spans are written by hand: FastAPI's own have the path and the query of a request, where clients put their configs.
Our own provider is no global one, so no library's spans get in between.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.context import Recorder, TraceIds
from service.errors import CannotStart

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

SERVICE = "backbone-service"
MAX_TRACESTATE_BYTES = 512
STOP_S = 2.0
NS = 1_000_000_000


class Spans:
    """Where the spans of all requests go.

    Args:
        provider: an SDK's; `from_environment` makes one.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE)

    @classmethod
    def from_environment(cls) -> Spans | None:
        """As the standard `OTEL_*` variables say: endpoint, headers, sampler, service name; None if they disable it.

        Raises:
            CannotStart: the extra is not installed, or the variables ask for another protocol than it has.
        """
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        _refuse_protocol()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            wanted = "BACKBONE_TRACING: needs the extra: pip install 'backbone-service[otel]'"
            raise CannotStart(wanted) from error
        resource = Resource.create()
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the variables name none
            resource = resource.merge(Resource({"service.name": SERVICE}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def begin(self, method: str, parent: TraceIds | None, tracestate: Sequence[bytes]) -> RequestSpan:
        """The span of a request, below its caller's."""
        from opentelemetry.trace import SpanKind

        above = _context_of(parent, tracestate)
        span = self._tracer.start_span(
            method, context=above, kind=SpanKind.SERVER, attributes={"http.request.method": method}
        )
        return RequestSpan(self._tracer, span)

    def stop(self) -> None:
        """Send what has not been sent; blocks for two seconds at most, whatever became of the collector."""
        sending = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        sending.start()
        sending.join(STOP_S)


def _refuse_protocol() -> None:
    asked = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if asked and asked != "http/protobuf":
        raise CannotStart(f"OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is served, not {asked}")


def _context_of(parent: TraceIds | None, tracestate: Sequence[bytes]) -> Context:
    """What OpenTelemetry takes for a caller; a `tracestate` that is too long or not valid is left out."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    if parent is None:
        return Context()
    state = [value.decode("latin-1") for value in tracestate]
    known = trace.TraceState.from_header(state) if len(",".join(state)) <= MAX_TRACESTATE_BYTES else None
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.is_sampled else trace.TraceFlags.DEFAULT)
    above = trace.SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=flags,
        trace_state=known,
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(above), Context())


class RequestSpan:
    """One request; a `Recorder`."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        from opentelemetry import trace

        self._tracer = tracer
        self.span = span
        self._below = trace.set_span_in_context(span)
        known = span.get_span_context()
        self.ids = TraceIds(
            f"{known.trace_id:032x}", f"{known.span_id:016x}", bool(known.trace_flags.sampled)
        )

    def stage(self, name: str, seconds: float, ended_s_ago: float = 0.0) -> None:
        """A span below the request's."""
        if self.span.is_recording():
            ended = time.time_ns() - int(ended_s_ago * NS)
            stage = self._tracer.start_span(name, context=self._below, start_time=ended - int(seconds * NS))
            stage.end(ended)

    def batch(self, shared_by: Sequence[Recorder], images: int, seconds: float) -> None:
        """A span below this request's, with a link to each request that shared the forward pass."""
        from opentelemetry.trace import Link

        ended = time.time_ns()
        links = [Link(other.span.get_span_context()) for other in shared_by if isinstance(other, RequestSpan)]
        attributes = {"backbone.batch.images": images, "backbone.batch.requests": len(shared_by)}
        start = ended - int(seconds * NS)
        batch = self._tracer.start_span(
            "batch", context=self._below, links=links, attributes=attributes, start_time=start
        )
        batch.end(ended)

    def end(self, name: str, attributes: dict[str, str | int], *, is_failed: bool) -> None:
        """The request is over; `name` is its method and its route."""
        from opentelemetry.trace import StatusCode

        self.span.update_name(name)
        self.span.set_attributes(attributes)
        if is_failed:
            self.span.set_status(StatusCode.ERROR)
        self.span.end()

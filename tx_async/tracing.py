"""OpenTelemetry: a request is one trace, from HTTP to the device and back. Off unless `otlp_endpoint` is set.

The HTTP request that submits is the root, or a child of the client's own span (`traceparent`, W3C). Below it is the
request, and below that each station, with the times that the scheduler's watch has noted. The poll that fetches the
result joins the same trace, unless its client says otherwise. A live request has only two stations, its turn and its
run: the journal never has it, and nobody polls. Spans of stations are made when the request has ended, and are sent by
a thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tx_async import __version__
from tx_async.errors import ConfigError
from tx_async.scheduler.interface import Passage

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

SERVICE = "tx_async"
SHUTDOWN_MS = 2_000

current: ContextVar[HttpSpan | None] = ContextVar("current", default=None)
"""The span of the HTTP request that is being handled; None elsewhere, and where tracing is off."""


class Tracing:
    """Sends spans to one receiver."""

    def __init__(self, endpoint: str):
        """endpoint: the receiver's, http://host:4318. Raises `ConfigError`."""
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"otlp_endpoint {endpoint!r} must look like http://127.0.0.1:4318.")
        url = endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError("otlp_endpoint is set: traces need `pip install 'tx-async[otel]'`.") from error
        resource = Resource.create({"service.name": SERVICE, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer(SERVICE, __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def shutdown(self) -> None:
        """Send what is left. This takes a while: call it on a thread."""
        self._provider.force_flush(SHUTDOWN_MS)
        self._provider.shutdown()

    # ---- HTTP

    def begin(self, headers: Mapping[str, str]) -> HttpSpan:
        parent = self._propagator.extract(headers) if "traceparent" in headers else None
        return HttpSpan(self, parent)

    def start(self, name: str, parent: Context | None, started: float, **attributes: Any) -> Span:
        return self._tracer.start_span(name, parent, start_time=_nanoseconds(started), attributes=attributes)

    def start_server(self, parent: Context | None, started: float) -> Span:
        kind = self._trace.SpanKind.SERVER
        return self._tracer.start_span("HTTP", parent, kind=kind, start_time=_nanoseconds(started))

    def context_of(self, span: Span) -> Context:
        """The context for a span's children."""
        return self._trace.set_span_in_context(span)

    # ---- stations

    def accepted(self, passage: Passage) -> None:
        """A request was accepted over HTTP: its span begins."""
        if http := current.get():
            attributes: dict[str, Any] = {"tx_async.request_id": passage.request_id}
            if passage.subject:  # a live request is about none
                attributes |= {"tx_async.subject": passage.subject, "tx_async.seq_id": passage.seq_id}
            passage.trace = self.start(passage.kind, http.context, passage.accepted_at, **attributes)

    def polled(self, passage: Passage) -> None:
        if (http := current.get()) and passage.trace is not None:
            http.join(self.context_of(passage.trace))

    def published(self, passage: Passage) -> None:
        """A request has ended: so have the stations that it passed."""
        self._ended(passage, passage.stations(), passage.published_at)

    def live_ended(self, passage: Passage) -> None:
        """The same for a live request, whose first station is its turn: the journal never has it."""
        self._ended(passage, passage.stations()[1:], passage.ended_at)

    def _ended(self, passage: Passage, stations: Sequence[tuple[str, float, float]], at: float) -> None:
        if passage.trace is None:
            return
        for name, began, ended in stations:
            self._station(passage, name, began, ended)
        if passage.failed:
            passage.trace.set_status(self._trace.StatusCode.ERROR)
        passage.trace.end(_nanoseconds(at))

    def fetched(self, passage: Passage) -> None:
        if passage.trace is not None:
            self._station(passage, "fetch", passage.published_at, passage.fetched_at)

    def _station(self, passage: Passage, name: str, began: float, ended: float) -> None:
        station = self.start(name, self.context_of(passage.trace), began)
        if name == "run":
            station.set_attribute("tx_async.worker", passage.worker_id)
            if passage.first_token_at:
                station.add_event("first token", timestamp=_nanoseconds(passage.first_token_at))
        station.end(_nanoseconds(ended))


class HttpSpan:
    """The span of one HTTP request. It is started when somebody needs its context, at the latest when it ends."""

    def __init__(self, tracing: Tracing, parent: Context | None):
        """parent: the client's context; None if it sent none."""
        self._tracing = tracing
        self._parent = parent
        self._began = time.time()
        self._span: Span | None = None

    @property
    def context(self) -> Context:
        return self._tracing.context_of(self._started())

    def join(self, context: Context | None) -> None:
        """Join the trace of the request that this HTTP request is about."""
        if self._span is None and self._parent is None:
            self._parent = context

    def end(self, method: str, route: str, status: int) -> None:
        span = self._started()
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.set_status(self._tracing._trace.StatusCode.ERROR)
        span.end()

    def _started(self) -> Span:
        if self._span is None:
            self._span = self._tracing.start_server(self._parent, self._began)
        return self._span


def open_tracing(endpoint: str) -> Tracing | None:
    """The tracing for an endpoint; None if none is named. Raises `ConfigError`."""
    return Tracing(endpoint) if endpoint else None


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)

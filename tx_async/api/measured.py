"""Measures the time of each answer, by route and status, and makes its span where there are traces."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tx_async.metrics import Metrics
from tx_async.tracing import Tracing, current

ELSEWHERE = "other"
"""The route's name where there is none, or where the gate has refused the request."""


class MeasureMiddleware:
    """The app's `state.metrics` exist once it has started. It is outside of the gate, so that refusals count, too."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics: Metrics = scope["app"].state.metrics
        tracing: Tracing | None = scope["app"].state.tracing
        span = tracing.begin(Headers(scope=scope)) if tracing else None
        current.set(span)
        began = time.perf_counter()
        statuses: list[int] = []
        #: the endpoint says what it is called, in whichever copy of the scope
        route: list[str] = []
        scope["tx_async.route"] = route

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            path = route[0] if route else ELSEWHERE
            status = statuses[0] if statuses else None
            metrics.http_request.labels(path, status or "none").observe(time.perf_counter() - began)
            if span:
                span.end(scope["method"], path, status or 0)
            if status == 500:
                metrics.http_server_errors.inc()

"""The SDK's telemetry is accepted and dropped. Its events may hold request headers, API keys among them, so none of it
is decoded, logged or kept."""

from __future__ import annotations

from tx_async.api.context import Call
from tx_async.wire import tinker


async def telemetry(call: Call) -> tinker.TelemetryResponse:
    return tinker.TelemetryResponse(status="accepted")

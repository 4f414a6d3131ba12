"""Results: the long poll, and their form for each generation of the SDK."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from tx_async.api.context import Call
from tx_async.api.errors import json_response
from tx_async.scheduler.interface import StillPending
from tx_async.wire import json_results, protobuf, results, tinker
from tx_async.wire.records import ResultRecord

METADATA_FIRST_BYTES = 2**20
"""From this size on, a client that supports it is first told the size, and asks again when it has room."""


async def retrieve_future(call: Call, request: tinker.RetrieveFutureRequest) -> Response:
    outcome = await call.scheduler.retrieve(call.owner, request.request_id, call.api.config.long_poll_ms / 1000)
    if isinstance(outcome, StillPending):
        return json_response(_pending(call, request.request_id, outcome), 408)
    if outcome.content == "error":
        return json_response(_redacted(call, outcome))
    if outcome.content == "json":
        return Response(outcome.payload, media_type="application/json")
    if request.allow_metadata_only and len(outcome.payload) >= METADATA_FIRST_BYTES:
        return json_response(
            tinker.ResultMetadata(status="complete_metadata", response_payload_size=len(outcome.payload))
        )
    wants_protobuf = protobuf.CONTENT_TYPE in call.header("accept")
    content = await call.hold.compute(_encode, len(outcome.payload), outcome, wants_protobuf)
    return Response(content, media_type=protobuf.CONTENT_TYPE if wants_protobuf else "application/json")


async def cancel_future(call: Call, request: tinker.CancelFutureRequest) -> tinker.Accepted:
    await call.scheduler.cancel(call.owner, request.request_id)
    return tinker.Accepted()


def _encode(record: ResultRecord, wants_protobuf: bool) -> bytes:
    if record.content == "sample":
        sample = results.decode_sample(record.payload)
        return protobuf.encode_sample(sample) if wants_protobuf else results.encode_json(json_results.sample(sample))
    output = results.decode_forward_backward(record.payload)
    if wants_protobuf:
        return protobuf.encode_forward_backward(output)
    return results.encode_json(json_results.forward_backward(output))


def _redacted(call: Call, record: ResultRecord) -> results.Failure:
    """The failure for tenants; the journal keeps the whole reason."""
    failure = msgspec.json.decode(record.payload, type=results.Failure)
    return msgspec.structs.replace(failure, error=call.api.redact(failure.error))


def _pending(call: Call, request_id: str, pending: StillPending) -> tinker.PendingResponse:
    return tinker.PendingResponse(
        request_id=request_id,
        queue_state=pending.queue_state,
        queue_state_reason=pending.queue_state_reason and call.api.redact(pending.queue_state_reason),
        detail="The result is not ready yet: poll again.",
        category="server",
    )

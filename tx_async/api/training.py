"""forward, forward_backward and optim_step; and how every request of a model's sequence is accepted.

A request whose (model_id, seq_id) is readable but whose content is not takes its place in the sequence as a `Rejected`
operation: its future fails with the message, and the requests after it do not wait for a seq_id that never comes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from tx_async.api import body, measure, validation
from tx_async.api.context import Call
from tx_async.api.models import future
from tx_async.errors import InvalidRequest, UserError
from tx_async.wire import datums, operations, protobuf, tinker
from tx_async.wire.worker import AdamParams

Ids = TypeVar("Ids", bound=tinker.TrainingIds)

LENIENT_BYTES_MAX = 2**20
"""Bodies up to this size are searched for their ids even if they are not JSON: their parser makes an object of
everything, in one piece."""
_ids_decoder = msgspec.json.Decoder(tinker.TrainingIds)


async def forward_backward(call: Call) -> tinker.UntypedAPIFuture:
    """Takes protobuf from SDKs since 0.25, JSON from older ones."""
    if protobuf.CONTENT_TYPE not in call.header("content-type"):
        return await submit(call, "ForwardBackward", tinker.ForwardBackwardRequest, _from_json)
    try:
        content = await read(call)
    except body.OversizedBody as error:
        if (ids := protobuf.peek_ids(error.head)) is None:
            raise
        return await _submit(call, _rejected(tinker.TrainingIds(*ids), "ForwardBackward", error))
    return await submit_decoded(call, content, _from_protobuf)


async def forward(call: Call) -> tinker.UntypedAPIFuture:
    return await submit(call, "ForwardBackward", tinker.UndecodedForwardRequest, _forward_from_json)


async def optim_step(call: Call) -> tinker.UntypedAPIFuture:
    return await submit(call, "OptimStep", tinker.OptimStepRequest, _optim_step)


Convert = Callable[[Call, Ids], operations.TrainingOperation]


async def submit(call: Call, kind: str, request_type: type[Ids], convert: Convert[Ids]) -> tinker.UntypedAPIFuture:
    """Read a JSON request, convert it and submit it; or submit its rejection."""
    return await submit_body(call, await read(call), kind, request_type, convert)


async def submit_body(
    call: Call, content: bytes, kind: str, request_type: type[Ids], convert: Convert[Ids]
) -> tinker.UntypedAPIFuture:
    return await submit_decoded(call, content, _decode, kind, request_type, convert)


async def submit_decoded(
    call: Call, content: bytes, decode: Callable[..., operations.Operation], *arguments: Any
) -> tinker.UntypedAPIFuture:
    """All work that grows with the body happens in one place: decoding it, and encoding it again for the journal."""
    operation, encoded = await call.hold.compute(_prepare, len(content), decode, call, content, *arguments)
    request = await call.scheduler.submit(call.owner, operation, encoded)
    return future(request, None if isinstance(operation, operations.Sample) else operation.model_id)


def _prepare(
    decode: Callable[..., operations.Operation], *arguments: Any
) -> tuple[operations.Operation, operations.Encoded]:
    operation = decode(*arguments)
    return operation, operations.Encoded.of(operation)


async def read(call: Call) -> bytes:
    return await body.read(call.request, call.api.config.request_body_bytes_max, call.hold)


def ids_of(content: bytes) -> tinker.TrainingIds | None:
    """The ids from a JSON body with any other fault."""
    for name in (b"-Infinity", b"Infinity", b"NaN"):  # Python's names of numbers that JSON lacks
        content = content.replace(name, b"null")
    try:
        return _ids_decoder.decode(content)
    except msgspec.ValidationError:
        return None
    except (ValueError, RecursionError):
        pass
    try:
        return msgspec.convert(json.loads(content), tinker.TrainingIds) if len(content) <= LENIENT_BYTES_MAX else None
    except (ValueError, RecursionError):
        return None


async def _submit(call: Call, operation: operations.TrainingOperation) -> tinker.UntypedAPIFuture:
    return future(await call.scheduler.submit(call.owner, operation), operation.model_id)


def _decode(
    call: Call, content: bytes, kind: str, request_type: type[Ids], convert: Convert[Ids]
) -> operations.TrainingOperation:
    measure.check_values(content, call.api.config.json_values_max)
    try:
        return convert(call, body.decode_json(content, request_type, call.api.config.json_depth_max))
    except measure.NestedTooDeep:
        raise
    except InvalidRequest as error:
        if (ids := ids_of(content)) is None:
            raise
        return _rejected(ids, kind, error)


def _rejected(ids: tinker.TrainingIds, kind: str, error: UserError) -> operations.Rejected:
    return operations.Rejected(model_id=ids.model_id, seq_id=ids.seq_id, kind=kind, message=error.message)


# ---- conversions


def _budget(call: Call) -> datums.DenseBudget:
    return datums.DenseBudget(call.api.config.request_body_bytes_max)


def _from_protobuf(call: Call, content: bytes) -> operations.TrainingOperation:
    try:
        measure.check_forward_backward(content, call.api.config.request_datums_max)
    except InvalidRequest as error:
        if (ids := protobuf.peek_ids(content[: body.HEAD_BYTES])) is None:
            raise
        return _rejected(tinker.TrainingIds(*ids), "ForwardBackward", error)
    message = protobuf.parse_forward_backward(content)
    try:
        operation = protobuf.to_forward_backward(message, _budget(call))
        return validation.forward_backward(operation, call.scheduler.base_model)
    except InvalidRequest as error:
        return _rejected(tinker.TrainingIds(message.model_id, message.seq_id), "ForwardBackward", error)


def _from_json(call: Call, request: tinker.ForwardBackwardRequest) -> operations.ForwardBackward:
    content = request.forward_backward_input
    operation = datums.forward_backward_from_json(request, content, False, _budget(call))
    return validation.forward_backward(operation, call.scheduler.base_model)


def _forward_from_json(call: Call, request: tinker.UndecodedForwardRequest) -> operations.ForwardBackward:
    operation = datums.forward_backward_from_json(request, request.forward_input, True, _budget(call))
    return validation.forward_backward(operation, call.scheduler.base_model)


def _optim_step(call: Call, request: tinker.OptimStepRequest) -> operations.OptimStep:
    params = validation.adam_params(_adam_params(request))
    return operations.OptimStep(model_id=request.model_id, seq_id=request.seq_id, adam_params=params)


def _adam_params(request: tinker.OptimStepRequest) -> AdamParams:
    """`adam_params`, or AdamW's under one of its other names."""
    params = request.adam_params
    if params is None:
        other = request.optimizer_params or request.optim_params
        if other is None:
            raise InvalidRequest("optim_step needs adam_params.")
        validation.optimizer_type(_convert(other, tinker.OtherOptimizerParams).type)
        params = _convert(other, tinker.AdamParams)
    return AdamParams(**msgspec.structs.asdict(params))


Converted = TypeVar("Converted")


def _convert(value: object, kind: type[Converted]) -> Converted:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"optimizer_params: {error}.") from None

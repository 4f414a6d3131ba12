"""Protobuf ⇄ structs: `ForwardBackwardRequest` in, `ForwardBackwardOutput` and `SampleResponse` out.

The messages live in a descriptor pool of their own, because a client in the same process registers the same file and
package names in the default one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from typing import Any, Literal

import numpy as np
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from tx_async.errors import InvalidRequest
from tx_async.wire.datums import DenseBudget, dense, densify, from_bytes
from tx_async.wire.operations import Datum, ForwardBackward, Provenance, ProvenanceSpan
from tx_async.wire.results import ForwardBackwardResult, SampleResult, TopkLogprobs
from tx_async.wire.tensors import Tensor

CONTENT_TYPE = "application/x-protobuf"

_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile((resources.files(__package__) / "tinker.binpb").read_bytes())  # type: ignore[reportAttributeAccessIssue]


def message_class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"tinker_public.{name}"))


ForwardBackwardRequest = message_class("ForwardBackwardRequest")
ForwardBackwardOutput = message_class("ForwardBackwardOutput")
SampleResponse = message_class("SampleResponse")

_DTYPE_NAMES: dict[int, Literal["float32", "int64"]] = {1: "float32", 2: "int64"}
_DTYPE_NUMBERS = {"float32": 1, "int64": 2, "int32": 3, "bfloat16": 4}
_STOP_REASONS = {"stop": 0, "length": 1}


# ---- forward_backward, in


def parse_forward_backward(body: bytes) -> Any:
    """The protobuf message; `InvalidRequest` when the body is none, or does not name its model and seq_id."""
    try:
        message = ForwardBackwardRequest.FromString(body)
    except DecodeError as error:
        raise InvalidRequest("The body is not a valid protobuf ForwardBackwardRequest.") from error
    if not message.model_id or message.seq_id < 1:
        raise InvalidRequest("forward_backward needs a model_id and a seq_id of at least 1.")
    return message


def to_forward_backward(message: Any, budget: DenseBudget) -> ForwardBackward:
    """The operation in its canonical form. `InvalidRequest` names the datum that cannot be converted."""
    return ForwardBackward(
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=tuple(_datum(datum, f"data[{i}]", budget) for i, datum in enumerate(message.data)),
        loss_fn=message.loss_fn,
        loss_fn_config=_loss_fn_config(message),
        forward_only=message.forward_only,
    )


def peek_ids(head: bytes) -> tuple[str, int] | None:
    """(model_id, seq_id) from the first bytes of a `ForwardBackwardRequest` that is too large to be read whole."""
    position, model_id, seq_id = 0, "", 0
    try:
        while not (model_id and seq_id):
            tag, position = _varint(head, position)
            value, position = _varint(head, position)
            if tag == 1 << 3 | 2:
                model_id, position = head[position : position + value].decode(), position + value
            elif tag == 2 << 3:
                seq_id = value
            else:
                return None
    except (IndexError, UnicodeDecodeError):
        return None
    return (model_id, seq_id) if position <= len(head) and seq_id < 2**31 else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _loss_fn_config(message: Any) -> dict[str, float]:
    config = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise InvalidRequest(f"loss_fn_config[{key!r}] must be a number.")
        config[key] = value.number
    return config


def _datum(datum: Any, where: str, budget: DenseBudget) -> Datum:
    try:
        tokens = b"".join(_text_chunks(datum.model_input))
        inputs = {name: _tensor(tensor, name, budget) for name, tensor in datum.loss_fn_inputs.items()}
        provenance = _provenance(datum)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}") from None
    return Datum(tokens, inputs, provenance)


def _provenance(datum: Any) -> Provenance | None:
    if not datum.model_input_spans and not datum.loss_fn_input_spans:
        return None
    return Provenance(
        _spans(datum.model_input_spans, "model_input_spans"), _spans(datum.loss_fn_input_spans, "loss_fn_input_spans")
    )


def _spans(spans: Any, name: str) -> tuple[ProvenanceSpan, ...]:
    return tuple(_span(span, f"{name}[{i}]") for i, span in enumerate(spans))


def _span(message: Any, where: str) -> ProvenanceSpan:
    kind = message.WhichOneof("span")
    if kind is None:
        raise InvalidRequest(f"{where} has neither prompt_tokens nor sampled_tokens.")
    span = getattr(message, kind)
    return ProvenanceSpan(kind == "sampled_tokens", span.sequence_id, span.offset, span.length)


def _text_chunks(chunks: Any) -> Iterator[bytes]:
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise InvalidRequest(f"model_input has a chunk of kind {kind}; this model takes encoded_text only.")
        tokens = chunk.encoded_text.tokens
        if len(tokens) % 4:
            raise InvalidRequest(f"model_input: {len(tokens)} bytes are not a whole number of int32 tokens.")
        yield tokens


def _tensor(tensor: Any, name: str, budget: DenseBudget) -> Tensor:
    dtype = _DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise InvalidRequest(f"loss_fn_inputs[{name!r}] must be float32 or int64.")
    try:
        if tensor.WhichOneof("encoding") != "sparse_csr":
            return dense(tensor.dense, dtype, tensor.shape)
        csr = tensor.sparse_csr
        crow = from_bytes(csr.crow_indices, "int64", "crow_indices")
        col = from_bytes(csr.col_indices, "int64", "col_indices")
        return Tensor.of(densify(from_bytes(csr.values, dtype, "values"), crow, col, tensor.shape, budget))
    except InvalidRequest as error:
        raise InvalidRequest(f"loss_fn_inputs[{name!r}]: {error.message}") from None


# ---- forward_backward, out


def encode_forward_backward(result: ForwardBackwardResult) -> bytes:
    """`ForwardBackwardOutput`: one record for each run of datums with the same trailing shape."""
    message = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=result.metrics)
    for trailing_shape, run in groupby(result.logprobs, key=lambda tensor: tensor.shape[1:]):
        _add_record(message, list(run), trailing_shape)
    return message.SerializeToString()


def _add_record(message: Any, tensors: list[Tensor], trailing_shape: tuple[int, ...]) -> None:
    ends = np.cumsum([0, *(len(tensor.data) for tensor in tensors)], dtype="<i8")
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(tensors))
    field = record.fields["logprobs"]
    field.data = b"".join(tensor.data for tensor in tensors)
    field.offsets = ends.tobytes()
    field.dtype = _DTYPE_NUMBERS["float32"]
    field.trailing_shape.extend(trailing_shape)


# ---- asample, out


def encode_sample(result: SampleResult) -> bytes:
    """`SampleResponse`, without fields that were not asked for."""
    message = SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        item = message.sequences.add(
            stop_reason=_STOP_REASONS[sequence.stop_reason], tokens=sequence.tokens, logprobs=sequence.logprobs
        )
        if sequence.topk is not None:
            _set_topk(item.topk_sampled_logprobs, sequence.topk)
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs
    if result.topk_prompt_logprobs is not None:
        _set_topk(message.topk_prompt_logprobs, result.topk_prompt_logprobs)
    if result.target_prompt_logprobs is not None:
        _set_targets(message.target_prompt_logprobs, result.target_prompt_logprobs, result.target_layout)
    if result.prompt_alt_tokens is not None:
        _set_dense(message.prompt_alt_tokens.tokens, result.prompt_alt_tokens.token_ids)
        _set_dense(message.prompt_alt_tokens.logprobs, result.prompt_alt_tokens.logprobs)
    return message.SerializeToString()


def _set_topk(message: Any, table: TopkLogprobs) -> None:
    message.token_ids = table.token_ids
    message.logprobs = table.logprobs
    message.k = table.k
    message.length = table.length


def _set_dense(message: Any, tensor: Tensor) -> None:
    message.dense = tensor.data
    message.dtype = _DTYPE_NUMBERS[tensor.dtype]
    message.shape.extend(tensor.shape)


def _set_targets(message: Any, tensor: Tensor, layout: tuple[bytes, bytes] | None) -> None:
    """Set the targets in the request's own layout: the cells that a sparse request listed, or all of them."""
    if layout is None:
        return _set_dense(message, tensor)
    crow_indices, col_indices = layout
    rows = np.repeat(np.arange(tensor.shape[0]), np.diff(np.frombuffer(crow_indices, "<i8")))
    message.sparse_csr.values = tensor.numpy()[rows, np.frombuffer(col_indices, "<i8")].tobytes()
    message.sparse_csr.crow_indices = crow_indices
    message.sparse_csr.col_indices = col_indices
    message.dtype = _DTYPE_NUMBERS[tensor.dtype]
    message.shape.extend(tensor.shape)

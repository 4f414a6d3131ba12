"""The results of requests in one canonical form: the scheduler makes these structs, the journal stores their bytes in
`ResultRecord.payload`, and `api/` turns them into protobuf or JSON, as the client's `Accept` header asks.

`ResultRecord.content` names the form of the payload: "forward_backward" and "sample" are msgpack of the two structs
below; "json" is a JSON object that goes out as it is; "error" is a JSON `Failure`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from tx_async.errors import Category, TxError
from tx_async.wire.tensors import Tensor

EMPTY_TOKEN_ID = 0
EMPTY_LOGPROB = -99999.0
"""An empty cell of a top-k table; a row whose first cell is empty means "nothing was scored here"."""


class ForwardBackwardResult(Struct, tag=True, frozen=True, kw_only=True):
    logprobs: tuple[Tensor, ...]
    """For each datum float32, with the shape of its target_tokens: [T] or [T, K]."""
    metrics: dict[str, float]
    """Each key is `name:reduction`; `loss:sum` is always there. NaN is allowed."""


class TopkLogprobs(Struct, frozen=True, array_like=True):
    """A row-major [length, k] table; empty cells hold (`EMPTY_TOKEN_ID`, `EMPTY_LOGPROB`)."""

    token_ids: bytes
    """int32"""
    logprobs: bytes
    """float32"""
    k: int

    @property
    def length(self) -> int:
        return len(self.token_ids) // (4 * self.k) if self.k else 0

    @classmethod
    def of(cls, token_ids: np.ndarray, logprobs: np.ndarray) -> TopkLogprobs:
        """A table from an integer and a float array of shape [length, k]."""
        assert token_ids.shape == logprobs.shape and token_ids.ndim == 2, (token_ids.shape, logprobs.shape)
        return cls(
            np.ascontiguousarray(token_ids, "<i4").tobytes(),
            np.ascontiguousarray(logprobs, "<f4").tobytes(),
            token_ids.shape[1],
        )


class SampledSequence(Struct, frozen=True, array_like=True):
    tokens: bytes
    """int32 [T], the tokens that stopped it included."""
    logprobs: bytes
    """float32 [T]"""
    stop_reason: Literal["stop", "length"]
    topk: TopkLogprobs | None = None
    """A table of length T."""


class PromptAltTokens(Struct, frozen=True, array_like=True):
    token_ids: Tensor
    """int32 [P-1, k]"""
    logprobs: Tensor
    """float32 [P-1, k]"""


class SampleResult(Struct, tag=True, frozen=True, kw_only=True):
    sequences: tuple[SampledSequence, ...]
    """In the order of the request's `sample_sequence_ids`."""
    prompt_logprobs: bytes | None = None
    """float32 [P], NaN at position 0 and where nothing was scored."""
    topk_prompt_logprobs: TopkLogprobs | None = None
    """A table of length P, its first row empty."""
    target_prompt_logprobs: Tensor | None = None
    """Dense float32 [P-1, K]; 0.0 in cells that named no token."""
    target_layout: tuple[bytes, bytes] | None = None
    """(crow_indices, col_indices), int64, of a CSR request (`Sample.target_layout`): the answer repeats them."""
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = 0


class Failure(Struct, frozen=True, kw_only=True):
    """The JSON that makes a future fail in the client."""

    error: str
    category: Category = "unknown"

    @classmethod
    def of(cls, error: TxError) -> Failure:
        return cls(error=error.message, category=error.category)


_encoder = msgspec.msgpack.Encoder()
_forward_backward_decoder = msgspec.msgpack.Decoder(ForwardBackwardResult)
_sample_decoder = msgspec.msgpack.Decoder(SampleResult)
_json_encoder = msgspec.json.Encoder()


def encode(result: ForwardBackwardResult | SampleResult) -> bytes:
    """The payload of a `ResultRecord` with content "forward_backward" or "sample"."""
    return _encoder.encode(result)


def encode_json(value: Any) -> bytes:
    """The payload of a `ResultRecord` with content "json" or "error". NaN becomes null: the SDK's parser is strict."""
    return _json_encoder.encode(value)


def decode_forward_backward(payload: bytes) -> ForwardBackwardResult:
    return _forward_backward_decoder.decode(payload)


def decode_sample(payload: bytes) -> SampleResult:
    return _sample_decoder.decode(payload)

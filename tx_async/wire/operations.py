"""Clients' requests in one canonical form: `api/` decodes every encoding and SDK generation into these structs, the
journal stores their msgpack, and replay starts from them. Everything that does not depend on live state is validated
before one is made; past `api/` their fields are trusted.
"""

from __future__ import annotations

import hashlib
import io
import struct
from typing import Any, Literal

import msgspec
from msgspec import Struct

from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import AdamParams, AdapterConfig, SequenceSpec


class ProvenanceSpan(Struct, frozen=True, array_like=True, gc=False):
    """A run of positions whose tokens are `[offset, offset + length)` of a sampled sequence, or of its prompt."""

    is_sampled: bool
    """False: the tokens are the prompt's."""
    sequence_id: str
    offset: int
    length: int


class Provenance(Struct, frozen=True, array_like=True, gc=False):
    """The origin of a datum's tokens; each list tiles its field."""

    model_input: tuple[ProvenanceSpan, ...]
    loss_fn_inputs: tuple[ProvenanceSpan, ...]
    """Tiles `target_tokens`."""


SUPPORT_TOKENS_MAX = 4096
"""The most tokens that top-k and top-p may leave where each of them is to be recorded (`stability_support_max`)."""
HEAD_TOKENS_MAX = 127
"""The most tokens recorded of one draw. With the sampled token they are the 128 targets that a position can have in
training."""


class SamplerHeads(Struct, frozen=True, array_like=True, gc=False):
    """The sampler's distribution when it drew the tokens of S positions of a datum: its K likeliest tokens, with the
    probabilities that it drew from (temperature, top-k and top-p applied)."""

    positions: bytes
    """int32 [S]"""
    token_ids: bytes
    """int32 [S, K]"""
    probabilities: bytes
    """float32 [S, K]; 0 in unused cells."""
    is_whole: bytes
    """uint8 [S]: 1 where top-k or top-p had left no other tokens to draw."""
    k: int


class Datum(Struct, frozen=True, array_like=True, gc=False):
    """One training sequence. `tokens` is int32 little-endian; loss inputs are dense ([T] or [T, K], float32 or
    int64)."""

    tokens: bytes
    loss_fn_inputs: dict[str, Tensor]
    provenance: Provenance | None = None
    heads: SamplerHeads | None = None
    """For stable_reinforce; they are looked up when the request is accepted, so that a replay needs nothing else."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4


class CreateModel(Struct, tag=True, frozen=True, kw_only=True):
    model_id: str
    session_id: str
    model_seq_id: int
    base_model: str
    lora: AdapterConfig
    user_metadata: dict[str, Any] = {}


class CreateModelFromCheckpoint(Struct, tag=True, frozen=True, kw_only=True):
    """load_weights with session addressing: a new model whose LoRA configuration is the checkpoint's."""

    model_id: str
    session_id: str
    model_seq_id: int
    path: str
    optimizer: bool
    user_metadata: dict[str, Any] = {}


class ForwardBackward(Struct, tag=True, frozen=True, kw_only=True):
    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: dict[str, float] = {}
    forward_only: bool = False


class OptimStep(Struct, tag=True, frozen=True, kw_only=True):
    model_id: str
    seq_id: int
    adam_params: AdamParams


class SaveWeights(Struct, tag=True, frozen=True, kw_only=True):
    """kind "weights": training checkpoint; "sampler_weights": immutable sampler version; "external_weights": PEFT
    export.

    `name` is None for an ephemeral sampler (save_weights_and_get_sampling_client), which then has a sampling session
    id.
    """

    model_id: str
    seq_id: int
    kind: Literal["weights", "sampler_weights", "external_weights"]
    name: str | None
    sampling_session_seq_id: int | None = None
    inflight: bool = False
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] = {}
    age_recipients: tuple[str, ...] = ()
    """The recipients who can read an export; () = everybody who gets the files."""
    exclude_unembed: bool = False
    """Leave the unembedding's adapter out of an export."""


class LoadWeights(Struct, tag=True, frozen=True, kw_only=True):
    """load_state on a live model."""

    model_id: str
    seq_id: int
    path: str
    optimizer: bool


class UnloadModel(Struct, tag=True, frozen=True, kw_only=True):
    model_id: str


class Sample(Struct, tag=True, frozen=True, kw_only=True):
    """`sampling_session_id` names the weights: base model, checkpoint or snapshot, fixed when it was created. A live
    request (`SchedulerApi.sample_live`) names them itself, and has "" and the number 0."""

    sampling_session_id: str
    seq_id: int
    prompt: bytes
    """int32 little-endian tokens."""
    num_samples: int = 1
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    use_eos: bool = True
    """Whether the model's end-of-sequence tokens stop, too; False only when `stop` was []."""
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int = 0
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Tensor | None = None
    """Dense int32 [P-1, K], -1 in unlisted cells."""
    target_layout: tuple[bytes, bytes] | None = None
    """(crow_indices, col_indices) of a CSR request, int64: the answer repeats them."""
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool = False
    """Record for each sampled token what stable_reinforce needs."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability are drawn, after the temperature."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has already."""
    frequency_penalty: float = 0.0
    """The same, for each time that it has them."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the answer are divided by it where they are positive, else multiplied."""
    min_tokens: int = 0
    """No stop token or stop string ends a shorter answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, bias that is added to its logit), each token once."""
    grammar: str = ""
    """The grammar that answers obey (`grammar.py`); "" = any text. Only live requests have one."""

    @property
    def scores_prompt(self) -> bool:
        """Whether anything is asked about the prompt's own tokens."""
        return bool(
            self.prompt_logprobs
            or self.topk_prompt_logprobs
            or self.target_prompt_logprobs is not None
            or self.prompt_alt_tokens_k
        )


class Rejected(Struct, tag=True, frozen=True, kw_only=True):
    """A training request with invalid content. A refused submit would burn its seq_id and leave a gap that nobody
    fills (`schemas/tinker.md`, "Requests that cannot be refused"), so it is accepted, takes its place in the order, and
    fails there with this message."""

    model_id: str
    seq_id: int
    kind: str
    """The name of the operation that it would have been."""
    message: str


TrainingOperation = ForwardBackward | OptimStep | SaveWeights | LoadWeights | Rejected
Operation = CreateModel | CreateModelFromCheckpoint | TrainingOperation | UnloadModel | Sample

_encoder = msgspec.msgpack.Encoder(order="sorted")
_decoder = msgspec.msgpack.Decoder(Operation)
_DATA = _encoder.encode("data")
_NO_DATA = _DATA + _encoder.encode(())


def encode(operation: Operation) -> bytes:
    """Large batches are encoded a datum at a time, because each call into the encoder keeps the interpreter to itself.
    The bytes are the same."""
    if not isinstance(operation, ForwardBackward):
        return _encoder.encode(operation)
    head, rest = _encoder.encode(msgspec.structs.replace(operation, data=())).split(_NO_DATA, 1)
    pieces = [head, _DATA, _array_head(len(operation.data)), *map(_encoder.encode, operation.data), rest]
    room = io.BytesIO(bytes(sum(map(len, pieces))))
    for piece in pieces:
        room.write(piece)
    return room.getvalue()


def _array_head(length: int) -> bytes:
    """How msgpack begins an array."""
    if length < 2**4:
        return bytes([0x90 | length])
    return struct.pack(">BH", 0xDC, length) if length < 2**16 else struct.pack(">BI", 0xDD, length)


class Encoded(Struct, frozen=True):
    """The stored form of an operation, encoded where that holds nobody up."""

    body: bytes
    digest: str

    @classmethod
    def of(cls, operation: Operation) -> Encoded:
        body, first = encode(operation), _as_first_tried(operation)
        return cls(body, body_digest(body if first is operation else encode(first)))


def decode(body: bytes) -> Operation:
    return _decoder.decode(body)


def body_digest(body: bytes) -> str:
    """Two submissions with one key are the same request exactly when these agree, whatever encoding they came in."""
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def _as_first_tried(operation: Operation) -> Operation:
    """The SDK numbers the sampling session of a save without a name anew each time that it tries it: that number makes
    no other request of it, and the first one stands."""
    if isinstance(operation, SaveWeights) and operation.sampling_session_seq_id is not None:
        return msgspec.structs.replace(operation, sampling_session_seq_id=0)
    return operation


def is_shaped(asked: Sample | SequenceSpec) -> bool:
    """Whether it draws from another distribution than that of logits, temperature, top_k and top_p."""
    return bool(
        asked.min_p
        or asked.presence_penalty
        or asked.frequency_penalty
        or asked.repetition_penalty != 1.0
        or asked.min_tokens
        or asked.logit_bias
    )

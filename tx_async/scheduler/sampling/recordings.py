"""What stable_reinforce needs to know of sampled sequences: recorded as tokens are drawn, looked up for training.

A recording belongs to the session that sampled it. The part that a datum needs is copied into the accepted operation,
so that a replay of the run is exact even after a recording has expired or made room for newer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeGuard

import msgspec
import numpy as np
from msgspec import Struct

from tx_async.errors import InvalidRequest
from tx_async.scheduler.core.policy import Policy
from tx_async.wire.operations import (
    HEAD_TOKENS_MAX,
    Datum,
    ForwardBackward,
    Operation,
    ProvenanceSpan,
    Sample,
    SamplerHeads,
)
from tx_async.wire.records import ModelRecord, RecordedSequence
from tx_async.wire.worker import GREEDY_BELOW, FinishedSequence

STABLE_REINFORCE = "stable_reinforce"
ALL, WHOLE, CUT = range(3)
"""Values of `FinishedSequence.head_is_whole`: every token can be drawn; only the head; more than the head, but not
all."""


def head_tokens(operation: Sample, policy: Policy, vocab_size: int) -> int:
    """How many of the likeliest tokens are recorded with each draw: where top_k or top_p limits what can be drawn, up
    to all that remains."""
    head = min(policy.stability_head_tokens, HEAD_TOKENS_MAX)
    if not operation.record_stability_info:
        return 0
    if operation.temperature < GREEDY_BELOW:
        return head
    if 1 <= operation.top_k < vocab_size:
        support = operation.top_k
    elif operation.top_p < 1:
        support = policy.stability_support_max
    else:
        return head
    # Engines look at few candidates or at many; of few they record all, because several may tie for the k-th place.
    return HEAD_TOKENS_MAX if support <= HEAD_TOKENS_MAX else max(head, policy.stability_support_max)


def check_whole(finished: FinishedSequence, tensors: Sequence[np.ndarray], policy: Policy) -> None:
    """Raises `InvalidRequest` where more could be drawn than is recorded, because the sample could not be trained
    on."""
    if finished.head_is_whole_index < 0:
        return
    is_cut = tensors[finished.head_is_whole_index] == CUT
    if is_cut.any():
        raise InvalidRequest(
            f"record_stability_info: at token {int(np.argmax(is_cut))} top_k and top_p left more tokens to draw than "
            f"are recorded (`stability_support_max` is {policy.stability_support_max}). Sample with a smaller top_k or "
            "top_p, or without both."
        )


class Recording(Struct, frozen=True, array_like=True):
    """The body of a `RecordedSequence`, all little-endian, for T sampled tokens and a head of k."""

    prompt: bytes
    """int32 [P]"""
    tokens: bytes
    """int32 [T]"""
    head_token_ids: bytes
    """int32 [T, k]"""
    head_probabilities: bytes
    """float32 [T, k]"""
    head_is_whole: bytes
    """uint8 [T]"""
    k: int

    @classmethod
    def of(cls, prompt: bytes, finished: FinishedSequence, tensors: Sequence[np.ndarray]) -> Recording:
        ids, probabilities = tensors[finished.head_token_ids_index], tensors[finished.head_probabilities_index]
        return cls(
            prompt,
            tensors[finished.tokens_index].astype("<i4").tobytes(),
            ids.astype("<i4").tobytes(),
            probabilities.astype("<f4").tobytes(),
            tensors[finished.head_is_whole_index].astype(np.uint8).tobytes(),
            ids.shape[1],
        )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Recording)


def encode(recording: Recording) -> bytes:
    return _encoder.encode(recording)


def decode(body: bytes) -> Recording:
    return _decoder.decode(body)


# ---- looking up


def are_needed(operation: Operation) -> TypeGuard[ForwardBackward]:
    return isinstance(operation, ForwardBackward) and operation.loss_fn == STABLE_REINFORCE


def spans_of(datum: Datum) -> Iterable[tuple[str, ProvenanceSpan]]:
    """Every span, with the name that errors give it."""
    if datum.provenance:
        for name in ("model_input", "loss_fn_inputs"):
            field = name.removesuffix("s") + "_spans"
            yield from ((f"{field}[{i}]", span) for i, span in enumerate(getattr(datum.provenance, name)))


def needed(
    operation: ForwardBackward, model: ModelRecord, find: Callable[[str], RecordedSequence | None]
) -> dict[str, RecordedSequence]:
    """The recordings that the operation's spans name; `find` looks up a sequence_id. Raises `InvalidRequest` for a
    recording that this run does not have, naming the datum and the span."""
    found: dict[str, RecordedSequence] = {}
    for i, datum in enumerate(operation.data):
        for where, span in spans_of(datum):
            if span.sequence_id not in found:
                record = find(span.sequence_id)
                if problem := _problem(record, model):
                    raise InvalidRequest(f"data[{i}]: {where}: the sequence {span.sequence_id[:200]!r} {problem}")
                assert record is not None
                found[span.sequence_id] = record
    return found


def _problem(record: RecordedSequence | None, model: ModelRecord) -> str:
    if record is None or record.owner != model.owner:
        return (
            "is not recorded here: it was sampled without record_stability_info, its record has expired "
            "(`stability_retention_s`), or newer ones needed its room (`stability_bytes_max`)."
        )
    if record.session_id != model.session_id:
        return "was sampled in another session: stable_reinforce trains what its own session has sampled."
    if record.base_model != model.base_model:
        return f"was sampled from {record.base_model}, and this run trains {model.base_model}."
    return ""


def with_heads(operation: ForwardBackward, recordings: Mapping[str, Recording]) -> ForwardBackward:
    """The operation with the recorded heads of its sampled positions. Raises `InvalidRequest` where the recorded tokens
    are not the datum's, naming the datum and the span."""
    data: list[Datum] = []
    for i, datum in enumerate(operation.data):
        try:
            data.append(_with_heads(datum, recordings))
        except InvalidRequest as error:
            raise InvalidRequest(f"data[{i}]: {error.message}") from None
    return msgspec.structs.replace(operation, data=tuple(data))


def _with_heads(datum: Datum, recordings: Mapping[str, Recording]) -> Datum:
    provenance = datum.provenance
    assert provenance is not None
    targets = datum.loss_fn_inputs["target_tokens"].numpy()
    _check(np.frombuffer(datum.tokens, "<i4"), provenance.model_input, "model_input_spans", recordings)
    _check(targets, provenance.loss_fn_inputs, "loss_fn_input_spans", recordings, sampled_only=True)
    pieces: list[_SpanHeads] = []
    position = 0
    for i, span in enumerate(provenance.loss_fn_inputs):
        if span.is_sampled and span.length:
            pieces.append(_piece(recordings[span.sequence_id], span, position, f"loss_fn_input_spans[{i}]"))
        position += span.length
    return msgspec.structs.replace(datum, heads=_joined(pieces) if pieces else None)


def _check(
    tokens: np.ndarray,
    spans: Sequence[ProvenanceSpan],
    name: str,
    recordings: Mapping[str, Recording],
    sampled_only: bool = False,
) -> None:
    """Check that the field's tokens are those of its spans. sampled_only: targets that are not trained on may be
    anything; tinker-cookbook's rl_loop has zeros there."""
    position = 0
    for i, span in enumerate(spans):
        recording = recordings[span.sequence_id]
        recorded = np.frombuffer(recording.tokens if span.is_sampled else recording.prompt, "<i4")
        mine = tokens[position : position + span.length]
        theirs = recorded[span.offset : span.offset + span.length]
        if not np.array_equal(mine, theirs) and (span.is_sampled or not sampled_only):
            kind = "sampled" if span.is_sampled else "prompt"
            raise InvalidRequest(
                f"{name}[{i}]: the datum's tokens are not the {kind} tokens {span.offset} to "
                f"{span.offset + span.length} of {span.sequence_id}."
            )
        position += span.length


class _SpanHeads(Struct, frozen=True):
    """The heads of one span."""

    positions: np.ndarray
    token_ids: np.ndarray
    probabilities: np.ndarray
    is_whole: np.ndarray


def _piece(recording: Recording, span: ProvenanceSpan, position: int, where: str) -> _SpanHeads:
    rows = slice(span.offset, span.offset + span.length)
    is_whole = np.frombuffer(recording.head_is_whole, np.uint8)[rows]
    if (is_whole == CUT).any():
        raise InvalidRequest(
            f"{where}: top_k or top_p left more than {recording.k} tokens to draw, and only that many were recorded. "
            "Sample without them, or with smaller ones."
        )
    return _SpanHeads(
        np.arange(position, position + span.length, dtype=np.int32),
        np.frombuffer(recording.head_token_ids, "<i4").reshape(-1, recording.k)[rows],
        np.frombuffer(recording.head_probabilities, "<f4").reshape(-1, recording.k)[rows],
        is_whole,
    )


def _joined(pieces: Sequence[_SpanHeads]) -> SamplerHeads:
    """The heads of several sequences joined; the shorter ones get unused cells."""
    k = max(piece.token_ids.shape[1] for piece in pieces)

    def wide(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), (0, k - array.shape[1])])

    return SamplerHeads(
        positions=b"".join(piece.positions.tobytes() for piece in pieces),
        token_ids=b"".join(wide(piece.token_ids).tobytes() for piece in pieces),
        probabilities=b"".join(wide(piece.probabilities).tobytes() for piece in pieces),
        is_whole=b"".join(piece.is_whole.tobytes() for piece in pieces),
        k=k,
    )

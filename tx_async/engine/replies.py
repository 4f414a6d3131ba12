"""What a quantum reports of its sequences: from the device's arrays to the structs and tensors of `Sampled`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tx_async.engine import heads
from tx_async.engine.decode_batches import ScoringPiece
from tx_async.engine.decode_programs import Decoded
from tx_async.engine.prompt_scores import Scores
from tx_async.engine.sequences import SequenceState
from tx_async.wire.worker import FinishedSequence, SequencePiece


def fetch(decoded: Decoded, samples: Sequence[SequenceState]) -> Decoded:
    """Copy to the host; the candidates only if somebody wants them."""
    tokens, logprobs, count = (np.asarray(array) for array in (decoded.tokens, decoded.logprobs, decoded.count))
    decoded = decoded._replace(tokens=tokens, logprobs=logprobs, count=count)
    wanted: list[str] = []
    if any(sample.spec.topk_logprobs or sample.spec.head_tokens for sample in samples):
        wanted += ["topk_token_ids", "topk_logprobs"]
    if any(sample.spec.head_tokens for sample in samples):
        wanted += ["head_probabilities", "head_is_whole"]
    return decoded._replace(**{name: np.asarray(getattr(decoded, name)) for name in wanted})


def store_scores(pieces: Sequence[ScoringPiece], scores: Scores) -> None:
    """Give each prompt its rows of one scoring call."""
    for piece in pieces:
        rows = slice(piece.first, piece.first + piece.count)
        piece.scoring.store(piece.start, Scores(*(array[rows] for array in vars(scores).values())))


def piece_of(sample: SequenceState, count: int, tensors: list[np.ndarray]) -> SequencePiece:
    """Describe the last `count` tokens of a sequence that goes on, appending its arrays to the message's."""

    def add(array: np.ndarray) -> int:
        tensors.append(array)
        return len(tensors) - 1

    fields: dict[str, int] = {}
    if sample.spec.topk_logprobs:
        ids, logprobs = sample.topk[-1]
        fields = {"topk_token_ids_index": add(ids), "topk_logprobs_index": add(logprobs)}
    return SequencePiece(
        sequence_id=sample.spec.sequence_id,
        start=len(sample.logprobs) - count,
        tokens_index=add(np.array(sample.tokens[-count:], np.int32)),
        logprobs_index=add(np.array(sample.logprobs[-count:], np.float32)),
        **fields,
    )


def finished_sequence(sample: SequenceState, reason: Any, tensors: list[np.ndarray], now: float) -> FinishedSequence:
    """Describe a sequence that ended, appending its arrays to the message's."""

    def add(array: np.ndarray) -> int:
        tensors.append(array)
        return len(tensors) - 1

    fields: dict[str, int] = {}
    if sample.spec.topk_logprobs:
        fields["topk_token_ids_index"] = add(np.concatenate([ids for ids, _ in sample.topk]))
        fields["topk_logprobs_index"] = add(np.concatenate([logprobs for _, logprobs in sample.topk]))
    if sample.heads:
        ids, probabilities, is_whole = heads.joined(sample.heads)
        fields["head_token_ids_index"], fields["head_probabilities_index"] = add(ids), add(probabilities)
        fields["head_is_whole_index"] = add(is_whole)
    if sample.scoring:
        fields |= {f"{name}_index": add(array) for name, array in sample.scoring.results().items()}
    return FinishedSequence(
        sequence_id=sample.spec.sequence_id,
        stop_reason=reason,
        tokens_index=add(np.array(sample.tokens[sample.num_prompt :], np.int32)),
        logprobs_index=add(np.array(sample.logprobs, np.float32)),
        num_cached_tokens=sample.num_cached,
        times=sample.times.until(now),
        **fields,
    )

"""The answer to a quantum: what became of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tx_async.errors import Category
from tx_async.wire.worker import FinishedSequence, Sampled, SequencePiece, SequenceSpec, SequenceTimes
from tx_async.worker.dialect import CompletionPart, EngineCompletion
from tx_async.worker.engine_api import Reply


@dataclass(frozen=True)
class SampleFailure:
    category: Category
    message: str


@dataclass(frozen=True)
class SampleOutcome:
    spec: SequenceSpec
    num_prompt_tokens: int
    result: EngineCompletion | SampleFailure
    took_ms: float = 0.0
    """From its admission to the engine's answer."""


@dataclass(frozen=True)
class SamplePart:
    """What a watched sequence that goes on has added."""

    sequence_id: int
    part: CompletionPart


def report(outcomes: Sequence[SampleOutcome], parts: Sequence[SamplePart], num_running: int) -> Reply:
    finished: list[FinishedSequence] = []
    tensors: list[np.ndarray] = []
    pieces = tuple(_piece(part.sequence_id, part.part, tensors) for part in parts)
    progress: list[tuple[int, int]] = []
    for outcome in outcomes:
        if isinstance(outcome.result, EngineCompletion):
            finished.append(_finished(outcome, outcome.result, tensors))
            num_computed = outcome.num_prompt_tokens - outcome.result.num_cached_tokens + len(outcome.result.tokens)
            progress.append((outcome.spec.sequence_id, num_computed))
    result = Sampled(
        finished=tuple(finished),
        failed=tuple(
            (outcome.spec.sequence_id, outcome.result.category, outcome.result.message)
            for outcome in outcomes
            if isinstance(outcome.result, SampleFailure)
        ),
        progress=tuple(progress),
        pieces=pieces,
        num_running=num_running,
    )
    return result, tensors


def _piece(sequence_id: int, part: CompletionPart, tensors: list[np.ndarray]) -> SequencePiece:
    return SequencePiece(
        sequence_id=sequence_id,
        start=part.start,
        tokens_index=_add(part.tokens, tensors),
        logprobs_index=_add(part.logprobs, tensors),
        topk_token_ids_index=_add(part.topk_token_ids, tensors),
        topk_logprobs_index=_add(part.topk_logprobs, tensors),
    )


def _add(array: np.ndarray | None, tensors: list[np.ndarray]) -> int:
    """The place of an array among `tensors`; -1 of none."""
    if array is None:
        return -1
    tensors.append(array)
    return len(tensors) - 1


def _finished(outcome: SampleOutcome, completion: EngineCompletion, tensors: list[np.ndarray]) -> FinishedSequence:
    add = partial(_add, tensors=tensors)
    return FinishedSequence(
        sequence_id=outcome.spec.sequence_id,
        stop_reason=completion.stop_reason,
        tokens_index=add(completion.tokens),
        logprobs_index=add(completion.logprobs),
        topk_token_ids_index=add(completion.topk_token_ids),
        topk_logprobs_index=add(completion.topk_logprobs),
        head_token_ids_index=add(completion.head_token_ids),
        head_probabilities_index=add(completion.head_probabilities),
        head_is_whole_index=-1
        if completion.head_token_ids is None
        else add(np.zeros(len(completion.tokens), np.int32)),
        num_cached_tokens=completion.num_cached_tokens,
        times=_times(outcome.took_ms, completion),
    )


def _times(took_ms: float, completion: EngineCompletion) -> SequenceTimes | None:
    """The engine says how long it generated, and the rest was before the first token. That token's own step counts as
    long as the mean of the others'; of a single token it is unknown."""
    if completion.generation_ms is None:
        return None
    first_token = max(0.0, took_ms - completion.generation_ms)
    num_steps = len(completion.tokens) - 1
    step = completion.generation_ms / num_steps if num_steps > 0 else 0.0
    return SequenceTimes(decode_began=max(0.0, first_token - step), first_token=first_token, last_token=took_ms)

"""The fake scheduler's live samples: a piece for every token, of all samples in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Sequence

import msgspec
import numpy as np

from tx_async.errors import TxError
from tx_async.scheduler.interface import LivePiece
from tx_async.testing.fake_results import SAMPLED_LOGPROB, sample
from tx_async.wire.operations import Sample
from tx_async.wire.results import SampledSequence, TopkLogprobs


class FakeLive:
    def __init__(self):
        self.operations: list[tuple[Sample, str | None]] = []
        """Every live request, with its `model_path`, in order of arrival."""
        self.answers: deque[Sequence[int]] = deque()
        """What the next samples say; those beyond count up from their prompts' last tokens."""
        self.tokens_max: int | None = None
        """After so many pieces of a request, `error` is raised."""
        self.error: TxError | None = None
        self.num_open = 0
        """Requests whose generators have begun and not ended."""

    async def stream(
        self, operation: Sample, model_path: str | None, vocab_size: int
    ) -> AsyncGenerator[LivePiece, None]:
        self.operations.append((operation, model_path))
        result = sample(operation, vocab_size)
        sequences = [self._scripted(sequence, operation) for sequence in result.sequences]
        prompt = {
            name: value
            for name in ("prompt_logprobs", "topk_prompt_logprobs", "target_prompt_logprobs", "prompt_alt_tokens")
            if (value := getattr(result, name)) is not None
        }
        num_pieces = 0
        self.num_open += 1
        try:
            for position in range(max(len(sequence.tokens) // 4 for sequence in sequences)):
                for index, sequence in enumerate(sequences):
                    if self.error and num_pieces == self.tokens_max:
                        raise self.error
                    if position < len(sequence.tokens) // 4:
                        yield _piece(index, sequence, position, prompt if index == 0 else {})
                        num_pieces += 1
        finally:
            self.num_open -= 1

    def _scripted(self, sequence: SampledSequence, operation: Sample) -> SampledSequence:
        if not self.answers:
            return sequence
        tokens = np.array(self.answers.popleft(), "<i4")
        is_cut = operation.max_tokens is not None and len(tokens) > operation.max_tokens
        tokens = tokens[: operation.max_tokens]
        topk = None
        if k := operation.topk_sample_logprobs:
            ids = np.tile(np.arange(k), (len(tokens), 1))
            topk = TopkLogprobs.of(ids, -(ids + 1.0))
        return SampledSequence(
            tokens.tobytes(),
            np.full(len(tokens), SAMPLED_LOGPROB, "<f4").tobytes(),
            "length" if is_cut else "stop",
            topk,
        )


def _piece(index: int, sequence: SampledSequence, position: int, prompt: dict) -> LivePiece:
    cells, topk = slice(4 * position, 4 * position + 4), sequence.topk
    if topk is not None:
        row = slice(4 * topk.k * position, 4 * topk.k * (position + 1))
        topk = TopkLogprobs(topk.token_ids[row], topk.logprobs[row], topk.k)
    piece = LivePiece(index=index, tokens=sequence.tokens[cells], logprobs=sequence.logprobs[cells], topk=topk)
    if cells.stop < len(sequence.tokens):
        return piece
    return msgspec.structs.replace(piece, stop_reason=sequence.stop_reason, prompt=prompt)

"""What the fake engine says of a sequence: its arrays, and where they stand in the message."""

from __future__ import annotations

from typing import Any

import numpy as np

from tx_async.testing.fake_model import FakeSequence, pair_logprobs
from tx_async.wire.results import EMPTY_LOGPROB
from tx_async.wire.worker import FinishedSequence, PromptScores, SequencePiece


class FakeReply:
    def __init__(self, sequence: FakeSequence, w: np.ndarray, vocab_size: int, tensors: list[np.ndarray]):
        """w: the adapter's numbers; tensors: of the message, which grows."""
        self.sequence = sequence
        self.w = w
        self.vocab_size = vocab_size
        self.tensors = tensors

    def piece(self, start: int) -> SequencePiece:
        """The tokens from `start` on, of a sequence that goes on."""
        return SequencePiece(sequence_id=self.sequence.spec.sequence_id, start=start, **self._sampled(start))

    def finished(self, stop_reason: str) -> FinishedSequence:
        spec, indices = self.sequence.spec, self._sampled(0)
        if spec.head_tokens:
            ids, values = self._topk(self._before(0), spec.head_tokens)
            indices |= {"head_token_ids_index": self._add(ids), "head_probabilities_index": self._add(np.exp(values))}
            indices["head_is_whole_index"] = self._add(np.zeros(len(ids), np.int32))
        if spec.prompt_scores:
            indices |= {
                f"{name}_index": self._add(array) for name, array in self._prompt_scores(spec.prompt_scores).items()
            }
        return FinishedSequence(
            sequence_id=spec.sequence_id,
            stop_reason=stop_reason,  # type: ignore[arg-type]
            times=self.sequence.times(),
            **indices,
        )

    def _add(self, array: np.ndarray) -> int:
        self.tensors.append(array)
        return len(self.tensors) - 1

    def _before(self, start: int) -> np.ndarray:
        """The token before each one from `start` on."""
        return np.array([self.sequence.prompt[-1], *self.sequence.tokens], np.int32)[start:-1]

    def _sampled(self, start: int) -> dict[str, Any]:
        spec, before = self.sequence.spec, self._before(start)
        tokens = np.array(self.sequence.tokens[start:], np.int32)
        indices = {
            "tokens_index": self._add(tokens),
            "logprobs_index": self._add(pair_logprobs(self.w, before, tokens)),
        }
        if spec.topk_logprobs:
            ids, values = self._topk(before, spec.topk_logprobs)
            indices |= {"topk_token_ids_index": self._add(ids), "topk_logprobs_index": self._add(values)}
        return indices

    def _topk(self, before: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best tokens after each of `before`: int32 and float32 [T, k], best first."""
        vocabulary = np.arange(self.vocab_size, dtype=np.int32)
        values = np.stack([pair_logprobs(self.w, np.full_like(vocabulary, token), vocabulary) for token in before]) \
            if len(before) else np.zeros((0, self.vocab_size), np.float32)  # fmt: skip
        ids = np.argsort(-values, axis=1, kind="stable")[:, :k].astype(np.int32)
        return ids, np.take_along_axis(values, ids, axis=1)

    def _prompt_scores(self, scores: PromptScores) -> dict[str, np.ndarray]:
        prompt, targets = self.sequence.prompt, self.sequence.targets
        first = max(1, len(prompt) - scores.last_n) if scores.last_n else 1
        found: dict[str, np.ndarray] = {}
        if scores.logprobs:
            logprobs = np.full(len(prompt), np.nan, np.float32)
            logprobs[first:] = pair_logprobs(self.w, prompt[first - 1 : -1], prompt[first:])
            found["prompt_logprobs"] = logprobs
        if scores.topk:
            ids = np.zeros((len(prompt), scores.topk), np.int32)
            values = np.full((len(prompt), scores.topk), EMPTY_LOGPROB, np.float32)
            ids[first:], values[first:] = self._topk(prompt[first - 1 : -1], scores.topk)
            found |= {"prompt_topk_token_ids": ids, "prompt_topk_logprobs": values}
        if targets is not None:
            values = pair_logprobs(self.w, np.repeat(prompt[:-1, None], targets.shape[1], axis=1), targets)
            found["target_logprobs"] = np.where(targets >= 0, values, np.float32(0.0))
        if scores.alt_tokens_k:
            ids, values = self._topk(prompt[:-1], scores.alt_tokens_k)
            found |= {"alt_token_ids": ids, "alt_logprobs": values}
        return found

"""What a request wants to know about its prompt, gathered chunk by chunk while the prompt is prefilled.

The hidden state at position h scores the token at h + 1. Nothing of size [prompt, vocabulary] ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tx_async.engine.sampler import TOPK_MAX
from tx_async.errors import InvalidRequest
from tx_async.wire.results import EMPTY_LOGPROB
from tx_async.wire.worker import PromptScores


@dataclass(frozen=True)
class Scores:
    """One scored piece as the device returns it; the first axis is the position."""

    logprobs: np.ndarray
    topk_token_ids: np.ndarray
    topk_logprobs: np.ndarray
    target_logprobs: np.ndarray
    alt_token_ids: np.ndarray
    alt_logprobs: np.ndarray


class PromptScoring:
    """Results of one prompt. `next` is the first position whose hidden state has not been scored yet."""

    def __init__(self, wanted: PromptScores, num_prompt: int, targets: np.ndarray | None):
        """targets: int32 [P-1, K], -1 in cells without a candidate."""
        if max(wanted.topk, wanted.alt_tokens_k, targets.shape[1] if targets is not None else 0) > TOPK_MAX:
            raise InvalidRequest(f"At most {TOPK_MAX} candidates can be scored per prompt position.")
        self.wanted = wanted
        self.targets = targets
        self.num_prompt = num_prompt
        self.first_scored = max(1, num_prompt - wanted.last_n) if wanted.last_n else 1
        needs_all = targets is not None or wanted.alt_tokens_k > 0
        self.next = 0 if needs_all else self.first_scored - 1
        self.logprobs = np.full(num_prompt, np.nan, np.float32)
        self.topk_token_ids = np.zeros((num_prompt, wanted.topk), np.int32)
        self.topk_logprobs = np.full((num_prompt, wanted.topk), EMPTY_LOGPROB, np.float32)
        self.target_logprobs = np.zeros((num_prompt - 1, targets.shape[1] if targets is not None else 0), np.float32)
        self.alt_token_ids = np.zeros((num_prompt - 1, wanted.alt_tokens_k), np.int32)
        self.alt_logprobs = np.zeros((num_prompt - 1, wanted.alt_tokens_k), np.float32)

    @property
    def is_planned(self) -> bool:
        """Whether every position has been given to the device."""
        return self.next >= self.num_prompt - 1

    def results(self) -> dict[str, np.ndarray]:
        """The results that were asked for, by the names that `FinishedSequence` has for their indexes."""
        results = {}
        if self.wanted.logprobs:
            results["prompt_logprobs"] = self.logprobs
        if self.wanted.topk:
            results |= {"prompt_topk_token_ids": self.topk_token_ids, "prompt_topk_logprobs": self.topk_logprobs}
        if self.targets is not None:
            results["target_logprobs"] = self.target_logprobs
        if self.wanted.alt_tokens_k:
            results |= {"alt_token_ids": self.alt_token_ids, "alt_logprobs": self.alt_logprobs}
        return results

    def store(self, start: int, scores: Scores) -> None:
        """Keep the scores of the hidden positions from `start` on."""
        stop = start + len(scores.logprobs)
        first = max(start + 1, self.first_scored)
        if first < stop + 1:
            rows = slice(first - start - 1, None)
            self.logprobs[first : stop + 1] = scores.logprobs[rows]
            self.topk_token_ids[first : stop + 1] = scores.topk_token_ids[rows, : self.wanted.topk]
            self.topk_logprobs[first : stop + 1] = scores.topk_logprobs[rows, : self.wanted.topk]
        if self.targets is not None:
            k = self.targets.shape[1]
            listed = self.targets[start:stop] >= 0
            self.target_logprobs[start:stop] = np.where(listed, scores.target_logprobs[:, :k], 0.0)
        if k := self.wanted.alt_tokens_k:
            self.alt_token_ids[start:stop] = scores.alt_token_ids[:, :k]
            self.alt_logprobs[start:stop] = scores.alt_logprobs[:, :k]

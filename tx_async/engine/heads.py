"""What stable_reinforce needs to know of each draw, on the host: the likeliest tokens with their probabilities, or all
tokens that top-k and top-p have left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tx_async.engine.sampler import TOPK_MAX
from tx_async.wire.operations import SUPPORT_TOKENS_MAX

Head = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids int32 [T, k], probabilities fp32 [T, k], whether each is whole [T] (`sampler.head_of`)."""


def num_candidates(head_tokens: int) -> int:
    """How many candidates a decode program must look at for a head of `head_tokens` tokens: one of two numbers, so that
    there are only two programs."""
    return TOPK_MAX if head_tokens <= TOPK_MAX else SUPPORT_TOKENS_MAX


def head_of_steps(out: Any, steps: slice, row: int, k: int) -> Head:
    """The k likeliest tokens of the distributions that these steps of a `Decoded` drew from; fewer where fewer could be
    drawn. It copies, because `out` is dropped."""
    probabilities, is_whole = out.head_probabilities[steps, row, :k], np.array(out.head_is_whole[steps, row])
    others = (out.head_probabilities[steps, row, k:] > 0).any(-1)
    if is_whole.all():
        k = max(1, int((probabilities > 0).sum(-1).max(initial=0)))
    ids = np.array(out.topk_token_ids[steps, row, :k])
    return ids, np.array(probabilities[:, :k]), np.where((is_whole == 1) & others, 2, is_whole)


def joined(heads: Sequence[Head]) -> Head:
    """The heads of all steps as one; the narrower ones get unused cells."""
    k = max(ids.shape[1] for ids, _, _ in heads)

    def wide(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), (0, k - array.shape[1])])

    ids, probabilities, is_whole = zip(*heads, strict=True)
    return (
        np.concatenate([wide(part) for part in ids]),
        np.concatenate([wide(part) for part in probabilities]),
        np.concatenate(is_whole).astype(np.int32),
    )

"""How far the trainer is from the sampler: metrics of every loss that is given the sampler's log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tx_async.wire.operations import Datum, ForwardBackward

LOG_RATIO_MAX = 20.0
OVERFLOWING = float(np.log(np.finfo(np.float32).max))
"""Where a ratio would overflow float32 the losses clamp its logarithm to LOG_RATIO_MAX, and so does its mean."""


def rollout_gap(operation: ForwardBackward, logprobs: Iterable[np.ndarray]) -> dict[str, float]:
    """Metrics over the sampled positions of all datums, q being the sampler's log-probability of the token and p the
    trainer's: `kl_sample_train:mean` and `:max` of q - p, and `ratio:mean` of exp(p - q). Without sampled positions
    they are 0, 0 and 1.

    logprobs: per datum float32 [T]. A loss without `logprobs` has none.
    """
    if not all("logprobs" in datum.loss_fn_inputs for datum in operation.data):
        return {}
    pairs = zip(operation.data, logprobs, strict=True)
    gap = np.concatenate([_gap(datum, p.astype(np.float64)) for datum, p in pairs])
    if not gap.size:
        return {"kl_sample_train:mean": 0.0, "kl_sample_train:max": 0.0, "ratio:mean": 1.0}
    ratio = np.exp(np.where(-gap > OVERFLOWING, LOG_RATIO_MAX, -gap))
    return {
        "kl_sample_train:mean": float(gap.mean()),
        "kl_sample_train:max": float(gap.max()),
        "ratio:mean": float(ratio.mean()),
    }


def num_sampled(operation: ForwardBackward) -> int:
    """How many positions the gap is taken over."""
    if not all("logprobs" in datum.loss_fn_inputs for datum in operation.data):
        return 0
    return sum(int(np.count_nonzero(_is_sampled(datum))) for datum in operation.data)


def _gap(datum: Datum, p: np.ndarray) -> np.ndarray:
    return (datum.loss_fn_inputs["logprobs"].numpy() - p)[_is_sampled(datum)]


def _is_sampled(datum: Datum) -> np.ndarray:
    """bool [T]: whether a position was sampled, as its spans say; without spans, where an advantage is not 0."""
    if datum.provenance is None:
        return datum.loss_fn_inputs["advantages"].numpy() != 0
    spans = datum.provenance.loss_fn_inputs
    return np.repeat([span.is_sampled for span in spans], [span.length for span in spans])

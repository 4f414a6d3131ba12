"""The losses of the Tinker API, with their derivatives. All are sums: nothing is normalised.

Notation of the functions: `lp` = log-probability of the target token under the current policy, `q` = the sampler's,
`A` = the advantage, `r = exp(lp - q)` = the ratio. A pointwise loss returns (term, d term / d lp) of one position,
elementwise. Which loss a position has is data (`loss_fn`), so one program serves every mix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.wire.worker import LOSS_FNS

CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO = range(len(LOSS_FNS))


class LossInputs(NamedTuple):
    """One entry per position, any shape [...]; `weights` has a last axis K more."""

    loss_fn: Array
    """int32: index in LOSS_FNS."""
    valid: Array
    """bool: False at padding, whose terms and derivatives are zero whatever the other inputs hold."""
    weights: Array
    logprobs: Array
    advantages: Array
    clip_low_threshold: Array
    clip_high_threshold: Array
    beta: Array
    log_sequence_ratio: Array
    """gspo's mean of lp - q over the sequence's marked positions (`log_sequence_ratios`)."""


Terms = tuple[Array, Array]

LOG_RATIO_MAX = 20.0


def _ratio(log_ratio: Array, weight: Array) -> Array:
    """exp(log_ratio). Where its product with `weight` is not finite, of the log-ratio clamped to ±LOG_RATIO_MAX: a
    position that counts nothing (0 · ∞), with a placeholder for its log-probability, must not spoil the others."""
    ratio = jnp.exp(log_ratio)
    clamped = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_MAX, LOG_RATIO_MAX))
    return jnp.where(jnp.isfinite(ratio * weight), ratio, clamped)


def _weighted(weight: Array, x: Array) -> Array:
    """weight · x, with 0 · ∞ = 0. NaN stays: it is no log-probability, and its cause must come to light."""
    return jnp.where((weight == 0) & ~jnp.isnan(x), 0.0, weight * x)


def importance_sampling(lp: Array, x: LossInputs) -> Terms:
    """-r A"""
    ratio = _ratio(lp - x.logprobs, x.advantages)
    return -ratio * x.advantages, -ratio * x.advantages


def ppo(lp: Array, x: LossInputs) -> Terms:
    """-min(r A, clip(r, low, high) A)"""
    return _clipped_surrogate(lp - x.logprobs, x)


def cispo(lp: Array, x: LossInputs) -> Terms:
    """-sg(clip(r, low, high)) lp A"""
    ratio = _ratio(lp - x.logprobs, x.advantages)
    weight = -jnp.clip(ratio, x.clip_low_threshold, x.clip_high_threshold) * x.advantages
    return _weighted(weight, lp), weight


def dro(lp: Array, x: LossInputs) -> Terms:
    """-(lp A - beta/2 (lp - q)²)"""
    gap = lp - x.logprobs
    return -(lp * x.advantages - 0.5 * x.beta * gap * gap), -(x.advantages - x.beta * gap)


def gspo(lp: Array, x: LossInputs) -> Terms:
    """ppo's form with the sequence's ratio s in the place of r; its gradient flows through the position's own lp."""
    return _clipped_surrogate(x.log_sequence_ratio, x)


def _clipped_surrogate(log_ratio: Array, x: LossInputs) -> Terms:
    ratio = _ratio(log_ratio, x.advantages)
    plain = ratio * x.advantages
    clipped = jnp.clip(ratio, x.clip_low_threshold, x.clip_high_threshold) * x.advantages
    # Where both are equal the ratio lies within the bounds, and clip passes its gradient there. NaN propagates.
    return -jnp.minimum(plain, clipped), jnp.where(clipped < plain, 0.0, -plain)


def loss_terms(lp: Array, x: LossInputs) -> Terms:
    """lp [..., K] -> (term [...] of each position, its derivative by lp [..., K]). Losses of RL read target 0 only."""
    first = lp[..., 0]
    terms = jnp.sum(_weighted(-x.weights, lp), axis=-1)
    slopes = -x.weights
    for loss, function in (
        (IMPORTANCE_SAMPLING, importance_sampling),
        (PPO, ppo),
        (CISPO, cispo),
        (DRO, dro),
        (GSPO, gspo),
    ):
        term, slope = function(first, x)
        mine = x.loss_fn == loss
        terms = jnp.where(mine, term, terms)
        slopes = jnp.where(mine[..., None], _first_of(slope, lp.shape[-1]), slopes)
    return jnp.where(x.valid, terms, 0.0), jnp.where(x.valid[..., None], slopes, 0.0)


def _first_of(slope: Array, k: int) -> Array:
    return jnp.pad(slope[..., None], [(0, 0)] * slope.ndim + [(0, k - 1)])


def log_sequence_ratios(lp: Array, q: Array, mask: Array, segment_ids: Array) -> Array:
    """gspo's log s: per segment the mean of lp - q over positions with mask != 0, given back to each position. All
    [R, L].

    Summed by segment, never through products with a mask. A sequence without marked positions has log s = 0.
    """
    num_segments = segment_ids.shape[-1] + 1

    def row(lp: Array, q: Array, mask: Array, segment_ids: Array) -> Array:
        marked = mask != 0
        sums = jax.ops.segment_sum(jnp.where(marked, lp - q, 0.0), segment_ids, num_segments)
        counts = jax.ops.segment_sum(marked.astype(lp.dtype), segment_ids, num_segments)
        return (sums / jnp.maximum(counts, 1.0))[segment_ids]

    return jax.vmap(row)(lp, q, mask, segment_ids)

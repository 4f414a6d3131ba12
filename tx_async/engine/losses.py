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

CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO, STABLE_REINFORCE = range(len(LOSS_FNS))
TAIL_MIN = 1e-6
"""The least probability that the policy is assumed to leave outside of a sampler's head."""


class LossInputs(NamedTuple):
    """One entry per position, any shape [...]; `weights` has an additional last axis K."""

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
    """exp(log_ratio). Where its product with `weight` is not finite, the log-ratio is clamped to ±LOG_RATIO_MAX: a
    position of weight 0 (0 · ∞), with a placeholder for its log-probability, must not spoil the others."""
    ratio = jnp.exp(log_ratio)
    clamped = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_MAX, LOG_RATIO_MAX))
    return jnp.where(jnp.isfinite(ratio * weight), ratio, clamped)


def _weighted(weight: Array, x: Array) -> Array:
    """weight · x, with 0 · ∞ = 0. NaN stays NaN: it is no log-probability, and its cause must come to light."""
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
    """ppo's form with the sequence's ratio s in place of r; its gradient flows through the position's own lp."""
    return _clipped_surrogate(x.log_sequence_ratio, x)


def stable_reinforce(lp: Array, x: LossInputs) -> Terms:
    """REINFORCE with score centering, the top-k estimator of arXiv:2609.20807: -A (lp_a - C) + kl_coeff KL.

    lp [..., K]: of the sampled token a, then of the sampler's head H, its likeliest tokens, whose probabilities q are
    `weights[..., 1:]` (0: no token). With p = exp(lp):

        rho = (1 - sum_H q) / max(1 - sum_H p, 1e-6)        what the head leaves out, as if p's tail had q's shape
        C   = sum_H sg(q - rho p) lp                        the score's mean under q, which sampling from p would make 0
        KL  = sum_H q (log q - lp) + (1 - sum_H q) log rho

    Where `weights[..., 0]` is set, top-k or top-p left nothing but H to draw: p is normalised over H, and there is no
    tail. -> (term [...], its derivative by lp [..., K]).
    """
    if lp.shape[-1] == 1:  # no position has a head: every advantage is 0
        return _weighted(-x.advantages, lp[..., 0]), -x.advantages[..., None]
    listed = x.weights[..., 1:] > 0
    q = jnp.where(listed, x.weights[..., 1:], 0.0)
    is_whole = (x.weights[..., :1] > 0) & jnp.any(listed, -1, keepdims=True)
    heads = jnp.where(listed, lp[..., 1:], 0.0)
    log_support = jax.nn.logsumexp(jnp.where(is_whole & listed, heads, -jnp.inf), axis=-1, keepdims=True)
    log_support = jnp.where(is_whole, log_support, 0.0)
    log_p = heads - log_support
    p = jnp.where(listed, jnp.exp(log_p), 0.0)
    missing = 1.0 - q.sum(-1, keepdims=True)
    tail = jnp.where(is_whole, 0.0, jnp.maximum(missing, 0.0))
    left = 1.0 - p.sum(-1, keepdims=True)
    rho = tail / jnp.maximum(left, TAIL_MIN)

    advantages, kl_coeff = x.advantages[..., None], x.beta[..., None]
    centering = q - rho * p
    score = lp[..., :1] - log_support - jnp.sum(centering * log_p, -1, keepdims=True)
    divergence = jnp.sum(jax.scipy.special.xlogy(q, jnp.where(listed, q, 1.0)) - q * log_p, -1, keepdims=True)
    divergence += jax.scipy.special.xlogy(tail, jnp.where(tail > 0, rho, 1.0))
    terms = _weighted(-advantages, score) + _weighted(kl_coeff, divergence)

    # Where p is normalised over the head, every lp of the head moves `log_support`, too.
    of_centering = centering + jnp.where(is_whole, missing * p, 0.0)
    of_tail = jnp.where(is_whole, (1.0 - missing) * p, jnp.where(left > TAIL_MIN, rho * p, 0.0))
    of_head = advantages * of_centering + kl_coeff * (of_tail - q)
    return terms[..., 0], jnp.concatenate([-advantages, of_head], -1)


def _clipped_surrogate(log_ratio: Array, x: LossInputs) -> Terms:
    ratio = _ratio(log_ratio, x.advantages)
    plain = ratio * x.advantages
    clipped = jnp.clip(ratio, x.clip_low_threshold, x.clip_high_threshold) * x.advantages
    # Where both are equal the ratio lies within the bounds, and clip passes its gradient there. NaN propagates.
    return -jnp.minimum(plain, clipped), jnp.where(clipped < plain, 0.0, -plain)


def loss_terms(lp: Array, x: LossInputs) -> Terms:
    """lp [..., K] -> (term [...] of each position, its derivative by lp [..., K]). RL losses read target 0 alone, and
    stable_reinforce all of them."""
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
    term, slope = stable_reinforce(lp, x)
    mine = x.loss_fn == STABLE_REINFORCE
    terms = jnp.where(mine, term, terms)
    slopes = jnp.where(mine[..., None], slope, slopes)
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

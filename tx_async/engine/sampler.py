"""From logits to tokens: greedy, temperature, top-k, top-p, one row independent of the others.

The vocabulary is laid out as [segments, lanes] (token = segment * num_lanes + lane), so every reduction over it runs
along contiguous lanes. Nothing is sorted: top-k and top-p are thresholds found by bisection over the bits of the fp32
weights, exact to the last token, and a draw inverts the cumulative distribution in two steps, lane then segment, with
two uniforms per row.

The order is that of transformers: temperature, top-k, top-p; min_p stands before top-k, as in vLLM. Ties at the k-th
place all stay; of ties at the edge of top-p, as many as p needs stay, from the lowest token on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.wire.worker import GREEDY_BELOW

SEGMENTS = 128
TOPK_MAX = 128
"""The most candidates that are reported per position."""
KEY_BITS = 30
"""Weights are at most 1.0, whose bits are 0x3f800000."""


class Choices(NamedTuple):
    """How each row samples."""

    temperature: Array
    """[B] fp32"""
    top_k: Array
    """[B] int32; below 1 = no limit"""
    top_p: Array
    """[B] fp32"""
    key: Array
    """[B, 2] uint32: `stream_key` of the row."""
    min_p: Array | None = None
    """[B] fp32; None where nobody asks for it."""


PASS_BITS = 2
"""How many bits each of a fixed number of passes over the vocabulary decides: it counts three thresholds at once."""


class _Limit(NamedTuple):
    """The tokens that stay: those whose weight's bits are above `key`, and among equals those up to token `last`."""

    key: Array
    last: Array


def stream_key(seed: Array, sample_index: Array) -> Array:
    """The random stream of a sample, fold_in(seed, sample_index): uint32 [B, 2] (low word first), [B] -> [B, 2]."""

    def one(words: Array, index: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(words[::-1]), index))

    return jax.vmap(one)(seed, sample_index)


def sample(
    logits: Array, choices: Choices, position: Array, fixed_passes: bool = False, drawn_from: Array | None = None
) -> tuple[Array, Array, Array]:
    """Draw the tokens that will stand at `position` [B]. fixed_passes: without loops and with one branch, taken where
    anybody wants top-k or top-p, so that an accelerator need not ask the host; the same tokens stay. drawn_from: logits
    to draw from in place of the model's own (`shaping.py`).

    logits fp32 [B, V] -> (tokens int32 [B], their log-probabilities in the plain model [B], the logits' logsumexp [B]).
    """
    z = _lanes(logits)
    top = z.max((1, 2))
    lse = _logsumexp(z, top)
    if drawn_from is not None:
        z = _lanes(drawn_from)
        top = z.max((1, 2))
    greedy = _first_index(z == top[:, None, None])
    draws = choices.temperature >= GREEDY_BELOW
    if fixed_passes:
        tokens = jnp.where(draws, _draw(z, top, greedy, choices, position, _limit_in_fixed_passes), greedy)
    else:
        tokens = jax.lax.cond(
            jnp.any(draws),
            lambda: jnp.where(draws, _draw(z, top, greedy, choices, position, _limit), greedy),
            lambda: greedy,
        )
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - lse, lse


def head_of(logits: Array, candidates: Array, choices: Choices, fixed_passes: bool = False) -> tuple[Array, Array]:
    """The distribution that `sample` draws from, for a few tokens.

    logits fp32 [B, V], candidates int32 [B, K] -> (their probabilities fp32 [B, K], uint8 [B]: 0 where the whole
    vocabulary can be drawn, 1 where only candidates can, 2 where a limit also leaves others).
    """
    z = _lanes(logits)
    top = z.max((1, 2))
    greedy = choices.temperature < GREEDY_BELOW
    weights = _weights(z, top, jnp.maximum(choices.temperature, GREEDY_BELOW))
    limit = _limit_in_fixed_passes if fixed_passes else _limit
    weights = jnp.where(_kept(weights, limit(weights, choices)), weights, 0.0)
    first = _first_index(z == top[:, None, None])
    mine = jnp.take_along_axis(weights.reshape(weights.shape[0], -1), candidates, axis=1) / _total(weights)[:, None]
    mine = jnp.where(greedy[:, None], candidates == first[:, None], mine)
    num_kept = jnp.where(greedy, 1, (weights > 0).sum(1).sum(1))
    vocab = logits.shape[1]
    is_limited = greedy | ((choices.top_k >= 1) & (choices.top_k < vocab)) | (choices.top_p < 1.0)
    is_whole = num_kept == (mine > 0).sum(1)
    return mine, jnp.where(is_limited, jnp.where(is_whole, 1, 2), 0).astype(jnp.uint8)


def logsumexp(logits: Array) -> Array:
    """[B, V] -> [B], summed in the order of `sample`."""
    z = _lanes(logits)
    return _logsumexp(z, z.max((1, 2)))


def draw_many(logits: Array, temperature: Array, keys: Array, k: int) -> Array:
    """k independent draws with replacement per row at its temperature: [B, V], [B], uint32 [B, 2] -> int32 [B, k]."""
    z = _lanes(logits)
    top = z.max((1, 2))
    weights = _weights(z, top, jnp.maximum(temperature, GREEDY_BELOW))
    by_lane = weights.sum(1)
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.wrap_key_data(key), (2, k)))(keys)
    greedy = _first_index(z == top[:, None, None])

    def draw_one(uniforms: Array) -> Array:
        lane = _invert(by_lane, uniforms[:, 0])
        column = jnp.take_along_axis(weights, lane[:, None, None], axis=2)[:, :, 0]
        return _token(z, column, lane, uniforms[:, 1], greedy)

    tokens = jax.lax.map(draw_one, jnp.moveaxis(u, 2, 0)).T
    return jnp.where((temperature >= GREEDY_BELOW)[:, None], tokens, greedy[:, None])


def _draw(z: Array, top: Array, greedy: Array, choices: Choices, position: Array, limit: Any) -> Array:
    weights = _weights(z, top, jnp.maximum(choices.temperature, GREEDY_BELOW))
    if choices.min_p is not None:
        weights = jnp.where(weights >= choices.min_p[:, None, None], weights, 0.0)  # the likeliest token's is 1
    weights = jnp.where(_kept(weights, limit(weights, choices)), weights, 0.0)
    u = jax.vmap(_uniforms)(choices.key, position)
    lane = _invert(weights.sum(1), u[:, 0])
    column = jnp.take_along_axis(weights, lane[:, None, None], axis=2)[:, :, 0]
    return _token(z, column, lane, u[:, 1], greedy)


def _uniforms(key: Array, position: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position), (2,))


def _token(z: Array, column: Array, lane: Array, u: Array, greedy: Array) -> Array:
    """The token of a lane whose weights by segment are `column`; the likeliest token where rounding left no weight."""
    segment = _invert(column, u)
    weight = jnp.take_along_axis(column, segment[:, None], axis=1)[:, 0]
    return jnp.where(weight > 0, segment * z.shape[2] + lane, greedy)


def _invert(weights: Array, u: Array) -> Array:
    """First index whose cumulative weight exceeds u · total: [B, n], [B] -> int32 [B]."""
    cumulative = jnp.cumsum(weights, axis=1)
    passed = cumulative <= u[:, None] * cumulative[:, -1:]
    return jnp.minimum(passed.sum(1), weights.shape[1] - 1).astype(jnp.int32)


# ---- top-k and top-p: weights are not negative, so their bits order as they do


def _limit(weights: Array, choices: Choices) -> _Limit:
    vocab = weights.shape[1] * weights.shape[2]
    k_active, p_active = _active(choices, vocab)
    everything = jnp.zeros(weights.shape[0], jnp.int32)
    kth = jax.lax.cond(jnp.any(k_active), lambda: _kth_key(weights, choices.top_k, k_active), lambda: everything)
    open_end = _Limit(kth, jnp.full_like(kth, vocab))
    return jax.lax.cond(
        jnp.any(p_active), lambda: _nucleus(weights, choices.top_p, p_active, open_end), lambda: open_end
    )


def _active(choices: Choices, vocab: int) -> tuple[Array, Array]:
    """Which rows' top-k, and which rows' top-p, limits anything."""
    draws = choices.temperature >= GREEDY_BELOW
    return (choices.top_k >= 1) & (choices.top_k < vocab) & draws, (choices.top_p < 1.0) & draws


def _limit_in_fixed_passes(weights: Array, choices: Choices) -> _Limit:
    vocab = weights.shape[1] * weights.shape[2]
    k_active, p_active = _active(choices, vocab)
    everything = jnp.zeros(weights.shape[0], jnp.int32)
    nothing_limits = _Limit(everything, jnp.full_like(everything, vocab))

    def both() -> _Limit:
        keys = _bits(weights)
        kth = _largest_key(lambda key: _total(jnp.where(keys >= key, 1.0, 0.0)) >= choices.top_k)
        inside = _Limit(jnp.where(k_active, kth, 0), nothing_limits.last)
        return _nucleus(weights, choices.top_p, p_active, inside, fixed_passes=True)

    return jax.lax.cond(jnp.any(k_active | p_active), both, lambda: nothing_limits)


def _largest_key(enough: Callable[[Array], Array], bits: int = KEY_BITS) -> Array:
    """The largest key of `bits` bits for which `enough` (key [B, 1, 1] -> [B]) holds, two bits a pass. It holds for 0,
    and never for a key above one for which it does not hold."""
    key: Array | int = 0
    for shift in range(-(-bits // PASS_BITS) * PASS_BITS - PASS_BITS, -1, -PASS_BITS):
        steps = [enough(jnp.asarray(key + (step << shift))) for step in range(1, 1 << PASS_BITS)]
        key = key + (sum((step.astype(jnp.int32) for step in steps), jnp.int32(0))[:, None, None] << shift)
    return jnp.asarray(key)[:, 0, 0]


def _kth_key(weights: Array, k: Array, active: Array) -> Array:
    """The bits of the k-th largest weight, or other bits that split the weights at the same place."""
    keys = _bits(weights)

    def enough(key: Array) -> tuple[Array, Array]:
        # Counted in fp32: exact to 2**24 tokens, and twice as fast as in int32.
        count = _total(jnp.where(keys >= key[:, None, None], 1.0, 0.0))
        return count >= k, count == k

    return _bisect(enough, jnp.zeros_like(k), active)


def _nucleus(weights: Array, p: Array, active: Array, inside: _Limit, fixed_passes: bool = False) -> _Limit:
    """The smallest set of largest weights whose share of the total `inside` is at least p."""
    keys = _bits(weights)
    weights = jnp.where(keys >= inside.key[:, None, None], weights, 0.0)
    total = _total(weights)
    needed = p * total

    def enough(key: Array) -> tuple[Array, Array]:
        return _total(jnp.where(keys >= key[:, None, None], weights, 0.0)) >= needed, jnp.zeros_like(active)

    # All weights below this one together are less than the share that may be missing.
    negligible = 0.5 * (1.0 - p) * total / (keys.shape[1] * keys.shape[2])
    if fixed_passes:
        found = _largest_key(lambda key: _total(jnp.where(keys >= key, weights, 0.0)) >= needed)
        found = jnp.minimum(found, _bits(jnp.ones(found.shape)))  # p = 0 keeps the likeliest
    else:
        found = _bisect(enough, _bits(negligible), active)
    key = jnp.where(active, jnp.maximum(found, inside.key), inside.key)
    ties = keys == key[:, None, None]
    above = _total(jnp.where(keys > key[:, None, None], weights, 0.0))
    each = jnp.where(ties, weights, 0.0).max((1, 2))
    num_ties = ties.sum(1).sum(1)
    num_kept = jnp.clip(jnp.ceil((needed - above) / jnp.maximum(each, 1e-38)), 1, num_ties).astype(jnp.int32)
    nth = _nth_index_in_fixed_passes if fixed_passes else _nth_index
    return _Limit(key, jnp.where(active, nth(ties, num_kept, num_ties), inside.last))


def _bisect(enough, low: Array, active: Array) -> Array:
    """The largest key for which `enough` (key -> holds, exactly) holds. It holds for `low`, and for nothing above
    1.0."""

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low + high) // 2
        holds, exactly = enough(middle)
        low = jnp.where(holds, middle, low)
        high = jnp.where(holds & ~exactly, high, middle)
        return low, jnp.where(exactly, low, high)

    high = jnp.where(active, _bits(jnp.ones(low.shape)) + 1, low)
    return jax.lax.while_loop(lambda state: jnp.any(state[1] - state[0] > 1), body, (low, high))[0]


def _nth_index(mask: Array, n: Array, count: Array) -> Array:
    """The index of the n-th set token (1-based) of each row; the end of the vocabulary where n reaches the count."""
    vocab = mask.shape[1] * mask.shape[2]
    index = _token_index(mask.shape[1], mask.shape[2])

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low + high) // 2
        holds = (mask & (index <= middle[:, None, None])).sum(1).sum(1) >= n
        return jnp.where(holds, low, middle + 1), jnp.where(holds, middle, high)

    low = jnp.where(n < count, 0, vocab)
    high = jnp.full_like(low, vocab)
    return jax.lax.while_loop(lambda state: jnp.any(state[0] < state[1]), body, (low, high))[0]


def _nth_index_in_fixed_passes(mask: Array, n: Array, count: Array) -> Array:
    vocab = mask.shape[1] * mask.shape[2]
    index = _token_index(mask.shape[1], mask.shape[2])
    found = _largest_key(lambda end: (mask & (index < end)).sum(1).sum(1) < n, vocab.bit_length())
    return jnp.where(n < count, found, vocab)


# ---- over the vocabulary


def _lanes(logits: Array) -> Array:
    """[B, V] -> [B, segments, lanes]; tokens that do not exist are -inf."""
    batch, vocab = logits.shape
    lanes = -(-vocab // SEGMENTS)
    if lanes * SEGMENTS != vocab:
        logits = jnp.pad(logits, ((0, 0), (0, lanes * SEGMENTS - vocab)), constant_values=-jnp.inf)
    return logits.reshape(batch, SEGMENTS, lanes)


def _total(x: Array) -> Array:
    return x.sum(1).sum(1)


def _weights(z: Array, top: Array, temperature: Array) -> Array:
    return jnp.exp((z - top[:, None, None]) / temperature[:, None, None])


def _logsumexp(z: Array, top: Array) -> Array:
    return top + jnp.log(_total(jnp.exp(z - top[:, None, None])))


def _kept(weights: Array, limit: _Limit) -> Array:
    keys, key = _bits(weights), limit.key[:, None, None]
    index = _token_index(weights.shape[1], weights.shape[2])
    return (keys > key) | ((keys == key) & (index <= limit.last[:, None, None]))


def _first_index(mask: Array) -> Array:
    """The lowest token of each row's mask; 0 for an empty one (a row of NaN)."""
    index = _token_index(mask.shape[1], mask.shape[2])
    beyond = mask.shape[1] * mask.shape[2]
    first = jnp.where(mask, index, beyond).min(1).min(1)
    return jnp.where(first == beyond, 0, first).astype(jnp.int32)


def _token_index(segments: int, lanes: int) -> Array:
    return jnp.arange(segments * lanes, dtype=jnp.int32).reshape(segments, lanes)


def _bits(weights: Array) -> Array:
    return jax.lax.bitcast_convert_type(weights, jnp.int32)

"""From logits to tokens: greedy, temperature, top-k, top-p, one row independent of the others.

The vocabulary is laid out as [segments, lanes] (`vocabulary.py`). Nothing is sorted: top-k and top-p are thresholds
found by bisection over the bits of the fp32 weights, exact to the last token, and a draw inverts the cumulative
distribution in two steps, lane then segment, with two uniforms per row.

On a mesh whose tensor axis cuts the vocabulary each device works on its own part. Of a row cross from device to device:
its largest logit, the sum of its weights, those by lane, and the weights of one lane; and where somebody's top-k or
top-p limits anything, as many sums for every pass as it counts thresholds: 17 small exchanges. Where somebody has
limits, moving some whole rows to each device instead would be an exchange or two, and faster by some 100 µs a step, but
would bring all logits to every device where rows are few. Tokens are those of one device, but where rounding decides: a
sum over devices is added in another order.

The order is that of transformers: temperature, top-k, top-p; min_p stands before top-k, as in vLLM. Ties at the k-th
place all stay; of ties at the edge of top-p, as many as p needs stay, from the lowest token on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tx_async.engine.vocabulary import VocabularyParts, bits_of, total_of
from tx_async.wire.worker import GREEDY_BELOW

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


PASS_BITS, PASS_BITS_OF_PARTS = 2, 4
"""How many bits each of a fixed number of passes over the vocabulary decides: with two it counts three thresholds at
once. On a mesh a pass is an exchange, which takes the devices longer than 15 thresholds do."""


class _Limit(NamedTuple):
    """The tokens that stay: those whose weight's bits are above `key`, and among equals those up to token `last`."""

    key: Array
    last: Array
    """Of a part of the vocabulary, -1 where none of its equals stay."""


def stream_key(seed: Array, sample_index: Array) -> Array:
    """The random stream of a sample, fold_in(seed, sample_index): uint32 [B, 2] (low word first), [B] -> [B, 2]."""

    def one(words: Array, index: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(words[::-1]), index))

    return jax.vmap(one)(seed, sample_index)


def sample(
    logits: Array,
    choices: Choices,
    position: Array,
    fixed_passes: bool = False,
    drawn_from: Array | None = None,
    vocabulary: VocabularyParts | None = None,
) -> tuple[Array, Array, Array]:
    """Draw the tokens that will stand at `position` [B]. fixed_passes: without loops and with one branch, taken where
    anybody wants top-k or top-p, so that an accelerator need not ask the host; the same tokens stay. drawn_from: logits
    to draw from in place of the model's own (`shaping.py`). vocabulary: where the logits are a device's part.

    logits fp32 [B, V] -> (tokens int32 [B], their log-probabilities in the plain model [B], the logits' logsumexp [B]).
    """
    v = vocabulary or VocabularyParts(logits.shape[1])
    z = v.lay_out(logits)
    top, greedy = v.likeliest(z)
    exponentials, highest = jnp.exp(z - top[:, None, None]), top
    if drawn_from is not None:
        z = v.lay_out(drawn_from)
        top, greedy = v.likeliest(z)
    draws = choices.temperature >= GREEDY_BELOW
    if fixed_passes or v.is_cut:
        tokens = jnp.where(draws, _draw(v, z, top, greedy, choices, position, _limit_in_fixed_passes), greedy)
    else:
        tokens = jax.lax.cond(
            jnp.any(draws),
            lambda: jnp.where(draws, _draw(v, z, top, greedy, choices, position, _limit), greedy),
            lambda: greedy,
        )
    found, total = v.at(logits, tokens[:, None], exponentials)
    lse = highest + jnp.log(total)
    return tokens, found[:, 0] - lse, lse


def head_of(
    logits: Array,
    candidates: Array,
    choices: Choices,
    fixed_passes: bool = False,
    vocabulary: VocabularyParts | None = None,
) -> tuple[Array, Array]:
    """The distribution that `sample` draws from, for a few tokens.

    logits fp32 [B, V], candidates int32 [B, K] -> (their probabilities fp32 [B, K], uint8 [B]: 0 where the whole
    vocabulary can be drawn, 1 where only candidates can, 2 where a limit also leaves others).
    """
    v = vocabulary or VocabularyParts(logits.shape[1])
    z = v.lay_out(logits)
    top, first = v.likeliest(z)
    greedy = choices.temperature < GREEDY_BELOW
    weights = _weights(z, top, jnp.maximum(choices.temperature, GREEDY_BELOW))
    limit = _limit_in_fixed_passes if fixed_passes or v.is_cut else _limit
    weights = jnp.where(_kept(v, weights, limit(v, weights, choices)), weights, 0.0)
    mine, total, num_kept = v.at(weights, candidates, weights, jnp.where(weights > 0, 1.0, 0.0))
    mine = mine / total[:, None]
    mine = jnp.where(greedy[:, None], candidates == first[:, None], mine)
    num_kept = jnp.where(greedy, 1.0, num_kept)
    is_limited = greedy | ((choices.top_k >= 1) & (choices.top_k < v.size)) | (choices.top_p < 1.0)
    is_whole = num_kept == (mine > 0).sum(1)
    return mine, jnp.where(is_limited, jnp.where(is_whole, 1, 2), 0).astype(jnp.uint8)


def logprobs_at(logits: Array, tokens: Array, vocabulary: VocabularyParts | None = None) -> tuple[Array, Array]:
    """[B, V], int32 [B, K] -> (log-probabilities [B, K], the logits' logsumexp [B]), summed as `sample` does."""
    v = vocabulary or VocabularyParts(logits.shape[1])
    z = v.lay_out(logits)
    top, _ = v.likeliest(z)
    found, total = v.at(logits, tokens, jnp.exp(z - top[:, None, None]))
    lse = top + jnp.log(total)
    return found - lse[:, None], lse


def draw_many(
    logits: Array, temperature: Array, keys: Array, k: int, vocabulary: VocabularyParts | None = None
) -> Array:
    """k independent draws with replacement per row at its temperature: [B, V], [B], uint32 [B, 2] -> int32 [B, k]."""
    v = vocabulary or VocabularyParts(logits.shape[1])
    z = v.lay_out(logits)
    top, greedy = v.likeliest(z)
    weights = _weights(z, top, jnp.maximum(temperature, GREEDY_BELOW))
    by_lane = v.by_lane(weights)
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.wrap_key_data(key), (2, k)))(keys)

    def draw_one(uniforms: Array) -> Array:
        lane = _invert(by_lane, uniforms[:, 0])
        return _token(v, v.column(weights, lane), lane, uniforms[:, 1], greedy)

    tokens = jax.lax.map(draw_one, jnp.moveaxis(u, 2, 0)).T
    return jnp.where((temperature >= GREEDY_BELOW)[:, None], tokens, greedy[:, None])


def _draw(
    v: VocabularyParts, z: Array, top: Array, greedy: Array, choices: Choices, position: Array, limit: Any
) -> Array:
    weights = _weights(z, top, jnp.maximum(choices.temperature, GREEDY_BELOW))
    if choices.min_p is not None:
        weights = jnp.where(weights >= choices.min_p[:, None, None], weights, 0.0)  # the likeliest token's is 1
    weights = jnp.where(_kept(v, weights, limit(v, weights, choices)), weights, 0.0)
    u = jax.vmap(_uniforms)(choices.key, position)
    lane = _invert(v.by_lane(weights), u[:, 0])
    return _token(v, v.column(weights, lane), lane, u[:, 1], greedy)


def _uniforms(key: Array, position: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position), (2,))


def _token(v: VocabularyParts, column: Array, lane: Array, u: Array, greedy: Array) -> Array:
    """The token of a lane whose weights by segment are `column`; the likeliest token where rounding left no weight."""
    segment = _invert(column, u)
    weight = jnp.take_along_axis(column, segment[:, None], axis=1)[:, 0]
    return jnp.where(weight > 0, segment * v.num_lanes + lane, greedy)


def _invert(weights: Array, u: Array) -> Array:
    """First index whose cumulative weight exceeds u · total: [B, n], [B] -> int32 [B]."""
    cumulative = jnp.cumsum(weights, axis=1)
    passed = cumulative <= u[:, None] * cumulative[:, -1:]
    return jnp.minimum(passed.sum(1), weights.shape[1] - 1).astype(jnp.int32)


# ---- top-k and top-p: weights are not negative, so their bits order as they do


def _limit(v: VocabularyParts, weights: Array, choices: Choices) -> _Limit:
    k_active, p_active = _active(choices, v.end)
    everything = jnp.zeros(weights.shape[0], jnp.int32)
    kth = jax.lax.cond(jnp.any(k_active), lambda: _kth_key(weights, choices.top_k, k_active), lambda: everything)
    open_end = _Limit(kth, jnp.full_like(kth, v.end))
    return jax.lax.cond(
        jnp.any(p_active), lambda: _nucleus(v, weights, choices.top_p, p_active, open_end), lambda: open_end
    )


def _active(choices: Choices, vocab: int) -> tuple[Array, Array]:
    """Which rows' top-k, and which rows' top-p, limits anything."""
    draws = choices.temperature >= GREEDY_BELOW
    return (choices.top_k >= 1) & (choices.top_k < vocab) & draws, (choices.top_p < 1.0) & draws


def _kth_key(weights: Array, k: Array, active: Array) -> Array:
    """The bits of the k-th largest weight, or other bits that split the weights at the same place."""
    keys = bits_of(weights)

    def enough(key: Array) -> tuple[Array, Array]:
        # Counted in fp32: exact to 2**24 tokens, and twice as fast as in int32.
        count = total_of(jnp.where(keys >= key[:, None, None], 1.0, 0.0))
        return count >= k, count == k

    return _bisect(enough, jnp.zeros_like(k), active)


def _nucleus(v: VocabularyParts, weights: Array, p: Array, active: Array, inside: _Limit) -> _Limit:
    """The smallest set of largest weights whose share of the total `inside` is at least p."""
    keys = bits_of(weights)
    weights = jnp.where(keys >= inside.key[:, None, None], weights, 0.0)
    total = total_of(weights)
    needed = p * total

    def enough(key: Array) -> tuple[Array, Array]:
        return total_of(jnp.where(keys >= key[:, None, None], weights, 0.0)) >= needed, jnp.zeros_like(active)

    # All weights below this one together are less than the share that may be missing.
    negligible = 0.5 * (1.0 - p) * total / (keys.shape[1] * keys.shape[2])
    key = jnp.where(active, jnp.maximum(_bisect(enough, bits_of(negligible), active), inside.key), inside.key)
    ties = keys == key[:, None, None]
    above = total_of(jnp.where(keys > key[:, None, None], weights, 0.0))
    each = jnp.where(ties, weights, 0.0).max((1, 2))
    num_ties = total_of(ties)
    num_kept = _num_kept(needed - above, each, num_ties)
    return _Limit(key, jnp.where(active, _nth_index(v, ties, num_kept, num_ties), inside.last))


def _num_kept(missing: Array, each: Array, num_ties: Array) -> Array:
    """How many of so many equals it takes for what is missing: at least one of them."""
    return jnp.clip(jnp.ceil(missing / jnp.maximum(each, 1e-38)), 1, num_ties).astype(jnp.int32)


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

    high = jnp.where(active, bits_of(jnp.ones(low.shape)) + 1, low)
    return jax.lax.while_loop(lambda state: jnp.any(state[1] - state[0] > 1), body, (low, high))[0]


def _nth_index(v: VocabularyParts, mask: Array, n: Array, count: Array) -> Array:
    """The index of the n-th set token (1-based) of each row; the end of the vocabulary where n reaches the count."""
    index = v.index

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low + high) // 2
        holds = (mask & (index <= middle[:, None, None])).sum(1).sum(1) >= n
        return jnp.where(holds, low, middle + 1), jnp.where(holds, middle, high)

    low = jnp.where(n < count, 0, v.end)
    high = jnp.full_like(low, v.end)
    return jax.lax.while_loop(lambda state: jnp.any(state[0] < state[1]), body, (low, high))[0]


# ---- the same in a fixed number of passes, by every device over its own part


def _limit_in_fixed_passes(v: VocabularyParts, weights: Array, choices: Choices) -> _Limit:
    k_active, p_active = _active(choices, v.end)
    everything = jnp.zeros(weights.shape[0], jnp.int32)
    nothing_limits = _Limit(everything, jnp.full_like(everything, v.end))

    def both() -> _Limit:
        keys, pass_bits = bits_of(weights), PASS_BITS_OF_PARTS if v.is_cut else PASS_BITS

        def at_least(x: Array | float) -> Callable[[Array], Array]:
            return lambda key: jnp.where(keys >= key, x, 0.0)

        # Counted in fp32: see `_kth_key`.
        kth, _ = _largest_key(v, at_least(1.0), lambda count, _: count >= choices.top_k, pass_bits)
        kth = jnp.where(k_active, kth, 0)
        inside = jnp.where(keys >= kth[:, None, None], weights, 0.0)
        found, total = _largest_key(v, at_least(inside), lambda share, total: share >= choices.top_p * total, pass_bits)
        needed = choices.top_p * total
        found = jnp.minimum(found, bits_of(jnp.ones(found.shape)))  # p = 0 keeps the likeliest
        key = jnp.where(p_active, jnp.maximum(found, kth), kth)
        ties = keys == key[:, None, None]
        above, num_ties, before = v.totals_and_before(jnp.where(keys > key[:, None, None], inside, 0.0), ties)
        num_kept = _num_kept(needed - above, jax.lax.bitcast_convert_type(key, jnp.float32), num_ties)
        nth = _nth_index_in_fixed_passes(v, ties, num_kept - before, num_ties, pass_bits)
        return _Limit(key, jnp.where(p_active, nth, v.end))

    return jax.lax.cond(jnp.any(k_active | p_active), both, lambda: nothing_limits)


def _largest_key(
    v: VocabularyParts, cells: Callable[[Array], Array], enough: Callable[[Array, Array], Array], pass_bits: int
) -> tuple[Array, Array]:
    """-> (the largest key whose total of cells(key) is `enough`, compared with that of key 0, which is; that of 0).
    Totals fall as keys rise."""
    key, whole = jnp.zeros((1, 1, 1), jnp.int32), None
    for digits, shift in _passes(KEY_BITS, pass_bits):
        totals = v.totals(cells, key + (digits << shift))
        whole = totals[0][0] if whole is None else whole
        key = key + (_largest_digit(digits, [enough(total, whole) for total in totals]) << shift)
    assert whole is not None
    return key[:, 0, 0], whole


def _nth_index_in_fixed_passes(v: VocabularyParts, mask: Array, n: Array, count: Array, pass_bits: int) -> Array:
    """The index of the n-th set token of this part; where it stands beyond, that of the part's last token or more, and
    where it stands before, -1. count: of all parts."""
    index, found = v.index, jnp.zeros((1, 1, 1), jnp.int32)
    for digits, shift in _passes(v.end.bit_length(), pass_bits):
        counts = v.own_totals(lambda end: mask & (index < end), found + (digits << shift))
        found = found + (_largest_digit(digits, [count < n for count in counts]) << shift)
    return jnp.where(n < 1, -1, jnp.where(n < count, found[:, 0, 0], v.end))


def _passes(num_bits: int, pass_bits: int) -> Iterator[tuple[np.ndarray, int]]:
    """(the digits that a pass tries [n, 1, 1, 1], the place of their lowest bit), from the highest; the first pass has
    the bits that the others leave, and tries 0 as well."""
    for shift in reversed(range(0, num_bits, pass_bits)):
        bits, is_first = min(pass_bits, num_bits - shift), shift + pass_bits >= num_bits
        yield np.arange(0 if is_first else 1, 1 << bits, dtype=np.int32)[:, None, None, None], shift


def _largest_digit(digits: np.ndarray, holds: Sequence[Array]) -> Array:
    """The largest for which something holds, [m, B] of some after others; it never does for one above one for which
    it does not. 0 where it holds for none."""
    count = sum((some.astype(jnp.int32).sum(0) for some in holds), jnp.int32(0))
    return jnp.maximum(count - (digits.flat[0] == 0), 0)[:, None, None]


# ---- over the vocabulary


def _weights(z: Array, top: Array, temperature: Array) -> Array:
    return jnp.exp((z - top[:, None, None]) / temperature[:, None, None])


def _kept(v: VocabularyParts, weights: Array, limit: _Limit) -> Array:
    keys, key = bits_of(weights), limit.key[:, None, None]
    return (keys > key) | ((keys == key) & (v.index <= limit.last[:, None, None]))

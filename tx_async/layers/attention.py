"""Attention for packed rows: exact softmax attention with fp32 statistics, never across segments, with windows and
sinks where a layer has them.

Models call an `Attend`; they do not know whether keys come from the same row (training, `PackedAttention`) or from a
paged cache (sampling, `engine/paged_attention.py`).

`PackedAttention` goes block by block, as FlashAttention does (arXiv 2205.14135, 2307.08691): the scores of a whole row
never exist, and the backward pass computes them again from the saved log-sum-exp. A block of queries meets only key
blocks between the start of its first segment and itself. How many that are is data: a row of short sequences costs what
the sequences cost, and one program serves all.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from tx_async.layers.delta_rule import CHUNKS, Chunks
from tx_async.layers.norm import row_sums
from tx_async.layers.residuals import keep

Cache = Any
"""A pytree that the layer scan carries: () in training, the page pools in sampling."""

MASKED = -1e30
"""The score of a key that may not be seen: negligible beside any other, and finite, so that differences are not NaN."""


BLOCK = 64
"""The default number of positions of a block."""


class Attend(Protocol):
    """How a layer's tokens attend to others; `layer` is the layer's place in the cache, among those of its window."""

    def __call__(
        self,
        cache: Cache,
        layer: Array,
        q: Array,
        k: Array,
        v: Array | None,
        scale: float,
        v_features: int = 0,
        window: int = 0,
        sinks: Array | None = None,
    ) -> tuple[Array, Cache]:
        """q [R, L, H, Dk], k [R, L, Hkv, Dk], v [R, L, Hkv, Dv] -> ([R, L, H, Dv], cache).

        With v None the values are the first `v_features` of each key (MLA's
        latent cache with absorbed projections). window: how many tokens a token sees, itself included; 0 = all before
        it. sinks: fp32 [H], for each head a logit that takes part in the softmax and has no value.
        """
        ...

    def recur(self, cache: Cache, layer: Array, rule: Any, x: Any) -> tuple[Array, Cache]:
        """A recurrence instead of attention: rule is a `delta_net.Rule`, x its input for each token."""
        ...


class PackedAttention:
    """Causal attention inside each segment of a row; needs no cache."""

    def __init__(
        self,
        positions: Array,
        segment_ids: Array,
        block: int = 0,
        flash: bool = False,
        mesh: Mesh | None = None,
        chunks: Chunks = CHUNKS,
    ):
        """positions (0, 1, … in each segment), segment_ids: int32 [R, L]; segment 0 is padding. block: positions of a
        block, the platform's choice; 0 = BLOCK. flash: whether `flash_attention.py` computes it where it can; on a
        mesh, each device for its own heads. chunks: of recurrent layers."""
        self.positions, self.segment_ids, self.block = positions, segment_ids, block or BLOCK
        self.flash, self.mesh, self.chunks = flash, mesh, chunks

    def __call__(
        self,
        cache: Cache,
        layer: Array,
        q: Array,
        k: Array,
        v: Array | None,
        scale: float,
        v_features: int = 0,
        window: int = 0,
        sinks: Array | None = None,
    ) -> tuple[Array, Cache]:
        v = k[..., :v_features] if v is None else v
        if self.flash:
            # Here, because a CPU that never needs Pallas should not wait for its import.
            from tx_async.layers import flash_attention

            if flash_attention.fits(q, v, self.mesh):
                packing = self.positions, self.segment_ids
                out: Any = flash_attention.flash_attention(q, k, v, sinks, *packing, scale, window, False, self.mesh)
                return out, cache
        return packed_attention(q, k, v, sinks, self.positions, self.segment_ids, scale, window, self.block), cache

    def recur(self, cache: Cache, layer: Array, rule: Any, x: Any) -> tuple[Array, Cache]:
        return rule.packed(x, self.positions, self.segment_ids, self.chunks), cache


class _RowBlocks(NamedTuple):
    """A row in n blocks of B positions; the G query heads of a key head stand side by side."""

    q: Array
    """[n, R, Hkv, G * B, Dk]"""
    k: Array
    """[n, R, Hkv, B, Dk]"""
    v: Array
    positions: Array
    """[n, R, B]"""
    segments: Array
    q_positions: Array
    """[n, R, G * B]: the same in the order of the queries."""
    q_segments: Array
    first: Array
    """[n]: the first key block that each query block needs."""


class _Residuals(NamedTuple):
    """What the backward pass needs of the forward pass."""

    blocks: _RowBlocks
    out: Array
    """[n, R, Hkv, G * B, Dv]"""
    lse: Array
    """fp32 [n, R, Hkv, G * B]: log of the sum of the exponentiated scores."""


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def packed_attention(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    positions: Array,
    segment_ids: Array,
    scale: float,
    window: int,
    block: int,
) -> Array:
    """q [R, L, H, Dk], k [R, L, Hkv, Dk], v [R, L, Hkv, Dv], sinks fp32 [H], frozen -> [R, L, H, Dv]"""
    return _forward(q, k, v, sinks, positions, segment_ids, scale, window, block)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    positions: Array,
    segment_ids: Array,
    scale: float,
    window: int,
    block: int,
) -> tuple[Array, _Residuals]:
    x = _blocks(q, k, v, positions, segment_ids, window, block)
    sink = None if sinks is None else _sink_of_queries(sinks, k.shape[2], x.k.shape[3])
    body = partial(_attend_from, x, sink, scale, window)
    _, (out, lse) = jax.lax.scan(lambda _, i: (None, body(i)), None, jnp.arange(x.q.shape[0]))
    out, lse = keep((out, lse))
    return _rows(out, q.shape[1], q.shape[2]), _Residuals(x, out, lse)


def _sink_of_queries(sinks: Array, num_kv_heads: int, size: int) -> Array:
    """[H] -> [Hkv, G * B], as the queries of a block stand."""
    return jnp.repeat(sinks.astype(jnp.float32).reshape(num_kv_heads, -1), size, axis=1)


def _attend_from(x: _RowBlocks, sink: Array | None, scale: float, window: int, i: Array) -> tuple[Array, Array]:
    """Attention of one block of queries to its keys, the diagonal block first: there every query sees at least
    itself."""

    def add(step: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = so_far
        j = i - step
        scores = _scores(x, i, j, scale, window)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top[..., None])
        further = _dot("rhqk,rhkd->rhqd", weights.astype(x.v.dtype), x.v[j])
        return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + further

    *lead, _ = x.q.shape[1:]
    nothing = (jnp.full(lead, MASKED), jnp.zeros(lead), jnp.zeros((*lead, x.v.shape[-1])))
    top, total, out = jax.lax.fori_loop(0, i - x.first[i] + 1, add, nothing)
    if sink is not None:
        top, total, out = with_sink(top, total, out, sink)
    return (out / total[..., None]).astype(x.v.dtype), top + jnp.log(total)


def with_sink(top: Array, total: Array, out: Array, sink: Array) -> tuple[Array, Array, Array]:
    """Add to an online softmax [...] one more logit, whose value is zero: `out` [..., D] only shrinks."""
    new_top = jnp.maximum(top, sink)
    shrink = jnp.exp(top - new_top)
    return new_top, total * shrink + jnp.exp(sink - new_top), out * shrink[..., None]


def _backward(scale: float, window: int, block: int, saved: _Residuals, dout: Array) -> tuple[Array | None, ...]:
    x = saved.blocks
    length, num_heads = dout.shape[1:3]
    dout = _queries(dout, x.k.shape[2], x.k.shape[3])
    delta = row_sums(dout.astype(jnp.float32) * saved.out.astype(jnp.float32))[..., 0]  # (n, R, Hkv, G * B)

    def pair(i: Array, j: Array) -> tuple[Array, Array, Array]:
        # Keys before queries: then dk and dv, which sum over queries, are plain products, and only dq reads its first
        # factor transposed, which takes a CPU half as long again. With queries first, dk and dv would.
        weights = jnp.exp(_scores_by_key(x, i, j, scale, window) - saved.lse[i][:, :, None])
        dweights = _dot("rhkd,rhqd->rhkq", x.v[j], dout[i])
        dscores = (weights * (dweights - delta[i][:, :, None]) * scale).astype(x.k.dtype)
        dq = _dot("rhkq,rhkd->rhqd", dscores, x.k[j])
        dk = _dot("rhkq,rhqd->rhkd", dscores, x.q[i])
        return dq, dk, _dot("rhkq,rhqd->rhkd", weights.astype(dout.dtype), dout[i])

    def one_query_block(dkv: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        def add(step: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            j = i - step
            dq, dk, dv = pair(i, j)
            return so_far[0] + dq, so_far[1].at[j].add(dk), so_far[2].at[j].add(dv)

        dq = jnp.zeros(x.q.shape[1:], jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(0, i - x.first[i] + 1, add, (dq, *dkv))
        return (dk, dv), dq

    zeros = (jnp.zeros(x.k.shape, jnp.float32), jnp.zeros(x.v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(one_query_block, zeros, jnp.arange(x.q.shape[0]))
    dq, dk, dv = (_rows(d, length, h) for d, h in ((dq, num_heads), (dk, dk.shape[2]), (dv, dv.shape[2])))
    return dq.astype(x.q.dtype), dk.astype(x.k.dtype), dv.astype(x.v.dtype), None, None, None


packed_attention.defvjp(_forward, _backward)


def _scores(x: _RowBlocks, i: Array, j: Array, scale: float, window: int) -> Array:
    """fp32 [R, Hkv, G * B, B]: queries of block i by keys of block j; scores of keys that may not be seen are very
    low."""
    seen = x.q_segments[i][:, :, None] == x.segments[j][:, None, :]
    seen &= x.q_positions[i][:, :, None] >= x.positions[j][:, None, :]
    if window:
        seen &= x.q_positions[i][:, :, None] - x.positions[j][:, None, :] < window
    return jnp.where(seen[:, None], _dot("rhqd,rhkd->rhqk", x.q[i], x.k[j]) * scale, MASKED)


def _scores_by_key(x: _RowBlocks, i: Array, j: Array, scale: float, window: int) -> Array:
    """The same [R, Hkv, B, G * B]."""
    seen = x.segments[j][:, :, None] == x.q_segments[i][:, None, :]
    seen &= x.positions[j][:, :, None] <= x.q_positions[i][:, None, :]
    if window:
        seen &= x.q_positions[i][:, None, :] - x.positions[j][:, :, None] < window
    return jnp.where(seen[:, None], _dot("rhkd,rhqd->rhkq", x.k[j], x.q[i]) * scale, MASKED)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _blocks(q: Array, k: Array, v: Array, positions: Array, segment_ids: Array, window: int, block: int) -> _RowBlocks:
    """Cut rows into blocks; the last block is filled up with padding."""
    size = min(block, q.shape[1])
    positions, segments = (_split(x, size).swapaxes(0, 1) for x in (positions, segment_ids))
    keys, values = (jnp.einsum("rnbhd->nrhbd", _split(x, size)) for x in (k, v))
    numbers = jnp.arange(len(positions))[:, None, None]
    # Padding sees only the padding of its own block, so its values do not depend on how many blocks other rows need.
    segments = jnp.where(segments > 0, segments, -1 - numbers)
    # Positions count from the start of their segment; min, because all rows go through the same blocks.
    reach = jnp.minimum(positions[:, :, 0], window - 1) if window else positions[:, :, 0]
    first = jnp.min(numbers[..., 0] - -(-reach // size), axis=1)
    group = (1, 1, q.shape[2] // k.shape[2])
    return _RowBlocks(
        q=_queries(q, k.shape[2], size),
        k=keys,
        v=values,
        positions=positions,
        segments=segments,
        q_positions=jnp.tile(positions, group),
        q_segments=jnp.tile(segments, group),
        first=jnp.maximum(first, 0),
    )


def _queries(x: Array, num_kv_heads: int, size: int) -> Array:
    """[R, L, H, D] -> [n, R, Hkv, G * B, D]"""
    x = _split(x, size)
    x = x.reshape(*x.shape[:3], num_kv_heads, -1, x.shape[-1])
    x = jnp.einsum("rnbhgd->nrhgbd", x)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _rows(x: Array, length: int, num_heads: int) -> Array:
    """[n, R, Hkv, G * B, D] -> [R, L, H, D]"""
    n, rows, kv_heads = x.shape[:3]
    x = x.reshape(n, rows, kv_heads, num_heads // kv_heads, -1, x.shape[-1])
    x = jnp.einsum("nrhgbd->rnbhgd", x)
    return x.reshape(rows, -1, num_heads, x.shape[-1])[:, :length]


def _split(x: Array, size: int) -> Array:
    """[R, L, ...] -> [R, n, B, ...], zeros at the end."""
    rows, length = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(rows, -1, size, *x.shape[2:])

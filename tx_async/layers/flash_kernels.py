"""The kernels of `flash_attention.py`: what a program computes for one block of a row, block after block of the others.

The features of a head come in parts whose sizes are powers of two, as the sides of Triton's blocks have to be: 192 are
128 and 64. A product over features is the sum of those of the parts; nothing is filled up with zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tx_async.layers.attention import MASKED

BLOCK = 64
LEAST_PART = 16
"""The least features that a product takes."""

Parts = tuple[Array, ...]
"""An array [·, features], cut by features."""


def forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    sink_ref: Any,
    positions_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    last_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
    window: int,
) -> None:
    i, q = pl.program_id(0), _read(q_ref)

    def add(step: Array, so_far: tuple[Parts, Array, Array]) -> tuple[Parts, Array, Array]:
        out, top, total = so_far
        j = i - step  # the diagonal block first: there every query sees at least itself
        k, v = _read(k_ref, j), _read(v_ref, j)
        seen = _seen(positions_ref, segments_ref, i, j, window)
        scores = jnp.where(seen, _over_features(q, k) * scale, MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        out = _add(tuple(x * shrink[:, None] for x in out), weights.astype(v_ref.dtype), v)
        return out, new_top, total * shrink + weights.sum(1)

    # A sink is a logit without a value: what a softmax has seen before any key.
    nothing = (_zeros(v_ref), jnp.full((BLOCK,), sink_ref[0]), jnp.ones((BLOCK,)))
    out, top, total = jax.lax.fori_loop(0, i - first_ref[0] + 1, add, nothing)
    _write(out_ref, tuple(x / total[:, None] for x in out))
    lse_ref[...] = top + jnp.log(total)


def dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    positions_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    last_ref: Any,
    dq_ref: Any,
    *,
    scale: float,
    window: int,
) -> None:
    i, q, dout = pl.program_id(0), _read(q_ref), _read(dout_ref)
    lse, delta = lse_ref[...], delta_ref[...]

    def add(step: Array, dq: Parts) -> Parts:
        j = i - step
        k, v = _read(k_ref, j), _read(v_ref, j)
        seen = _seen(positions_ref, segments_ref, i, j, window)
        _, dscores = _gradients_of_scores(seen, q, k, v, dout, lse, delta, scale)
        return _add(dq, dscores.astype(k_ref.dtype), k)

    _write(dq_ref, jax.lax.fori_loop(0, i - first_ref[0] + 1, add, _zeros(q_ref)))


def dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    positions_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    last_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    scale: float,
    window: int,
) -> None:
    j, k, v = pl.program_id(0), _read(k_ref), _read(v_ref)

    def add(i: Array, so_far: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
        dk, dv = so_far
        q, dout = _read(q_ref, i), _read(dout_ref, i)
        lse, delta = lse_ref[_block(i)], delta_ref[_block(i)]
        seen = _seen(positions_ref, segments_ref, i, j, window)
        weights, dscores = _gradients_of_scores(seen, q, k, v, dout, lse, delta, scale)
        return _add(dk, dscores.astype(q_ref.dtype).T, q), _add(dv, weights.astype(dout_ref.dtype).T, dout)

    dk, dv = jax.lax.fori_loop(j, last_ref[0] + 1, add, (_zeros(k_ref), _zeros(v_ref)))
    _write(dk_ref, dk)
    _write(dv_ref, dv)


def _seen(positions_ref: Any, segments_ref: Any, queries: Array, keys: Array, window: int) -> Array:
    """[queries, keys] of two blocks: whether a query sees a key."""
    mine, theirs = positions_ref[_block(queries)][:, None], positions_ref[_block(keys)][None, :]
    seen = segments_ref[_block(queries)][:, None] == segments_ref[_block(keys)][None, :]
    seen &= mine >= theirs
    return seen & (mine - theirs < window) if window else seen


def _gradients_of_scores(
    seen: Array, q: Parts, k: Parts, v: Parts, dout: Parts, lse: Array, delta: Array, scale: float
) -> tuple[Array, Array]:
    """Recompute the weights of a block of queries and one of keys; -> (weights, gradients of the scores), [queries,
    keys]."""
    scores = jnp.where(seen, _over_features(q, k) * scale, MASKED)
    weights = jnp.exp(scores - lse[:, None])
    return weights, weights * (_over_features(dout, v) - delta[:, None]) * scale


# ---- parts of features


def _cuts(features: int) -> list[Any]:
    """Slices, the widest first: the powers of two that features is the sum of."""
    sizes = [1 << bit for bit in reversed(range(features.bit_length())) if features >> bit & 1]
    return [pl.ds(sum(sizes[:place]), size) for place, size in enumerate(sizes)]


def _block(i: Array) -> Any:
    return pl.ds(i * BLOCK, BLOCK)


def _read(ref: Any, i: Array | None = None) -> Parts:
    """Block i of a whole row, or all of a block."""
    rows = slice(None) if i is None else _block(i)
    return tuple(ref[rows, cut] for cut in _cuts(ref.shape[-1]))


def _write(ref: Any, parts: Parts) -> None:
    for cut, part in zip(_cuts(ref.shape[-1]), parts, strict=True):
        ref[:, cut] = part.astype(ref.dtype)


def _zeros(ref: Any) -> Parts:
    return tuple(jnp.zeros((BLOCK, cut.size), jnp.float32) for cut in _cuts(ref.shape[-1]))


def _over_features(a: Parts, b: Parts) -> Array:
    """fp32 [rows of a, rows of b]."""
    first, *others = (plgpu.dot(x, y.T) for x, y in zip(a, b, strict=True))
    return sum(others, first)


def _add(so_far: Parts, weights: Array, further: Parts) -> Parts:
    return tuple(x + plgpu.dot(weights, y) for x, y in zip(so_far, further, strict=True))

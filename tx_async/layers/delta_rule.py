"""The gated delta rule (arXiv 2412.06464): a linear recurrence whose state is a matrix per head.

    S_t = exp(g_t) S_{t-1} + k_t u_tᵀ    u_t = β_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)    o_t = S_tᵀ q_t

`step` computes that for one token. In chunks of C tokens, the u of a chunk solve one triangular system
(`_ChunkTerms.of`), and only the state goes from chunk to chunk. A segment that begins inside of a chunk sees
nothing from before it: its terms with earlier tokens are exact zeros. Everything is fp32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.residuals import keep


class Inputs(NamedTuple):
    """The inputs of R rows of L tokens; q and k are normalised, q is scaled."""

    q: Array
    """[R, L, H, dk]"""
    k: Array
    v: Array
    """[R, L, H, dv]"""
    g: Array
    """[R, L, H]: log of the decay, ≤ 0."""
    beta: Array
    """[R, L, H]"""


class _ChunkTerms(NamedTuple):
    """What C tokens are to each other and to a state that comes in: [R, H, C, ·]."""

    values: Array
    """[R, H, C, dv]"""
    keys: Array
    """[R, H, C, dk]: reads the state that came in, for u."""
    inverse: Array
    """[R, H, C, C]: makes u of values less what the keys read."""
    q: Array
    """[R, H, C, dk]: reads the state that came in."""
    scores: Array
    """[R, H, C, C]: reads the u of the chunk."""
    k: Array
    """[R, H, C, dk]: writes the u into the state that goes out."""
    decay: Array
    """[R, H, 1, 1]: decay of the state that came in."""

    @classmethod
    def of(cls, x: Inputs, segments: Array, carried: Array) -> _ChunkTerms:
        """segments int32 [R, C]; carried int32 [R]: the segment that the state coming in belongs to."""
        q, k, v, g, beta = (jnp.moveaxis(y.astype(jnp.float32), 2, 1) for y in x)
        order = jnp.arange(g.shape[-1])
        seen = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order)  # (R, C, C)
        decays = jnp.where(seen[:, None], g[:, :, None, :], 0.0).sum(-1)  # since the segment began, in the chunk
        pairs = _exp_where(seen[:, None], decays[..., None] - decays[:, :, None])
        into = _exp_where((segments == carried[:, None])[:, None], decays)
        last = _exp_where(seen[:, -1:], decays[..., -1:] - decays)
        return cls(
            values=v * beta[..., None],
            keys=k * (beta * into)[..., None],
            inverse=_unit_lower_inverse(_dot("rhid,rhjd->rhij", k * beta[..., None], k) * pairs),
            q=q * into[..., None],
            scores=_dot("rhid,rhjd->rhij", q, k) * pairs,
            k=k * last[..., None],
            decay=into[..., -1:, None],
        )

    def __call__(self, state: Array) -> tuple[Array, Array]:
        """state [R, H, dk, dv] -> (the next state, o [R, C, H, dv])."""
        size = self.k.shape[2]
        read = _dot("rhck,rhkv->rhcv", jnp.concatenate([self.keys, self.q], axis=2), state)
        u = _dot("rhij,rhjv->rhiv", self.inverse, self.values - read[:, :, :size])
        out = read[:, :, size:] + _dot("rhij,rhjv->rhiv", self.scores, u)
        return state * self.decay + _dot("rhck,rhcv->rhkv", self.k, u), jnp.moveaxis(out, 1, 2)


class ChunkTransition(NamedTuple):
    """How the C tokens of a chunk change any state that comes in, known before that state is: [R, H, C, ·]. It takes a
    product more than `_ChunkTerms`."""

    u: Array
    """[R, H, C, dv]: the u for a state of zeros."""
    of_state: Array
    """[R, H, C, dk]: u falls by of_state S."""
    q: Array
    """[R, H, C, dk]: reads the state that came in."""
    scores: Array
    """[R, H, C, C]: reads the u of the chunk."""
    k: Array
    """[R, H, C, dk]: writes the u into the state that goes out."""
    decay: Array
    """[R, H, 1, 1]: decay of the state that came in."""

    @classmethod
    def of(cls, x: Inputs, segments: Array, carried: Array) -> ChunkTransition:
        """As `_ChunkTerms.of`."""
        chunk = _ChunkTerms.of(x, segments, carried)
        both = jnp.concatenate([chunk.values, chunk.keys], axis=-1)
        solved = jnp.matmul(chunk.inverse, both, precision="highest")
        split = chunk.values.shape[-1]
        return cls(solved[..., :split], solved[..., split:], chunk.q, chunk.scores, chunk.k, chunk.decay)

    def __call__(self, state: Array) -> tuple[Array, Array]:
        """state [R, H, dk, dv] -> (the next state, o [R, C, H, dv])."""
        u = self.u - _dot("rhck,rhkv->rhcv", self.of_state, state)
        out = _dot("rhck,rhkv->rhcv", self.q, state) + _dot("rhij,rhjv->rhiv", self.scores, u)
        return state * self.decay + _dot("rhck,rhcv->rhkv", self.k, u), jnp.moveaxis(out, 1, 2)


def _unit_lower_inverse(system: Array) -> Array:
    """[..., C, C] -> the inverse of 1 + the part below the diagonal; the rest of `system` is ignored.

    It goes by blocks, from single elements to the whole: [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]]. It uses
    only products: a library's triangular solve is a call out of the program, and on a CPU several at once have been
    seen to hang.
    """
    size = system.shape[-1]
    full = 1 << (size - 1).bit_length()
    padding = [(0, 0)] * (system.ndim - 2) + [(0, full - size)] * 2
    system = jnp.pad(system, padding)
    inverse = jnp.ones((*system.shape[:-1], 1, 1), system.dtype)  # [..., blocks, s, s]
    while (s := inverse.shape[-1]) < full:
        number = full // (2 * s)
        blocks = system.reshape(*system.shape[:-2], number, 2 * s, number, 2 * s)
        below = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)[..., s:, :s]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -jnp.matmul(jnp.matmul(second, below, precision="highest"), first, precision="highest")
        top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
    return inverse[..., 0, :size, :size]


class Chunks(NamedTuple):
    """How rows are computed in training."""

    size: int = 64
    keeps_states: bool = False
    """A layer keeps what it made and the state before each chunk. Otherwise its backward pass goes over all chunks once
    more to have them."""


CHUNKS = Chunks()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def packed(x: Inputs, segments: Array, chunks: Chunks = CHUNKS) -> Array:
    """Rows of several segments, each starting from a state of zeros -> o [R, L, H, dv]. Memory and time grow with L."""
    return _forward(x, segments, chunks)[0]


def _forward(x: Inputs, segments: Array, chunks: Chunks) -> tuple[Array, Any]:
    def one(carry: tuple[Array, Array], chunk: tuple[Inputs, Array]) -> tuple[tuple[Array, Array], Any]:
        state, carried = carry
        inputs, segments = chunk
        after, out = _ChunkTerms.of(inputs, segments, carried)(state)
        return (after, segments[:, -1]), (out, state, carried)

    rows, length, heads, features = x.k.shape
    start = jnp.zeros((rows, heads, features, x.v.shape[-1])), jnp.full(rows, -1, segments.dtype)
    _, (out, states, carried) = jax.lax.scan(one, start, _in_chunks(chunks, (x, segments)))
    if chunks.keeps_states:
        out, states = keep((out, states))
    return _row(out, length), (x, segments, states, carried)


def _backward(chunks: Chunks, saved: Any, dout: Array) -> tuple[Inputs, None]:
    """The terms of a chunk are computed again from the state before it."""
    x, segments, states, carried = saved

    def one(dstate: Array, chunk: Any) -> tuple[Array, Inputs]:
        (inputs, segments), carried, state, dout = chunk
        _, back = jax.vjp(lambda inputs, state: _ChunkTerms.of(inputs, segments, carried)(state), inputs, state)
        dinputs, before = back((dstate, dout))
        return before, dinputs

    inputs, dout = _in_chunks(chunks, ((x, segments), dout))
    _, dx = jax.lax.scan(one, jnp.zeros_like(states[0]), (inputs, carried, states, dout), reverse=True)
    return jax.tree.map(lambda y: _row(y, x.g.shape[1]), dx), None


packed.defvjp(_forward, _backward)


def _row(x: Array, length: int) -> Array:
    """[n, R, C, ...] -> [R, length, ...]"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _in_chunks(chunks: Chunks, rows: Any) -> Any:
    """[R, L, ...] -> [n, R, C, ...] with zeros at the end, which decay and write nothing."""

    def cut(x: Array) -> Array:
        size = min(chunks.size, x.shape[1])
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, rows)


class Write(NamedTuple):
    """What one token of each row makes of its state: exp(g) S + k uᵀ."""

    decay: Array
    """[R, H, 1]"""
    k: Array
    """[R, H, dk]"""
    u: Array
    """[R, H, dv]"""

    def __call__(self, state: Array) -> Array:
        return state * self.decay[..., None] + self.k[..., None] * self.u[..., None, :]


def step(x: Inputs, state: Array) -> tuple[Write, Array]:
    """One token a row: L = 1, state [R, H, dk, dv] -> (what it writes, o [R, 1, H, dv]).

    o is computed as exp(g) Sᵀ q + (k · q) u, from the state that came in: so one product reads the state for k and q.
    """
    q, k, v, g, beta = (y[:, 0].astype(jnp.float32) for y in x)
    decay = jnp.exp(g)[..., None]
    read = decay[..., None] * _dot("rhik,rhkv->rhiv", jnp.stack([k, q], axis=2), state)
    u = (v - read[:, :, 0]) * beta[..., None]
    out = read[:, :, 1] + (k * q).sum(-1, keepdims=True) * u
    return Write(decay, k, u), out[:, None]


def _exp_where(there: Array, x: Array) -> Array:
    """exp(x) for x ≤ 0 where `there` is set, exact zeros elsewhere, also in its gradient."""
    return jnp.where(there, jnp.exp(jnp.where(there, x, 0.0)), 0.0)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=jnp.float32)

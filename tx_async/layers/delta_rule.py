"""The gated delta rule (arXiv 2412.06464): a linear recurrence whose state is a matrix per head.

    S_t = exp(g_t) S_{t-1} + k_t u_tᵀ    u_t = β_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)    o_t = S_tᵀ q_t

`step` computes that for one token. In chunks of C tokens, the u of a chunk solve one triangular system
(`ChunkTransition.of`), and only the state goes from chunk to chunk. A segment that begins inside of a chunk sees
nothing from before it: its terms with earlier tokens are exact zeros. Everything is fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 64


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


class ChunkTransition(NamedTuple):
    """How the C tokens of a chunk change any state that comes in: [R, H, C, ·]."""

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
        """segments int32 [R, C]; carried int32 [R]: the segment that the state coming in belongs to."""
        q, k, v, g, beta = (jnp.moveaxis(y.astype(jnp.float32), 2, 1) for y in x)
        order = jnp.arange(g.shape[-1])
        seen = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order)  # (R, C, C)
        decays = jnp.where(seen[:, None], g[:, :, None, :], 0.0).sum(-1)  # since the segment began, in the chunk
        pairs = _exp_where(seen[:, None], decays[..., None] - decays[:, :, None])
        into = _exp_where((segments == carried[:, None])[:, None], decays)
        last = _exp_where(seen[:, -1:], decays[..., -1:] - decays)
        system = _dot("rhid,rhjd->rhij", k * beta[..., None], k) * pairs
        both = jnp.concatenate([v * beta[..., None], k * (beta * into)[..., None]], axis=-1)
        solved = jnp.matmul(_unit_lower_inverse(system), both, precision="highest")
        return cls(
            u=solved[..., : v.shape[-1]],
            of_state=solved[..., v.shape[-1] :],
            q=q * into[..., None],
            scores=_dot("rhid,rhjd->rhij", q, k) * pairs,
            k=k * last[..., None],
            decay=into[..., -1:, None],
        )

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


def packed(x: Inputs, segments: Array) -> Array:
    """Rows of several segments, each starting from a state of zeros -> o [R, L, H, dv]. Memory and time grow with L."""
    length, size = x.g.shape[1], min(CHUNK, x.g.shape[1])
    chunks = jax.tree.map(lambda y: _chunked(y, size), (x, segments))

    # A chunk's terms are computed again in the backward pass: only the state before each chunk is kept.
    @jax.checkpoint
    def one(carry: tuple[Array, Array], chunk: tuple[Inputs, Array]) -> tuple[tuple[Array, Array], Array]:
        state, segment = carry
        inputs, segments = chunk
        state, out = ChunkTransition.of(inputs, segments, segment)(state)
        return (state, segments[:, -1]), out

    rows, _, heads, features = x.k.shape
    start = jnp.zeros((rows, heads, features, x.v.shape[-1])), jnp.full(rows, -1, segments.dtype)
    _, out = jax.lax.scan(one, start, chunks)
    return jnp.moveaxis(out, 0, 1).reshape(rows, -1, *out.shape[3:])[:, :length]


def _chunked(x: Array, size: int) -> Array:
    """[R, L, ...] -> [n, R, C, ...] with zeros at the end, which decay and write nothing."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


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

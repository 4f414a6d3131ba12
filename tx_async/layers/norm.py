"""RMSNorm (arXiv 1910.07467) with fp32 statistics: x / √(mean(x²) + eps) · w."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class RmsNorm:
    """How a family normalises; the weights themselves are parameters."""

    eps: float
    adds_one: bool = False
    """The factor is 1 + w (Gemma, Qwen3-Next and later)."""

    def __call__(self, x: Array, weight: Array) -> Array:
        return rms_norm(x, 1 + weight.astype(jnp.float32) if self.adds_one else weight, self.eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x [..., D], weight [D]; the product is formed in fp32 and rounded once."""
    return _rms_norm(x, weight, eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return _forward(x, weight, eps)[0]


def _forward(x: Array, weight: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * weight.astype(jnp.float32)).astype(x.dtype), (x, weight, inverse)


def _backward(eps: float, saved: tuple[Array, Array, Array], dout: Array) -> tuple[Array, Array]:
    x, weight, inverse = saved
    normed, dout = x.astype(jnp.float32) * inverse, dout.astype(jnp.float32)
    dnormed = dout * weight.astype(jnp.float32)
    dx = (dnormed - normed * (row_sums(dnormed * normed) / x.shape[-1])) * inverse
    dweight = jnp.sum(dout * normed, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


_rms_norm.defvjp(_forward, _backward)


def row_sums(x: Array) -> Array:
    """[..., D] -> [..., 1], as a product with ones: on a CPU, XLA's fused product and reduction is several times slower
    than the two apart."""
    return x @ jnp.ones((x.shape[-1], 1), x.dtype)

"""Linear layers: frozen base weight, optional bias, LoRA beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.lora import LayerLora, Lora, LoraRows
from tx_async.layers.residuals import keep


class OutFirst(NamedTuple):
    """A matrix stored [out, in], for products with few rows on a CPU: read along its rows, as it lies, while those of
    x stay in the cache. Stored [in, out] it would be rearranged at every product, which costs more than the product.
    """

    matrix: Array


def product(x: Array, w: Array | OutFirst, dtype: Any = None) -> Array:
    """x [..., in] W -> [..., out] in `dtype`, x's own without."""
    if not isinstance(w, OutFirst):
        return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)
    # Without the barriers the compiler turns the product round again, into x Wᵀ.
    rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    out = jax.lax.dot_general(w.matrix, rows, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], -1)


def project(lora: Lora, adapters: LayerLora, w: dict[str, Any], names: tuple[str, ...], x: Array) -> list[Array]:
    """x [R, L, in] -> for each name x W + bias + (x A) B · scale, [R, L, out]."""
    adapted = tuple(name for name in names if name in adapters)
    row = lora if isinstance(lora, LoraRows) and lora.joined else None
    deltas = {} if row or not adapted else dict(zip(adapted, lora.deltas(adapters, adapted, x), strict=True))

    def one(name: str) -> Array:
        if row and name in adapted:
            a, b = adapters[name]
            y = joined(x[0], row.low(a, x)[0], w[name], b[0].astype(x.dtype))[None]
        else:
            y = product(x, w[name])
        return keep(_add(_add(y, w.get(f"{name}_bias")), deltas.get(name)))

    return [one(name) for name in names]


@jax.custom_vjp
def joined(x: Array, low: Array, w: Array, b: Array) -> Array:
    """x [L, in], low [L, rank], W [in, out], B [rank, out] -> x W + low B = [x | low] [W ; B]; W is frozen.

    On a CPU the thin products of an adapter cost many times their arithmetic, a few more rows of a wide one next to
    nothing: two of six products go, and W is copied out of its stack anyway.
    """
    return jnp.concatenate([x, low], axis=1) @ jnp.concatenate([w, b])


def _forward(x: Array, low: Array, w: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return joined(x, low, w, b), (low, w, b)


def _backward(saved: tuple[Array, Array, Array], dout: Array) -> tuple[Array, Array, None, Array]:
    low, w, b = saved
    both = dout @ jnp.concatenate([w, b]).T
    return both[:, : len(w)], both[:, len(w) :], None, low.T @ dout


joined.defvjp(_forward, _backward)


def _add(x: Array, y: Array | None) -> Array:
    return x if y is None else x + y

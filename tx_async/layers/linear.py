"""Linear layers: frozen base weight, optional bias, LoRA beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import Array

from tx_async.layers.lora import LayerLora, Lora
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
    deltas = dict(zip(adapted, lora.deltas(adapters, adapted, x) if adapted else (), strict=True))
    return [keep(_add(_add(product(x, w[name]), w.get(f"{name}_bias")), deltas.get(name))) for name in names]


def _add(x: Array, y: Array | None) -> Array:
    return x if y is None else x + y

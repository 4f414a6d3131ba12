"""Linear layers: a frozen base weight, an optional bias, and LoRA beside them."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from tx_async.layers.cpu import OutFirst, joined
from tx_async.layers.lora import LayerLora, Lora, LoraRows
from tx_async.layers.residuals import keep


def product(x: Array, w: Array | OutFirst, dtype: Any = None) -> Array:
    """x [..., in] W -> [..., out] in `dtype`, by default x's own."""
    if isinstance(w, OutFirst):
        return w.product(x, dtype)
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)


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


def _add(x: Array, y: Array | None) -> Array:
    return x if y is None else x + y

"""Linear layers: frozen base weight, optional bias, LoRA beside them."""

from __future__ import annotations

from typing import Any

from jax import Array

from tx_async.layers.lora import LayerLora, Lora
from tx_async.layers.residuals import keep


def project(lora: Lora, adapters: LayerLora, w: dict[str, Any], names: tuple[str, ...], x: Array) -> list[Array]:
    """x [R, L, in] -> for each name x W + bias + (x A) B · scale, [R, L, out]."""
    adapted = tuple(name for name in names if name in adapters)
    deltas = dict(zip(adapted, lora.deltas(adapters, adapted, x) if adapted else (), strict=True))
    return [keep(_add(_add(x @ w[name], w.get(f"{name}_bias")), deltas.get(name))) for name in names]


def _add(x: Array, y: Array | None) -> Array:
    return x if y is None else x + y

"""LoRA beside a frozen linear layer: y = x W + (x A) B · scale, with the adapter chosen per row.

`weights[stack][name] = (A, B)`: stacked over the layers of a stack, then over adapters, so that a scan over layers slices both.
    A: [layers, adapters, in, rank]    B: [layers, adapters, rank, out]   fp32
Experts have one more axis: A [layers, adapters, experts, in, rank].

Two ways to apply them, one interface (`deltas`):
- `LoraRows` (training): the adapter axis is the row axis, A is already gathered per row; differentiable per row.
- `LoraActive` (sampling): a loop over the adapters that are active in this batch; each row selects its own result, so no row's
  bits depend on another adapter, and a batch without adapters costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array

LoraWeights = dict[str, dict[str, tuple[Array, Array]]]
LayerLora = dict[str, tuple[Array, Array]]
"""One layer's slice: name -> (A [adapters, in, rank], B [adapters, rank, out])."""


@dataclass(frozen=True)
class LoraTarget:
    """One family of adapted matrices: the same projection in every layer of a stack."""

    group: Literal["attn", "mlp", "unembed"]
    in_features: int
    out_features: int
    hf_names: tuple[str, ...]
    """Hugging Face module path of each layer's matrix, for example `model.layers.0.self_attn.q_proj`."""
    num_experts: int = 0


class Lora(Protocol):
    weights: LoraWeights

    def deltas(self, layer: LayerLora, names: tuple[str, ...], x: Array) -> list[Array]:
        """x [R, L, in] -> for each name [R, L, out] in x's dtype. Names that the layer does not have give zeros of no cost."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["weights", "scale"], meta_fields=[])
@dataclass(frozen=True)
class LoraRows:
    weights: LoraWeights
    scale: Array
    """[R] fp32: LORA_ALPHA / rank of the row's adapter."""

    def deltas(self, layer: LayerLora, names: tuple[str, ...], x: Array) -> list[Array]:
        return [self._delta(layer[name], x) for name in names]

    def _delta(self, ab: tuple[Array, Array], x: Array) -> Array:
        a, b = ab
        low = jnp.einsum("rld,rdk->rlk", x, a.astype(x.dtype), preferred_element_type=jnp.float32)
        low = (low * self.scale[:, None, None]).astype(x.dtype)
        return jnp.einsum("rlk,rko->rlo", low, b.astype(x.dtype))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "scale", "active", "num_active", "row_adapter"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LoraActive:
    weights: LoraWeights
    scale: Array
    """[adapters] fp32."""
    active: Array
    """[adapters] int32: the first `num_active` entries are the adapters of this batch."""
    num_active: Array
    row_adapter: Array
    """[R] int32: adapter of each row; -1 = none."""

    def deltas(self, layer: LayerLora, names: tuple[str, ...], x: Array) -> list[Array]:
        def add_one(i: Array, totals: list[Array]) -> list[Array]:
            adapter = self.active[i]
            mine = (self.row_adapter == adapter)[:, None, None]
            return [jnp.where(mine, self._delta(layer[name], adapter, x), total) for name, total in zip(names, totals)]

        zeros = [jnp.zeros((*x.shape[:-1], layer[name][1].shape[-1]), x.dtype) for name in names]
        return jax.lax.fori_loop(0, self.num_active, add_one, zeros)

    def _delta(self, ab: tuple[Array, Array], adapter: Array, x: Array) -> Array:
        a, b = (jax.lax.dynamic_index_in_dim(w, adapter, keepdims=False).astype(x.dtype) for w in ab)
        low = jnp.einsum("rld,dk->rlk", x, a, preferred_element_type=jnp.float32)
        low = (low * self.scale[adapter]).astype(x.dtype)
        return jnp.einsum("rlk,ko->rlo", low, b)


def init_weights(targets: dict[str, dict[str, LoraTarget]], num_adapters: int, rank: int) -> LoraWeights:
    """Zeros for `num_adapters` slots. Values of a new adapter come from `engine/adapter_slots.py`."""

    def pair(target: LoraTarget) -> tuple[Array, Array]:
        experts = (target.num_experts,) if target.num_experts else ()
        lead = (len(target.hf_names) // max(1, target.num_experts), num_adapters, *experts)
        return jnp.zeros((*lead, target.in_features, rank)), jnp.zeros((*lead, rank, target.out_features))

    return jax.tree.map(pair, targets, is_leaf=lambda node: isinstance(node, LoraTarget))


def layer_slice(weights: dict[str, Any]) -> dict[str, Any]:
    """A stack of one layer (the unembedding) without its layer axis."""
    return jax.tree.map(lambda w: w[0], weights)

"""Which experts a token goes to, and with what weight. All of it is in fp32: a rounding error here chooses another
expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.block import LayerWeights
from tx_async.layers.weights import Dim, Stack, Weight


@dataclass(frozen=True)
class SoftmaxRouter:
    """Qwen3: the k largest of a softmax over all experts."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    def weights(self, stack: Stack) -> Iterator[Weight]:
        dims = (Dim(self.hidden_size), Dim(self.num_experts))
        yield stack.matrix("router", "mlp.gate", dims, None, wide=True)

    def __call__(self, w: LayerWeights, x: Array) -> tuple[Array, Array]:
        """x [R, L, D] -> (experts int32 [R, L, k], weights fp32 [R, L, k])."""
        weights, experts = jax.lax.top_k(jax.nn.softmax(_logits(w, x), axis=-1), self.num_experts_per_tok)
        return experts, weights / weights.sum(-1, keepdims=True) if self.norm_topk_prob else weights


@dataclass(frozen=True)
class ChosenSoftmaxRouter:
    """gpt-oss: the k largest logits, which have a bias, and a softmax over those alone. Called like `SoftmaxRouter`."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int

    def weights(self, stack: Stack) -> Iterator[Weight]:
        dims = (Dim(self.hidden_size), Dim(self.num_experts))
        yield stack.matrix("router", "mlp.router", dims, None, wide=True)
        yield stack.vector("router_bias", "mlp.router.bias", dims[1], wide=True)

    def __call__(self, w: LayerWeights, x: Array) -> tuple[Array, Array]:
        logits, experts = jax.lax.top_k(_logits(w, x) + w["router_bias"], self.num_experts_per_tok)
        return experts, jax.nn.softmax(logits, axis=-1)


@dataclass(frozen=True)
class SigmoidRouter:
    """DeepSeek V3 (arXiv 2412.19437): sigmoid scores, with a bias that affects only the choice; experts come from the
    best groups only. Called like `SoftmaxRouter`."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    num_groups: int
    topk_group: int
    scaling_factor: float

    def weights(self, stack: Stack) -> Iterator[Weight]:
        dims = (Dim(self.hidden_size), Dim(self.num_experts))
        yield stack.matrix("router", "mlp.gate", dims, None, wide=True)
        yield stack.vector("router_bias", "mlp.gate.e_score_correction_bias", dims[1], wide=True)

    def __call__(self, w: LayerWeights, x: Array) -> tuple[Array, Array]:
        scores = jax.nn.sigmoid(_logits(w, x))
        experts = jax.lax.top_k(self._candidates(scores + w["router_bias"]), self.num_experts_per_tok)[1]
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return experts, weights * self.scaling_factor

    def _candidates(self, scores: Array) -> Array:
        """-inf for experts outside of the `topk_group` groups with the largest sums of their two best scores."""
        grouped = scores.reshape(*scores.shape[:-1], self.num_groups, -1)
        best = jax.lax.top_k(jax.lax.top_k(grouped, 2)[0].sum(-1), self.topk_group)[1]
        chosen = (best[..., None] == jnp.arange(self.num_groups)).any(-2)
        return jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _logits(w: LayerWeights, x: Array) -> Array:
    return jnp.einsum("rld,de->rle", x.astype(jnp.float32), w["router"], precision="highest")

"""Multi-head latent attention (DeepSeek V2/V3): keys and values of all heads come from one small latent vector per
token.

Training expands the latent to keys and values (few features per score). With a cache, only the latent and the shared
rotary key are stored, and `kv_b` is absorbed: into the query (scores are products with latents), and into the output
(a weighted mean of latents is expanded once). LoRA on `kv_b` is absorbed in the same way, A and B in turn, so both
forms compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.attention import Cache
from tx_async.layers.block import ForwardPass, Keeps, LayerWeights
from tx_async.layers.linear import project, project_back
from tx_async.layers.lora import LayerLora
from tx_async.layers.norm import rms_norm
from tx_async.layers.rope import Rope, rotate, rotate_interleaved
from tx_async.layers.weights import Dim, Stack, Weight

LATENT_NORM_EPS = 1e-6  # transformers builds these norms with its default eps, whatever rms_norm_eps is


@dataclass(frozen=True)
class LatentAttention:
    """See the module, and DeepSeek-V2 (arXiv 2405.04434). A `Mixer`."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int
    """0 = queries have no latent of their own."""
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    rope: Rope
    interleaved: bool
    bias: bool = False

    @property
    def keeps(self) -> Keeps:
        return Keeps({"k": (1, self.kv_lora_rank + self.rope_dim)})

    @property
    def _values(self) -> Dim:
        return Dim(self.num_heads * self.v_dim, "heads", self.num_heads)

    def weights(self, stack: Stack) -> Iterator[Weight]:
        hidden, heads = Dim(self.hidden_size, "embed"), self.num_heads
        queries = Dim(heads * (self.nope_dim + self.rope_dim), "heads", heads)
        if self.q_lora_rank:
            latent = Dim(self.q_lora_rank)
            yield from stack.linear("q_a", "self_attn.q_a_proj", (hidden, latent), "attn", self.bias)
            yield stack.vector("q_a_norm", "self_attn.q_a_layernorm.weight", latent)
            yield from stack.linear("q_b", "self_attn.q_b_proj", (latent, queries), "attn")
        else:
            yield from stack.linear("q", "self_attn.q_proj", (hidden, queries), "attn")
        latent, entry = Dim(self.kv_lora_rank), Dim(self.kv_lora_rank + self.rope_dim)
        expanded = Dim(heads * (self.nope_dim + self.v_dim), "heads", heads)
        yield from stack.linear("kv_a", "self_attn.kv_a_proj_with_mqa", (hidden, entry), "attn", self.bias)
        yield stack.vector("kv_a_norm", "self_attn.kv_a_layernorm.weight", latent)
        yield stack.matrix("kv_b", "self_attn.kv_b_proj", (latent, expanded), "attn")
        yield from stack.linear("o", "self_attn.o_proj", (self._values, hidden), "attn", self.bias)

    def __call__(
        self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array, cache: Cache, layer: Array
    ) -> tuple[Array, Cache]:
        turn = rotate_interleaved if self.interleaved else rotate
        nope, rope = jnp.split(self._queries(forward, w, adapters, x), [self.nope_dim], axis=-1)
        rotary = forward.rotary[self.rope]
        rope = turn(rope, *rotary)
        (entry,) = project(forward.lora, adapters, w, ("kv_a",), x)
        latent, shared = jnp.split(entry, [self.kv_lora_rank], axis=-1)
        latent, shared = rms_norm(latent, w["kv_a_norm"], LATENT_NORM_EPS), turn(shared[:, :, None], *rotary)
        attend = self._absorbed if jax.tree.leaves(cache) else self._expanded
        out, cache = attend(forward, w, adapters, nope, rope, latent, shared, cache, layer)
        out = out.reshape(*x.shape[:2], -1)
        return project_back(forward.mesh, self._values, forward.lora, adapters, w, "o", out), cache

    def _queries(self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array) -> Array:
        if self.q_lora_rank:
            (latent,) = project(forward.lora, adapters, w, ("q_a",), x)
            latent = rms_norm(latent, w["q_a_norm"], LATENT_NORM_EPS)
            (q,) = project(forward.lora, adapters, w, ("q_b",), latent)
        else:
            (q,) = project(forward.lora, adapters, w, ("q",), x)
        return q.reshape(*x.shape[:2], self.num_heads, -1)

    def _expanded(
        self,
        forward: ForwardPass,
        w: LayerWeights,
        adapters: LayerLora,
        nope: Array,
        rope: Array,
        latent: Array,
        shared: Array,
        cache: Cache,
        layer: Array,
    ) -> tuple[Array, Cache]:
        """nope, rope [R, L, H, ·], latent [R, L, kv_rank], shared [R, L, 1, rope] -> ([R, L, H, v], cache)."""
        (kv,) = project(forward.lora, adapters, w, ("kv_b",), latent)
        k, v = jnp.split(kv.reshape(*latent.shape[:2], self.num_heads, -1), [self.nope_dim], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(shared, (*k.shape[:3], self.rope_dim))], axis=-1)
        return forward.attend(cache, layer, jnp.concatenate([nope, rope], axis=-1), k, v, self.scale)

    def _absorbed(
        self,
        forward: ForwardPass,
        w: LayerWeights,
        adapters: LayerLora,
        nope: Array,
        rope: Array,
        latent: Array,
        shared: Array,
        cache: Cache,
        layer: Array,
    ) -> tuple[Array, Cache]:
        """Like `_expanded`, through the latents that the cache holds."""
        for_keys, for_values = self._halves(w["kv_b"])
        q = jnp.einsum("rlhn,dhn->rlhd", nope, for_keys)
        if "kv_b" in adapters:
            q = q + forward.lora.per_row(adapters["kv_b"], self._lora_query, nope)
        q = jnp.concatenate([q, rope], axis=-1)
        k = jnp.concatenate([latent[:, :, None], shared], axis=-1)
        mean, cache = forward.attend(cache, layer, q, k, None, self.scale, self.kv_lora_rank)
        out = jnp.einsum("rlhd,dhv->rlhv", mean, for_values)
        if "kv_b" in adapters:
            out = out + forward.lora.per_row(adapters["kv_b"], self._lora_value, mean)
        return out, cache

    def _lora_query(self, a: Array, b: Array, scale: Array, nope: Array) -> Array:
        """a [kv_rank, rank], b [rank, H · (nope + v)], nope [L, H, nope] -> [L, H, kv_rank]: nope Bᵀ Aᵀ · scale."""
        low = jnp.einsum("lhn,khn->lhk", nope, self._halves(b)[0], preferred_element_type=jnp.float32) * scale
        return jnp.einsum("lhk,dk->lhd", low.astype(nope.dtype), a)

    def _lora_value(self, a: Array, b: Array, scale: Array, mean: Array) -> Array:
        """mean [L, H, kv_rank] -> [L, H, v]: mean A B · scale."""
        low = jnp.einsum("lhd,dk->lhk", mean, a, preferred_element_type=jnp.float32) * scale
        return jnp.einsum("lhk,khv->lhv", low.astype(mean.dtype), self._halves(b)[1])

    def _halves(self, expand: Array) -> tuple[Array, Array]:
        """[d, H · (nope + v)] -> [d, H, nope], [d, H, v]."""
        keys, values = jnp.split(expand.reshape(-1, self.num_heads, self.nope_dim + self.v_dim), [self.nope_dim], -1)
        return keys, values

"""Grouped-query attention (Llama, Qwen, Mistral, Gemma, OLMo …): one layer's switches are its fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from tx_async.layers.attention import Cache
from tx_async.layers.block import ForwardPass, Keeps, LayerWeights
from tx_async.layers.linear import project, project_back, project_out
from tx_async.layers.lora import LayerLora
from tx_async.layers.norm import RmsNorm
from tx_async.layers.rope import Rope, rotate
from tx_async.layers.weights import Dim, Stack, Weight


@dataclass(frozen=True)
class QueryScaling:
    """Queries beyond the original context are scaled up: 1 + beta · log(1 + ⌊position / original⌋) (Llama 4,
    Ministral)."""

    beta: float
    original: int

    def __call__(self, q: Array, positions: Array) -> Array:
        factor = 1 + self.beta * jnp.log1p(jnp.floor(positions / self.original))
        return q * factor[..., None, None].astype(q.dtype)


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Several query heads share one head of keys and values (arXiv 2305.13245). A `Mixer`."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    """None: the layer has no positional encoding, only the causal order."""
    bias: bool = False
    """Whether queries, keys and values have biases."""
    out_bias: bool = False
    head_norm: RmsNorm | None = None
    """The norm of queries and keys."""
    norms_whole: bool = False
    """The norm goes over the whole projection, not over each head (OLMo)."""
    scale: float = 0.0
    """The scale of scores; 0 = head_dim ** -0.5."""
    window: int = 0
    """A token sees itself and the window - 1 before it; 0 = all before it."""
    sinks: bool = False
    """Whether each head has a logit that takes part in the softmax and has no value (gpt-oss)."""
    gated: bool = False
    """The query projection also makes a gate of the output, beside each head's query (Qwen3-Next)."""
    fused: bool = False
    """Queries, keys and values are one module, `qkv_proj` (Phi)."""
    query_scaling: QueryScaling | None = None

    @property
    def keeps(self) -> Keeps:
        of_token = {"k": (self.num_kv_heads, self.head_dim), "v": (self.num_kv_heads, self.head_dim)}
        return Keeps(of_token, window=self.window)

    @property
    def _queries(self) -> Dim:
        return Dim(self.num_heads * self.head_dim, "heads", self.num_heads)

    @property
    def _keys(self) -> Dim:
        return Dim(self.num_kv_heads * self.head_dim, "kv_heads", self.num_kv_heads)

    def weights(self, stack: Stack) -> Iterator[Weight]:
        hidden, queries, keys, heads = Dim(self.hidden_size, "embed"), self._queries, self._keys, self.num_heads
        if self.fused:
            together = Dim(queries.size + 2 * keys.size, "mixed")
            yield from stack.linear("qkv", "self_attn.qkv_proj", (hidden, together), "attn", self.bias)
        else:
            made = Dim(2 * queries.size, "heads", heads) if self.gated else queries
            yield from stack.linear("q", "self_attn.q_proj", (hidden, made), "attn", self.bias)
            yield from stack.linear("k", "self_attn.k_proj", (hidden, keys), "attn", self.bias)
            yield from stack.linear("v", "self_attn.v_proj", (hidden, keys), "attn", self.bias)
        yield from stack.linear("o", "self_attn.o_proj", (queries, hidden), "attn", self.out_bias)
        if self.head_norm:
            head = Dim(self.head_dim)
            yield stack.vector("q_norm", "self_attn.q_norm.weight", queries if self.norms_whole else head)
            yield stack.vector("k_norm", "self_attn.k_norm.weight", keys if self.norms_whole else head)
        if self.sinks:
            yield stack.vector("sinks", "self_attn.sinks", Dim(heads), wide=True)

    def __call__(
        self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array, cache: Cache, layer: Array
    ) -> tuple[Array, Cache]:
        q, k, v, gate = self._projected(forward, w, adapters, x)
        if self.rope:
            q, k = rotate(q, *forward.rotary[self.rope]), rotate(k, *forward.rotary[self.rope])
        if self.query_scaling:
            q = self.query_scaling(q, forward.positions)
        scale = self.scale or self.head_dim**-0.5
        out, cache = forward.attend(cache, layer, q, k, v, scale, window=self.window, sinks=w.get("sinks"))
        out = out.reshape(*x.shape[:2], -1)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return project_back(forward.mesh, self._queries, forward.lora, adapters, w, "o", out), cache

    def _projected(
        self, forward: ForwardPass, w: LayerWeights, adapters: LayerLora, x: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """-> q, k, v [R, L, heads, head_dim], normalised; gate [R, L, heads · head_dim]."""
        if self.fused:
            (together,) = project(forward.lora, adapters, w, ("qkv",), x)
            ends = [self.num_heads * self.head_dim, (self.num_heads + self.num_kv_heads) * self.head_dim]
            q, k, v = jnp.split(together, ends, axis=-1)
        else:
            outputs = (self._queries, self._keys, self._keys)
            q, k, v = project_out(forward.mesh, outputs, forward.lora, adapters, w, ("q", "k", "v"), x)
        gate = None
        if self.gated:
            q, gate = jnp.split(q.reshape(*x.shape[:2], self.num_heads, -1), 2, axis=-1)
            gate = gate.reshape(*x.shape[:2], -1)
        if self.head_norm and self.norms_whole:
            q, k = self.head_norm(q, w["q_norm"]), self.head_norm(k, w["k_norm"])
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.head_norm and not self.norms_whole:
            q, k = self.head_norm(q, w["q_norm"]), self.head_norm(k, w["k_norm"])
        return q, k, v, gate
